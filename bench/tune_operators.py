"""What each operator that the PyTorch path could be made of costs by itself, over blocks of one large vector.

    python -m bench.tune_operators [--rounds N] [--out FILE]

On blocks that come from memory, as for the first operator of a block; and once more right after another operator has
read them, whose time is subtracted. In multiples of the floor, `g.add_(w, alpha=c)`, all in turn in one run; medians.
No sequence of operators is faster than the sum of its parts, which bounds what can be reached without a compiler.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.turns import arguments, take_turns, write
from fastreg.plan import CPU_BLOCK

N_BLOCKS = 48
ROW = 128
FIRST = "Σw²: float32 dot"  # the quickest way to have read a block


def operators() -> Iterator[tuple[str, Callable[[Tensor, Tensor], object]]]:
    """Names, and what is done to a block of weights and one of gradients."""
    shape = CPU_BLOCK // ROW, ROW
    rows, out, wide = torch.empty(CPU_BLOCK // ROW), torch.empty(CPU_BLOCK), torch.zeros(CPU_BLOCK, dtype=torch.float64)
    matrix, zero = out.view(shape), torch.zeros(1, ROW)

    def fused(w: Tensor, g: Tensor) -> None:
        rates = {"weight_decay": 0.0, "momentum": 1e-5, "lr": -1.0, "dampening": 1 - 1e-4}
        flags = {"nesterov": False, "maximize": False, "is_first_step": False}
        torch._fused_sgd_([g], [w], [out], **rates, **flags)  # type: ignore[call-overload]

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
    yield "fused SGD", fused


def main() -> None:
    options = arguments(__doc__)
    device = torch.device("cpu")
    n = N_BLOCKS * CPU_BLOCK
    weights, grads = torch.randn(n).mul_(0.02).split(CPU_BLOCK), torch.zeros(n).split(CPU_BLOCK)

    def over_blocks(*steps: Callable[[Tensor, Tensor], object]) -> Callable[[], None]:
        def call() -> None:
            for w, g in zip(weights, grads, strict=True):
                for step in steps:
                    step(w, g)

        return call

    named = dict(operators())
    cases = {name: over_blocks(step) for name, step in named.items()}
    cases |= {f"{name}, after": over_blocks(named[FIRST], step) for name, step in named.items()}
    found, floor = take_turns(device, torch.float32, n, options.rounds, cases)
    print(f"multiples of the floor ({floor * 1e3:.1f} ms)")
    print("| operator | on a block from memory | on the same block again |")
    print("| --- | ---: | ---: |")
    for name in named:
        after = found[f"{name}, after"]["p50"] - found[FIRST]["p50"]
        print(f"| {name} | {found[name]['p50']:.2f} | {after:.2f} |")
    write(options.out, device, found, block=CPU_BLOCK, rounds=options.rounds)


if __name__ == "__main__":
    main()
