"""fastreg.optim in the place of torch.optim: training, checkpoints in both directions, and everything around a step."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

import fastreg
from tests import oracle
from tests.support.helpers import Path, bits, naming, needs_compiler
from tests.support.training import loss_of, net

L1, L2, STEPS = 1e-3, 1e-2, 15
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"lr": 0.1},
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
        {"lr": 0.1, "momentum": 0.5, "dampening": 0.3},
        {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    ],
    "Adam": [{"lr": 0.01}, {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.1}, {"amsgrad": True}],
    "AdamW": [{"lr": 0.01}, {"lr": 0.01, "weight_decay": 0.3, "amsgrad": True}],
}
CASES = [(kind, options) for kind, each in OPTIONS.items() for options in each]
IDS = [f"{kind}-{'-'.join(options)}" for kind, options in CASES]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-5}
everywhere = pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)


def ours(kind: str, model: nn.Module, **options: Any) -> Any:
    return getattr(fastreg.optim, kind)(model.parameters(), **{"l1": L1, "l2": L2, **options})


def theirs(kind: str, model: nn.Module, **options: Any) -> Any:
    return getattr(torch.optim, kind)(model.parameters(), fused=True, **options)


def take(model: nn.Module, optimizer: Any, number: int, scaler: GradScaler | None = None) -> None:
    """A step; of torch.optim's class with the penalty in the loss."""
    optimizer.zero_grad()
    loss = loss_of(model, number)
    if not type(optimizer).__module__.startswith("fastreg"):
        loss = loss + fastreg.elastic_penalty(model, L1, L2)
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def assert_same_weights(one: nn.Module, other: nn.Module, dtype: torch.dtype) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@everywhere
def test_trains_as_torch_does_with_the_penalty_in_the_loss(kind: str, options: Any, dtype: torch.dtype) -> None:
    model, other = net().to(dtype), net().to(dtype)
    optimizer, expected = ours(kind, model, **options), theirs(kind, other, **options)
    for number in range(STEPS):
        take(model, optimizer, number)
        take(other, expected, number)
    assert_same_weights(model, other, dtype)
    plain = net().to(dtype)  # the penalty matters
    without = getattr(torch.optim, kind)(plain.parameters(), **options)
    for number in range(STEPS):
        without.zero_grad()
        loss_of(plain, number).backward()
        without.step()
    assert (
        max(float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
        > 1e-3
    )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@everywhere
def test_optimizers_exchanged_in_mid_training(kind: str, options: Any, dtype: torch.dtype) -> None:
    """By state_dict, in both directions, through torch.save's copies."""
    model, other = net().to(dtype), net().to(dtype)
    first, expected = ours(kind, model, **options), theirs(kind, other, **options)
    for number in range(5):
        take(model, first, number)
        take(other, expected, number)
    second = theirs(kind, model, **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["l1"] == L1  # torch.optim's classes keep what they do not know
    for number in range(5, 10):
        take(model, second, number)
        take(other, expected, number)
    third = ours(kind, model, **options)
    state = copy.deepcopy(second.state_dict())
    for group in state["param_groups"]:
        group.pop("l1"), group.pop("l2"), group.pop("prox")
    with pytest.warns(UserWarning, match="the loaded state has no l1 and l2") as seen:
        third.load_state_dict(state)
    assert seen[0].filename == __file__
    assert [third.param_groups[0][name] for name in ("l1", "l2", "prox")] == [0.0, 0.0, False]
    third.param_groups[0].update(l1=L1, l2=L2)
    for number in range(10, STEPS):
        take(model, third, number)
        take(other, expected, number)
    assert_same_weights(model, other, dtype)


@everywhere
def test_states_have_the_names_dtypes_and_places_of_torch(kind: str, options: Any) -> None:
    model, other = net(), net()
    optimizer, expected = ours(kind, model, **options), theirs(kind, other, **options)
    take(model, optimizer, 0)
    take(other, expected, 0)
    found, right = optimizer.state_dict(), expected.state_dict()
    assert {k: v for k, v in found["param_groups"][0].items() if k not in ("l1", "l2", "prox")} == {
        **right["param_groups"][0],
        "foreach": None,
    }
    for state, other_state in zip(optimizer.state.values(), expected.state.values(), strict=True):
        assert state.keys() == other_state.keys()
        for name, value in state.items():
            like = other_state[name]
            assert (value.dtype, value.shape, value.stride(), value.device) == (
                like.dtype,
                like.shape,
                like.stride(),
                like.device,
            )


def test_a_state_of_the_unfused_form_is_taken_over() -> None:
    """Its step counters may be numbers of another dtype, or of old versions no tensors."""
    model, other = net(), net()
    plain = torch.optim.AdamW(other.parameters(), lr=0.01, foreach=False)
    mine = fastreg.optim.AdamW(model.parameters(), lr=0.01)
    for number in range(6):
        if number == 3:
            state = copy.deepcopy(plain.state_dict())
            state["state"][0]["step"] = float(state["state"][0]["step"])
            state["state"][1]["step"] = state["state"][1]["step"].double()
            mine.load_state_dict(state)
            model.load_state_dict(other.state_dict())
        for optimizer, each in ((plain, other), (mine, model)):
            optimizer.zero_grad()
            loss_of(each, number).backward()
            optimizer.step()
    assert_same_weights(model, other, torch.float32)
    assert all(s["step"].dtype == torch.float32 and float(s["step"]) == 6 for s in mine.state.values())


@pytest.mark.parametrize("prox", [False, True], ids=["gradient", "prox"])
def test_a_skipped_step_changes_nothing(prox: bool) -> None:
    for kind, options in CASES:
        model = net()
        optimizer = ours(kind, model, **options, prox=prox)
        scaler = GradScaler("cpu", init_scale=1024.0)
        take(model, optimizer, 0, scaler)
        kept = copy.deepcopy((list(model.parameters()), optimizer.state_dict()))
        next(model.parameters()).register_hook(lambda grad: grad * torch.inf)
        take(model, optimizer, 1, scaler)
        with naming((kind, options)):
            assert bits(*model.parameters()) == bits(*kept[0])
            for now, before in zip(optimizer.state.values(), kept[1]["state"].values(), strict=True):
                assert bits(*now.values()) == bits(*before.values())
        assert scaler.get_scale() == 512.0


@everywhere
def test_a_first_step_that_was_not_made_counts_for_nothing(kind: str, options: Any) -> None:
    """Neither one that GradScaler skips nor one that raises; the next one starts the momentum, undamped."""
    found = []
    for way in ("none", "skipped", "raises"):
        model = net()
        optimizer = ours(kind, model, **options)
        scaler = GradScaler("cpu", init_scale=1024.0)
        if way == "skipped":
            handle = next(model.parameters()).register_hook(lambda grad: grad * torch.inf)
            take(model, optimizer, 9, scaler)
            handle.remove()
        elif way == "raises":
            loss_of(model, 9).backward()
            model[2].weight.grad = torch.zeros(1, 7).to_sparse()
            with pytest.raises(RuntimeError, match="is sparse"):
                optimizer.step()
        assert not optimizer.state
        for number in range(3):
            take(model, optimizer, number)
        found.append(bits(*model.parameters()))
    assert found[0] == found[1] == found[2]


@everywhere
def test_a_scaled_step_is_the_step(kind: str, options: Any) -> None:
    """Unscaled inside, or before by `unscale_` and then clipped; .grad stays as it was."""
    model, other, clipped = net(), net(), net()
    optimizer, expected, third = (ours(kind, each, **options) for each in (model, other, clipped))
    scalers = GradScaler("cpu", init_scale=2.0**16), GradScaler("cpu", init_scale=2.0**16)
    for number in range(4):
        take(model, optimizer, number, scalers[0])
        take(other, expected, number)
        third.zero_grad()
        scalers[1].scale(loss_of(clipped, number)).backward()
        scalers[1].unscale_(third)
        nn.utils.clip_grad_norm_(clipped.parameters(), 1e9)
        scalers[1].step(third)
        scalers[1].update()
    assert_same_weights(model, other, torch.float32)
    assert_same_weights(clipped, other, torch.float32)
    for w, v in zip(model.parameters(), other.parameters(), strict=True):
        assert w.grad is not None
        torch.testing.assert_close(w.grad, v.grad * 2.0**16 if v.grad is not None else None, rtol=1e-4, atol=1e-2)


def test_schedules_closures_hooks_and_new_groups() -> None:
    model, other = net(), net()
    optimizer, expected = ours("AdamW", model, lr=0.05), theirs("AdamW", other, lr=0.05)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, 5) for each in (optimizer, expected)]
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure(number: int) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            calls.append("closure")
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            return loss

        return evaluate

    for number in range(5):
        loss = optimizer.step(closure(number))
        assert loss.requires_grad
        take(other, expected, number)
        for schedule in schedules:
            schedule.step()
    assert calls == ["before", "closure", "after"] * 5
    assert_same_weights(model, other, torch.float32)
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.5, "l1": 100.0, "prox": True})
    extra.grad = torch.full((3,), 1e-3)
    optimizer.step()
    assert not extra.detach().any()
    assert optimizer.param_groups[1]["l2"] == L2


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_as_the_original(way: str) -> None:
    model = net()
    optimizer = fastreg.optim.Adam(model.parameters(), lr=0.05, l1=L1, track=True, impl="torch")
    take(model, optimizer, 0)
    pair = model, optimizer
    twin_model, twin = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert twin.last is None
    for each, one in ((model, optimizer), (twin_model, twin)):
        take(each, one, 1)
    assert bits(*model.parameters()) == bits(*twin_model.parameters())
    assert optimizer.last is not None
    assert twin.last.total == optimizer.last.total


