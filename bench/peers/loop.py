"""The Python loop over the parameters."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bench.strengths import LR

NAME = "loop"


def prepare(weights: Sequence[nn.Parameter], l1: float, l2: float) -> dict[str, Callable[[], Tensor | None]]:
    def penalty() -> Tensor:
        return l1 * sum(w.abs().sum() for w in weights) + l2 * sum(w.square().sum() for w in weights)

    @torch.no_grad()
    def add_grad() -> Tensor:
        for w in weights:
            assert w.grad is not None
            w.grad.add_(w.sign(), alpha=l1).add_(w, alpha=2 * l2)
        return penalty()

    @torch.no_grad()
    def prox() -> None:
        for w in weights:
            w.copy_(w.sign() * (w.abs() - LR * l1).clamp_(min=0) / (1 + 2 * LR * l2))

    return {"penalty": penalty, "add_grad": add_grad, "prox": prox}
