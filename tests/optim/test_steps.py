"""The optimizers of fastreg.optim, step by step, against NumPy float64: every rule, dtype and place in memory."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastreg
from fastreg.formulas.steps import take_steps
from tests import oracle
from tests.support.helpers import Path, bits, naming, slack

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1, "weight_decay": 0.02}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "dampening": ("SGD", {"lr": 0.1, "momentum": 0.5, "dampening": 0.3, "weight_decay": 0.02}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": ("Adam", {"lr": 0.01}),
    "adam, options": ("Adam", {"lr": 0.01, "betas": (0.3, 0.99), "eps": 1e-3, "weight_decay": 0.05}),
    "amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True, "betas": (0.9, 0.5)}),
    "adamw": ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
}
PENALTIES = {
    "none": {},
    "gradient": {"l1": 0.03, "l2": 0.02},
    "l1 prox": {"l1": 0.03, "prox": True},
    "elastic prox": {"l1": 0.02, "l2": 0.05, "prox": True},
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NUMBERS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# Units in the last place of float32 or float64, at the largest number of the formula, that some ten roundings come to.
ROUNDINGS = 12.0


def weights_of(dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """Of every length about a vector and a block, in other orders of memory, with gaps, and not aligned."""
    shapes = [(0,), (1,), (15,), (17, 1), (1023,), (1025,), (2048,), (5001,), (), (3, 4)]
    weights = [torch.randn(shape, device=device).mul_(0.3).to(dtype) for shape in shapes]
    weights[2][::3] = 0.0
    weights.append(torch.randn(2, 3, 4, 5, device=device).mul_(0.3).to(dtype).to(memory_format=torch.channels_last))
    weights.append(torch.randn(1031, device=device).mul_(0.3).to(dtype)[1:])  # not aligned
    weights.append(torch.randn(6, 10, device=device).mul_(0.3).to(dtype)[:, ::2])  # with gaps
    return [nn.Parameter(w) for w in weights]


def give_gradients(weights: Sequence[nn.Parameter], number: int) -> None:
    """New ones in new places: dense, transposed, not aligned."""
    for i, w in enumerate(weights):
        grad = torch.randn(w.numel() + 1, device=w.device).mul_(0.1).to(w.dtype)
        grad = grad[1:] if (i + number) % 3 == 0 else grad[:-1]
        w.grad = grad.view(w.shape) if w.ndim != 2 or i % 2 else grad.view(w.shape[::-1]).t()


def arrays(state: dict[str, Tensor]) -> dict[str, Any]:
    """A state as the oracle has it: of what the optimizer has rounded."""
    found: dict[str, Any] = {name: oracle.array(state[name]).copy() for name in NUMBERS if name in state}
    return found | ({"step": int(state["step"])} if "step" in state else {})


def assert_near(actual: Tensor, expected: np.ndarray, size: np.ndarray, path: Path) -> None:
    """Within the roundings of the arithmetic at `size`, and of one more unit where the dtype is narrow."""
    wide = torch.float64 if actual.dtype == torch.float64 else torch.float32
    allowed = ROUNDINGS * torch.finfo(wide).eps * size
    if actual.dtype != wide:
        allowed = allowed + (1 + slack(path, actual.dtype)) * torch.finfo(actual.dtype).eps * np.abs(expected)
        allowed = allowed + torch.finfo(actual.dtype).tiny * torch.finfo(actual.dtype).eps
    off = np.abs(oracle.array(actual) - expected)
    assert (off <= allowed).all(), (
        float(off.max(initial=0)),
        float((off / np.maximum(allowed, 1e-300)).max(initial=0)),
    )


def check_step(optimizer: Any, kind: str, options: dict[Tensor, dict[str, Any]], path: Path) -> None:
    """One step of all weights that have gradients, against the oracle from the same numbers."""
    before = {w: (oracle.array(w).copy(), arrays(optimizer.state.get(w, {}))) for w in options}
    grads = {w: bits(w.grad) for w in options}
    optimizer.step()
    for i, (w, o) in enumerate(options.items()):
        with naming(f"weight {i}, {tuple(w.shape)}, {w.dtype}"):
            start, state = before[w]
            assert bits(w.grad) == grads[w]
            if w.grad is None:
                assert bits(w) == bits(torch.from_numpy(start).to(w.dtype).view(w.shape).to(w.device))
                assert arrays(optimizer.state.get(w, {})).keys() == state.keys()
                continue
            grad = oracle.array(w.grad)
            expected, size = oracle.step(kind, start, grad, state, {**o, "rounding": oracle.rounding(w.dtype)})
            if "step" in state:
                assert int(optimizer.state[w]["step"]) == state["step"]
            full = np.abs(grad) + o.get("l1", 0.0) + np.abs((2 * o.get("l2", 0.0) + o.get("weight_decay", 0.0)) * start)
            for name in NUMBERS:
                if name in state:
                    largest = full * full if "sq" in name else full
                    assert_near(optimizer.state[w][name], state[name], largest + np.abs(state[name]), path)
            assert_near(w, expected, size, path)


def optimizer_of(kind: str, params: Any, path: Path, **options: Any) -> Any:
    return getattr(fastreg.optim, kind)(params, impl=path[0], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_steps_against_numpy(path: Path, rule: str, dtype: torch.dtype) -> None:
    """Without a penalty, with its gradient and with proximal steps, for several steps, with late first gradients."""
    kind, options = RULES[rule]
    is_slow = path == ("triton", "cpu")
    for name in ("gradient", "elastic prox") if is_slow else PENALTIES:
        weights = weights_of(dtype, path[1])
        given = {**options, **PENALTIES[name]}
        optimizer = optimizer_of(kind, weights, path, **given)
        for number in range(4 if not is_slow else 3 if dtype == torch.float32 else 2):
            give_gradients(weights, number)
            if number == 0:
                weights[3].grad = weights[7].grad = None
            if number == 2:
                weights[4].grad = None
            with naming(f"{name}, step {number}"):
                check_step(optimizer, kind, dict.fromkeys(weights, given), path)


def test_param_groups_of_all_kinds_in_one_optimizer(path: Path) -> None:
    """Dtypes, learning rates, strengths, proximal or not, and rules that need other states."""
    for kind, kinds in (("SGD", ({"momentum": 0.9}, {"momentum": 0.0})), ("Adam", ({"amsgrad": True}, {"eps": 1e-3}))):
        weights = [nn.Parameter(torch.randn(n, device=path[1]).to(d)) for d in DTYPES for n in (5, 1100)]
        own = [
            {"lr": 0.1, "l1": 0.1, **kinds[0]},
            {"lr": 0.01, "l2": 0.1, "prox": True, **kinds[1]},
            {"lr": 0.05, "l1": 0.2, "prox": True, **kinds[0]},
        ]
        groups = [{"params": weights[i::3], **options} for i, options in enumerate(own)]
        optimizer = optimizer_of(kind, groups, path, lr=1.0, track=True)
        options = {w: own[i % 3] for i, w in enumerate(weights)}
        for number in range(3):
            give_gradients(weights, number)
            exact = [oracle.penalty([w], o.get("l1", 0.0), o.get("l2", 0.0)) for w, o in options.items()]
            with naming(f"{kind}, step {number}"):
                check_step(optimizer, kind, options, path)
                for found, terms in zip(optimizer.last, zip(*exact, strict=True), strict=True):
                    assert float(found) == pytest.approx(sum(terms), rel=1e-6)
            optimizer.param_groups[1]["lr"] = own[1]["lr"] = 0.02 * (number + 1)
            optimizer.param_groups[0]["l1"] = own[0]["l1"] = 0.01 * number


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("prox", [False, True], ids=["gradient", "prox"])
def test_numbers_on_the_device_and_a_gradient_scale(path: Path, rule: str, prox: bool) -> None:
    """Learning rates and strengths as tensors, and what GradScaler gives fused optimizers."""
    kind, options = RULES[rule]
    weights = [nn.Parameter(torch.randn(n, device=path[1])) for n in (7, 1500)]
    lr, l1 = (torch.tensor(x, device=path[1]) for x in (options["lr"], 0.03))
    optimizer = optimizer_of(kind, weights, path, **{**options, "lr": lr}, l1=l1, l2=0.05, prox=prox)
    plain = {**options, "l1": 0.03, "l2": 0.05, "prox": prox}
    for number in range(2):
        give_gradients(weights, number)
        check_step(optimizer, kind, dict.fromkeys(weights, plain), path)
        lr.mul_(0.5)
        plain["lr"] *= 0.5
    # Scaled gradients make the step of those without a scale, and infinite ones none.
    optimizer.grad_scale = torch.tensor(1024.0, device=path[1])
    for found_inf in (1.0, 0.0):
        give_gradients(weights, 3)
        optimizer.found_inf = torch.tensor(found_inf, device=path[1])
        before = [bits(w, *(t for t in optimizer.state.get(w, {}).values())) for w in weights]
        starts = [(oracle.array(w).copy(), arrays(optimizer.state.get(w, {}))) for w in weights]
        for w in weights:
            assert w.grad is not None
            w.grad.mul_(1024.0)
        optimizer.step()
        after = [bits(w, *(t for t in optimizer.state.get(w, {}).values())) for w in weights]
        assert (after == before) == (found_inf == 1.0)
    for w, (start, state) in zip(weights, starts, strict=True):
        assert w.grad is not None
        expected, size = oracle.step(kind, start, oracle.array(w.grad) / 1024, state, plain)
        assert_near(w, expected, size, path)


@pytest.mark.parametrize("rule", RULES)
def test_expressions_make_the_same_steps(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What compilers see, and devices without kernels or fused operators."""
    kind, options = RULES[rule]
    monkeypatch.setattr("fastreg.blocks.sweep.take_block_steps", _by_expressions)
    for dtype in (torch.float64, torch.bfloat16):
        for name, penalty in PENALTIES.items():
            weights = weights_of(dtype, "cpu")
            given = {**options, **penalty}
            optimizer = optimizer_of(kind, weights, ("torch", "cpu"), **given)
            for number in range(3):
                give_gradients(weights, number)
                with naming(f"{name}, step {number}"):
                    check_step(optimizer, kind, dict.fromkeys(weights, given), ("torch", "cpu"))


