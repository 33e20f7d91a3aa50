"""What fastreg.optim refuses, with a reason, before anything is changed."""

import copy
import enum
import gc
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fastreg
from fastreg.core.types import STATES, SGDSettings
from fastreg.formulas.steps import take_steps
from fastreg.optim.base import Penalized
from tests.support.helpers import Path, bits
from tests.support.training import L1, loss_of, net

KINDS = ["SGD", "Adam", "AdamW"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"l1": -0.1}, ValueError, "l1 must be finite and at least 0"),
        ({"l2": float("nan")}, ValueError, "l2 must be finite and at least 0"),
        ({"l1": "0.1"}, TypeError, "l1 must be a float or a 0-dim tensor"),
        ({"l2": torch.ones(2)}, ValueError, "l2 must be a float or a 0-dim tensor"),
        ({"prox": 1}, TypeError, "prox of param group 0 must be True or False, got 1"),
        ({"track": "yes"}, TypeError, "track must be True or False, got 'yes'"),
        ({"impl": "cuda"}, ValueError, 'impl must be "triton", "torch" or None'),
        ({"maximize": True}, ValueError, "maximize=True would reward the penalty"),
        ({"differentiable": True}, ValueError, "differentiable=True is not supported"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate"),
        ({"l3": 0.1}, TypeError, "l3"),
        ({"proximal": True}, TypeError, "proximal"),
    ],
)
def test_wrong_arguments(kind: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(fastreg.optim, kind)(net().parameters(), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"l1": -1.0}, ValueError, "l1 of param group 1 must be finite and at least 0"),
        ({"prox": "no"}, TypeError, "prox of param group 1 must be True or False"),
        ({"Prox": True}, ValueError, r"groups\[1\] has a key 'Prox', which means nothing here; write 'prox'"),
        ({"proxx": True}, ValueError, r"groups\[1\] has a key 'proxx', which means nothing here; write 'prox'"),
        ({"L1": 0.1}, ValueError, r"groups\[1\] has a key 'L1', which means nothing here; write 'l1'"),
        ({"lambda2": 0.1}, ValueError, "write 'l2'"),
        ({"maximize": True}, ValueError, "maximize=True would reward"),
    ],
)
def test_wrong_groups(kind: str, group: dict[str, Any], error: type[Exception], message: str) -> None:
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), **group}]
    with pytest.raises(error, match=message):
        getattr(fastreg.optim, kind)(groups)
    optimizer = getattr(fastreg.optim, kind)(model[0].parameters())
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": list(model[2].parameters()), **group})
    assert len(optimizer.param_groups) == 1


def test_momentum_from_one_on_has_no_proximal_step() -> None:
    with pytest.raises(ValueError, match="a proximal step needs momentum < 1"):
        fastreg.optim.SGD(net().parameters(), momentum=1.0, l1=0.1, prox=True)
    fastreg.optim.SGD(net().parameters(), momentum=1.0, l1=0.1)
    fastreg.optim.SGD(net().parameters(), momentum=1.0, prox=True)


def change_option(name: str, value: Any) -> Callable[[Any, nn.Module], object]:
    return lambda optimizer, model: optimizer.param_groups[0].update({name: value})


def sparse_gradient(optimizer: Any, model: nn.Module) -> None:
    model[2].weight.grad = torch.zeros(1, 7).to_sparse()


def other_state(optimizer: Any, model: nn.Module) -> None:
    optimizer.state[model[2].weight]["exp_avg"] = torch.zeros(1, 7, dtype=torch.float64)


def expanded_weight(optimizer: Any, model: nn.Module) -> None:
    model[2].bias.data = torch.zeros(1).expand(1)
    model[0].bias.data = torch.zeros(1).expand(7)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (sparse_gradient, RuntimeError, r"the gradient of parameter 'groups\[0\].params\[2\]' is sparse"),
        (other_state, TypeError, "the optimizer state of parameter .* is torch.float64"),
        (expanded_weight, ValueError, "is expanded: its elements share memory"),
        (change_option("l1", -1.0), ValueError, "l1 of param group 0 must be finite and at least 0"),
        (change_option("lr", float("nan")), ValueError, "lr of param group 0 must be finite and at least 0"),
        (change_option("prox", None), TypeError, "prox of param group 0"),
        (change_option("maximize", True), ValueError, "maximize=True"),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
