"""Every kernel of the Triton path over small and awkward weights, for tools that watch each access to memory."""

import argparse
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

import fastreg

STEPS: list[tuple[Any, dict[str, Any]]] = [
    (fastreg.optim.SGD, {}),
    (fastreg.optim.SGD, {"momentum": 0.5}),
    (fastreg.optim.AdamW, {}),
    (fastreg.optim.Adam, {"amsgrad": True}),
]
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def sweep(device: str, impl: Literal["triton", "torch"] | None = None) -> float:
    """All modes, with a value and without; the weights of a penalty have a float64 value or one of float32."""
    total = 0.0
    for dtypes in (NARROW, (torch.float64, torch.float32)):
        weights: list[Tensor] = []
        for dtype in dtypes:
            for n, offset in ((1, 0), (5, 1), (2048, 0), (4096 + 3, 0), (4096 + 3, 1), (0, 0)):
                weights.append(torch.full((n + offset,), 0.5, dtype=dtype, device=device)[offset:].requires_grad_())
        # A block between others is out of the range of sums in float32.
        large = torch.full((3 * 2048,), 0.5, device=device)
        large[2050] = 1e25
        weights.append(large.requires_grad_())
        groups = [{"params": weights[::2]}, {"params": weights[1::2], "l1": 0.1}]
        reg = fastreg.ElasticNet(groups, 0.25, 0.5, impl=impl)
        for _ in range(2):
            (reg() * 0.5).backward()
            reg.add_grad_()
            reg.prox_(0.1)
            total += float(torch.no_grad()(reg)())
        hook = weights[0].register_hook(lambda grad: grad)  # now autograd has to see gradients, and scales them
        for _ in range(2):
            (reg() * 0.5).backward()
        hook.remove()
        for attached in (torch.optim.SGD(weights, lr=0.1), torch.optim.Adam(weights, lr=0.1)):
            handle = reg.attach(attached, mode="prox")
            attached.step()
            handle.remove()
        for track in (False, True):
            for kind, options in STEPS:
                inside = kind(weights, lr=0.1, l1=0.1, l2=0.5, prox=track, track=track, impl=impl, **options)
                inside.step()
                inside.step()
    return total


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    print(f"{sweep(parser.parse_args(arguments).device):.7g}")


if __name__ == "__main__":
    main()
