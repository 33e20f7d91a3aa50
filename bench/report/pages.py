"""docs/benchmarks.md, its figures and the README's table, from the results files: `python -m bench.report.pages`."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import host, update
from bench.measure.models import MODELS
from bench.report import plots
from bench.report.results import FOLDER, ROOT, Case, describe, file_name, pivot, read, table, unique
from bench.static import ledger

PAGE = Path(__file__).with_name("benchmarks.in.md")
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


def report(found: Sequence[dict[str, Any]], images: Path) -> str:
    """The document; its figures are written to `images`."""
    devices, updates, hosts = [], [], []
    if not _on_gpu(found):
        not_measured = [[model, *[NOT_MEASURED] * 4] for model in MODELS]
        devices += ["## GPU", "", *table(["model", "value", "backward", "add_grad", "prox"], not_measured)]
    for result in found:
        facts, dtype = describe(result["environment"]), result["cases"][0]["dtype"]
        if _is_of_device(result):
            devices += _device(result, images)
        elif result["cases"][0]["question"] == "update":
            updates += [f"{dtype}; {facts}.", "", *update.tables(result["cases"]), ""]
        else:
            hosts += [f"{facts}.", "", *host.tables(result["cases"])]
    rows = ledger.rows(LEDGER_MODELS)
    parts = {
        "devices": devices,
        "updates": updates or [f"{NOT_MEASURED.capitalize()}."],
        "hosts": hosts or [f"{NOT_MEASURED.capitalize()}."],
        "ledger": ledger.table(rows),
        "steps": [line for model in LEDGER_MODELS for line in (*update.counted_table(model), "")],
        "figures": [line for model in LEDGER_MODELS for line in _ledger_figure(model, rows, images)],
    }
    text = PAGE.read_text().format(host=host, update=update, **{name: "\n".join(each) for name, each in parts.items()})
    return re.sub("\n{3,}", "\n\n", text).rstrip() + "\n"


def _is_of_device(result: dict[str, Any]) -> bool:
    return result["cases"][0]["question"] not in ("host", "update")


def _on_gpu(found: Sequence[dict[str, Any]]) -> bool:
    return any(_is_of_device(result) and result["environment"]["device_type"] == "cuda" for result in found)


def _device(result: dict[str, Any], images: Path) -> Iterator[str]:
    facts, dtype, source = result["environment"], result["cases"][0]["dtype"], describe(result["environment"])

    def figure(kind: str, text: str, title: str, draw: Callable[..., None], *data: Any) -> list[str]:
        return _figure(images / f"{kind}-{file_name(facts, dtype)}", text, title, source, draw, *data)

    yield from ("", f"## {facts['device']}, {dtype}", "", f"{source}.")
    cases: dict[str, list[Case]] = {}
    for case in result["cases"]:
        cases.setdefault(case["question"], []).append(case)
    for question, title in QUESTIONS.items():
        if chosen := cases.get(question):
            yield from ("", f"### {title}", "", *pivot(chosen, "x floor"), "")
            if question in ("backward", "add_grad") and (by_method := speedups(chosen)):
                text = f"{title}: time in multiples of fastreg's, by model"
                yield from figure(question, text, f"{title}, {dtype}, against fastreg", plots.speedups, by_method)
            yield from (*details(chosen), "")
    for question, (title, x_label) in CURVES.items():
        if chosen := [c for c in cases.get(question, ()) if c["status"] == "measured"]:
            yield from ("", f"### {title}", "", *pivot(chosen, "x floor"), "")
            for task in ("backward", "add_grad"):
                if found := points(chosen, task, lambda c: c["ratio"]["p50"]):
                    text = f"{title}: {QUESTIONS[task][0].lower()}{QUESTIONS[task][1:]}, {dtype}"
                    data = found, 1, "floor", x_label, "time, in multiples of the floor's"
                    yield from figure(f"{question}-{task}", text, text, plots.curves, *data)
            if question == "size" and (found := points(chosen, "add_grad", lambda c: c["bytes_per_second"] / 1e9)):
                copy = sorted(c["copy_bytes_per_second"] / 1e9 for c in chosen)[len(chosen) // 2]
                text, y_label = f"add_grad_ against size, {dtype}", "GB/s, counting three passes over the weights"
                data = found, copy, "copy of a large tensor", x_label, y_label
                yield from figure("bandwidth", text, text, plots.curves, *data)
    if chosen := cases.get("tensors"):
        yield from ("", "### Many small tensors and few large ones", "", *pivot(chosen, "x floor"))
    if chosen := cases.get("step"):
        yield from ("", "### A whole training step", "", "Longer than the same step without a penalty, by:", "")
        yield from pivot(chosen, "method", "{:+.0%}", less=1, row="method", column="label")
    if failed := [c for c in result["cases"] if c["status"] == "failed"]:
        yield from ("", "### Not timed", "")
        yield from (f"- {c['method']}, {c['question']}, {c['label']}: {c['reason']}" for c in failed)


def _ledger_figure(model: str, rows: Sequence[ledger.Row], images: Path) -> list[str]:
    file, source = images / f"ledger-{model}", f"Counted without a device, float32; PyTorch {torch.__version__}"
    chosen = [r for r in rows if r.model == model and (r.task == "backward" or r[1:3] == ("add_grad", "fastreg"))]
    text, title = f"Launches and passes of each method on {model}", f"Value and gradient of {model}, counted"
    return _figure(file, text, title, source, plots.ledger, chosen, panels=2)


def _figure(file: Path, text: str, *what: Any, panels: int = 1) -> list[str]:
    """Writes a figure; returns the lines that show it."""
    plots.save(file, *what, panels=panels)
    return [f"![{text}]({file.parent.name}/{file.name}.svg)", ""]


def points(cases: Sequence[Case], task: str, y: Callable[[Case], float]) -> dict[str, list[tuple[float, float]]]:
    """By method, what `y` says of its cases, over what they are labeled with."""
    found: dict[str, list[tuple[float, float]]] = {}
    for c in sorted((c for c in cases if c["task"] == task), key=lambda c: int(c["label"])):
        found.setdefault(c["method"], []).append((int(c["label"]), y(c)))
    return found


def details(cases: Sequence[Case]) -> list[str]:
    """Everything else about each case."""
    on_gpu = any(c.get("host_seconds") for c in cases)
    names = ["model", "method", "p20, ms", "p50, ms", "p80, ms", "GB/s", "of copy"]
    names += ["launches", "extra memory, MB", "host, µs"] if on_gpu else ["operators", "extra memory, MB"]
    rows = []
    for c in (c for c in cases if c["status"] == "measured"):
        cells = [c["label"], c["method"], *(f"{c['seconds'][q] * 1e3:,.3f}" for q in ("p20", "p50", "p80"))]
        cells += [f"{c['bytes_per_second'] / 1e9:,.1f}", f"{c['share_of_copy']:.0%}"]
        cells += ["-" if c["launches"] is None else f"{c['launches']:,}", f"{c['peak_extra_bytes'] / 1e6:,.2f}"]
        cells += [f"{c['host_seconds'] * 1e6:,.0f}"] if on_gpu else []
        worst = max((float(e) for e in c["errors"].values()), default=math.nan)
        rows.append([*cells, f"{worst:.0e}", c["rounds"]])
    return table([*names, "error", "rounds"], rows)


def speedups(cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """By method and label, how many times longer than fastreg each other method takes; NaN where one was not timed."""
    ratios = {(c["label"], c["method"]): c["ratio"]["p50"] for c in cases if c["status"] == "measured"}

    def times(method: str, label: str) -> float:
        return float(ratios.get((label, method), math.nan) / ratios.get((label, "fastreg"), math.nan))

    labels, methods = (unique(c[key] for c in cases) for key in ("label", "method"))
    return {method: {label: times(method, label) for label in labels} for method in methods if method != "fastreg"}


def readme_block(found: Sequence[dict[str, Any]]) -> str:
    lines = [] if _on_gpu(found) else [f"GPU: {NOT_MEASURED}.", ""]
    for result in found:
        if chosen := [c for c in result["cases"] if c["question"] == "backward"]:
            by_method, rows = speedups(chosen), []
            for label in unique(c["label"] for c in chosen):
                times = [by_label[label] for by_label in by_method.values()]
                rows.append([label, *("-" if math.isnan(v) else f"{v:.1f}x" for v in times)])
            source = f"{chosen[0]['dtype']}; {describe(result['environment'])}."
            lines += [*table(["faster than", *by_method], rows), "", source, ""]
    return "\n".join([*lines, "More, and how it was measured: [docs/benchmarks.md](docs/benchmarks.md)."])


def main(folder: Path = FOLDER, docs: Path = ROOT / "docs", readme: Path = ROOT / "README.md") -> None:
    """Writes benchmarks.md and img/ in `docs`, and what stands between the two markers in `readme`."""
    found, text = read(folder), readme.read_text()
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "benchmarks.md").write_text(report(found, docs / "img"))
    old = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    readme.write_text(old.sub(lambda _: f"{START}\n{readme_block(found)}\n{END}", text))


if __name__ == "__main__":
    main()
