"""The bound for L2 alone: a fused optimizer that decays the weights while it touches them anyway.

Not a penalty that could be logged, so it is no peer of the other questions than that of the whole step.
"""

from collections.abc import Iterable

import torch
from torch import nn

NAME = "weight_decay (L2 only)"


def optimizer(weights: Iterable[nn.Parameter], lr: float, l2: float) -> torch.optim.Optimizer:
    """SGD whose weight_decay is the gradient of l2 * Σw²."""
    return torch.optim.SGD(weights, lr=lr, weight_decay=2 * l2, fused=True)
