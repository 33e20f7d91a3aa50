"""One step of attach(mode="prox") against the NumPy formula with the step size that the optimizer made."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam, Adamax, AdamW, Optimizer

import fastreg.optim
from fastreg import ElasticNet
from tests import oracle
from tests.support.cases import CASES, DTYPES, leaf, make
from tests.support.helpers import Path, bits, memory, naming, outside
from tests.support.metric import ADAMS, MAKERS, OTHERS, SGDS, Attached, forms, gradients, state_bits

L1, L2 = 0.1, 0.2
# Weights with gaps in memory are not for torch's fused optimizers, which write across them.
SHAPES = [case for case in CASES if case not in ("expanded", "special_values")]
WITH_GAPS = ("every_other",)
EVERY = pytest.mark.parametrize("kind", MAKERS)
TYPICAL = pytest.mark.parametrize("kind", ["SGD", "momentum", "Adam", "amsgrad"])


def randn(path: Path, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(path[1], dtype)) for shape in shapes]


def attach(optimizer: Optimizer, weights: Sequence[Tensor], path: Path, metric: str = "optimizer") -> Attached:
    reg = ElasticNet(list(weights), L1, L2, impl=path[0])
    return Attached(reg, optimizer, weights, [(L1, L2)] * len(weights), path, metric)


def adversarial(path: Path, dtype: torch.dtype, with_gaps: bool) -> list[Tensor]:
    made = [make(case, dtype, path) for case in SHAPES if with_gaps or case not in WITH_GAPS]
    return [*made, *randn(path, (15,), (16,), (17,), dtype=dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY
def test_every_shape_in_one_step(path: Path, kind: str, dtype: torch.dtype) -> None:
    """And in the next one, where the averages are no longer the gradient's square."""
    for form, options in forms(path).items():
        if form == "capturable" and kind in SGDS:
            continue
        with naming(form):
            weights = adversarial(path, dtype, with_gaps=form == "loop")
            around = [bits(memory(w)[outside(w)]) for w in weights]
            # Adam's own eps is nothing in float16.
            narrow = {"eps": 1e-3} if dtype == torch.float16 and kind in ("AdamW", "amsgrad", "Adam") else {}
            optimizer = MAKERS[kind](weights, **options, **narrow)
            attached = attach(optimizer, weights, path)
            for _ in range(2):
                gradients(weights)
                attached.step()
            assert [bits(memory(w)[outside(w)]) for w in weights] == around


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", OTHERS)
def test_other_optimizers(path: Path, kind: str, dtype: torch.dtype) -> None:
    """Several steps of every form, with gradients of exactly 0 in the first ones; groups, and late first gradients."""
    is_slow = path == ("triton", "cpu")
    for form, options in forms(path, OTHERS[kind]).items():
        with naming(form):
            shapes = [(40,), (3, 5), (1,)] if is_slow else [(2049,), (40,), (3, 5), (1,), ()]
            weights = randn(path, *shapes, dtype=dtype)
            narrow = {"eps": 1e-2} if dtype == torch.float16 else {}
            groups = [{"params": weights[:1], **narrow}, {"params": weights[1:], "lr": 0.25, **narrow}]
            optimizer = OTHERS[kind](groups, **options)
            attached = attach(optimizer, weights, path)
            for step in range(2 if is_slow else 4):
                gradients(weights)
                if step == 0:
                    weights[1].grad = None
                    weights[0].grad.view(-1)[:8] = 0.0  # type: ignore[union-attr]
                if step == 2:
                    weights[0].grad = None
                with naming(f"step {step}"):
                    attached.step()


