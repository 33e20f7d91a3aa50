"""Gradients that are cleared between the step and the proximal step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastreg import ElasticNet
from tests.support.helpers import bits
from tests.support.training import L1, L2, loss_of, net

MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "Adam": lambda params: Adam(params, lr=0.05),
    "Adagrad": lambda params: Adagrad(params, lr=0.05),
}


def clear(optimizer: Optimizer, *_: Any) -> None:
    optimizer.zero_grad()


class Clearing(AdamW):
    """Clears the gradients at the end of its step, and calls its parent's step."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.zero_grad()
        return result


def trained(
    make: Callable[[Any], Optimizer],
    prepare: Callable[[Optimizer], object] = lambda _: None,
    *,
    with_closure: bool = False,
    metric: Any = None,
    before: bool = True,
) -> tuple[list[bytes | None], list[bytes | None]]:
    """The weights and the penalties of three steps; `prepare` is called before the attachment or after it."""
    model = net()
    optimizer = make(model.parameters())
    reg = ElasticNet(model, L1, L2)
    if before:
        prepare(optimizer)
    reg.attach(optimizer, mode="prox", metric=metric)
    if not before:
        prepare(optimizer)
    penalties: list[Tensor] = []

    def closure() -> None:
        optimizer.zero_grad()
        loss_of(model, len(penalties)).backward()

    for _ in range(3):
        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        assert reg.last is not None
        penalties.append(reg.last.total)
    return bits(*model.parameters()), bits(*penalties)


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_another_hook_clears_the_gradients(kind: str, before: bool, with_closure: bool) -> None:
    make = MAKERS[kind]
    cleared = trained(
        make, lambda optimizer: optimizer.register_step_post_hook(clear), with_closure=with_closure, before=before
    )
    assert cleared == trained(make, with_closure=with_closure)


def test_a_subclass_or_a_global_hook_clears_the_gradients() -> None:
    assert trained(lambda params: Clearing(params, lr=0.05), metric="lr") == trained(
        lambda params: AdamW(params, lr=0.05), metric="lr"
    )
    handle = register_optimizer_step_post_hook(clear)  # runs after those of the instance
    try:
        assert trained(MAKERS["Adam"]) == trained(MAKERS["Adam"])
    finally:
        handle.remove()


@pytest.mark.parametrize("with_closure", [False, True])
def test_weights_that_had_no_gradient_are_left_alone(with_closure: bool) -> None:
    """Also in a step after one in which they had a gradient, and when a closure clears them first."""
    first, second = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([3.0, 0.5]))
    optimizer = SGD([first, second], lr=0.1)
    optimizer.register_step_post_hook(clear)
    reg = ElasticNet([first, second], l1=1.0)
    reg.attach(optimizer, mode="prox")
    for step, loss in enumerate((lambda: (first + second).sum(), lambda: first.sum())):

        def closure(loss: Callable[[], Tensor] = loss) -> None:
            optimizer.zero_grad()
            loss().backward()

        if with_closure:
            if step == 1:
                second.grad = torch.ones(2)  # which the closure clears
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    torch.testing.assert_close(first, nn.Parameter(torch.tensor([0.6, -2.0])))  # gradient and penalty, twice
    torch.testing.assert_close(second, nn.Parameter(torch.tensor([2.8, 0.3])))  # once
    assert reg.last is not None
    torch.testing.assert_close(reg.last.total.item(), 0.7 + 2.1 + 2.8 + 0.3)


def test_a_hook_that_makes_the_gradients() -> None:
    """A pre-hook that runs after the attachment's: its weights make a step."""

    def compute(optimizer: Optimizer, *_: Any) -> None:
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)

    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = SGD([w], lr=0.1)
    ElasticNet([w], l1=1.0).attach(optimizer, mode="prox")
    optimizer.register_step_pre_hook(compute)
    optimizer.step()
    torch.testing.assert_close(w, nn.Parameter(torch.tensor([0.8, -2.0])))
