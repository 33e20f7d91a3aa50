"""What people get wrong when they attach a penalty: wrappers, learning rates, and the penalty twice."""

import copy
import gc
import sys
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from fastreg import ElasticNet
from fastreg.optim import AdamW
from tests.support.helpers import bits
from tests.support.training import L1, L2, MODES, by_hand, loss_of, net, plain, train


class Wrapper(Optimizer):
    """Like Accelerate's AcceleratedOptimizer: a subclass that holds an optimizer and skips `Optimizer.__init__`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)


class Proxy(SGD):
    """Like Lightning's LightningOptimizer: passes for the optimizer's own class, and asks it for all attributes."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def optimizer(self) -> Optimizer:
        return self._optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)


class NoLr(Optimizer):
    """Steps by a fixed size."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=0.1)


@pytest.mark.parametrize("wrappers", [[Wrapper], [Wrapper, Wrapper], [Proxy]])
@pytest.mark.parametrize("mode", MODES)
def test_wrapped_optimizer_steps_with_the_penalty(mode: Any, wrappers: list[Any]) -> None:
    model, other = net(), net()
    inner = optimizer = plain(model.parameters())
    for wrapper in wrappers:
        optimizer = wrapper(optimizer)
    reg = ElasticNet(model, L1, L2)
    handle = reg.attach(optimizer, mode)
    assert handle._optimizer() is inner, "the one whose step and state count"
    assert train(model, optimizer) == by_hand(mode, other, plain(other.parameters()))
    handle.remove()
    without = train(model, optimizer, steps=1)
    assert without == train(other, plain(other.parameters()), steps=1)


def test_gradient_needs_no_learning_rate() -> None:
    model, other = net(), net()
    optimizer = NoLr(model.parameters())
    ElasticNet(model, L1, L2).attach(optimizer)
    assert train(model, optimizer) == by_hand("grad", other, plain(other.parameters()))


def test_prox_without_a_learning_rate_is_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"param group 0 of the optimizer has no lr"):
        ElasticNet(model, L1, L2).attach(NoLr(model.parameters()), "prox", metric="lr")


@pytest.mark.parametrize("lr", [-0.1, float("nan"), torch.tensor(-0.1)], ids=str)
def test_prox_with_a_wrong_learning_rate_changes_nothing(lr: float | Tensor) -> None:
    model = net()
    optimizer = SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1)
    ElasticNet(model, L1, L2).attach(optimizer, "prox")
    loss_of(model, 0).backward()
    before = bits(*model.parameters())
    optimizer.param_groups[1]["lr"] = lr
    with pytest.raises(ValueError, match="lr of param group 1 must be finite and at least 0"):
        optimizer.step()
    assert bits(*model.parameters()) == before
    optimizer.param_groups[1].pop("lr")
    with pytest.raises(ValueError, match="param group 1 of the optimizer has no lr"):
        optimizer.step()
    assert bits(*model.parameters()) == before


def test_learning_rate_as_a_tensor_of_one_element() -> None:
    model, other = net(), net()
    optimizer = SGD(model.parameters(), lr=torch.tensor([0.1]), foreach=False)
    ElasticNet(model, L1, L2).attach(optimizer, "prox")
    by_number = SGD(other.parameters(), lr=torch.tensor(0.1), foreach=False)
    assert train(model, optimizer) == by_hand("prox", other, by_number)


def test_deleted_optimizer_leaves_the_penalty_free() -> None:
    model = net()
    reg = ElasticNet(model, L1, L2)
    optimizer = plain(model.parameters())
    handle = reg.attach(optimizer)
    del optimizer
    gc.collect()
    again = reg.attach(plain(model.parameters()))
    handle.remove()  # of the first, which is gone; the second stays
    assert reg._attachment is again


def test_parameter_that_leaves_the_optimizer_is_named() -> None:
    model = net()
    optimizer = plain(model.parameters())
    for mode in MODES:
        handle = ElasticNet(model, L1, L2).attach(optimizer, mode)  # type: ignore[arg-type]
        removed = optimizer.param_groups[0]["params"].pop()
        with pytest.raises(ValueError, match=r"parameter '2\.bias' is not in the optimizer"):
            optimizer.step()
        optimizer.param_groups[0]["params"].append(removed)
        handle.remove()


def test_two_attached_penalties_of_one_weight_warn() -> None:
    model = net()
    optimizer = plain(model.parameters())
    first = ElasticNet(model, L1, L2)
    handle = first.attach(optimizer)
    with pytest.warns(UserWarning, match=r"another penalty of parameter '0\.weight' is attached") as seen:
        second = ElasticNet(model, L1, L2).attach(optimizer, "prox")
    assert seen[0].filename == __file__
    second.remove()
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # One after the other, or of different weights: nothing is counted twice.
        ElasticNet(model[0], L1, L2).attach(optimizer)
        ElasticNet(model[2], L1, L2).attach(optimizer)


@pytest.mark.parametrize("mode", MODES)
def test_attached_penalty_in_a_loss_warns_when_it_goes_backward(mode: Any) -> None:
    model = net()
    reg = ElasticNet(model, L1, L2)
    optimizer = plain(model.parameters())
    handle = reg.attach(optimizer, mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = reg()  # to look at it is no mistake
        with torch.no_grad():
            reg(return_terms=True)
    with pytest.warns(UserWarning, match="attached to an optimizer.*it counts twice"):
        (loss_of(model, 0) + value).backward()
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reg().backward()


def test_copies_forget_the_attachment() -> None:
    model = net()
    model.reg = ElasticNet(model[0], L1, L2)
    optimizer = plain(model.parameters())
    model.reg.attach(optimizer)
    twin = copy.deepcopy(model)
    assert twin.reg._attachment is None
    assert twin.reg.last is None
    twin.reg.attach(plain(twin.parameters()))
    assert model.reg._attachment is not None


def test_prox_of_groups_whose_learning_rates_become_equal() -> None:
    """One learning rate for two groups, and two again: the same arithmetic as by hand, in one form of strengths."""
    model, other = net(), net()
    rates = [(0.1, 0.2), (0.1, 0.1), (0.3, 0.1)]

    def two_groups(model: nn.Sequential) -> Optimizer:
        return SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1)

    optimizers = two_groups(model), two_groups(other)
    ElasticNet(model, L1, L2).attach(optimizers[0], "prox")
    for pair in rates:
        for optimizer in optimizers:
            for group, lr in zip(optimizer.param_groups, pair, strict=True):
                group["lr"] = lr
        assert train(model, optimizers[0], steps=1) == by_hand("prox", other, optimizers[1], steps=1)


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_a_parameter_replaced_between_steps_is_named(mode: Any) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ElasticNet(model, 0.1, 0.1).attach(optimizer, mode)
    optimizer.step()
    model.bias = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="'bias' is not in the optimizer"):
        optimizer.step()


def test_an_optimizer_with_strengths_of_its_own_warns() -> None:
    model = net()
    for strengths in ({"l1": 0.1}, {"l2": torch.tensor(0.0)}):
        with pytest.warns(
            UserWarning, match=r"strengths of its own, l1 or l2 of fastreg\.optim\.AdamW: both penalties"
        ):
            ElasticNet(model, L1).attach(AdamW(model.parameters(), lr=0.1, **strengths))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ElasticNet(model, L1).attach(AdamW(model.parameters(), lr=0.1))


class ZeroOptimizer:
    """Like DeepSpeed's, which are no torch.optim.Optimizer and hold flat copies of the weights."""

    __module__ = "deepspeed.runtime.zero.stage_1_and_2"

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups


