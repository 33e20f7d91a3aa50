"""The strongest hand-written rival in eager PyTorch: multi-tensor operators, inside a custom Function."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.strengths import LR

NAME = "foreach"


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, l1: float, l2: float, *weights: Tensor) -> Tensor:
        ctx.weights, ctx.strengths = weights, (l1, l2)
        return value(weights, l1, l2)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        l1, l2 = ctx.strengths
        grads = torch._foreach_sign(ctx.weights)
        torch._foreach_mul_(grads, l1)
        torch._foreach_add_(grads, ctx.weights, alpha=2 * l2)
        torch._foreach_mul_(grads, upstream)
        return None, None, *grads


def value(weights: Sequence[Tensor], l1: float, l2: float) -> Tensor:
    # Norms of half-precision weights are asked for in float32: in their own dtype they overflow.
    l1_norms = torch.stack(torch._foreach_norm(weights, 1, dtype=torch.float32))
    l2_norms = torch.stack(torch._foreach_norm(weights, 2, dtype=torch.float32))
    return l1 * l1_norms.sum() + l2 * l2_norms.square().sum()


def prepare(weights: Sequence[nn.Parameter], l1: float, l2: float) -> dict[str, Callable[[], Tensor | None]]:
    @torch.no_grad()
    def add_grad() -> Tensor:
        grads = [w.grad for w in weights]
        torch._foreach_add_(grads, torch._foreach_sign(weights), alpha=l1)
        torch._foreach_add_(grads, weights, alpha=2 * l2)
        return value(weights, l1, l2)

    @torch.no_grad()
    def prox() -> None:
        # What is left of a weight is what a clamp to the threshold takes away.
        clamped = torch._foreach_clamp_max(weights, LR * l1)
        torch._foreach_clamp_min_(clamped, -LR * l1)
        torch._foreach_sub_(weights, clamped)
        torch._foreach_div_(weights, 1 + 2 * LR * l2)

    return {
        "penalty": lambda: _Penalty.apply(l1, l2, *weights),
        "value": torch.no_grad()(lambda: value(weights, l1, l2)),
        "add_grad": add_grad,
        "prox": prox,
    }
