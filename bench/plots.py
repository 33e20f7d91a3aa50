"""The figures of docs/benchmarks.md, each as PNG and SVG; every one names what it was measured on."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bench.ledger import Row

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


@plt.rc_context(STYLE)
def speedups(path: Path, title: str, source: str, models: Sequence[str], found: dict[str, list[float]]) -> None:
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
def lines(
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
def ledger(path: Path, model: str, rows: Sequence[Row], source: str) -> None:
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
