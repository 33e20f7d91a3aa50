"""Markdown tables from the cases of a results file."""

import math
from collections.abc import Iterable, Iterator, Sequence

from bench.results import Case

NOT_MEASURED = "not measured yet"
OURS = "fastreg"


def unmeasured(models: Sequence[str]) -> Iterator[str]:
    """What stands where a GPU's figures will."""
    header = ["model", "value", "backward", "add_grad", "prox"]
    yield from _head(header)
    for model in models:
        yield _row([model, *[NOT_MEASURED] * 4])


def against_floor(cases: Sequence[Case]) -> Iterator[str]:
    """Multiples of the floor: a row per label and task, a column per method."""
    methods = _unique(c["method"] for c in cases)
    tasks = _unique(c["task"] for c in cases)
    yield from _head(["x floor", *(["task"] if len(tasks) > 1 else []), *methods])
    for task in tasks:
        for label in _unique(c["label"] for c in cases if c["task"] == task):
            found = {c["method"]: c for c in cases if (c["label"], c["task"]) == (label, task)}
            cells = [_ratio(found.get(method)) for method in methods]
            yield _row([_label(label), *([task] if len(tasks) > 1 else []), *cells])


def details(cases: Sequence[Case]) -> Iterator[str]:
    """Everything else about each case."""
    on_gpu = any(c.get("host_seconds") for c in cases)
    launches = "launches" if on_gpu else "operators"
    header = ["model", "method", "p20, ms", "p50, ms", "p80, ms", "GB/s", "of copy", launches, "extra memory, MB"]
    yield from _head([*header, *(["host, µs"] if on_gpu else []), "error", "rounds"])
    for c in cases:
        if c["status"] != "measured":
            continue
        times = [f"{c['seconds'][q] * 1e3:,.3f}" for q in ("p20", "p50", "p80")]
        speed = [f"{c['bytes_per_second'] / 1e9:,.1f}", f"{c['share_of_copy']:.0%}"]
        launched = "-" if c["launches"] is None else f"{c['launches']:,}"
        cells = [_label(c["label"]), c["method"], *times, *speed, launched, f"{c['peak_extra_bytes'] / 1e6:,.2f}"]
        host = [f"{c['host_seconds'] * 1e6:,.0f}"] if on_gpu else []
        worst = max((float(e) for e in c["errors"].values()), default=math.nan)
        yield _row([*cells, *host, f"{worst:.0e}", str(c["rounds"])])


def speedups(cases: Sequence[Case]) -> tuple[list[str], dict[str, list[float]]]:
    """The labels, and for each other method how many times longer than fastreg it takes; NaN where it was not timed."""
    labels = _unique(c["label"] for c in cases)
    ratios = {(c["label"], c["method"]): c["ratio"]["p50"] for c in cases if c["status"] == "measured"}
    methods = [m for m in _unique(c["method"] for c in cases) if m != OURS]
    return labels, {
        method: [ratios.get((label, method), math.nan) / ratios.get((label, OURS), math.nan) for label in labels]
        for method in methods
    }


def speedup_table(cases: Sequence[Case]) -> Iterator[str]:
    """How many times faster fastreg is than each method, by model."""
    labels, found = speedups(cases)
    yield from _head(["faster than", *found])
    for i, label in enumerate(labels):
        yield _row([label, *(f"{values[i]:.1f}x" if values[i] == values[i] else "-" for values in found.values())])


def steps(cases: Sequence[Case]) -> Iterator[str]:
    """What each method adds to a training step, in per cent of it."""
    labels = _unique(c["label"] for c in cases)
    yield from _head(["method", *labels])
    for method in _unique(c["method"] for c in cases):
        found = {c["label"]: c for c in cases if c["method"] == method}
        yield _row([method, *(_overhead(found.get(label)) for label in labels)])


def curve(cases: Sequence[Case], task: str) -> dict[str, list[tuple[float, float]]]:
    """(size or count, multiple of the floor) for each method."""
    chosen = [c for c in cases if c["task"] == task and c["status"] == "measured"]
    return {
        method: [(float(c["label"]), c["ratio"]["p50"]) for c in chosen if c["method"] == method]
        for method in _unique(c["method"] for c in chosen)
    }


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _label(label: str) -> str:
    return f"{int(label):,}" if label.isdigit() else label


def _ratio(case: Case | None) -> str:
    if case is None:
        return "-"
    return f"{case['ratio']['p50']:.2f}" if case["status"] == "measured" else "wrong"


def _overhead(case: Case | None) -> str:
    if case is None:
        return "-"
    return f"{case['ratio']['p50'] - 1:+.0%}" if case["status"] == "measured" else "wrong"


def _head(names: Sequence[str]) -> Iterator[str]:
    yield _row(names)
    yield _row(["---", *["---:"] * (len(names) - 1)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
