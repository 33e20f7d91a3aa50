"""How large the PyTorch path's blocks should be, and where the time of add_grad_ goes.

    python -m bench.tune_blocks [--model resnet50] [--rounds N] [--out FILE]

All block sizes and parts of the work take turns in one run, each right after the floor, `g.add_(w, alpha=c)`; figures
are medians of the ratios to it.
"""

from collections.abc import Callable

import torch

from bench.models import from_shapes, shapes_of
from bench.turns import arguments, take_turns, write
from fastreg import plan, recall
from fastreg.plan import Mode
from fastreg.strengths import Strengths
from fastreg.sweep import sweep

BLOCKS = [1 << k for k in range(15, 22)]


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
    options = arguments(__doc__, model="resnet50")
    device = torch.device("cpu")
    n = sum(torch.Size(shape).numel() for shape in shapes_of(options.model))
    tasks = parts(options.model)
    cases = {f"{block} {task}": call for block in BLOCKS for task, call in tasks.items()}

    def prepare(name: str) -> None:
        block, task = name.split()
        plan.CPU_BLOCK = int(block)
        recall.forget()
        for _ in range(2):  # builds the plan, which is then known
            tasks[task]()

    found, floor = take_turns(device, torch.float32, n, options.rounds, cases, prepare)
    print(f"{options.model}, multiples of the floor ({floor * 1e3:.1f} ms)")
    print("| block | " + " | ".join(tasks) + " |")
    print("| ---: |" + " ---: |" * len(tasks))
    for block in BLOCKS:
        print(f"| {block} | " + " | ".join(f"{found[f'{block} {task}']['p50']:.2f}" for task in tasks) + " |")
    write(options.out, device, found, model=options.model, rounds=options.rounds)


if __name__ == "__main__":
    main()
