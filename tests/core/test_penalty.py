"""A penalty that only the reference has: generic code computes it right or refuses it, never the elastic net for it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastreg.core.penalty import BasePenalty
from fastreg.formulas.penalty import ElasticNetPenalty
from fastreg.regularizer import Regularizer
from tests.support.helpers import Path


class Term(NamedTuple):
    total: Tensor
    l1: Tensor


class PositiveL1(BasePenalty):
    """l1 times the sum of the positive weights."""

    NAMES = ("l1",)
    RESULT = Term

    def sums(self, w: Tensor) -> tuple[Tensor]:
        return (torch.relu(w.double()).sum(),)

    def gradient(self, w: Tensor) -> Tensor:
        return (w > 0).to(w.dtype) * self.strengths[0]

    def prox(self, w: Tensor) -> Tensor:
        return torch.where(w > 0, (w - self.strengths[0]).clamp(min=0.0), w)


class Variant(ElasticNetPenalty):
    """Another penalty whose strengths have the names of the elastic net's."""

    def sums(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(w.double()).sum(), w.double().square().sum()


def regularizer(penalty: type[BasePenalty], w: Tensor, path: Path) -> Regularizer[Term]:
    class Toy(Regularizer[Term]):
        _PENALTY = penalty

    return Toy([w], (0.5,) * len(penalty.NAMES), None, None, path[0])


def weight(path: Path) -> Tensor:
    return nn.Parameter(torch.tensor([1.0, -2.0, 0.0, 0.25], device=path[1]))


CALLS: dict[str, Callable[[Regularizer[Term], Tensor], object]] = {
    "value": lambda reg, w: reg(),
    "terms without a gradient": lambda reg, w: torch.no_grad()(reg)(return_terms=True),
    "add_grad_": lambda reg, w: reg.add_grad_(),
    "prox_": lambda reg, w: reg.prox_(0.1),
    "attached gradient": lambda reg, w: stepped(reg, torch.optim.SGD([w], 0.1), "grad"),
    "attached proximal step": lambda reg, w: stepped(reg, torch.optim.SGD([w], 0.1), "prox"),
    "attached elementwise proximal step": lambda reg, w: stepped(reg, torch.optim.Adam([w], 0.1), "prox"),
}


def stepped(reg: Regularizer[Term], optimizer: torch.optim.Optimizer, mode: str) -> None:
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    reg.attach(optimizer, mode)  # type: ignore[arg-type]
    optimizer.step()


@pytest.mark.parametrize("penalty", [PositiveL1, Variant])
@pytest.mark.parametrize("call", CALLS)
def test_no_path_computes_another_penalty(path: Path, penalty: type[BasePenalty], call: str) -> None:
    w = weight(path)
    with pytest.raises(NotImplementedError, match=f"does not have the formulas of {penalty.__name__}"):
        CALLS[call](regularizer(penalty, w, path), w)
    assert w.grad is None or call.startswith("attached")


def test_expressions_compute_it(path: Path) -> None:
    w = weight(path)
    reg = regularizer(PositiveL1, w, ("torch", path[1]))

    def value(x: Tensor) -> Tensor:
        return Term(*regularizer(PositiveL1, x, ("torch", path[1]))(return_terms=True)).total

    assert math.isclose(float(torch.func.vmap(value)(w.detach()[None])), 0.5 * 1.25)
    assert torch.func.grad(value)(w.detach()).tolist() == [0.5, 0.0, 0.0, 0.5]
    assert repr(reg) == "Toy(1 tensors, 4 weights, l1=0.5)"
