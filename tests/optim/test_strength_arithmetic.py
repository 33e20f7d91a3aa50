"""Strengths that are narrow, tiny or beyond float32: their products are formed in float64, and no step fails midway."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastreg
from fastreg.formulas.steps import take_steps
from tests import oracle
from tests.support.helpers import Path, bits, naming

WEIGHTS = [0.0, -0.0, 0.5, -0.5, 1e-3, -2.0, 3.0]
GRADS = [0.0, 0.1, -0.1, 0.2, 0.3, -0.4, 0.0]
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.7}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.7, "nesterov": True}),
    "dampening": ("SGD", {"lr": 0.1, "momentum": 0.7, "dampening": 0.3}),
    "adam": ("Adam", {"lr": 0.1}),
    "amsgrad": ("Adam", {"lr": 0.1, "amsgrad": True}),
    "adamw": ("AdamW", {"lr": 0.1, "weight_decay": 0.1}),
}
ways = pytest.mark.parametrize("way", ["as it is", "expressions"])


@pytest.fixture(autouse=True)
def overflows_are_meant() -> Iterator[None]:
    """NumPy, in which the interpreter computes, warns of infinities."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        yield


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch, path: Path, way: str) -> None:
    """Make the steps by the path's own code, or by the expressions that compilers see."""
    if way == "expressions":
        if path != ("torch", "cpu"):
            pytest.skip("the expressions are the same on every path")
        monkeypatch.setattr("fastreg.blocks.sweep.take_block_steps", by_expressions)


def by_expressions(parts: Any, work: Any, request: Any) -> None:
    take_steps(request.mode, work.weights, request.grads, work.groups, request.step)


def trained(kind: str, path: Path, options: dict[str, Any], dtype: torch.dtype, n_steps: int = 2) -> Tensor:
    """The weights after steps with the same gradients, each checked against the oracle from the same numbers."""
    w = nn.Parameter(torch.tensor(WEIGHTS, dtype=dtype, device=path[1]))
    optimizer = getattr(fastreg.optim, kind)([w], impl=path[0], **options)
    plain = {name: float(o) if isinstance(o, Tensor) else o for name, o in options.items()}
    plain["rounding"] = oracle.rounding(dtype)
    state: dict[str, Any] = {}
    for number in range(n_steps):
        w.grad = torch.tensor(GRADS, dtype=dtype, device=path[1])
        start, grad = oracle.array(w).copy(), oracle.array(w.grad)
        state = {n: oracle.array(s).copy() for n, s in optimizer.state[w].items() if n != "step"} if number else {}
        optimizer.step()
        expected, size = oracle.step(kind, start, grad, state | ({"step": number} if kind != "SGD" else {}), plain)
        eps = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-15
        off = np.abs(oracle.array(w) - expected)
        assert (off <= 8 * eps * np.minimum(size, 1e3) + 1e-37).all(), f"step {number}: {w.tolist()} {expected}"
    return w.detach()


@ways
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.usefixtures("choose")
def test_narrow_tensors_are_the_numbers_that_they_hold(path: Path, rule: str) -> None:
    """0.1 in bfloat16 is 0.10009765625. Times the factor of momentum, or in any other product, it stays that number."""
    kind, options = RULES[rule]
    for prox in (False, True):
        for dtype in (torch.bfloat16, torch.float16):
            l1, l2 = (torch.tensor(x, dtype=dtype, device=path[1]) for x in (0.1, 0.03))
            with naming(f"prox={prox}, {dtype}"):
                trained(kind, path, {**options, "l1": l1, "l2": l2, "prox": prox}, torch.float32)


@ways
@pytest.mark.usefixtures("choose")
def test_a_float16_strength_whose_double_overflows(path: Path) -> None:
    l2 = torch.tensor(40000.0, dtype=torch.float16, device=path[1])
    for prox in (False, True):
        trained("SGD", path, {"lr": 1e-6, "l2": l2, "prox": prox}, torch.float32)