def test_a_step_that_raises_has_changed_nothing(
    change: Callable[[Any, nn.Module], object], error: type[Exception], message: str, first: bool
) -> None:
    model = net()
    optimizer = fastreg.optim.Adam(model.parameters(), lr=0.1, l1=0.1)
    if not first or change is other_state:
        loss_of(model, 0).backward()
        optimizer.step()
    loss_of(model, 1).backward()
    change(optimizer, model)
    tensors = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    before = bits(*tensors)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert bits(*tensors) == before


class LionMode(enum.Enum):
    """As a new member of Mode would be."""

    LION = "lion"


class Lion(Penalized, torch.optim.Optimizer):
    """Has a first state only, as SGD with momentum has."""

    def __init__(self, params: Any, impl: Any = None) -> None:
        super().__init__(params, {"lr": 0.1})
        self._init_penalty(0.1, 0.0, False, False, impl)

    def _mode(self, group: dict[str, Any]) -> Any:
        return LionMode.LION

    def _settings(self, group: dict[str, Any], number: int, is_first: bool) -> SGDSettings:
        return SGDSettings(group["lr"], l1=group["l1"])


def test_an_optimizer_whose_mode_has_no_states_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LionMode\.LION is not a step: .*STATES has no entry"):
        Lion(net().parameters())


@pytest.mark.parametrize("way", ["as it is", "expressions", "adopted by SGD"])
def test_an_optimizer_without_a_formula_of_its_own_makes_no_step(
    path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of SGD with momentum, which has the same states; and nothing was written."""
    impl, device = path
    monkeypatch.setitem(STATES, LionMode.LION, ("exp_avg",))  # type: ignore[arg-type]
    if way == "expressions":  # what compilers see, and devices without kernels
        monkeypatch.setattr("fastreg.sweep.local.block_sweep", by_expressions)
    model = net().to(device)
    optimizer = Lion(model.parameters(), impl="torch" if way == "expressions" else impl)
    if way == "adopted by SGD":
        optimizer = fastreg.optim.SGD(model.parameters(), momentum=0.9, impl=impl)
        monkeypatch.setattr(optimizer, "_mode", lambda group: LionMode.LION)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = bits(*model.parameters(), *(p.grad for p in model.parameters()))
    with pytest.raises(Exception, match="step of") as raised:
        optimizer.step()
    assert "lion" in str(raised.value).lower()
    assert bits(*model.parameters(), *(p.grad for p in model.parameters())) == before
    assert not optimizer.state
    with pytest.raises(ValueError, match=r"the step size of .* is not known"):
        fastreg.ElasticNet(model, 0.1).attach(optimizer, mode="prox")


def by_expressions(parts: Any, work: Any, request: Any) -> None:
    take_steps(request.mode, work.weights, request.grads, work.groups, request.step)


def test_parameters_that_have_no_penalty() -> None:
    w = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = fastreg.optim.Adam([w])
    w.grad = torch.zeros_like(w)
    with pytest.raises(TypeError, match=r"parameter 'groups\[0\].params\[0\]' has dtype torch.complex64"):
        optimizer.step()


def test_named_parameters_are_named() -> None:
    model = net()
    optimizer = fastreg.optim.SGD(model.named_parameters(), lr=0.1)
    loss_of(model, 0).backward()
    sparse_gradient(optimizer, model)
    with pytest.raises(RuntimeError, match=r"the gradient of parameter '2\.weight' is sparse"):
        optimizer.step()


def test_an_optimizer_that_deepspeed_replaced_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate makes a DeepSpeedCPUAdam of its param groups, and drops it."""

    def warned(stepped: bool = False, **options: Any) -> bool:
        model = net()
        optimizer = fastreg.optim.AdamW(model.parameters(), **options)
        twin = copy.deepcopy(optimizer)
        if stepped:
            loss_of(model, 0).backward()
            optimizer.step()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            del optimizer, twin
            gc.collect()
        assert all("zero_force_ds_cpu_optimizer: false" in str(each.message) for each in seen)
        assert len(seen) <= 1
        return bool(seen)

    assert not warned(l1=L1)
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    assert warned(l1=L1)
    assert not warned()
    assert not warned(l1=L1, stepped=True)
    with pytest.raises(ValueError, match="l1 must be finite"):
        fastreg.optim.AdamW(net().parameters(), l1=-1.0)
    gc.collect()
