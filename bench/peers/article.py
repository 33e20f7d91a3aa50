"""The article's form: all parameters in one vector, and two sums over it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

NAME = "torch.cat"


def prepare(weights: Sequence[nn.Parameter], l1: float, l2: float) -> dict[str, Callable[[], Tensor | None]]:
    def penalty() -> Tensor:
        everything = torch.cat([w.view(-1) for w in weights])
        return l1 * everything.abs().sum() + l2 * everything.square().sum()

    return {"penalty": penalty}
