"""A few sweeps of every kind over small and awkward weights, for tools that watch each access to memory."""

import argparse
from collections.abc import Sequence

import torch

import fastreg


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args(arguments).device
    weights = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for n, offset in ((1, 0), (5, 1), (2048, 0), (4096 + 3, 0), (4096 + 3, 1), (0, 0)):
            weights.append(torch.full((n + offset,), 0.5, dtype=dtype, device=device)[offset:].requires_grad_())
    weights.append(torch.full((5000,), 1e25, device=device).requires_grad_())  # squares overflow in float32
    reg = fastreg.ElasticNet([{"params": weights[::2]}, {"params": weights[1::2], "l1": 0.1}], 0.25, 0.5)
    for _ in range(2):
        reg().backward()
        reg.add_grad_()
        with torch.no_grad():
            value = reg()
        reg.prox_(0.1)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{float(value):.7g}")


if __name__ == "__main__":
    main()