@ways
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.usefixtures("choose")
def test_a_tiny_l1_leaves_l2_as_it_is(path: Path, rule: str) -> None:
    kind, options = RULES[rule]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for l1 in (1e-30, 1e-36, 1e-38, 1e-40, 1e-45, 1e-300):
            with naming(f"{dtype}, l1={l1}"):
                trained(kind, path, {**options, "l1": l1, "l2": 0.1, "prox": True}, dtype)


@ways
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.usefixtures("choose")
def test_proximal_strengths_beyond_float32(path: Path, rule: str) -> None:
    """Or within it, with a product beyond it: the step of the largest strength, without an error."""
    kind, options = RULES[rule]
    for l1, l2, lr in ((1e39, 0.0, 0.1), (0.0, 1e39, 0.1), (1e39, 1e39, 0.1), (3e38, 0.0, 10.0), (1.0, 3e38, 10.0)):
        with naming(f"l1={l1}, l2={l2}, lr={lr}"):
            trained(kind, path, {**options, "lr": lr, "l1": l1, "l2": l2, "prox": True}, torch.float32)
            trained(kind, path, {**options, "lr": lr, "l1": l1, "l2": l2, "prox": True}, torch.bfloat16)


@ways
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.usefixtures("choose")
def test_gradients_beyond_float32_raise_nothing_half_way(path: Path, rule: str) -> None:
    """The weights become infinite or NaN, as from any infinite gradient; zeros without a gradient stay zeros."""
    kind, options = RULES[rule]
    for l1, l2 in ((1e39, 0.0), (0.0, 1e39), (0.0, 3e38), (1.0, 3e38)):
        for as_tensor in (False, True):
            w = nn.Parameter(torch.tensor([0.0, -0.0, 0.5, -0.5], device=path[1]))
            given = [torch.tensor(s, dtype=torch.float64, device=path[1]) if as_tensor else s for s in (l1, l2)]
            optimizer = getattr(fastreg.optim, kind)([w], impl=path[0], l1=given[0], l2=given[1], **options)
            w.grad = torch.zeros_like(w)
            optimizer.step()
            with naming(f"l1={l1}, l2={l2}, {as_tensor}"):
                assert not w.detach()[:2].any()
                assert not torch.isfinite(w.detach()[2:]).any() or kind != "SGD"


@pytest.mark.parametrize("is_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_at_zero_is_zero_for_any_l2(path: Path, dtype: torch.dtype, is_tensor: bool) -> None:
    """In every call that writes one; elsewhere it is the float32 formula, which is infinite."""
    for l2 in (1e39, 3e38):
        strength = torch.tensor(l2, dtype=torch.float64, device=path[1]) if is_tensor else l2
        values = [0.0, -0.0, 0.5, -0.5, 1e-3, torch.inf, -torch.inf, torch.nan]
        weights = [nn.Parameter(torch.tensor(values * n, device=path[1]).to(dtype)) for n in (1, 300)]
        loss = fastreg.elastic_penalty(weights, 0.0, strength, impl=path[0])
        in_place = fastreg.add_elastic_grad_
        in_place(weights, 0.0, strength, impl=path[0])
        for w, returned in zip(weights, torch.autograd.grad(2.0 * loss, weights), strict=True):
            for grad, factor in ((w.grad, 1.0), (returned, 2.0)):
                assert grad is not None
                assert oracle.ulp_distance(grad, oracle.gradient(w, 0.0, factor * l2)) <= oracle.GRADIENT_ULPS[dtype]
                assert bits(grad[:2]) == bits(torch.zeros_like(grad[:2]))
            w.grad = None
        (fastreg.elastic_penalty(weights, 0.0, strength, impl=path[0])).backward()
        for w in weights:
            assert w.grad is not None
            assert oracle.ulp_distance(w.grad, oracle.gradient(w, 0.0, l2)) <= oracle.GRADIENT_ULPS[dtype]


def test_alpha_as_a_narrow_tensor() -> None:
    w = nn.Parameter(torch.ones(3))
    alpha, ratio = torch.tensor(0.1, dtype=torch.bfloat16), torch.tensor(0.3, dtype=torch.bfloat16)
    reg = fastreg.ElasticNet.from_alpha([w], alpha, ratio)
    assert float(reg.l1) == float(alpha) * float(ratio)
    assert float(reg.l2) == float(alpha) * (1 - float(ratio)) / 2
