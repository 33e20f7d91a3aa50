"""What a run on a GPU comes to: the worst ratios of each task, and which of the project's bars were missed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measure import replay
from bench.measure.peers import COMPILED
from bench.report import results
from bench.report.results import Case

# The bars: share of the copy bandwidth from so many weights on, and value and gradient against the best eager peer.
SHARE, FROM_WEIGHTS, OF_BEST_EAGER = 0.9, 25_000_000, 1 / 3
TASKS_OF_MODELS = ("backward", "value", "add_grad", "prox")
# What tells one run's environment from another's.
SAME = ("device", "device_type", "torch", "commit", "dirty")


def summary(folder: Path, environment: dict[str, Any], since: float = 0.0) -> list[str]:
    """Of the results files that this code wrote to `folder` on this device after `since`, in seconds of Unix."""
    lines: list[str] = []
    for path in sorted([*folder.glob("*.json"), *folder.glob("run/*.json")]):
        if path.stat().st_mtime < since:
            continue
        try:
            found = json.loads(path.read_text())
            facts, cases = found["environment"], found["cases"]
            is_own = bool(cases) and all(facts[key] == environment[key] for key in SAME)
        except (ValueError, KeyError, TypeError):
            continue  # of tuning, or somebody else's
        if is_own and cases[0]["question"] == "replay":
            lines += [*replay.table(cases), ""]
        elif is_own and cases[0]["question"] != "host":
            lines += [f"{results.describe(facts)}; {cases[0]['dtype']}", "", *worst(cases), "", *missed(cases), ""]
    return lines or ["This run has measured nothing.", ""]


def compare(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Of each task on each model: fastreg's time by the floor's, by that of the best peers, and its share of a copy."""
    measured = [c for c in cases if c["status"] == "measured"]
    rows = []
    for case in (c for c in measured if c["method"] == "fastreg" and c["question"] in TASKS_OF_MODELS):
        own, key = case["ratio"]["p50"], (case["task"], case["label"])
        row = {"task": case["task"], "label": case["label"], "n_weights": case["n_weights"], "floor": own}
        others = [c for c in measured if (c["task"], c["label"]) == key and c is not case]
        for kind in ("eager", "compiled"):
            of_kind = [c for c in others if (c["method"] in COMPILED) == (kind == "compiled")]
            row[kind] = max((own / c["ratio"]["p50"] for c in of_kind), default=None)
        rows.append({**row, "share": case.get("share_of_copy")})
    return rows


def worst(cases: Sequence[Case]) -> list[str]:
    """A row per task: the worst of each ratio, and on which model."""
    rows, compared = [], compare(cases)
    for task in results.unique(row["task"] for row in compared):
        rows.append([task])
        for field, pick in (("floor", max), ("eager", max), ("compiled", max), ("share", min)):
            there = [row for row in compared if row["task"] == task and row[field] is not None]
            found = pick(there, key=lambda row: row[field], default=None)
            rows[-1].append("-" if found is None else f"{found[field]:.2f} ({found['label']})")
    return results.table(["worst of", "x floor", "x best eager", "x best compiled", "share of copy"], rows)


def missed(cases: Sequence[Case]) -> list[str]:
    """The bars that were missed, a line each; and what failed."""
    lines, compared = [], compare(cases)
    for row in compared:
        what, share = f"- missed: {row['task']}, {row['label']}:", row["share"]
        if row["task"] == "backward":
            for kind, most, words in (("eager", OF_BEST_EAGER, "a third"), ("compiled", 1, "at most 1")):
                if row[kind] is not None and row[kind] > most:
                    lines.append(f"{what} {row[kind]:.2f} of the best {kind} peer's time, not {words}")
        elif row["n_weights"] >= FROM_WEIGHTS and share is not None and share < SHARE:
            lines.append(f"{what} {share:.0%} of copy bandwidth, not {SHARE:.0%}")
    failed = [c for c in cases if c["status"] == "failed" and c["method"].startswith("fastreg")]
    lines += [f"- wrong: {c['task']}, {c['label']}, {c['method']}: {c['reason']}" for c in failed]
    n_models = len({row["label"] for row in compared})
    return lines or [f"No bar was missed by what was measured, on {n_models} models."]
