"""Optimizers whose step size is not known, those that keep other copies of the weights, and misspelt metrics."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

import fastreg
from fastreg import ElasticNet
from tests.support.helpers import Path, bits, naming
from tests.support.metric import Attached, gradients
from tests.support.training import L1, L2, loss_of, net, plain, train


class Wrapper(Optimizer):
    """Holds an optimizer, and skips `Optimizer.__init__`, as Accelerate's does."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer


class OwnStep(Adam):
    """Steps as it likes: what its state has to do with it, nobody knows."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


class OwnStepInBetween(OwnStep):
    """Inherits it."""


class OwnDefaults(Adam):
    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr=lr, betas=(0.8, 0.95), eps=1e-3)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none=set_to_none)


class OwnMomentum(SGD):
    """Not the step but its name."""


class OwnName(NAdam):
    """Likewise."""


UNKNOWN: dict[str, Callable[..., Optimizer]] = {
    "RAdam": partial(RAdam, lr=0.01),
    "Adadelta": partial(Adadelta, lr=0.01),
    "ASGD": partial(ASGD, lr=0.01),
    "Rprop": partial(Rprop, lr=0.01),
    "OwnStep": partial(OwnStep, lr=0.01),
    "OwnStepInBetween": partial(OwnStepInBetween, lr=0.01),
}


@pytest.mark.parametrize("kind", UNKNOWN)
@pytest.mark.parametrize("metric", [{}, {"metric": "optimizer"}], ids=["default", "said"])
def test_unknown_step_sizes_are_refused(kind: str, metric: Any) -> None:
    model = net()
    before = bits(*model.parameters())
    optimizer = UNKNOWN[kind](model.parameters())
    reg = ElasticNet(model, L1, L2)
    known = "torch.optim.SGD, Adam, AdamW, RMSprop, Adagrad, NAdam and Adamax"
    with pytest.raises(ValueError, match=f'{kind} is not known, only those of {known}.*metric="lr"'):
        reg.attach(optimizer, mode="prox", **metric)
    assert bits(*model.parameters()) == before
    other = net()
    assert train(model, optimizer) == train(other, UNKNOWN[kind](other.parameters()))
    assert reg.last is None
    reg.attach(optimizer, mode="grad")  # which needs no step size, and was left free to be attached


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_step_sizes_take_the_learning_rate(path: Path, kind: str) -> None:
    weights = [nn.Parameter(torch.randn(n, device=path[1])) for n in (40, 7)]
    optimizer = UNKNOWN[kind](weights)
    attached = Attached(ElasticNet(weights, L1, L2, impl=path[0]), optimizer, weights, [(L1, L2)] * 2, path, "lr")
    for _ in range(2):
        gradients(weights)
        attached.step()


@pytest.mark.parametrize(
    "cls",
    [OwnDefaults, partial(OwnMomentum, lr=0.1, momentum=0.9), partial(OwnName, lr=0.1)],
    ids=["Adam", "SGD", "NAdam"],
)
def test_subclasses_with_the_step_of_their_class(path: Path, cls: Any) -> None:
    weights = [nn.Parameter(torch.randn(n, device=path[1])) for n in (40, 7)]
    attached = Attached(ElasticNet(weights, L1, L2, impl=path[0]), cls(weights), weights, [(L1, L2)] * 2, path)
    for _ in range(3):
        gradients(weights)
        attached.step()


def test_a_subclass_that_is_used_before_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch wraps `step` on the class of the first instance, which then looks like one that overrides it."""
    plain(net().parameters())
    monkeypatch.setattr(SGD, "step", SGD.step.__wrapped__)  # type: ignore[attr-defined]

    class Early(SGD):
        pass

    model = net()
    optimizer = Early(model.parameters(), lr=0.1)
    assert "step" in vars(Early)
    ElasticNet(model, L1, L2).attach(optimizer, mode="prox")
    ElasticNet(model, L1, L2).attach(SGD(model.parameters(), lr=0.1), mode="prox")


