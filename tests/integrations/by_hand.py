"""The penalty written out in plain PyTorch, for loops that the callbacks are held to."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def add_gradient_by_hand(params: Iterable[nn.Parameter], l1: float, l2: float) -> None:
    with torch.no_grad():
        for p in params:
            assert p.grad is not None
            p.grad += (l1 * p.sign() + 2 * l2 * p).to(p.grad.dtype)


def shrink_by_hand(params: Iterable[nn.Parameter], optimizer: Optimizer, l1: float, l2: float) -> None:
    """The proximal step after one of SGD without momentum, or of Adam or AdamW, in their metric."""
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    with torch.no_grad():
        for p in params:
            group = group_of[p]
            t: float | Tensor = group["lr"]
            if "betas" not in group:
                p.copy_(p.sign() * (p.abs() - t * l1).clamp(min=0) / (1 + 2 * t * l2))
                continue
            state, (beta1, beta2) = optimizer.state[p], group["betas"]
            step, square = state["step"].item(), state["exp_avg_sq"]
            t = t / ((square / (1 - beta2**step)).sqrt() + group["eps"])
            shrunk = p.sign() * (p.abs() - t * l1).clamp(min=0) / (1 + 2 * t * l2)
            reach = group["lr"] * max(2.0, (1 - beta1) / (1 - beta2) ** 0.5)
            p.copy_(torch.where((square == 0) & (step == 1), p, shrunk.clamp(p - reach, p + reach)))


def terms_by_hand(params: Iterable[nn.Parameter], l1: float, l2: float) -> tuple[float, float, float]:
    """The two terms and the share of exact zeros."""
    flat = torch.cat([p.detach().flatten().double() for p in params])
    return (l1 * flat.abs().sum()).item(), (l2 * flat.square().sum()).item(), (flat == 0).double().mean().item()


def step_by_hand(
    params: list[nn.Parameter], optimizer: Optimizer, mode: str, l1: float, l2: float
) -> tuple[float, float, float]:
    """A step with the penalty of `params`; returns what the callbacks log: the terms at the step, and the share now."""
    terms = terms_by_hand(params, l1, l2)
    if mode == "grad":
        add_gradient_by_hand(params, l1, l2)
    optimizer.step()
    if mode == "prox":
        terms = terms_by_hand(params, l1, l2)
        shrink_by_hand(params, optimizer, l1, l2)
    return (*terms[:2], terms_by_hand(params, l1, l2)[2])
