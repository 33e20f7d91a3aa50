"""docs/benchmarks.md, its figures and the README's table, from the results files: `python -m bench.report.pages`."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from bench.measure import host, update
from bench.measure.models import MODELS
from bench.report.results import FOLDER, ROOT, Case, describe, file_name, read, table
from bench.static import ledger

QUESTIONS = {
    "backward": "Value and gradient through autograd",
    "add_grad": "Value and gradient straight into .grad",
    "value": "Value alone",
    "prox": "Proximal step",
}
CURVES = {
    "size": ("Cost against size", "weights, in one tensor"),
    "count": ("Cost against the number of tensors", "tensors of 1,000 weights each"),
}
LEDGER_MODELS = ("resnet50", "gpt2")
NOT_MEASURED = "not measured yet"
START, END = "<!-- bench:start -->", "<!-- bench:end -->"

# One colour per method in every figure; compiled forms share the hue of what they compile.
COLOURS = {
    "fastreg": "#c1272d",
    "torch.cat": "#222222",
    "loop": "#1f5fa8",
    "foreach": "#e08a00",
    "loop compiled": "#6fa3dc",
    "foreach compiled": "#f2bd66",
}
MARKERS = {"fastreg": "o", "torch.cat": "s", "loop": "^", "foreach": "D"}
Points = dict[str, list[tuple[float, float]]]  # x and y by method
GREY: Any = {"color": "#777777", "linestyle": "--", "linewidth": 1}
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "svg.hashsalt": "fastreg",  # the same figure gives the same file
    "legend.frameon": False,
}

HOW_TO_READ = """
Every method is checked in float64 before it is timed, and is not timed if it is wrong. Each round of a method runs
right after a round of the floor, `g.add_(w, alpha=c)` over one flat tensor with as many elements: three passes, what
any gradient costs at least. *x floor* is the median over rounds of one divided by the other, and how much faster
fastreg is than another method is the quotient of their two *x floor*. Times are medians. On a GPU they are taken with
CUDA events after L2 was flushed; on a CPU with the wall clock, caches left as the calls leave them. Gradients are
added to a `.grad` that exists. GB/s counts what fastreg's design moves: one pass for the value, four through
autograd, three straight into `.grad`, two for the proximal step; *of copy* divides by what copying a tensor larger
than the caches reached in the same run. *Extra memory* is the most that a call takes besides weights and gradients.
fastreg's scratch memory on a CPU, about 8 MB for each thread, is kept from the first call on and so not in it.
"""

HOST_TIME = f"""
By `python -m bench.measure.host`: how long a call keeps the host before there is anything to compute, with {host.NUMEL}
float32 weights a tensor. All calls take turns in one run, in random order. *adds*: the median time of a forward and
backward pass with the penalty, less that of the same pass without it; the loss gives every weight a new gradient, and
`.grad` is None before. *one-liner*: the same of `elastic_penalty(module)`; *x kept* divides it by that of an
`ElasticNet` kept for the module. *add_grad* and *prox* stand alone, next to one `torch._foreach_add_` of the weights
to the gradients. On cpu the methods compute, except *{host.STUBBED}*: the Triton path up to its launches, which do
nothing. On cuda a time ends when the call returns.
"""

UPDATE = f"""
By `python -m bench.measure.update`: one step of AdamW with a penalty in it or beside it, in multiples of torch.optim's
fused step without a penalty, which runs right before each. *prox* shrinks after the step, all others add a gradient
before it; *gradient* is the least that foreach operators can do, without a value. The last column is how long a step of
{update.HOST_TENSORS} tensors of {update.HOST_NUMEL} weights keeps the host: fastreg's on the Triton path, whose
launches do nothing, and PyTorch's, whose fused operator reads its arguments and does nothing, and which counts no
steps.
"""


def report(found: Sequence[dict[str, Any]], images: Path) -> str:
    """The document; its figures are written to `images`."""
    written = "Written by `python -m bench.report.pages` from the files in `bench/results/`."
    lines = ["# Benchmarks", "", written, HOW_TO_READ]
    if not _has_gpu(found):
        rows = [[model, *[NOT_MEASURED] * 4] for model in MODELS]
        lines += ["", "## GPU", "", *table(["model", "value", "backward", "add_grad", "prox"], rows)]
    for result in found:
        lines += [] if _is(result, "host") or _is(result, "update") else _device(result, images)
    if updates := [result for result in found if _is(result, "update")]:
        lines += ["", "## A step with the penalty inside", UPDATE]
        for result in updates:
            dtype = result["cases"][0]["dtype"]
            lines += ["", f"{dtype}; {describe(result['environment'])}.", "", *update.tables(result["cases"])]
    if hosts := [result for result in found if _is(result, "host")]:
        lines += ["", "## Host time", HOST_TIME]
        for result in hosts:
            lines += ["", f"{describe(result['environment'])}.", "", *host.tables(result["cases"])]
    lines += ["", "## Launches and bytes, counted", "", *_counted(images)]
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _device(result: dict[str, Any], images: Path) -> Iterator[str]:
    facts, dtype, source = result["environment"], result["cases"][0]["dtype"], describe(result["environment"])
    name = file_name(facts, dtype)
    cases: dict[str, list[Case]] = {}
    for case in result["cases"]:
        cases.setdefault(case["question"], []).append(case)
    yield from ("", f"## {facts['device']}, {dtype}", "", f"{source}.")
    for question, title in QUESTIONS.items():
        if chosen := cases.get(question):
            yield from ("", f"### {title}", "", *against_floor(chosen), "")
            if question in ("backward", "add_grad") and (found := speedups(chosen)):
                file, text = images / f"{question}-{name}", f"{title}: time in multiples of fastreg's, by model"
                yield from _figure(file, text, f"{title}, {dtype}, against fastreg", source, plot_speedups, found)
            yield from (*details(chosen), "")
    for question, (title, x_label) in CURVES.items():
        if chosen := [c for c in cases.get(question, ()) if c["status"] == "measured"]:
            yield from ("", f"### {title}", "", *against_floor(chosen), "")
            for task in ("backward", "add_grad"):
                points: Points = {}
                for c in sorted((c for c in chosen if c["task"] == task), key=lambda c: c["n_weights"]):
                    points.setdefault(c["method"], []).append((int(c["label"]), c["ratio"]["p50"]))
                if points:
                    file = images / f"{question}-{task}-{name}"
                    text = f"{title}: {QUESTIONS[task][0].lower()}{QUESTIONS[task][1:]}, {dtype}"
                    names = x_label, "time, in multiples of the floor's"
                    yield from _figure(file, text, text, source, plot_curves, points, (1, "floor"), *names, True)
            ours = [c for c in chosen if (c["task"], c["method"]) == ("add_grad", "fastreg")]
            if question == "size" and ours:
                speeds = {"fastreg": sorted((c["n_weights"], c["bytes_per_second"] / 1e9) for c in ours)}
                copy = sorted(c["copy_bytes_per_second"] / 1e9 for c in chosen)[len(chosen) // 2]
                file, text = images / f"bandwidth-{name}", f"add_grad_ against size, {dtype}"
                data = speeds, (copy, "copy of a large tensor"), x_label, "GB/s", False
                yield from _figure(file, text, text, source, plot_curves, *data)
    if chosen := cases.get("tensors"):
        yield from ("", "### Many small tensors and few large ones", "", *against_floor(chosen))
    if chosen := cases.get("step"):
        yield from ("", "### A whole training step", "", "Longer than the same step without a penalty, by:", "")
        yield from steps(chosen)
    if failed := [c for c in result["cases"] if c["status"] == "failed"]:
        yield from ("", "### Not timed", "")
        yield from (f"- {c['method']}, {c['question']}, {c['label']}: {c['reason']}" for c in failed)


def _counted(images: Path) -> Iterator[str]:
    yield "Of the operators that PyTorch dispatches, and of fastreg's plan, by `python -m bench.static.ledger`;"
    yield "float32. The floor is one pass for the value, three for a gradient, two for the proximal step. Nothing here"
    yield "was timed."
    rows = ledger.rows(LEDGER_MODELS)
    yield from ("", *ledger.table(rows), "")
    yield from ("A step of AdamW, which moves 28 bytes a weight without any penalty, by `bench.measure.update`:", "")
    for model in LEDGER_MODELS:
        yield from (*update.counted_table(model), "")
    source = f"Counted without a device, float32; PyTorch {torch.__version__}"
    for model in LEDGER_MODELS:
        file, text = images / f"ledger-{model}", f"Launches and passes of each method on {model}"
        chosen = [r for r in rows if r.model == model and (r.task == "backward" or r[1:3] == ("add_grad", "fastreg"))]
        yield from _figure(file, text, f"Value and gradient of {model}, counted", source, plot_ledger, chosen, panels=2)


def against_floor(cases: Sequence[Case]) -> list[str]:
    """Multiples of the floor: a row per label and task, a column per method."""
    methods, tasks = _unique(c["method"] for c in cases), _unique(c["task"] for c in cases)
    several = len(tasks) > 1
    rows = []
    for task in tasks:
        for label in _unique(c["label"] for c in cases if c["task"] == task):
            found = {c["method"]: c for c in cases if (c["label"], c["task"]) == (label, task)}
            shown = f"{int(label):,}" if label.isdigit() else label
            rows.append([shown, *[task] * several, *(_ratio(found.get(m), "{:.2f}") for m in methods)])
    return table(["x floor", *["task"] * several, *methods], rows)


def details(cases: Sequence[Case]) -> list[str]:
    """Everything else about each case."""
    on_gpu = any(c.get("host_seconds") for c in cases)
    names = ["model", "method", "p20, ms", "p50, ms", "p80, ms", "GB/s", "of copy"]
    rows = []
    for c in cases:
        if c["status"] == "measured":
            cells = [c["label"], c["method"], *(f"{c['seconds'][q] * 1e3:,.3f}" for q in ("p20", "p50", "p80"))]
            cells += [f"{c['bytes_per_second'] / 1e9:,.1f}", f"{c['share_of_copy']:.0%}"]
            cells += ["-" if c["launches"] is None else f"{c['launches']:,}", f"{c['peak_extra_bytes'] / 1e6:,.2f}"]
            cells += [f"{c['host_seconds'] * 1e6:,.0f}"] if on_gpu else []
            worst = max((float(e) for e in c["errors"].values()), default=math.nan)
            rows.append([*cells, f"{worst:.0e}", c["rounds"]])
    names += ["launches", "extra memory, MB", "host, µs"] if on_gpu else ["operators", "extra memory, MB"]
    return table([*names, "error", "rounds"], rows)


def speedups(cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """By method and label, how many times longer than fastreg each other method takes; NaN where one was not timed."""
    ratios = {(c["label"], c["method"]): c["ratio"]["p50"] for c in cases if c["status"] == "measured"}
    found: dict[str, dict[str, float]] = {}
    for method in _unique(c["method"] for c in cases if c["method"] != "fastreg"):
        for label in _unique(c["label"] for c in cases):
            ratio = ratios.get((label, method), math.nan) / ratios.get((label, "fastreg"), math.nan)
            found.setdefault(method, {})[label] = ratio
    return found


def steps(cases: Sequence[Case]) -> list[str]:
    """What each method adds to a training step, in per cent of it."""
    labels, rows = _unique(c["label"] for c in cases), []
    for method in _unique(c["method"] for c in cases):
        found = {c["label"]: c for c in cases if c["method"] == method}
        rows.append([method, *(_ratio(found.get(label), "{:+.0%}", less=1) for label in labels)])
    return table(["method", *labels], rows)


def readme_block(found: Sequence[dict[str, Any]]) -> str:
    lines = [] if _has_gpu(found) else [f"GPU: {NOT_MEASURED}.", ""]
    for result in found:
        if chosen := [c for c in result["cases"] if c["question"] == "backward"]:
            by_method, rows = speedups(chosen), []
            for label in _unique(c["label"] for c in chosen):
                times = [by_label[label] for by_label in by_method.values()]
                rows.append([label, *("-" if math.isnan(v) else f"{v:.1f}x" for v in times)])
            source = f"{chosen[0]['dtype']}; {describe(result['environment'])}."
            lines += [*table(["faster than", *by_method], rows), "", source, ""]
    lines.append("More, and how it was measured: [docs/benchmarks.md](docs/benchmarks.md).")
    return "\n".join(lines)


def _has_gpu(found: Sequence[dict[str, Any]]) -> bool:
    is_device = [not _is(result, "host") and not _is(result, "update") for result in found]
    return any(r["environment"]["device_type"] == "cuda" and each for r, each in zip(found, is_device, strict=True))


def _is(result: dict[str, Any], question: str) -> bool:
    return bool(result["cases"][0]["question"] == question)


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _ratio(case: Case | None, form: str, less: int = 0) -> str:
    if case is None:
        return "-"
    return form.format(case["ratio"]["p50"] - less) if case["status"] == "measured" else "wrong"


def _figure(
    file: Path, text: str, title: str, source: str, plot: Callable[..., None], *data: Any, panels: int = 1
) -> list[str]:
    """Has `plot` draw `data`, and writes it to `file` as PNG and SVG; returns the lines that show it."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, panels, figsize=(8.5, 4.2 if panels == 1 else 3.2))
        plot(axes, *data)
        if panels == 1:
            axes.set_title(title, loc="left", fontsize=11)
            axes.legend(loc="upper left", bbox_to_anchor=(1.08, 1))
        else:
            figure.suptitle(title, fontsize=11)
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        figure.text(0.01, 0.01, source, fontsize=7, color="#555555")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(f"{file}.png", dpi=130, bbox_inches="tight")
        figure.savefig(f"{file}.svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    return [f"![{text}]({file.parent.name}/{file.name}.svg)", ""]


def plot_speedups(axes: Axes, found: dict[str, dict[str, float]]) -> None:
    """Bars, from 1, so that what is faster than fastreg points down."""
    width = 0.8 / len(found)
    for i, (method, by_label) in enumerate(found.items()):
        places = [j - 0.4 + (i + 0.5) * width for j in range(len(by_label))]
        heights = [v - 1 for v in by_label.values()]
        bars = axes.bar(places, heights, width * 0.92, bottom=1, label=method, color=COLOURS[method])
        texts = ["" if math.isnan(v) else f"{v:.2g}" if v < 10 else f"{v:.0f}" for v in by_label.values()]
        axes.bar_label(bars, texts, fontsize=8, padding=1)
    axes.axhline(1, color=COLOURS["fastreg"], linewidth=1.5)
    axes.annotate("fastreg", (1, 1), xycoords=("axes fraction", "data"), color=COLOURS["fastreg"], va="center")
    _log_scale(axes)
    axes.margins(y=0.12)
    axes.grid(visible=False, axis="x")
    axes.set_xticks(range(len(by_label)), list(by_label))
    axes.set_ylabel("time, in multiples of fastreg's")


def plot_curves(axes: Axes, found: Points, level: tuple[float, str], x_label: str, y_label: str, log_y: bool) -> None:
    """A line per method, and a dashed one for the level that is compared with."""
    for method, points in found.items():
        look: Any = {"color": COLOURS[method], "marker": MARKERS[method]}
        axes.plot(*zip(*points, strict=True), label=method, linewidth=2.5 if method == "fastreg" else 1.5, **look)
    axes.axhline(level[0], label=level[1], **GREY)
    axes.set(xscale="log", xlabel=x_label, ylabel=y_label)
    if log_y:
        _log_scale(axes)
    else:
        axes.set_ylim(bottom=0)


def plot_ledger(both: Sequence[Axes], rows: Sequence[ledger.Row]) -> None:
    """Bars: launches, and passes over the weights, of value and gradient together."""
    rows = sorted(rows, key=lambda row: row.passes)[::-1]
    names = [f"{row.method}, add_grad" if row.task == "add_grad" else row.method for row in rows]
    labels = {"launches": "kernel launches", "passes": "passes over the weights, reads and writes"}
    for axes, (field, label) in zip(both, labels.items(), strict=True):
        values = [getattr(row, field) for row in rows]
        bars = axes.barh(names, values, color=[COLOURS[row.method] for row in rows])
        axes.bar_label(bars, [f"{v:,.0f}" if v == int(v) else f"{v:,.1f}" for v in values], padding=3)
        axes.set_xlabel(label)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.15)
    left, right = both
    left.set(xscale="log", xlim=(1, None))
    right.set_yticklabels([])
    right.axvline(3, **GREY)
    right.annotate("floor", (3, 1), xycoords=("data", "axes fraction"), color="#777777", fontsize=8, ha="center")


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def main(folder: Path = FOLDER, docs: Path = ROOT / "docs", readme: Path = ROOT / "README.md") -> None:
    """Writes benchmarks.md and img/ in `docs`, and what stands between the two markers in `readme`."""
    found, text = read(folder), readme.read_text()
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "benchmarks.md").write_text(report(found, docs / "img"))
    old = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    readme.write_text(old.sub(lambda _: f"{START}\n{readme_block(found)}\n{END}", text))


if __name__ == "__main__":
    main()
