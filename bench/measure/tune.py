"""Block sizes and warps against each other: all take turns in one run, each right after the floor.

    python -m bench.measure.tune kernel [--model gpt2] [--dtype bfloat16]   blocks and warps of the kernels, on a GPU
    python -m bench.measure.tune blocks [--model resnet50]                  blocks of the PyTorch path

Figures are medians of the ratios to the floor, `g.add_(w, alpha=c)` over as many elements. Under TRITON_INTERPRET=1 the
kernels run on the CPU, where the figures mean nothing.
"""

import argparse
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.measure import internals
from bench.measure.harness import Call, Harness, compared
from bench.measure.internals import Mode, Want
from bench.measure.models import DTYPES, SHAPES, Shapes, from_shapes, n_weights
from bench.report import results

Settings = dict[str, int]
Found = dict[str, dict[str, float]]  # quantiles by case
CPU_BLOCKS = [{"CPU_BLOCK": 1 << k} for k in range(15, 22)]


def take_turns(harness: Harness, n: int, cases: Mapping[str, tuple[Settings, Call]], rounds: int) -> Found:
    """Quantiles of each case's time in multiples of the floor's over `n` elements.

    A case is what to call, and with which settings; between the turns they are the library's own again.
    """

    @contextmanager
    def with_settings(name: str) -> Iterator[None]:
        chosen, call = cases[name]
        with internals.settings(**chosen):
            for _ in range(2):  # compiles, and builds what is then known of the weights
                call()
            yield

    calls = {name: call for name, (_, call) in cases.items()}
    times = harness.take_turns(calls, harness.floor(n), rounds, with_settings, warm_up=1)
    return {name: compared(pairs)["ratio"] for name, pairs in times.items()}


def tune_settings(harness: Harness, shapes: Shapes, settings: Sequence[Settings], impl: str, rounds: int) -> Found:
    """One sweep of each kind with every setting; prints a row per setting."""
    weights = [w.detach() for w in from_shapes(shapes, harness.dtype, harness.device)]
    grads = [torch.zeros_like(w) for w in weights]

    def one(mode: Mode, **keywords: Any) -> Call:
        return lambda: internals.one_sweep(weights, mode, 0.5, 5.0, impl, **keywords)

    sweeps = {
        "value": one(Mode.VALUE),
        "gradient": one(Mode.ACCUMULATE, grads=grads, want=Want.NOTHING),
        "add_grad": one(Mode.ACCUMULATE, grads=grads),
        # With a learning rate of 0, so that weights stay what they are.
        "prox": one(Mode.PROX, scale=(0.0, 0.0), want=Want.NOTHING),
    }
    cases = {f"{i} {task}": (chosen, call) for i, chosen in enumerate(settings) for task, call in sweeps.items()}
    found = take_turns(harness, n_weights(shapes), cases, rounds)
    medians = [[f"{found[f'{i} {task}']['p50']:.2f}" for task in sweeps] for i in range(len(settings))]
    rows = [[*chosen.values(), *each] for chosen, each in zip(settings, medians, strict=True)]
    print("\n".join(results.table([*settings[0], *sweeps], rows)))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("what", choices=("kernel", "blocks"))
    parser.add_argument("--model", default="resnet50", choices=SHAPES)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--settings", type=int, help="only the first so many")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args(arguments)
    settings, impl, device = CPU_BLOCKS, "torch", "cpu"
    if options.what == "kernel":
        own, impl = internals.kernel_settings(), "triton"
        device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
        tried = itertools.product((1024, 2048, 4096), (4, 8), (2048, 8192, 32768))
        # The library's own twice, first and among the others, which shows the noise.
        settings = [own, *(dict(zip(own, values, strict=True)) for values in tried)]
    settings = settings[: options.settings]
    harness = Harness(torch.device(device), DTYPES[options.dtype])
    found = tune_settings(harness, SHAPES[options.model], settings, impl, options.rounds)
    record = {"environment": results.environment(harness.device), **vars(options), "settings": settings, "ratio": found}
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n")


if __name__ == "__main__":
    main()
