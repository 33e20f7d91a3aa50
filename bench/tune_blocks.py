"""How large the PyTorch path's blocks should be, and where the time of add_grad_ goes.

    python -m bench.tune_blocks [--model resnet50] [--out FILE]

All block sizes and parts of the work take turns in one run, each right after the floor, `g.add_(w, alpha=c)`; figures
are medians of the ratios to it.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch

from bench import environment
from bench.clock import clock_for, seconds
from bench.harness import Harness, quantiles, ratios
from bench.models import from_shapes, shapes_of
from fastreg import plan, recall
from fastreg.plan import Mode
from fastreg.strengths import Strengths
from fastreg.sweep import sweep

BLOCKS = [1 << k for k in range(15, 22)]
ROUNDS = 9


def parts(model: str) -> dict[str, Callable[[], object]]:
    """The sums alone, the gradient alone, and both, as add_grad_ does them."""
    weights = from_shapes(shapes_of(model), torch.float32, "cpu")
    grads = [torch.zeros_like(w) for w in weights]
    groups, strengths = [0] * len(weights), Strengths(0.5, 5.0)
    return {
        "value": lambda: sweep(weights, groups, Mode.VALUE, strengths, impl="torch"),
        "gradient": lambda: sweep(weights, groups, Mode.ACCUMULATE, strengths, grads=grads, reduce=False, impl="torch"),
        "add_grad": lambda: sweep(weights, groups, Mode.ACCUMULATE, strengths, grads=grads, impl="torch"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    device = torch.device("cpu")
    clock = clock_for(device)
    floor = Harness(device, torch.float32, 0.0, ROUNDS).floor(
        sum(torch.Size(shape).numel() for shape in shapes_of(options.model))
    )
    tasks = parts(options.model)
    times: dict[tuple[int, str], list[float]] = {(block, task): [] for block in BLOCKS for task in tasks}
    floors: dict[tuple[int, str], list[float]] = {case: [] for case in times}
    for round_number in range(ROUNDS + 1):
        for block, task in times:
            plan.CPU_BLOCK = block
            recall.forget()
            tasks[task]()  # builds the plan, outside the timing
            floors[block, task].append(seconds(clock, floor))
            times[block, task].append(seconds(clock, tasks[task]))
        print(f"round {round_number}/{ROUNDS}", flush=True)

    found = {
        f"{block} {task}": quantiles(ratios(times[block, task][1:], floors[block, task][1:]))._asdict()
        for block, task in times
    }
    print(f"{options.model}, multiples of the floor ({statistics.median(chain(*floors.values())) * 1e3:.1f} ms)")
    print("| block | " + " | ".join(tasks) + " |")
    print("| ---: |" + " ---: |" * len(tasks))
    for block in BLOCKS:
        print(f"| {block} | " + " | ".join(f"{found[f'{block} {task}']['p50']:.2f}" for task in tasks) + " |")
    if options.out:
        record = {"environment": environment.facts(device), "model": options.model, "rounds": ROUNDS, "ratio": found}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
