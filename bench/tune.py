"""Block sizes, warps and operators against each other: all take turns in one run, each right after the floor.

    python -m bench.tune kernel [--model gpt2] [--dtype float32]    blocks, warps and chunks of the kernels, on a GPU
    python -m bench.tune blocks [--model resnet50]                  blocks of the PyTorch path
    python -m bench.tune operators                                  what the PyTorch path could be made of

Figures are medians of the ratios to the floor, `g.add_(w, alpha=c)` over as many elements. Under TRITON_INTERPRET=1 the
kernels run on the CPU, where the figures mean nothing.
"""

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import internals, results
from bench.harness import Call, Harness, quantiles, ratios
from bench.internals import CPU_BLOCK, Mode, Scale
from bench.models import DTYPES, SHAPES, Shapes, from_shapes, n_weights

Settings = dict[str, int]
Quantiles = dict[str, float]
TASKS = ("value", "gradient", "add_grad", "prox")
CPU_BLOCKS = [{"CPU_BLOCK": 1 << k} for k in range(15, 22)]
N_BLOCKS, ROW = 48, 128
FIRST = "Σw²: float32 dot"  # the quickest way to have read a block


def take_turns(
    harness: Harness, n: int, cases: Mapping[str, tuple[Settings, Call]], warm_up: int = 2
) -> tuple[dict[str, Quantiles], float]:
    """Quantiles of each case's time in multiples of the floor's over `n` elements, and the floor's median time.

    Args:
        cases: what to call, and the settings to call it with, which are the library's own again between the turns.
        warm_up: untimed calls in each turn: they compile, and build what is then known of the weights.
    """
    floor = harness.floor(n)
    times: dict[str, list[float]] = {name: [] for name in cases}
    floors: dict[str, list[float]] = {name: [] for name in cases}
    rounds = harness.rounds or 9
    for number in range(rounds + 1):  # the first of them warms up
        for name, (chosen, call) in cases.items():
            with internals.settings(**chosen):
                for _ in range(warm_up):
                    call()
                floors[name].append(harness.seconds(floor))
                times[name].append(harness.seconds(call))
        print(f"round {number}/{rounds}", flush=True)
    found = {name: quantiles(ratios(times[name][1:], floors[name][1:])) for name in cases}
    return found, statistics.median(itertools.chain(*floors.values()))


def sweeps(shapes: Shapes, dtype: torch.dtype, device: torch.device, impl: str) -> dict[str, Call]:
    """One sweep of each kind. The proximal step's learning rate is 0, so that weights stay what they are."""
    weights = [w.detach() for w in from_shapes(shapes, dtype, device)]
    grads = [torch.zeros_like(w) for w in weights]

    def one(mode: Mode, **keywords: Any) -> Call:
        return lambda: internals.one_sweep(weights, mode, 0.5, 5.0, impl, **keywords)

    return {
        "value": one(Mode.VALUE),
        "gradient": one(Mode.ACCUMULATE, grads=grads, reduce=False),
        "add_grad": one(Mode.ACCUMULATE, grads=grads),
        "prox": one(Mode.PROX, scale=Scale(0.0, 0.0), reduce=False),
    }


def kernel_settings() -> list[Settings]:
    """What is tried; the library's own come first."""
    own = internals.kernel_settings()
    tried = itertools.product((1024, 2048, 4096), (4, 8), (2048, 8192, 32768))
    others = [dict(zip(own, values, strict=True)) for values in tried]
    return [own, *(each for each in others if each != own)]


def tune_settings(
    harness: Harness, shapes: Shapes, settings: Sequence[Settings], impl: str
) -> tuple[dict[str, Quantiles], float]:
    """Every sweep with every setting; prints a row per setting."""
    calls = sweeps(shapes, harness.dtype, harness.device, impl)
    cases = {f"{i} {task}": (each, call) for i, each in enumerate(settings) for task, call in calls.items()}
    found, floor = take_turns(harness, n_weights(shapes), cases)
    head = [*settings[0], *calls]
    rows = [[*each.values(), *(_median(found[f"{i} {task}"]) for task in calls)] for i, each in enumerate(settings)]
    _print_table(floor, [head, ["---:"] * len(head), *rows])
    return found, floor