def test_what_wrappers_and_instances_make_of_step_is_no_other_step() -> None:
    """Schedulers and compilers put a step of their own on the instance, which calls that of the class."""
    model = net()
    optimizer = Adam(model.parameters(), lr=0.05)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step = partial(optimizer.step)  # type: ignore[method-assign]
    handle = ElasticNet(model, L1, L2).attach(optimizer, mode="prox")
    found = train(model, optimizer)
    handle.remove()
    ElasticNet(model, L1, L2).attach(Wrapper(optimizer), mode="prox")  # type: ignore[arg-type]

    other = net()
    it = Adam(other.parameters(), lr=0.05)
    ElasticNet(other, L1, L2).attach(it, mode="prox")
    assert found == train(other, it)
    with pytest.raises(ValueError, match='metric="lr"'):
        ElasticNet(other, L1, L2).attach(Wrapper(RAdam(other.parameters())), mode="prox")  # type: ignore[arg-type]


def test_misspelt_metrics() -> None:
    model = net()
    optimizer, reg = plain(model.parameters()), ElasticNet(model, L1, L2)
    before = bits(*model.parameters())
    for metric in ("Optimizer", "adam", "", True, 0.1):
        with naming(metric), pytest.raises(ValueError, match='metric must be "optimizer" or "lr"'):
            reg.attach(optimizer, mode="prox", metric=metric)  # type: ignore[arg-type]
    for metric in ("optimizer", "lr"):
        for mode in ({}, {"mode": "grad"}):
            with naming((metric, mode)), pytest.raises(ValueError, match=r'metric.*mode="prox"'):
                reg.attach(optimizer, **mode, metric=metric)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='mode must be "grad" or "prox"'):
        reg.attach(optimizer, mode="lr", metric="lr")  # type: ignore[arg-type]
    loss_of(model, 0).backward()
    assert bits(*model.parameters()) == before
    reg.attach(optimizer, mode="grad", metric=None)


@pytest.mark.parametrize("momentum", [1.0, 1.5])
def test_momentum_that_never_settles(momentum: float) -> None:
    """In any group, at once or by a schedule, before anything is written; t = lr asks for no momentum."""
    model = net()
    reg = ElasticNet(model, L1, L2)

    def optimizer(momentum: float) -> SGD:
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "momentum": momentum}]
        return SGD(groups, lr=0.1)

    with pytest.raises(ValueError, match="momentum"):
        reg.attach(optimizer(momentum), mode="prox")
    later = optimizer(0.9)
    handle = reg.attach(later, mode="prox")
    loss_of(model, 0).backward()
    before = bits(*model.parameters())
    later.param_groups[1]["momentum"] = momentum
    with pytest.raises(ValueError, match="momentum"):
        later.step()
    assert bits(*model.parameters()) == before
    assert not later.state
    later.param_groups[1]["momentum"] = 0.5
    later.step()
    handle.remove()
    reg.attach(optimizer(momentum), mode="prox", metric="lr")


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"alpha": 1.0}, {"alpha": 1.5, "centered": True}], ids=str)
def test_options_of_rmsprop_that_have_no_step_size(options: Any) -> None:
    model = net()
    reg = ElasticNet(model, L1, L2)
    with pytest.raises(ValueError, match=f"with {next(iter(options))}="):
        reg.attach(RMSprop(model.parameters(), **options), mode="prox")
    later = RMSprop(model.parameters())
    reg.attach(later, mode="prox")
    loss_of(model, 0).backward()
    before = bits(*model.parameters())
    later.param_groups[0].update(options)
    with pytest.raises(ValueError, match=f"with {next(iter(options))}="):
        later.step()
    assert bits(*model.parameters()) == before


class Hidden(SGD):
    """An optimizer of elsewhere, by what can be seen of it: it would write its own copy over the shrunk weights."""

    def __init__(self, params: Any, **attributes: Any) -> None:
        super().__init__(params, lr=0.1)
        for name, value in attributes.items():
            setattr(self, name, value)


def with_group(params: Any, **options: Any) -> Optimizer:
    optimizer = SGD(params, lr=0.1)
    optimizer.param_groups[-1].update(options)
    return optimizer


def with_state(params: Any, key: str) -> Optimizer:
    optimizer = AdamW(params, lr=0.1)
    last = optimizer.param_groups[-1]["params"][-1]
    optimizer.state[last][key] = torch.zeros_like(last, dtype=torch.float32)
    return optimizer


