"""docs/benchmarks.md, its figures and the README's table, from the results files alone: `python -m bench.report`."""

import argparse
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bench import ledger, results
from bench.models import MODELS
from bench.peers import PEERS
from bench.results import ROOT, Case, describe, slug

QUESTIONS = {
    "backward": "Value and gradient through autograd",
    "add_grad": "Value and gradient straight into .grad",
    "value": "Value alone",
    "prox": "Proximal step",
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
    "loop max-autotune": "#b3d0f0",
    "foreach compiled": "#f2bd66",
    "foreach max-autotune": "#f9dfb4",
}
MARKERS = {"fastreg": "o", "torch.cat": "s", "loop": "^", "foreach": "D"}
GREY: Any = {"color": "#777777", "linestyle": "--", "linewidth": 1}
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "svg.hashsalt": "fastreg",  # the same figure gives the same file
    "legend.frameon": False,
}

HOW_TO_READ = """
Every method is checked against NumPy in float64 before it is timed, and is not timed if it is wrong. Each round of a
method runs right after a round of the floor, `g.add_(w, alpha=c)` over one flat tensor with as many elements: three
passes, what any gradient costs at least. *x floor* is the median over rounds of one divided by the other, and how much
faster fastreg is than another method is the quotient of their two *x floor*. Times are medians. On a GPU they are taken
with CUDA events after L2 was flushed; on a CPU with the wall clock, caches left as the calls leave them. Gradients
are added to a `.grad` that exists. GB/s counts what fastreg's design moves: one pass for the value, four through
autograd, three straight into `.grad`, two for the proximal step; *of copy* divides by what copying a tensor larger than
the caches reached in the same run. *Extra memory* is the most that a call takes besides weights and gradients.
fastreg's scratch memory on a CPU, about 10 MB for each thread, is kept from the first call on and so not in it.
"""


def report(found: Sequence[dict[str, Any]], images: Path) -> str:
    """The document; figures are written to `images`, a folder beside it."""
    lines = ["# Benchmarks", "", "Written by `python -m bench.report` from the files in `bench/results/`.", HOW_TO_READ]
    if not _has_gpu(found):
        lines += ["", "## GPU", "", *_head(["model", "value", "backward", "add_grad", "prox"])]
        lines += [_row([model, *[NOT_MEASURED] * 4]) for model in MODELS]
    for result in found:
        lines += _device(result, images)
    lines += ["", "## Launches and bytes, counted", "", *_counted(images)]
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _device(result: dict[str, Any], images: Path) -> Iterator[str]:
    facts, cases = result["environment"], result["cases"]
    dtype, source = cases[0]["dtype"], describe(facts)
    name = f"{slug(facts['device'])}-{dtype}"
    yield from ("", f"## {facts['device']}, {dtype}", "", f"{source}.")
    for question, title in QUESTIONS.items():
        if chosen := [c for c in cases if c["question"] == question]:
            yield from ("", f"### {title}", "", *against_floor(chosen), "")
            models, by_method = speedups(chosen)
            if question in ("backward", "add_grad") and not all(map(math.isnan, chain(*by_method.values()))):
                file = images / f"{question}-{name}"
                plot_speedups(file, f"{title}, {dtype}, against fastreg", source, models, by_method)
                yield from (_image(file, f"{title}: time in multiples of fastreg's, by model"), "")
            yield from (*details(chosen), "")
    for question, title, x_label in (
        ("size", "Cost against size", "weights, in one tensor"),
        ("count", "Cost against the number of tensors", "tensors of 1,000 weights each"),
    ):
        if chosen := [c for c in cases if c["question"] == question and c["status"] == "measured"]:
            yield from ("", f"### {title}", "", *against_floor(chosen), "")
            yield from _curves(chosen, title, source, x_label, images, name)
    if chosen := [c for c in cases if c["question"] == "tensors"]:
        yield from ("", "### Many small tensors and few large ones", "", *against_floor(chosen))
    if chosen := [c for c in cases if c["question"] == "step"]:
        yield from ("", "### A whole training step", "", "Longer than the same step without a penalty, by:", "")
        yield from steps(chosen)
    if failed := [c for c in cases if c["status"] == "failed"]:
        yield from ("", "### Not timed", "")
        yield from (f"- {c['method']}, {c['question']}, {c['label']}: {c['reason']}" for c in failed)


