"""docs/benchmarks.md, its figures and the README's table, from the results files alone: `python -m bench.report`."""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import ledger, plots, results, tables
from bench.environment import ROOT, commit, describe, git_state, slug
from bench.models import MODELS
from bench.peers import PEERS

QUESTIONS = {
    "backward": "Value and gradient through autograd",
    "add_grad": "Value and gradient straight into .grad",
    "value": "Value alone",
    "prox": "Proximal step",
}
LEDGER_MODELS = ("resnet50", "gpt2")
SHOWN = [("backward", method) for method in PEERS] + [("add_grad", "fastreg")]
START, END = "<!-- bench:start -->", "<!-- bench:end -->"

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
    lines = ["# Benchmarks", "", "Written by `python -m bench.report` from the files in `bench/results/`."]
    lines.append(HOW_TO_READ.rstrip())
    if not any(result["environment"]["device_type"] == "cuda" for result in found):
        lines += ["", "## GPU", "", *tables.unmeasured(MODELS)]
    for result in found:
        lines += _device(result, images)
    lines += ["", "## Launches and bytes, counted", "", *_counted(LEDGER_MODELS, images)]
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _device(result: dict[str, Any], images: Path) -> Iterator[str]:
    facts, cases = result["environment"], result["cases"]
    dtype = cases[0]["dtype"]
    name = f"{slug(facts['device'])}-{dtype}"
    yield from ("", f"## {facts['device']}, {dtype}", "", f"{describe(facts)}.")
    for question, title in QUESTIONS.items():
        chosen = [c for c in cases if c["question"] == question]
        if not chosen:
            continue
        yield from ("", f"### {title}", "", *tables.against_floor(chosen), "")
        models, by_method = tables.speedups(chosen)
        if question in ("backward", "add_grad") and any(v == v for values in by_method.values() for v in values):
            file = images / f"{question}-{name}"
            plots.speedups(file, f"{title}, {dtype}, against fastreg", facts, models, by_method)
            yield from (_image(file, images, f"{title}: time in multiples of fastreg's, by model"), "")
        yield from (*tables.details(chosen), "")
    yield from _curves(cases, facts, images, name)
    chosen = [c for c in cases if c["question"] == "tensors"]
    if chosen:
        yield from ("", "### Many small tensors and few large ones", "", *tables.against_floor(chosen))
    chosen = [c for c in cases if c["question"] == "step"]
    if chosen:
        yield from ("", "### A whole training step", "", "Longer than the same step without a penalty, by:", "")
        yield from tables.steps(chosen)
    failed = [c for c in cases if c["status"] == "failed"]
    if failed:
        yield from ("", "### Not timed", "")
        yield from (f"- {c['method']}, {c['question']}, {c['label']}: {c['reason']}" for c in failed)


def _curves(cases: list[results.Case], facts: dict[str, Any], images: Path, name: str) -> Iterator[str]:
    for question, title, x_label in (
        ("size", "Cost against size", "weights, in one tensor"),
        ("count", "Cost against the number of tensors", "tensors of 1,000 weights each"),
    ):
        chosen = [c for c in cases if c["question"] == question and c["status"] == "measured"]
        if not chosen:
            continue
        yield from ("", f"### {title}", "", *tables.against_floor(chosen), "")
        for task in ("backward", "add_grad"):
            points = tables.curve(chosen, task)
            if points:
                file = images / f"{question}-{task}-{name}"
                what = f"{title}: {QUESTIONS[task][0].lower()}{QUESTIONS[task][1:]}, {chosen[0]['dtype']}"
                level = (1.0, "floor")
                plots.lines(file, what, facts, points, x_label, "time, in multiples of the floor's", level)
                yield from (_image(file, images, what), "")
        ours = [c for c in chosen if (c["task"], c["method"]) == ("add_grad", "fastreg")]
        shares = [(c["n_weights"], c["bytes_per_second"] / 1e9) for c in ours]
        if question == "size" and shares:
            file = images / f"bandwidth-{name}"
            copy = sorted(c["copy_bytes_per_second"] / 1e9 for c in chosen)[len(chosen) // 2]
            what = f"add_grad_ against size, {chosen[0]['dtype']}"
            level = (copy, "copy of a large tensor")
            plots.lines(file, what, facts, {"fastreg": shares}, x_label, "GB/s", level, log_y=False)
            yield from (_image(file, images, what), "")


def _counted(models: Sequence[str], images: Path) -> Iterator[str]:
    yield "Of the operators that PyTorch dispatches, and of fastreg's plan, by `python -m bench.ledger`; float32. The"
    yield "floor is one pass for the value, three for a gradient, two for the proximal step. Nothing here was timed."
    rows = list(ledger.rows(models))
    source = f"Counted without a device, float32; PyTorch {torch.__version__}; {commit(git_state())}"
    yield from ("", *ledger.table(rows, None, None, {}), "")
    for model in models:
        shown = [r for r in rows if r.model == model and (r.task, r.method) in SHOWN]
        file = images / f"ledger-{model}"
        plots.ledger(file, model, sorted(shown, key=lambda r: r.passes), source)
        yield from (_image(file, images, f"Launches and passes of each method on {model}"), "")


def _image(file: Path, images: Path, text: str) -> str:
    return f"![{text}]({images.name}/{file.name}.svg)"


def readme_block(found: Sequence[dict[str, Any]]) -> str:
    """How much faster fastreg is than each peer through autograd, by model, on each device."""
    lines = []
    if not any(result["environment"]["device_type"] == "cuda" for result in found):
        lines += ["GPU: not measured yet.", ""]
    for result in found:
        chosen = [c for c in result["cases"] if c["question"] == "backward"]
        if chosen:
            source = f"{chosen[0]['dtype']}; {describe(result['environment'])}."
            lines += [*tables.speedup_table(chosen), "", source, ""]
    lines.append("More, and how it was measured: [docs/benchmarks.md](docs/benchmarks.md).")
    return "\n".join(lines)


def with_block(text: str, block: str) -> str:
    """`text` with what stands between the two markers replaced, or as it is where there are none."""
    pattern = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{START}\n{block}\n{END}", text)


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