def operators() -> Iterator[tuple[str, Callable[[Tensor, Tensor], object]]]:
    """Names, and what is done to a block of weights and one of gradients."""
    shape = CPU_BLOCK // ROW, ROW
    rows, out, wide = torch.empty(CPU_BLOCK // ROW), torch.empty(CPU_BLOCK), torch.zeros(CPU_BLOCK, dtype=torch.float64)
    matrix, zero = out.view(shape), torch.zeros(1, ROW)
    rates = {"weight_decay": 0.0, "momentum": 1e-5, "lr": -1.0, "dampening": 1 - 1e-4}
    flags = {"nesterov": False, "maximize": False, "is_first_step": False}
    yield "Σw²: row norms", lambda w, g: torch.linalg.vector_norm(w.view(shape), 2, dim=1, out=rows)
    yield "Σw²: float32 dot", lambda w, g: torch.dot(w, w)
    yield "Σw²: batched dots", lambda w, g: torch.bmm(w.view(-1, 1, ROW), w.view(-1, ROW, 1))
    yield "Σ|w|: row norms of order 1", lambda w, g: torch.linalg.vector_norm(w.view(shape), 1, dim=1, out=rows)
    yield "Σ|w|: distances of order 1", lambda w, g: torch.ops.aten._cdist_forward(w.view(shape), zero, 1.0, 2)
    yield "both: layer norm", lambda w, g: torch.native_layer_norm(w.view(shape), (ROW,), None, None, 1e-30)
    yield "to float64", lambda w, g: wide.copy_(w)
    yield "float64 dot, in scratch", lambda w, g: torch.dot(wide, wide)
    yield "float64 abs, in scratch", lambda w, g: torch.abs(wide, out=wide)
    yield "float64 sum, in scratch", lambda w, g: wide.sum()
    yield "abs", lambda w, g: torch.abs(w, out=out)
    yield "sum of rows", lambda w, g: torch.sum(w.view(shape), 1, out=rows)
    yield "sum of columns", lambda w, g: torch.sum(w.view(ROW, -1), 0, out=rows)
    yield "matrix times ones", lambda w, g: torch.mv(matrix, zero[0])
    yield "sign", lambda w, g: torch.sign(w, out=out)
    yield "product", lambda w, g: torch.mul(w, 1e-4, out=out)
    yield "sum into scratch", lambda w, g: torch.add(out, w, alpha=1e-4, out=out)
    yield "sum into the gradient", lambda w, g: g.add_(w, alpha=1e-4)
    yield "fused SGD", lambda w, g: torch._fused_sgd_([g], [w], [out], **rates, **flags)  # type: ignore[call-overload]


def tune_operators(harness: Harness, n_blocks: int = N_BLOCKS) -> tuple[dict[str, Quantiles], float]:
    """Each operator by itself on blocks that come from memory, and right after another has read them, less its time.

    No sequence of operators is faster than the sum of its parts, which bounds what can be reached without a compiler.
    """
    n = n_blocks * CPU_BLOCK
    weights, grads = torch.randn(n).mul_(0.02).split(CPU_BLOCK), torch.zeros(n).split(CPU_BLOCK)

    def over_blocks(*steps: Callable[[Tensor, Tensor], object]) -> tuple[Settings, Call]:
        return {}, lambda: [step(w, g) for w, g in zip(weights, grads, strict=True) for step in steps]

    named = dict(operators())
    cases = {name: over_blocks(step) for name, step in named.items()}
    cases |= {f"{name}, after": over_blocks(named[FIRST], step) for name, step in named.items()}
    found, floor = take_turns(harness, n, cases, warm_up=0)
    rows = [["operator", "on a block from memory", "on the same block again"], ["---", "---:", "---:"]]
    for name in named:
        again = found[f"{name}, after"]["p50"] - found[FIRST]["p50"]
        rows.append([name, _median(found[name]), f"{again:.2f}"])
    _print_table(floor, rows)
    return found, floor


def _median(found: Quantiles) -> str:
    return f"{found['p50']:.2f}"


def _print_table(floor: float, rows: Sequence[Sequence[object]]) -> None:
    print(f"multiples of the floor ({floor * 1e3:.3f} ms)")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kernel", "blocks", "operators"))
    parser.add_argument("--model", default="resnet50", choices=SHAPES)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args(arguments)
    on_gpu = options.what == "kernel" and os.environ.get("TRITON_INTERPRET") != "1"
    device = torch.device("cuda" if on_gpu else "cpu")
    harness = Harness(device, DTYPES[options.dtype], 0.0, options.rounds)
    record: dict[str, Any] = {"environment": results.environment(device), **vars(options)}
    if options.what == "operators":
        record["ratio"], _ = tune_operators(harness)
    else:
        impl = "triton" if options.what == "kernel" else "torch"
        record["settings"] = kernel_settings() if options.what == "kernel" else CPU_BLOCKS
        record["ratio"], _ = tune_settings(harness, SHAPES[options.model], record["settings"], impl)
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n")


if __name__ == "__main__":
    main()
