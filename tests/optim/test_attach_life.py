"""The life of an attachment: what it refuses, closures, removal, and what becomes of state and copies."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import LBFGS, SGD

from fastreg import ElasticNet, elastic_penalty
from tests.support.helpers import bits
from tests.support.training import L1, L2, MAKERS, MODES, attached, by_hand, loss_of, net, plain, train


def test_a_closure_in_prox_mode() -> None:
    model = net()
    expected = by_hand("prox", model, plain(model.parameters()), steps=1)
    other, optimizer, _ = attached("prox")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(other, 0)
        loss.backward()
        return loss

    assert torch.equal(optimizer.step(closure), loss_of(net(), 0))
    assert bits(*other.parameters()) == expected


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_a_closure_gets_the_gradient_when_it_is_done(name: str, by_keyword: bool) -> None:
    model, maker = net(), MAKERS[name]
    expected = by_hand("grad", model, maker(model.parameters()))
    other, optimizer, reg = attached("grad", maker)
    n_calls = 0
    for batch in range(4):

        def closure(batch: int = batch) -> Tensor:
            nonlocal n_calls
            n_calls += 1
            optimizer.zero_grad()
            loss = loss_of(other, batch)
            loss.backward()
            clip_grad_norm_(other.parameters(), 1e6)  # which comes before the penalty, and clips nothing here
            return loss

        expected_loss = loss_of(other, batch).detach()
        penalty = elastic_penalty(other, L1, L2).detach()
        loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
        assert torch.equal(loss, expected_loss), "the closure's own result comes back"
        assert reg.last is not None
        assert torch.equal(reg.last.total, penalty)
    assert n_calls == 4
    assert bits(*other.parameters()) == expected


class OtherName(SGD):
    """Calls its closure by another name."""

    @torch.no_grad()
    def step(self, fn: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            fn()
        return super().step()


def test_a_closure_by_another_name() -> None:
    model, other = net(), net()
    expected = by_hand("grad", model, plain(model.parameters()), steps=1)
    optimizer = OtherName(other.parameters(), lr=0.1)
    ElasticNet(other, L1, L2).attach(optimizer)
    optimizer.step(fn=lambda: loss_of(other, 0).backward())
    assert bits(*other.parameters()) == expected


def test_two_penalties_and_a_closure() -> None:
    model, other = net(), net()
    expected = by_hand("grad", model, plain(model.parameters()), steps=1)
    optimizer = plain(other.parameters())
    first = ElasticNet(other, L1, L2, include=r"^0\.")
    second = ElasticNet(other, L1, L2, exclude=r"^0\.")
    first.attach(optimizer)
    second.attach(optimizer)
    optimizer.step(lambda: loss_of(other, 0).backward())
    assert bits(*other.parameters()) == expected


class Impatient(SGD):
    """Calls its closure as often as it is told."""

    n_calls = 2

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for _ in range(self.n_calls):
            with torch.enable_grad():
                closure()
        return super().step()


@pytest.mark.parametrize(("n_calls", "message"), [(0, "did not call its closure"), (2, "several times a step")])
def test_closures_that_are_not_called_once(n_calls: int, message: str) -> None:
    model = net()
    optimizer = Impatient(model.parameters(), lr=0.1)
    optimizer.n_calls = n_calls
    ElasticNet(model, L1, L2).attach(optimizer)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=rf"Impatient.* {message}"):
        optimizer.step(lambda: loss_of(model, 0).backward())


def test_a_weight_that_left_the_optimizer_is_noticed_before_the_closure() -> None:
    _, optimizer, _ = attached("grad")
    optimizer.param_groups[0]["params"].pop()
    with pytest.raises(ValueError, match="is not in the optimizer"):
        optimizer.step(lambda: pytest.fail("called"))


class Holding(SGD):
    """Makes the step of an optimizer that it holds, and is an optimizer itself, with hooks that run."""

    def __init__(self, held: SGD) -> None:
        super().__init__([nn.Parameter(torch.zeros(1))], lr=0.1)
        self.held = held

    def step(self, closure: Any = None) -> Any:
        return self.held.step(closure)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_inside_of_another_optimizers_step_is_a_step(mode: Any) -> None:
    model, other = net(), net()
    expected = by_hand(mode, model, plain(model.parameters()), steps=1)
    held = SGD(other.parameters(), lr=0.1)
    ElasticNet(other, L1, L2).attach(held, mode)
    loss_of(other, 0).backward()
    Holding(held).step()
    assert bits(*other.parameters()) == expected


def test_an_error_in_a_closure_is_raised_and_the_next_step_is_whole() -> None:
    model, other = net(), net()
    expected = by_hand("grad", model, plain(model.parameters()), steps=1)
    optimizer = plain(other.parameters())
    ElasticNet(other, L1, L2).attach(optimizer)

    def broken() -> None:
        raise KeyError("data")

    with pytest.raises(KeyError, match="data"):
        optimizer.step(broken)
    optimizer.step(lambda: loss_of(other, 0).backward())
    assert bits(*other.parameters()) == expected


class Inherited(SGD):
    """Makes its parent's step, in which PyTorch runs all hooks once more where a parent exists already."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_calls_its_parents_step_is_one_step(mode: Any, with_closure: bool) -> None:
    model, other = net(), net()
    expected = by_hand(mode, model, plain(model.parameters()), steps=1)
    optimizer = Inherited(other.parameters(), lr=0.1)
    n_pre: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: n_pre.append(1))
    ElasticNet(other, L1, L2).attach(optimizer, mode, metric="lr" if mode == "prox" else None)
    if with_closure:
        optimizer.step(lambda: loss_of(other, 0).backward())
    else:
        loss_of(other, 0).backward()
        optimizer.step()
    assert bits(*other.parameters()) == expected
    assert len(n_pre) == 2, "PyTorch calls hooks once only now: _is_inner_step can go"


