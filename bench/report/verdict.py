"""What a run on a GPU comes to: the worst ratios of each task, and which of the project's bars were missed."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.measure import replay
from bench.measure.peers import COMPILED
from bench.report import results
from bench.report.results import Case

# The bars: share of the copy bandwidth from so many weights on, and value and gradient against the best eager peer.
SHARE, FROM_WEIGHTS, TASKS_WITH_SHARE = 0.9, 25_000_000, ("value", "add_grad", "prox")
OF_BEST_EAGER = 1 / 3
TASKS_OF_MODELS = ("backward", *TASKS_WITH_SHARE)
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
    measured = {(c["task"], c["label"], c["method"]): c for c in cases if c["status"] == "measured"}
    rows = []
    for (task, label, method), case in measured.items():
        if method != "fastreg" or case["question"] not in TASKS_OF_MODELS:
            continue
        others = {m: c["ratio"]["p50"] for (t, n, m), c in measured.items() if (t, n) == (task, label) and m != method}
        own = case["ratio"]["p50"]
        row = {"task": task, "label": label, "n_weights": case["n_weights"], "floor": own}
        row["eager"] = _over(own, (v for m, v in others.items() if m not in COMPILED))
        row["compiled"] = _over(own, (v for m, v in others.items() if m in COMPILED))
        rows.append({**row, "share": case.get("share_of_copy")})
    return rows


def _over(own: float, others: Iterable[float]) -> float | None:
    best = min(others, default=None)
    return None if best is None else own / best


def worst(cases: Sequence[Case]) -> list[str]:
    """A row per task: the worst of each ratio, and on which model."""
    rows = []
    compared = compare(cases)
    for task in dict.fromkeys(row["task"] for row in compared):
        cells = [task]
        for field, pick in (("floor", max), ("eager", max), ("compiled", max), ("share", min)):
            there = [row for row in compared if row["task"] == task and row[field] is not None]
            found = pick(there, key=lambda row: row[field], default=None)
            cells.append("-" if found is None else f"{found[field]:.2f} ({found['label']})")
        rows.append(cells)
    return results.table(["worst of", "x floor", "x best eager", "x best compiled", "share of copy"], rows)


def missed(cases: Sequence[Case]) -> list[str]:
    """The bars that were missed, a line each; and what failed."""
    lines, compared = [], compare(cases)
    for row in compared:
        what, large = f"{row['task']}, {row['label']}", row["n_weights"] >= FROM_WEIGHTS
        if large and row["task"] in TASKS_WITH_SHARE and row["share"] is not None and row["share"] < SHARE:
            lines.append(f"- missed: {what}: {row['share']:.0%} of copy bandwidth, not {SHARE:.0%}")
        if row["task"] == "backward" and row["eager"] is not None and row["eager"] > OF_BEST_EAGER:
            lines.append(f"- missed: {what}: {row['eager']:.2f} of the best eager peer's time, not a third")
        if row["task"] == "backward" and row["compiled"] is not None and row["compiled"] > 1:
            lines.append(f"- missed: {what}: {row['compiled']:.2f} of the best compiled peer's time, not at most 1")
    failed = [c for c in cases if c["status"] == "failed" and c["method"].startswith("fastreg")]
    lines += [f"- wrong: {c['task']}, {c['label']}, {c['method']}: {c['reason']}" for c in failed]
    n_models = len({row["label"] for row in compared})
    return lines or [f"No bar was missed by what was measured, on {n_models} models."]