HIDDEN: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "attribute master_weights": partial(Hidden, master_weights=True),
    "attribute param_groups_master": partial(Hidden, param_groups_master=[{}]),
    "group master_weights": partial(with_group, master_weights=True),
    "group kahan_sum": partial(with_group, kahan_sum=True),
    "state master_param": partial(with_state, key="master_param"),
    "state kahan_comp": partial(with_state, key="kahan_comp"),
}
NOT_HIDDEN: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "attribute master_weights": partial(Hidden, master_weights=False),
    "group master_weights": partial(with_group, master_weights=False),
    "group kahan_sum": partial(with_group, kahan_sum=False),
}


def narrow() -> list[Tensor]:
    return [nn.Parameter(torch.randn(n, dtype=torch.bfloat16)) for n in (40, 7)]


@pytest.mark.parametrize("metric", [{}, {"metric": "optimizer"}, {"metric": "lr"}], ids=str)
@pytest.mark.parametrize("kind", HIDDEN)
def test_hidden_copies_of_the_weights_are_refused(kind: str, metric: Any) -> None:
    weights = narrow()
    before = bits(*weights)
    reg = ElasticNet(weights, L1, L2)
    with pytest.raises(ValueError, match=r"cop(y|ies)|master|kahan"):
        reg.attach(HIDDEN[kind](weights), mode="prox", **metric)
    assert bits(*weights) == before
    assert reg.last is None
    reg.attach(HIDDEN[kind](weights), mode="grad")


@pytest.mark.parametrize("metric", ["optimizer", "lr"])
def test_hidden_copies_that_are_only_named(metric: Any) -> None:
    for kind, maker in NOT_HIDDEN.items():
        with naming(kind):
            weights = narrow()
            ElasticNet(weights, L1, L2).attach(maker(weights), mode="prox", metric=metric)
    # Where the weights are wide, nothing is kept of them.
    wide = [nn.Parameter(torch.randn(7))]
    ElasticNet(wide, L1, L2).attach(with_group(wide, kahan_sum=True), mode="prox", metric=metric)


@pytest.mark.parametrize("metric", ["optimizer", "lr"])
def test_hidden_copies_that_the_first_step_makes(metric: Any) -> None:
    """At the latest the second step refuses, before anything is written."""
    weights = narrow()
    optimizer = AdamW(weights, lr=0.1)
    ElasticNet(weights, L1, L2).attach(optimizer, mode="prox", metric=metric)
    gradients(weights)
    optimizer.step()
    optimizer.state[weights[1]]["kahan_comp"] = torch.zeros_like(weights[1])
    before = bits(*weights)
    with pytest.raises(ValueError, match=r"cop(y|ies)|kahan"):
        optimizer.step()
    assert bits(*weights) == before


def test_the_learning_rate_is_still_checked() -> None:
    for metric in ("optimizer", "lr"):
        model = net()
        optimizer = Adam(model.parameters(), lr=0.1)
        ElasticNet(model, L1, L2).attach(optimizer, mode="prox", metric=metric)  # type: ignore[arg-type]
        loss_of(model, 0).backward()
        before = bits(*model.parameters())
        optimizer.param_groups[0]["lr"] = float("nan")
        with naming(metric), pytest.raises(ValueError, match="lr of param group 0 must be finite and at least 0"):
            optimizer.step()
        assert bits(*model.parameters()) == before
        assert not optimizer.state


@pytest.mark.parametrize("kind", [fastreg.optim.Adam, fastreg.optim.AdamW, AdamW])
def test_a_first_step_that_a_scaler_skips(kind: Any) -> None:
    """fastreg's optimizers keep no state of a step that was not made."""
    w, other = (nn.Parameter(torch.tensor([1.0, -2.0, 0.5])) for _ in range(2))
    reg = ElasticNet([w], l1=1e-3)
    optimizer, plain = (
        kind([w], lr=0.1),
        AdamW([other], lr=0.1, weight_decay=0.01 if kind is not fastreg.optim.Adam else 0),
    )
    reg.attach(optimizer, mode="prox")
    ElasticNet([other], l1=1e-3).attach(plain, mode="prox")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (float("inf"), 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale(w.square().sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == 1:
            plain.zero_grad()
            other.square().sum().backward()
            plain.step()
        torch.testing.assert_close(w, other)
    assert reg.last is not None
