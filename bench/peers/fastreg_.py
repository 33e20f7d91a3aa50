"""fastreg, with the plan kept."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import fastreg
from bench.strengths import LR

NAME = "fastreg"


def prepare(weights: Sequence[nn.Parameter], l1: float, l2: float) -> dict[str, Callable[[], Tensor | None]]:
    reg = fastreg.ElasticNet(list(weights), l1, l2)
    return {
        "penalty": reg,
        "value": torch.no_grad()(reg),
        "add_grad": lambda: reg.add_grad_().total,
        "prox": lambda: reg.prox_(LR),
    }