@pytest.mark.parametrize("mode", MODES)
def test_no_closure_said_aloud(mode: str) -> None:
    _, optimizer, reg = attached(mode)
    optimizer.step(closure=None)
    optimizer.step(None)
    assert reg.last is not None


def test_what_cannot_be_attached() -> None:
    model = net()
    reg = ElasticNet(model, L1, L2)
    partly = SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(TypeError, match="LBFGS evaluates its closure's loss several times a step: add the penalty to"):
        reg.attach(LBFGS(model.parameters()))
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got Sequential"):
        reg.attach(model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='mode must be "grad" or "prox", got \'l1\''):
        reg.attach(partly, mode="l1")  # type: ignore[arg-type]
    for mode in MODES:
        with pytest.raises(ValueError, match=r"parameter '2\.weight' is not in the optimizer"):
            reg.attach(partly, mode)  # type: ignore[arg-type]
    before = bits(*model.parameters())
    partly.step()
    assert bits(*model.parameters()) == before
    optimizer = plain(model.parameters())
    reg.attach(optimizer)
    with pytest.raises(RuntimeError, match=r"attached already; call \.remove\(\) on its handle first"):
        reg.attach(plain(model.parameters()))


@pytest.mark.parametrize("mode", MODES)
def test_removed_means_removed(mode: Any) -> None:
    model, other = net(), net()
    optimizer = plain(model.parameters())
    reg = ElasticNet(model, L1, L2)
    first = reg.attach(optimizer, mode)
    first.remove()
    first.remove()
    assert train(model, optimizer) == train(other, plain(other.parameters()))
    assert reg.last is None

    reg.attach(optimizer, mode)
    first.remove()  # does nothing, least of all to the second
    train(model, optimizer)
    assert reg.last is not None
    with pytest.raises(RuntimeError, match="attached already"):
        reg.attach(optimizer, mode)


def test_attached_to_weights_that_were_replaced_before() -> None:
    model = net()
    reg = ElasticNet(model, L1, L2)
    model.load_state_dict(net().state_dict(), assign=True)
    optimizer = plain(model.parameters())
    reg.attach(optimizer)
    other = net()
    assert train(model, optimizer) == by_hand("grad", other, plain(other.parameters()))


@pytest.mark.parametrize("mode", MODES)
def test_the_optimizers_state_is_its_own(mode: Any) -> None:
    model, optimizer, _ = attached(mode, MAKERS["Adam"])
    assert optimizer.state_dict() == MAKERS["Adam"](net().parameters()).state_dict()
    train(model, optimizer)

    other, resumed, _ = attached(mode, MAKERS["Adam"])
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer) == train(other, resumed)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("mode", MODES)
def test_copies_of_model_and_optimizer_go_without_the_penalty(mode: str, duplicate: Callable[[Any], Any]) -> None:
    model, optimizer, reg = attached(mode, MAKERS["Adam"])
    twin, its_optimizer = duplicate((model, optimizer))
    other = net()
    without = train(twin, its_optimizer)
    assert without == train(other, MAKERS["Adam"](other.parameters()))
    assert reg.last is None
    assert train(model, optimizer) != without


def test_optimizers_that_a_gradient_does_not_suit() -> None:
    model = net()
    reg = ElasticNet(model, L1, L2)
    with pytest.raises(ValueError, match="maximize=True would reward the penalty"):
        reg.attach(torch.optim.SGD(model.parameters(), lr=0.1, maximize=True))
    with pytest.raises(TypeError, match="SparseAdam takes sparse gradients only"):
        reg.attach(torch.optim.SparseAdam(model.parameters(), lr=0.1))
    # The proximal step asks for no gradient.
    reg.attach(torch.optim.SGD(model.parameters(), lr=0.1, maximize=True), "prox").remove()
