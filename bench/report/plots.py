"""The figures of docs/benchmarks.md."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bench.static.ledger import Row

# One color per method in every figure; compiled forms share the hue of what they compile.
COLORS = {
    "fastreg": "#c1272d",
    "torch.cat": "#222222",
    "loop": "#1f5fa8",
    "foreach": "#e08a00",
    "loop compiled": "#6fa3dc",
    "foreach compiled": "#f2bd66",
}
MARKERS = {"fastreg": "o", "torch.cat": "s", "loop": "^", "foreach": "D"}
GREY: Any = {"color": "#777777", "linestyle": "--", "linewidth": 1}
STYLE = Path(__file__).with_name("plots.mplstyle")


def save(file: Path, title: str, source: str, draw: Callable[..., None], *data: Any, panels: int = 1) -> None:
    """Writes what `draw` makes of `data` to `file` as PNG and SVG; `source` is the small print."""
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(11, 6), layout="constrained")
        figure.suptitle(title)
        figure.supxlabel(source, fontsize=8, color="#555555", x=0.01, ha="left")
        axes = figure.subplots(1, panels)
        draw(axes, *data)
        if panels == 1:
            figure.legend(loc="outside right upper")
        file.parent.mkdir(parents=True, exist_ok=True)
        for kind, metadata in (("png", None), ("svg", {"Date": None})):
            figure.savefig(f"{file}.{kind}", dpi=110, bbox_inches="tight", pad_inches=0.15, metadata=metadata)


def speedups(axes: Axes, by_method: dict[str, dict[str, float]]) -> None:
    """Bars that start at 1, so that what is faster than fastreg points down."""
    width = 0.8 / len(by_method)
    for i, (method, by_label) in enumerate(by_method.items()):
        places = [j - 0.4 + (i + 0.5) * width for j in range(len(by_label))]
        heights = [v - 1 for v in by_label.values()]
        bars = axes.bar(places, heights, width * 0.92, bottom=1, label=method, color=COLORS[method])
        texts = ["" if math.isnan(v) else f"{v:.2g}" if v < 10 else f"{v:.0f}" for v in by_label.values()]
        axes.bar_label(bars, texts, fontsize=10, padding=1)
        axes.set_xticks(range(len(by_label)), list(by_label))
        axes.set_xlim(-0.5, len(by_label) - 0.5)
    axes.axhline(1, color=COLORS["fastreg"], linewidth=1.5, label="fastreg")
    axes.set_ylabel("time, in multiples of fastreg's")
    axes.margins(y=0.12)
    axes.grid(visible=False, axis="x")
    _log_scale(axes)


def curves(
    axes: Axes, points: dict[str, list[tuple[float, float]]], level: float, name: str, x_label: str, y_label: str
) -> None:
    """A line through the points (x, y) of each method, and a dashed one at the level that is compared with."""
    for method, pairs in points.items():
        look: Any = {"color": COLORS[method], "marker": MARKERS[method], "linewidth": 3 if method == "fastreg" else 1.5}
        axes.plot(*zip(*pairs, strict=True), label=method, **look)
    axes.axhline(level, label=name, **GREY)
    axes.set(xscale="log", xlabel=x_label, ylabel=y_label)
    _log_scale(axes)


def ledger(both: Sequence[Axes], rows: Sequence[Row]) -> None:
    """Bars: launches, and passes over the weights, of value and gradient together."""
    rows = sorted(rows, key=lambda row: row.passes)[::-1]
    names = [f"{row.method}, add_grad" if row.task == "add_grad" else row.method for row in rows]
    labels = {"launches": "kernel launches", "passes": "passes over the weights, reads and writes"}
    for axes, (field, label) in zip(both, labels.items(), strict=True):
        values = [getattr(row, field) for row in rows]
        bars = axes.barh(names, values, color=[COLORS[row.method] for row in rows])
        axes.bar_label(bars, [f"{v:,.0f}" if v == int(v) else f"{v:,.1f}" for v in values], padding=3)
        axes.set_xlabel(label)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.15)
    left, right = both
    left.set(xscale="log", xlim=(1, None))
    right.set_yticklabels([])
    right.axvline(3, **GREY)
    right.annotate("floor", (3, 1), xycoords=("data", "axes fraction"), color="#777777", ha="center", va="bottom")


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
