"""How many elements a Triton program should read at a time, with how many warps, in how many chunks: on a GPU.

    python -m bench.tune_kernel [--model gpt2] [--dtype float32] [--rounds N] [--out FILE]

All settings take turns in one run, each right after the floor, `g.add_(w, alpha=c)` over as many elements, with a cold
L2. Figures are medians of the ratios to it, per pass over the weights: 1.00 moves bytes as fast as the floor does.
Under TRITON_INTERPRET=1 it runs on the CPU, where the figures mean nothing.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.harness import PASSES
from bench.models import DTYPES, from_shapes, shapes_of
from bench.turns import arguments, take_turns, write
from fastreg import kernels, plan, recall
from fastreg.kernels import launch
from fastreg.plan import Mode
from fastreg.strengths import Scale, Strengths
from fastreg.sweep import sweep


class Setting(NamedTuple):
    """What is tuned; the first of SETTINGS is what the library has."""

    block: int
    warps: int
    most_chunks: int

    def apply(self) -> None:
        plan.BLOCK = launch.BLOCK = self.block
        launch.NUM_WARPS = self.warps
        plan.MOST_CHUNKS = self.most_chunks
        recall.forget()


SETTINGS = [Setting(plan.BLOCK, launch.NUM_WARPS, plan.MOST_CHUNKS)]
SETTINGS += [
    setting
    for setting in itertools.starmap(Setting, itertools.product((1024, 2048, 4096), (4, 8), (2048, 8192, 32768)))
    if setting != SETTINGS[0]
]


def tasks(model: str, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """One sweep of each kind. The proximal step's learning rate is 0, so that weights stay what they are."""
    weights = [w.detach() for w in from_shapes(shapes_of(model), dtype, device)]
    grads = [torch.zeros_like(w) for w in weights]
    groups, strengths, still = [0] * len(weights), Strengths(0.5, 5.0), Scale(0.0, 0.0)
    return {
        "value": lambda: sweep(weights, groups, Mode.VALUE, strengths, impl="triton"),
        "add_grad": lambda: sweep(weights, groups, Mode.ACCUMULATE, strengths, grads=grads, impl="triton"),
        "prox": lambda: sweep(weights, groups, Mode.PROX, strengths, scale=still, reduce=False, impl="triton"),
    }


def main() -> None:
    options = arguments(__doc__, model="gpt2", dtype="float32")
    device = torch.device("cpu" if kernels.INTERPRETED else "cuda")
    dtype = DTYPES[options.dtype]
    n = sum(torch.Size(shape).numel() for shape in shapes_of(options.model))
    sweeps = tasks(options.model, dtype, device)
    cases = {f"{i} {task}": call for i in range(len(SETTINGS)) for task, call in sweeps.items()}

    def prepare(name: str) -> None:
        number, task = name.split()
        SETTINGS[int(number)].apply()
        for _ in range(2):  # compiles, builds the tables, which are then known
            sweeps[task]()

    found, floor = take_turns(device, dtype, n, options.rounds, cases, prepare)
    SETTINGS[0].apply()
    per_pass = {
        name: {q: ratio * PASSES["add_grad"] / PASSES[name.split()[1]] for q, ratio in quantiles.items()}
        for name, quantiles in found.items()
    }
    print(f"{options.model}, {options.dtype}, per pass, multiples of the floor's ({floor / 3 * 1e3:.3f} ms)")
    print("| block | warps | most chunks | " + " | ".join(sweeps) + " |")
    print("| ---: | ---: | ---: |" + " ---: |" * len(sweeps))
    for i, setting in enumerate(SETTINGS):
        figures = [f"{per_pass[f'{i} {task}']['p50']:.2f}" for task in sweeps]
        print(f"| {' | '.join(map(str, setting))} | {' | '.join(figures)} |")
    settings = [setting._asdict() for setting in SETTINGS]
    write(options.out, device, per_pass, model=options.model, dtype=options.dtype, settings=settings)


if __name__ == "__main__":
    main()
