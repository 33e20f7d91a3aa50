"""Checkpoints: states that lack the penalty's options, and what torch.distributed.checkpoint does to an optimizer."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)

import fastreg
from tests.support.helpers import Path, bits, naming
from tests.support.training import loss_of, net

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "adam": ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    "amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "adamw": ("AdamW", {"lr": 0.01}),
}


def groups_of(model: nn.Sequential) -> list[dict[str, Any]]:
    """A param group with its own strengths, and one with those of the constructor."""
    return [{"params": list(model[0].parameters()), "l1": 0.5}, {"params": list(model[2].parameters())}]


def step(model: nn.Module, optimizer: Any, number: int) -> None:
    optimizer.zero_grad()
    loss_of(model, number).backward()
    optimizer.step()


def without(state: dict[str, Any], names: tuple[str, ...], *groups: int) -> dict[str, Any]:
    """The state as torch.optim or an older version has it: without the options `names` in some groups."""
    state = copy.deepcopy(state)
    for group in groups:
        for name in names:
            del state["param_groups"][group][name]
    return state


@pytest.mark.parametrize(
    ("names", "lacking", "options", "message"),
    [
        (("l1", "l2", "prox"), (0, 1), {"l1": 0.1}, "no l1 and l2 and prox for param groups 0 and 1"),
        (("l1", "l2"), (1,), {"l1": 0.1}, "no l1 and l2 for param group 1,"),
        (("prox",), (0, 1), {"prox": True}, "no prox for param groups 0 and 1"),
        (("prox",), (1,), {"prox": True}, "no prox for param group 1,"),
        (("l2",), (0,), {"l2": 0.1}, "no l2 for param group 0,"),
        (("l1",), (0,), {}, "no l1 for param group 0,"),
        (("l1", "l2"), (1,), {"l1": torch.tensor(0.1)}, "no l1 and l2 for param group 1,"),
    ],
)
def test_options_that_a_state_lacks_are_named(
    names: tuple[str, ...], lacking: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    model = net()
    optimizer = fastreg.optim.AdamW(groups_of(model), **options)
    step(model, optimizer, 0)
    state = without(optimizer.state_dict(), names, *lacking)
    kept = [dict(group) for group in optimizer.param_groups]
    with pytest.warns(UserWarning, match=message) as seen:
        optimizer.load_state_dict(state)
    assert [warning.filename for warning in seen] == [__file__]
    for number, (group, before) in enumerate(zip(optimizer.param_groups, kept, strict=True)):
        for name in ("l1", "l2", "prox"):
            assert group[name] == (0 if number in lacking and name in names else before[name])


def test_nothing_is_said_where_nothing_is_lost() -> None:
    model = net()
    for options, names in (({}, ("l1", "l2", "prox")), ({"l2": 0.1}, ("l1", "prox")), ({"prox": True}, ("l1", "l2"))):
        optimizer = fastreg.optim.AdamW(model.parameters(), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.load_state_dict(without(optimizer.state_dict(), names, 0))


@pytest.mark.parametrize("prox", [False, True], ids=["gradient", "prox"])
@pytest.mark.parametrize("rule", RULES)
def test_states_asked_for_before_the_first_step_change_no_training(path: Path, rule: str, prox: bool) -> None:
    """get_state_dict makes a step with lr=0 and zero gradients, to learn which states there are."""
    kind, options = RULES[rule]
    found = []
    for is_asked in (False, True):
        model = net(path[1])
        optimizer = getattr(fastreg.optim, kind)(
            model.parameters(), l1=0.05, l2=0.1, prox=prox, impl=path[0], track=True, **options
        )
        if is_asked:
            _, state = get_state_dict(model, optimizer)
            assert all(not t.any() for each in state["state"].values() for t in each.values())
            assert all(float(each.get("step", 0)) == 0 for each in optimizer.state.values())
            assert optimizer.param_groups[0]["lr"] == options["lr"]
        for number in range(2):
            step(model, optimizer, number)
        found.append(bits(*model.parameters(), *(t for each in optimizer.state.values() for t in each.values())))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_the_same_with_a_penalty_that_is_attached(kind: str) -> None:
    """The step is torch.optim's own, which counts it; but it has no gradient of the penalty."""
    options = {"momentum": 0.9} if kind == "SGD" else {}
    found = []
    for is_attached in (False, True):
        model = net()
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, **options)
        if is_attached:
            fastreg.ElasticNet(model, 0.05, 0.1).attach(optimizer)
        before = bits(*model.parameters())
        get_state_dict(model, optimizer)
        assert bits(*model.parameters()) == before
        found.append(bits(*(t for each in optimizer.state.values() for t in each.values())))
    assert found[0] == found[1]


def one_gradient(model: nn.Module, optimizer: Any) -> None:
    last = list(model.parameters())[-1]
    last.grad = torch.ones_like(last)


def a_learning_rate(model: nn.Module, optimizer: Any) -> None:
    optimizer.param_groups[1]["lr"] = 0.1


def a_state(model: nn.Module, optimizer: Any) -> None:
    p = next(model.parameters())
    optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}


@pytest.mark.parametrize("change", [one_gradient, a_learning_rate, a_state])
def test_other_first_steps_are_steps(change: Callable[[nn.Module, Any], None]) -> None:
    """A warm-up from lr=0, gradients that are zero, and parameters that join later."""
    for lr in (0.0, torch.tensor(0.0)):
        model = net()
        optimizer = fastreg.optim.SGD(groups_of(model), lr=lr, momentum=0.9, l1=0.25)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        change(model, optimizer)
        optimizer.step()
        with naming((change, lr)):
            for state, w in zip(optimizer.state.values(), model.parameters(), strict=True):
                assert state["momentum_buffer"].any() or not w.detach().any()


def test_flat_states_of_torch_are_completed_by_ours() -> None:
    """torch's own KeyError names the option that a flat state of torch.optim lacks; docs/exact-zeros.md says this."""
    model, other = net(), net()
    plain = torch.optim.AdamW(other.parameters(), lr=0.03)
    step(other, plain, 0)
    theirs = get_optimizer_state_dict(other, plain, options=FLAT)
    optimizer = fastreg.optim.AdamW(model.parameters(), lr=0.01, l1=0.25, prox=True)
    with pytest.raises(KeyError, match=r"param_groups\.0\.weight\.l1"):
        set_optimizer_state_dict(model, optimizer, theirs, options=FLAT)
    ours = get_optimizer_state_dict(model, optimizer, options=FLAT)
    set_optimizer_state_dict(model, optimizer, {**ours, **theirs}, options=FLAT)
    group = optimizer.param_groups[0]
    assert (group["l1"], group["prox"], group["lr"]) == (0.25, True, 0.03)
    for state, expected in zip(optimizer.state.values(), plain.state.values(), strict=True):
        assert bits(*(state[name] for name in expected)) == bits(*expected.values())


def test_full_states_of_torch_keep_the_strengths_of_the_optimizer() -> None:
    """torch fills a full state from the optimizer's own before it is loaded, so a warning cannot tell."""
    model, other = net(), net()
    plain = torch.optim.AdamW(other.parameters(), lr=0.03)
    step(other, plain, 0)
    optimizer = fastreg.optim.AdamW(model.parameters(), lr=0.01, l1=0.25, prox=True)
    full = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(other, plain, options=full), options=full)
    group = optimizer.param_groups[0]
    assert (group["l1"], group["prox"], group["lr"]) == (0.25, True, 0.03)
    assert isinstance(next(iter(optimizer.state.values()))["exp_avg"], Tensor)