@pytest.mark.parametrize("mode", MODES)
def test_an_optimizer_of_deepspeed_names_the_way_out(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    flat = nn.Parameter(nn.utils.parameters_to_vector(model.parameters()).detach())
    base = plain([flat])
    for optimizer in (ZeroOptimizer(base), Wrapper(ZeroOptimizer(base))):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"DeepSpeed steps copies of the weights.* optimizer of fastreg\.optim"):
            ElasticNet(model, L1).attach(optimizer, mode)  # type: ignore[arg-type]
    for loaded in (False, True):
        if loaded:
            monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
        with pytest.raises(ValueError, match=r"'0\.weight' is not in the optimizer") as raised:
            ElasticNet(model, L1).attach(base, mode)
        assert ("fastreg.optim" in str(raised.value)) == loaded


def test_an_optimizer_inside_another_one_is_named() -> None:
    model = net()
    inner = plain(model.parameters())

    class Averaging(Optimizer):
        """Like PostLocalSGDOptimizer, which skips `Optimizer.__init__`."""

        def __init__(self, optim: Optimizer) -> None:
            self.optim, self.param_groups = optim, optim.param_groups

    for mode in MODES:
        with pytest.raises(TypeError, match=r"Averaging wraps an optimizer.* attach to the one inside, \.optim"):
            ElasticNet(model, L1).attach(Averaging(inner), mode)  # type: ignore[arg-type]
        ElasticNet(model, L1).attach(Averaging(inner).optim, mode).remove()  # type: ignore[arg-type]