@pytest.mark.parametrize("kind", [*ADAMS, *OTHERS])
def test_counters_on_a_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that may not be read, as those of capturable optimizers: the same steps."""

    def stay(number: Any) -> Any:
        return torch.as_tensor(number, dtype=torch.float32)

    monkeypatch.setattr("fastreg.optim.step_size._on_host", stay)
    weights = randn(("torch", "cpu"), (40,), (3, 5), (7,))
    optimizer = {**ADAMS, **OTHERS}[kind](weights)
    attached = attach(optimizer, weights, ("torch", "cpu"))
    for step in range(4):
        gradients(weights)
        if step < 2:
            weights[1].grad = None
        attached.step()


@pytest.mark.parametrize("kind", OTHERS)
def test_weights_of_others_that_have_seen_no_gradient(path: Path, kind: str) -> None:
    """Not on a first step; from then on they move no further than the reach, whatever the strength."""
    (w,) = randn(path, (6,))
    optimizer = OTHERS[kind]([w], weight_decay=0.0)
    ElasticNet([w], 10.0, impl=path[0]).attach(optimizer, mode="prox")
    for step in range(3):
        before = w.detach().clone()
        w.grad = torch.zeros_like(w)
        optimizer.step()
        if "initial value" not in kind and (step == 0 or "centered" in kind):
            assert bits(w) == bits(before)
        bound = oracle.reach(optimizer, optimizer.param_groups[0], optimizer.state[w])
        assert (np.abs(oracle.array(w - before)) <= 1.001 * bound).all()
        assert torch.isfinite(w).all()


def test_norms_of_adamax_that_vanish(path: Path) -> None:
    """In float16, the squares of small norms are 0: the weights move by the reach, and are not NaN."""
    for l1, l2 in ((0.5, 0.0), (0.0, 0.5), (0.5, 0.5)):
        w = nn.Parameter(torch.full((5,), 2.0, dtype=torch.float16, device=path[1]))
        optimizer = Adamax([w], lr=0.125, eps=1e-4)
        ElasticNet([w], l1, l2, impl=path[0]).attach(optimizer, mode="prox")
        for _ in range(2):
            before = w.detach().clone()
            w.grad = torch.tensor([1e-4, -1e-4, 0.0, 1.0, 2e-4], dtype=torch.float16, device=path[1])
            optimizer.step()
            assert torch.isfinite(w).all()
            assert ((w - before).abs() <= 0.125 * 3.01).all()


@pytest.mark.parametrize(("name", "options"), [("SGD", {"momentum": 0.9}), ("Adam", {"amsgrad": True}), ("AdamW", {})])
def test_the_librarys_own_optimizers(path: Path, name: str, options: Any) -> None:
    """They are known, too; this penalty is the only one."""
    weights = randn(path, (40,), (3, 5))
    optimizer = getattr(fastreg.optim, name)(weights, lr=0.125, **options)
    attached = attach(optimizer, weights, path)
    for _ in range(3):
        gradients(weights)
        attached.step()


@pytest.mark.parametrize("strengths", [(0.1, 0.0), (0.0, 0.2), (0.0, 0.0)], ids=["l1", "l2", "none"])
@TYPICAL
def test_one_term_alone(path: Path, kind: str, strengths: tuple[float, float]) -> None:
    weights = randn(path, (40,), (3, 5))
    optimizer = MAKERS[kind](weights)
    attached = Attached(ElasticNet(weights, *strengths, impl=path[0]), optimizer, weights, [strengths] * 2, path)
    for _ in range(3):
        gradients(weights)
        attached.step()


def sgd_groups(weights: list[nn.Parameter], rates: list[Any]) -> Optimizer:
    options: list[dict[str, Any]] = [{}, {"momentum": 0.9}, {"momentum": 0.5, "dampening": 0.3}]
    groups = [
        {"params": weights[i::3], "lr": lr, **each} for i, (lr, each) in enumerate(zip(rates, options, strict=True))
    ]
    return SGD(groups, foreach=False)


def adam_groups(weights: list[nn.Parameter], rates: list[Any]) -> Optimizer:
    options: list[dict[str, Any]] = [{"betas": (0.9, 0.9)}, {"eps": 0.2}, {"amsgrad": True, "betas": (0.0, 0.5)}]
    groups = [
        {"params": weights[i::3], "lr": lr, **each} for i, (lr, each) in enumerate(zip(rates, options, strict=True))
    ]
    return AdamW(groups, foreach=False)


@pytest.mark.parametrize("rates", ["floats", "tensors", "equal"])
@pytest.mark.parametrize("kind", ["floats", "tensors"])
@pytest.mark.parametrize("groups_of", [sgd_groups, adam_groups])
def test_groups_of_strengths_across_groups_of_the_optimizer(
    path: Path, groups_of: Callable[..., Optimizer], kind: str, rates: str
) -> None:
    impl, device = path
    weights = randn(path, (2049,), (1,), (40,), (7, 3), (16,), (0,), (5,))
    own = [(0.05, 0.3)] * 3 + [(0.2, 0.1)] * 4

    def strength(value: float) -> float | Tensor:
        return value if kind == "floats" else torch.tensor(value, dtype=torch.float64, device=device)

    reg = ElasticNet(
        [{"params": weights[:3], "l1": strength(0.05), "l2": strength(0.3)}, {"params": weights[3:]}],
        strength(0.2),
        strength(0.1),
        impl=impl,
    )
    lrs = [0.5, 0.25, 0.125] if rates != "equal" else [0.25] * 3
    optimizer = groups_of(weights, [torch.tensor(lr) for lr in lrs] if rates == "tensors" else lrs)
    attached = Attached(reg, optimizer, weights, own, path)
    for lr in (None, 0.0, 0.125):  # a schedule, and a group that rests
        if lr is not None:
            optimizer.param_groups[1]["lr"] = lr
        gradients(weights)
        attached.step()


@EVERY
def test_learning_rates_as_tensors_of_fused_optimizers(path: Path, kind: str) -> None:
    for device in dict.fromkeys(("cpu", path[1])):
        with naming(f"lr on {device}"):
            weights = randn(path, (300,), (7,))
            lr = torch.tensor(0.25, device=device)
            optimizer = MAKERS[kind](weights, lr=lr, fused=True)
            attached = attach(optimizer, weights, path)
            for _ in range(2):
                gradients(weights)
                attached.step()
                lr.mul_(0.5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("metric", ["optimizer", "lr"])
@TYPICAL
def test_a_weight_without_gradient_made_no_step(path: Path, kind: str, metric: Any, fused: bool) -> None:
    """Before its first gradient, and later, when the optimizer remembers older ones; some of them, and all."""
    weights = randn(path, (2049,), (7,), (40,), (5,))
    optimizer = MAKERS[kind]([{"params": weights[:3]}, {"params": weights[3:], "lr": 0.5}], fused=fused)
    attached = attach(optimizer, weights, path, metric)
    # torch's own fused momentum wants all first gradients at once.
    first = [] if fused and kind in SGDS else [(1,), (0, 3)]
    for missing in [(0, 1, 2, 3), *first, (), (1,), (2,), (0, 1, 2, 3), (0, 3), ()]:
        with naming(f"no gradients of {missing}"):
            gradients(weights)
            for i in missing:
                weights[i].grad = None
            attached.step()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ADAMS)
def test_weights_that_have_made_different_numbers_of_steps(path: Path, kind: str, fused: bool) -> None:
    for dtype in (torch.float64, torch.float32):
        weights = randn(path, (2049,), (7,), (40,), dtype=dtype)
        optimizer = MAKERS[kind](weights, fused=fused)
        attached = attach(optimizer, weights, path)
        for step in range(5):
            gradients(weights)
            for i in range(3):
                if step < 2 * i:
                    weights[i].grad = None
            attached.step()
        assert [int(optimizer.state[w]["step"]) for w in weights] == [5, 3, 1]


@pytest.mark.parametrize("kind", ADAMS)
def test_long_averages(path: Path, kind: str) -> None:
    """1 - beta2^step where it is small, and where a float32 cannot tell it from 1."""
    for beta2, step in [(0.999999, 1.0), (0.9999, 1000.0), (0.9, 100_000.0)]:
        for dtype in (torch.float64, torch.float32):
            with naming((beta2, step, dtype)):
                weights = randn(path, (300,), (7,), dtype=dtype)
                optimizer = MAKERS[kind](weights, betas=(0.9, beta2))
                gradients(weights)
                optimizer.step()
                for w in weights:
                    optimizer.state[w]["step"].fill_(step)
                attach(optimizer, weights, path).step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["Adam", "amsgrad"])
def test_averages_of_other_strides_than_their_weights(path: Path, kind: str, dtype: torch.dtype) -> None:
    weights = [leaf(torch.randn(7, 300).to(path[1], dtype)) for _ in range(2)]
    optimizer = MAKERS[kind](weights, eps=1e-3, foreach=False)
    attached = attach(optimizer, weights, path)
    gradients(weights)
    optimizer.step()
    for state in optimizer.state.values():
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            if key in state:
                state[key] = state[key].t().contiguous().t()
    for _ in range(2):
        gradients(weights)
        attached.step()


def test_squares_that_overflow_or_vanish(path: Path) -> None:
    """With an infinite average a step is 0; with none it is lr / eps, bounded, and nothing on the first step."""
    (w,) = randn(path, (6,))
    optimizer = Adam([w], lr=0.125)
    attached = attach(optimizer, [w], path)
    w.grad = torch.tensor([1e25, -1e25, 1e-25, 0.0, -0.0, 1.0], device=path[1])
    before = w.detach().clone()
    attached.step()
    assert torch.equal(w[:5], before[:5])
    attached.step()
    assert torch.equal(w[:2], before[:2])
    assert ((w[2:5] - before[2:5]).abs() > 0.3).all()


@pytest.mark.parametrize("metric", ["optimizer", "lr"])
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@TYPICAL
def test_skipped_steps_shrink_nothing(path: Path, kind: str, fused: bool, unscale: bool, metric: Any) -> None:
    """The first of all, but where torch's own fused momentum keeps garbage of it, and a later one."""
    weights = randn(path, (2049,), (7,))
    optimizer = MAKERS[kind](weights, fused=fused)
    reg = ElasticNet(weights, L1, L2, impl=path[0])
    reg.attach(optimizer, mode="prox", metric=metric)
    scaler = GradScaler(path[1], init_scale=4.0)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale(torch.stack([w.square().sum() for w in weights]).sum() * factor).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    if fused and kind in SGDS:
        step(1.0)
    for _ in range(2):
        before, kept = bits(*weights), state_bits(optimizer, weights)
        step(float("inf"))
        assert bits(*weights) == before
        if any(kept):  # a first step that was skipped may have made zeros
            assert state_bits(optimizer, weights) == kept
        step(1.0)
        assert bits(*weights) != before
        assert all(torch.isfinite(w).all() for w in weights)


@TYPICAL
def test_a_fused_step_under_a_scaler_is_the_one_without(path: Path, kind: str) -> None:
    weights = randn(path, (300,), (7,), dtype=torch.float64)
    optimizer = MAKERS[kind](weights, fused=True)
    others, other = copy.deepcopy((weights, optimizer))
    ElasticNet(weights, L1, L2, impl=path[0]).attach(optimizer, mode="prox")
    attached = attach(other, others, path)
    scaler = GradScaler(path[1], init_scale=4.0)  # a power of two: exact
    for _ in range(3):
        gradients(others)
        for w, o in zip(weights, others, strict=True):
            assert o.grad is not None
            w.grad = o.grad * 4
        scaler.scale(torch.zeros((), device=path[1]))  # wakes it
        scaler.step(optimizer)
        attached.step()
        assert bits(*weights) == bits(*others)
        scaler.update()