def _curves(cases: list[Case], title: str, source: str, x_label: str, images: Path, name: str) -> Iterator[str]:
    question, dtype = cases[0]["question"], cases[0]["dtype"]
    for task in ("backward", "add_grad"):
        points: dict[str, list[tuple[float, float]]] = {}
        for c in cases:
            if c["task"] == task:
                points.setdefault(c["method"], []).append((float(c["label"]), c["ratio"]["p50"]))
        if points:
            file = images / f"{question}-{task}-{name}"
            what = f"{title}: {QUESTIONS[task][0].lower()}{QUESTIONS[task][1:]}, {dtype}"
            plot_lines(file, what, source, points, (x_label, "time, in multiples of the floor's"), (1.0, "floor"))
            yield from (_image(file, what), "")
    ours = [c for c in cases if (c["question"], c["task"], c["method"]) == ("size", "add_grad", "fastreg")]
    if ours:
        file, what = images / f"bandwidth-{name}", f"add_grad_ against size, {dtype}"
        speeds = [(c["n_weights"], c["bytes_per_second"] / 1e9) for c in ours]
        copy = sorted(c["copy_bytes_per_second"] / 1e9 for c in cases)[len(cases) // 2]
        level = (copy, "copy of a large tensor")
        plot_lines(file, what, source, {"fastreg": speeds}, (x_label, "GB/s"), level, log_y=False)
        yield from (_image(file, what), "")


def _counted(images: Path) -> Iterator[str]:
    yield "Of the operators that PyTorch dispatches, and of fastreg's plan, by `python -m bench.ledger`; float32. The"
    yield "floor is one pass for the value, three for a gradient, two for the proximal step. Nothing here was timed."
    rows = list(ledger.rows(LEDGER_MODELS))
    yield from ("", *ledger.table(rows, None, {}), "")
    source = f"Counted without a device, float32; PyTorch {torch.__version__}"
    shown = [("backward", method) for method in PEERS] + [("add_grad", "fastreg")]
    for model in LEDGER_MODELS:
        file, chosen = images / f"ledger-{model}", [r for r in rows if r.model == model and (r.task, r.method) in shown]
        plot_ledger(file, model, sorted(chosen, key=lambda r: r.passes)[::-1], source)
        yield from (_image(file, f"Launches and passes of each method on {model}"), "")


def against_floor(cases: Sequence[Case]) -> Iterator[str]:
    """Multiples of the floor: a row per label and task, a column per method."""
    methods, tasks = _unique(c["method"] for c in cases), _unique(c["task"] for c in cases)
    yield from _head(["x floor", *(["task"] if len(tasks) > 1 else []), *methods])
    for task in tasks:
        for label in _unique(c["label"] for c in cases if c["task"] == task):
            found = {c["method"]: c for c in cases if (c["label"], c["task"]) == (label, task)}
            cells = [_figure(found.get(method), "{:.2f}") for method in methods]
            yield _row([_label(label), *([task] if len(tasks) > 1 else []), *cells])


def details(cases: Sequence[Case]) -> Iterator[str]:
    """Everything else about each case."""
    on_gpu = any(c.get("host_seconds") for c in cases)
    launches = "launches" if on_gpu else "operators"
    header = ["model", "method", "p20, ms", "p50, ms", "p80, ms", "GB/s", "of copy", launches, "extra memory, MB"]
    yield from _head([*header, *(["host, µs"] if on_gpu else []), "error", "rounds"])
    for c in cases:
        if c["status"] == "measured":
            cells = [_label(c["label"]), c["method"], *(f"{c['seconds'][q] * 1e3:,.3f}" for q in ("p20", "p50", "p80"))]
            cells += [f"{c['bytes_per_second'] / 1e9:,.1f}", f"{c['share_of_copy']:.0%}"]
            cells += ["-" if c["launches"] is None else f"{c['launches']:,}", f"{c['peak_extra_bytes'] / 1e6:,.2f}"]
            cells += [f"{c['host_seconds'] * 1e6:,.0f}"] if on_gpu else []
            worst = max((float(e) for e in c["errors"].values()), default=math.nan)
            yield _row([*cells, f"{worst:.0e}", str(c["rounds"])])


def speedups(cases: Sequence[Case]) -> tuple[list[str], dict[str, list[float]]]:
    """The labels, and for each other method how many times longer than fastreg it takes; NaN where it was not timed."""
    labels, methods = _unique(c["label"] for c in cases), _unique(c["method"] for c in cases)
    ratios = {(c["label"], c["method"]): c["ratio"]["p50"] for c in cases if c["status"] == "measured"}

    def of(method: str) -> list[float]:
        return [ratios.get((label, method), math.nan) / ratios.get((label, "fastreg"), math.nan) for label in labels]

    return labels, {method: of(method) for method in methods if method != "fastreg"}


def steps(cases: Sequence[Case]) -> Iterator[str]:
    """What each method adds to a training step, in per cent of it."""
    labels = _unique(c["label"] for c in cases)
    yield from _head(["method", *labels])
    for method in _unique(c["method"] for c in cases):
        found = {c["label"]: c for c in cases if c["method"] == method}
        yield _row([method, *(_figure(found.get(label), "{:+.0%}", less=1) for label in labels)])


def readme_block(found: Sequence[dict[str, Any]]) -> str:
    """How much faster fastreg is than each peer through autograd, by model, on each device."""
    lines = [] if _has_gpu(found) else [f"GPU: {NOT_MEASURED}.", ""]
    for result in found:
        if chosen := [c for c in result["cases"] if c["question"] == "backward"]:
            labels, by_method = speedups(chosen)
            lines += _head(["faster than", *by_method])
            for i, label in enumerate(labels):
                times = [values[i] for values in by_method.values()]
                lines.append(_row([label, *("-" if math.isnan(v) else f"{v:.1f}x" for v in times)]))
            lines += ["", f"{chosen[0]['dtype']}; {describe(result['environment'])}.", ""]
    lines.append("More, and how it was measured: [docs/benchmarks.md](docs/benchmarks.md).")
    return "\n".join(lines)


def with_block(text: str, block: str) -> str:
    """`text` with what stands between the two markers replaced, or as it is where there are none."""
    pattern = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{START}\n{block}\n{END}", text)


def _has_gpu(found: Sequence[dict[str, Any]]) -> bool:
    return any(result["environment"]["device_type"] == "cuda" for result in found)


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _label(label: str) -> str:
    return f"{int(label):,}" if label.isdigit() else label


def _figure(case: Case | None, form: str, less: int = 0) -> str:
    if case is None:
        return "-"
    return form.format(case["ratio"]["p50"] - less) if case["status"] == "measured" else "wrong"


def _image(file: Path, text: str) -> str:
    return f"![{text}]({file.parent.name}/{file.name}.svg)"


def _head(names: Sequence[str]) -> list[str]:
    return [_row(names), _row(["---", *["---:"] * (len(names) - 1)])]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


@plt.rc_context(STYLE)
def plot_speedups(path: Path, title: str, source: str, models: Sequence[str], found: dict[str, list[float]]) -> None:
    """Bars: how many times longer than fastreg each method takes, by model; NaN where it was not timed."""
    figure, axes = plt.subplots(figsize=(8.5, 4.2))
    width = 0.8 / len(found)
    for i, (method, values) in enumerate(found.items()):
        places = [j - 0.4 + (i + 0.5) * width for j in range(len(models))]
        # From 1, so that what is faster than fastreg points down.
        heights = [v - 1 for v in values]
        bars = axes.bar(places, heights, width * 0.92, bottom=1, label=method, color=COLOURS[method])
        labels = ["" if math.isnan(v) else f"{v:.2g}" if v < 10 else f"{v:.0f}" for v in values]
        axes.bar_label(bars, labels, fontsize=8, padding=1)
    axes.axhline(1, color=COLOURS["fastreg"], linewidth=1.5)
    axes.annotate("fastreg", (1, 1), xycoords=("axes fraction", "data"), color=COLOURS["fastreg"], va="center")
    _log_scale(axes)
    axes.margins(y=0.12)
    axes.grid(visible=False, axis="x")
    axes.set_xticks(range(len(models)), models)
    axes.set_ylabel("time, in multiples of fastreg's")
    _finish(figure, axes, title, source, path)


@plt.rc_context(STYLE)
def plot_lines(
    path: Path,
    title: str,
    source: str,
    found: dict[str, list[tuple[float, float]]],
    labels: tuple[str, str],
    level: tuple[float, str],
    log_y: bool = True,
) -> None:
    """A line per method over sizes or counts, and a dashed one for the level that is compared with."""
    figure, axes = plt.subplots(figsize=(8.5, 4.2))
    for method, points in found.items():
        xs, ys = zip(*sorted(points), strict=True)
        wide = 2.5 if method == "fastreg" else 1.5
        axes.plot(xs, ys, label=method, color=COLOURS[method], marker=MARKERS[method], linewidth=wide)
    axes.axhline(level[0], label=level[1], **GREY)
    axes.set_xscale("log")
    if log_y:
        _log_scale(axes)
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    _finish(figure, axes, title, source, path)


@plt.rc_context(STYLE)
def plot_ledger(path: Path, model: str, rows: Sequence[ledger.Row], source: str) -> None:
    """Bars: launches, and passes over the weights, of value and gradient together."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.2))
    names = [f"{row.method}, add_grad" if row.task == "add_grad" else row.method for row in rows]
    for axes, values, label in (
        (left, [row.launches for row in rows], "kernel launches"),
        (right, [row.passes for row in rows], "passes over the weights, reads and writes"),
    ):
        bars = axes.barh(names, values, color=[COLOURS[row.method] for row in rows])
        axes.bar_label(bars, [f"{v:,.0f}" if v == int(v) else f"{v:,.1f}" for v in values], padding=3)
        axes.set_xlabel(label)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.15)
    left.set_xscale("log")
    left.set_xlim(left=1)
    right.set_yticklabels([])
    right.axvline(3, **GREY)
    right.annotate("floor", (3, 1), xycoords=("data", "axes fraction"), color="#777777", fontsize=8, ha="center")
    figure.suptitle(f"Value and gradient of {model}, counted", fontsize=11)
    _save(figure, source, path)


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _finish(figure: Figure, axes: Axes, title: str, source: str, path: Path) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(loc="upper left", bbox_to_anchor=(1.08, 1))
    _save(figure, source, path)


def _save(figure: Figure, source: str, path: Path) -> None:
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.text(0.01, 0.01, source, fontsize=7, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=130, bbox_inches="tight")
    figure.savefig(path.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="the folder of results files")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where benchmarks.md and img/ are written")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="a file with the two markers")
    options = parser.parse_args(arguments)
    found = results.read(options.results)
    options.docs.mkdir(parents=True, exist_ok=True)
    (options.docs / "benchmarks.md").write_text(report(found, options.docs / "img"))
    if options.readme.exists():
        options.readme.write_text(with_block(options.readme.read_text(), readme_block(found)))


if __name__ == "__main__":
    main()