def _by_expressions(parts: Any, work: Any, request: Any) -> None:
    take_steps(request.mode, work.weights, request.grads, work.groups, request.step)


def special(device: str) -> Iterator[tuple[Tensor, Tensor]]:
    values = [0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e19, -3e38, 1e-40]
    for w in (0.0, -0.5, 0.25):
        yield torch.full((len(values),), w, device=device), torch.tensor(values, device=device)


@pytest.mark.parametrize("rule", RULES)
def test_special_gradients_go_where_they_go_in_torch(path: Path, rule: str) -> None:
    """NaN, infinite, huge and tiny gradients: the same elements become NaN or infinite as in torch.optim."""
    kind, options = RULES[rule]
    for start, grad in special(path[1]):
        ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
        mine = optimizer_of(kind, [ours], path, l1=0.5, **options)
        other = getattr(torch.optim, kind)([theirs], foreach=False, **options)
        for _ in range(2):
            ours.grad, theirs.grad = grad.clone(), grad + 0.5 * theirs.detach().sign()
            mine.step()
            other.step()
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_zeros_stay_zeros_and_the_sign_of_zero_is_plus(path: Path) -> None:
    for rule in ("sgd", "momentum", "adam", "amsgrad"):
        kind, options = RULES[rule]
        w = nn.Parameter(torch.tensor([0.0, -0.0, 1e-3, -1e-3] * 300, device=path[1]))
        optimizer = optimizer_of(kind, [w], path, l1=2.0, prox=True, **options)
        for _ in range(3):
            w.grad = torch.linspace(-1, 1, w.numel(), device=path[1])
            optimizer.step()
            with naming(rule):
                assert not w.detach().any()
                assert not torch.signbit(w.detach()).any()