@pytest.mark.parametrize("prox", [False, True], ids=["gradient", "prox"])
def test_tracked_values_are_those_before_the_step(path: Path, prox: bool) -> None:
    model = net(path[1])
    optimizer = fastreg.optim.AdamW(model.parameters(), lr=0.1, l1=0.3, l2=0.2, prox=prox, track=True, impl=path[0])
    assert optimizer.last is None
    for number in range(3):
        exact = oracle.penalty(model.parameters(), 0.3, 0.2)
        take(model, optimizer, number)
        for found, term in zip(optimizer.last, exact, strict=True):
            assert float(found) == pytest.approx(term, rel=1e-6)
    untracked = fastreg.optim.SGD(model.parameters(), lr=0.1, l1=0.3, impl=path[0])
    take(model, untracked, 3)
    assert untracked.last is None


def test_counters_changed_by_others_are_seen(path: Path) -> None:
    """In place, by another list of weights, and by torch.optim's own step in between."""
    weights = [nn.Parameter(torch.ones(n, device=path[1])) for n in (3, 2000)]
    optimizer = fastreg.optim.Adam(weights, lr=0.1, impl=path[0])
    expected = [0.0, 0.0]

    def step(*having_gradients: int) -> None:
        for i, w in enumerate(weights):
            w.grad = torch.ones_like(w) if i in having_gradients else None
            expected[i] += i in having_gradients
        optimizer.step()
        counted = [float(optimizer.state[w]["step"]) if w in optimizer.state else 0.0 for w in weights]
        assert counted == expected

    for _ in range(3):  # by the kernel's own counters
        step(0, 1)
    step(0)
    step(0, 1)
    step(1)
    step(0, 1)
    optimizer.state[weights[0]]["step"].fill_(40.0)
    expected[0] = 40.0
    step(0, 1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(0, 1)


@needs_compiler
@pytest.mark.parametrize("prox", [False, True], ids=["gradient", "prox"])
@pytest.mark.parametrize(("kind", "options"), [("SGD", {"momentum": 0.9}), ("AdamW", {"amsgrad": True})])
def test_compiled_steps(kind: str, options: Any, prox: bool) -> None:
    models = net(), net()
    optimizers = [ours(kind, model, lr=0.05, prox=prox, track=True, **options) for model in models]
    torch.compiler.reset()
    compiled = torch.compile(optimizers[1].step, backend="aot_eager")
    for number in range(4):
        for model, optimizer, step in zip(models, optimizers, (optimizers[0].step, compiled), strict=True):
            optimizer.zero_grad()
            loss_of(model, number).backward()
            step()
        torch.testing.assert_close(optimizers[0].last, optimizers[1].last, rtol=1e-6, atol=0)
    assert_same_weights(*models, torch.float32)


def test_weights_that_a_graph_has_saved_are_seen_to_change(path: Path) -> None:
    w = nn.Parameter(torch.ones(5, device=path[1]))
    optimizer = fastreg.optim.SGD([w], lr=0.1, impl=path[0])
    loss = w.square().sum()
    w.grad = torch.ones_like(w)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_to_do_is_no_error() -> None:
    model = net()
    optimizer = ours("Adam", model, track=True)
    before = bits(*model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.step() is None
    assert bits(*model.parameters()) == before
    assert not optimizer.state
