"""Training loops with the penalty written out by hand, which those with an attached penalty are held to."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastreg import ElasticNet, elastic_penalty, elastic_prox_
from tests.support.helpers import bits

L1, L2 = 1e-2, 3e-2
MODES = ["grad", "prox"]

Maker = Callable[..., Optimizer]
MAKERS: dict[str, Maker] = {
    "SGD": partial(SGD, lr=0.1, momentum=0.9),
    "Adam": partial(Adam, lr=0.05),
    "AdamW": partial(AdamW, lr=0.05),
}


def net(device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).to(device)


def plain(params: Any) -> Optimizer:
    return SGD(params, lr=0.1)


def attached(mode: Any, maker: Maker = plain, device: str = "cpu") -> tuple[nn.Sequential, Optimizer, ElasticNet]:
    model = net(device)
    optimizer = maker(model.parameters())
    reg = ElasticNet(model, L1, L2)
    reg.attach(optimizer, mode, metric="lr" if mode == "prox" else None)  # as `shrink` does
    return model, optimizer, reg


def loss_of(model: nn.Module, batch: int) -> Tensor:
    x, y = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(batch)).to(next(model.parameters()))
    return (model(x) - y[:, :1]).square().mean()


def train(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
    scaler: GradScaler | None = None,
    unscale: bool = False,
    steps: int = 4,
    micro_batches: int = 1,
    set_to_none: bool = True,
) -> list[bytes | None]:
    """Trains on made-up data, and returns the bits of the weights."""
    for step in range(steps):
        optimizer.zero_grad(set_to_none=set_to_none)
        for micro in range(micro_batches):
            loss = loss_of(model, step * micro_batches + micro)
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None and unscale:
            scaler.unscale_(optimizer)
        before()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        after()
    return bits(*model.parameters())


def add_autograd(model: nn.Module, l1: float = L1, l2: float = L2) -> None:
    weights = list(model.parameters())
    for w, gradient in zip(weights, torch.autograd.grad(elastic_penalty(weights, l1, l2), weights), strict=True):
        assert w.grad is not None
        w.grad.add_(gradient)


@torch.no_grad()
def add_formula(model: nn.Module) -> None:
    """The float32 formula, in which products are exact and the sum is rounded once."""
    l1, slope = torch.tensor([L1, 2 * L2]).double()
    for w in model.parameters():
        assert w.grad is not None
        wide = w.detach().double()
        w.grad.add_((l1 * wide.sign() + slope * wide).float())


def shrink(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        elastic_prox_(group["params"], L1, L2, lr=float(group["lr"]))


def by_hand(mode: str, model: nn.Module, optimizer: Optimizer, **options: Any) -> list[bytes | None]:
    if mode == "grad":
        return train(model, optimizer, before=partial(add_autograd, model), **options)
    return train(model, optimizer, after=partial(shrink, optimizer), **options)
