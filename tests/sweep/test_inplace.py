"""The calls that write in place, add_grad_ and prox_, and sparsity: what they write and what they leave alone."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastreg
from fastreg.core.types import Work
from fastreg.formulas.penalty import ElasticNetPenalty
from fastreg.sweep.prox import apply_prox_of_groups
from tests import oracle
from tests.support.cases import BLOCK, CASES, DTYPES, GRADS, INF, L1, L2, LR, NAN, leaf, make, mixed_model
from tests.support.helpers import Path, assert_gradient, assert_value, bits, memory, naming, outside, prox_ulps, slack
from tests.support.strategies import FEWER_EXAMPLES, strengths, weights


def with_gradients(weights: dict[str, Tensor], present: str) -> dict[str, tuple[Tensor | None, Any]]:
    """Gives the weights their gradients, and returns these with what lies around them."""
    found: dict[str, tuple[Tensor | None, Any]] = {}
    for case, w in weights.items():
        w.grad = before = GRADS[present](w)
        found[case] = before, None if before is None else bits(memory(before)[outside(before)])
    return found


def assert_added(w: Tensor, before: Tensor | None, around: Any, expected: Tensor, path: Path) -> None:
    """The gradient is in place, with the bits that autograd gives it, and nothing else was written."""
    assert w.grad is not None
    if before is None:
        assert_gradient(w, L1, L2, path)
    else:
        assert w.grad is before
        assert bits(memory(before)[outside(before)]) == around
    if slack(path, w.dtype):
        assert oracle.ulp_distance(w.grad, oracle.array(expected)) <= 1
    else:
        assert bits(w.grad) == bits(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("present", GRADS)
def test_add_grad_adds_what_autograd_would(path: Path, present: str, dtype: torch.dtype) -> None:
    """To each weight alone, and to all of them in one call."""
    impl = path[0]
    weights = {case: make(case, dtype, path) for case in CASES}
    unchanged = {case: bits(memory(w)) for case, w in weights.items()}
    formed = {
        case: torch.autograd.grad(fastreg.elastic_penalty(w, L1, L2, impl=impl), w)[0] for case, w in weights.items()
    }

    def expected(before: Tensor | None, case: str) -> Tensor:
        return formed[case] if before is None else before + formed[case]

    there = with_gradients(weights, present)
    for case, w in weights.items():
        with naming(f"{case}, alone"):
            wanted = expected(there[case][0], case)
            found = fastreg.add_elastic_grad_(w, L1, L2, impl=impl)
            for actual, exact in zip(found, oracle.penalty([w], L1, L2), strict=True):
                assert_value(actual, exact, path, dtype)
                assert not actual.requires_grad
            assert bits(memory(w)) == unchanged[case]
            assert_added(w, *there[case], wanted, path)

    del weights["special_values"]  # which would hide the value of the others
    there = with_gradients(weights, present)
    wanted_of_all = {case: expected(before, case) for case, (before, _) in there.items()}
    found = fastreg.add_elastic_grad_(list(weights.values()), L1, L2, impl=impl)
    for actual, exact in zip(found, oracle.penalty(weights.values(), L1, L2), strict=True):
        assert_value(actual, exact, path, dtype)
    for case, w in weights.items():
        with naming(f"{case}, among the others"):
            assert bits(memory(w)) == unchanged[case]
            assert_added(w, *there[case], wanted_of_all[case], path)


def prepared_for_prox(case: str, dtype: torch.dtype, path: Path) -> Tensor:
    w = make(case, dtype, path)
    w.grad = torch.full_like(w, NAN)
    memory(w)[outside(w)] = 7.0  # NaN would stay NaN
    return w


def assert_shrunk(w: Tensor, expected: np.ndarray, stride: tuple[int, ...], path: Path) -> None:
    """To the formula's numbers, zeros without a sign among them, and nothing else was written."""
    assert oracle.ulp_distance(w.detach(), expected) <= prox_ulps(path, w.dtype)
    zeros = w.detach()[torch.from_numpy(np.asarray(expected == 0.0)).to(w.device)]
    assert bits(zeros) == bits(torch.zeros_like(zeros))
    assert (memory(w)[outside(w)] == 7.0).all()
    assert w.stride() == stride
    assert w.grad is not None
    assert torch.isnan(w.grad).all()


@pytest.mark.parametrize("lr", [LR, torch.tensor(LR)], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prox_shrinks_by_the_formula(path: Path, dtype: torch.dtype, lr: float | Tensor) -> None:
    """Each weight alone, and all of them in one call."""
    impl, device = path
    step = lr.to(device) if isinstance(lr, Tensor) else lr
    cases = [case for case in CASES if case != "expanded"]
    for together in (False, True):
        weights = {case: prepared_for_prox(case, dtype, path) for case in cases}
        expected = {case: (oracle.prox(w, L1, L2, LR), w.stride()) for case, w in weights.items()}
        if together:
            fastreg.elastic_prox_(list(weights.values()), L1, L2, lr=step, impl=impl)
        for case, w in weights.items():
            with naming(f"{case}, {'among the others' if together else 'alone'}"):
                if not together:
                    fastreg.elastic_prox_(w, L1, L2, lr=step, impl=impl)
                assert_shrunk(w, *expected[case], path)


def test_in_place_on_a_model_of_everything(path: Path) -> None:
    model = mixed_model(path[1])
    used = [p for p in model.parameters() if p.requires_grad]
    for p in used[::2]:
        p.grad = torch.ones_like(p)
    frozen = bits(*model.frozen.parameters())
    before = oracle.penalty(used, L1, L2)
    added = [oracle.gradient(p, L1, L2) for p in used]
    shrunk = [oracle.prox(p, L1, L2, LR) for p in used]
    reg = fastreg.ElasticNet(model, L1, L2, impl=path[0])

    found = reg.add_grad_()

    for actual, exact in zip(found, before, strict=True):
        assert_value(actual, exact, path, torch.float64)
        assert actual.device == used[0].device
    for i, (p, gradient) in enumerate(zip(used, added, strict=True)):
        assert p.grad is not None
        rounded = torch.from_numpy(np.asarray(gradient)).to(p.dtype).to(torch.float64).numpy()
        # Rounded before it is added: at most one unit of the gradient itself and half a unit of the sum.
        spacing = np.exp2(np.floor(np.log2(np.maximum(np.abs(rounded), 1.0)))) * oracle.FINFO[p.dtype].eps
        error = np.abs(oracle.array(p.grad) - rounded - (i % 2 == 0))
        assert (error <= (2 + slack(path, p.dtype)) * spacing).all()
    reg.prox_(LR)
    for p, exact in zip(used, shrunk, strict=True):
        assert oracle.ulp_distance(p.detach(), exact) <= prox_ulps(path, p.dtype)
    assert all(p.grad is None for p in model.frozen.parameters())
    assert bits(*model.frozen.parameters()) == frozen


def test_a_sparse_grad_becomes_dense(path: Path) -> None:
    table = nn.Embedding(50, 7, sparse=True, device=path[1])
    table(torch.tensor([3, 3, 49], device=path[1])).sum().backward()
    assert table.weight.grad is not None
    expected = table.weight.grad.to_dense()
    (gradient,) = torch.autograd.grad(fastreg.elastic_penalty(table, L1, L2, impl=path[0]), table.weight)

    fastreg.add_elastic_grad_(table, L1, L2, impl=path[0])

    assert bits(table.weight.grad) == bits(expected + gradient)


@pytest.mark.parametrize("kind", ["floats", "tensors", "mixed"])
def test_groups_with_strengths_of_their_own(path: Path, kind: str) -> None:
    impl, device = path
    own = [(0.3, 0.0), (0.0, 0.7), (0.25, 0.125), (0.5, 0.25)]

    def strength(value: float, index: int) -> float | Tensor:
        if kind == "floats" or (kind == "mixed" and index % 2):
            return value
        return torch.tensor(value, dtype=torch.float64, device=device, requires_grad=True)

    tensors = [leaf(torch.randn(BLOCK + 1, device=device).to(dtype)) for dtype in DTYPES]
    groups = [
        {"params": [w], "l1": strength(l1, i), "l2": strength(l2, i)}
        for i, (w, (l1, l2)) in enumerate(zip(tensors[:3], own[:3], strict=True))
    ]
    reg = fastreg.ElasticNet([*groups, {"params": tensors[3]}], *(strength(v, 0) for v in own[3]), impl=impl)
    expected = np.sum([oracle.penalty([w], *pair) for w, pair in zip(tensors, own, strict=True)], axis=0)
    shrunk = [oracle.prox(w, l1, l2, LR) for w, (l1, l2) in zip(tensors, own, strict=True)]

    found = reg.add_grad_()

    for actual, exact in zip(found, expected, strict=True):
        assert_value(actual, exact, path, torch.float64)
        assert not actual.requires_grad
    for w, (l1, l2) in zip(tensors, own, strict=True):
        assert_gradient(w, l1, l2, path)
    reg.prox_(LR)
    for w, exact in zip(tensors, shrunk, strict=True):
        assert oracle.ulp_distance(w.detach(), exact) <= prox_ulps(path, w.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(path: Path, dtype: torch.dtype) -> None:
    impl, device = path
    w = leaf(torch.tensor([NAN, INF, -INF, 0.0, -0.0, 0.25, -0.25, 0.75, -0.75], device=device).to(dtype))

    found = fastreg.add_elastic_grad_(w, 0.5, 1.0, impl=impl)
    assert all(torch.isnan(term) for term in found)
    assert w.grad is not None
    np.testing.assert_array_equal(oracle.array(w.grad), [NAN, INF, -INF, 0.0, 0.0, 1.0, -1.0, 2.0, -2.0])

    # The threshold lies exactly at 0.25, the divisor is 2.
    fastreg.elastic_prox_(w, 0.5, 1.0, lr=0.5, impl=impl)
    np.testing.assert_array_equal(oracle.array(w), [NAN, INF, -INF, 0.0, 0.0, 0.0, 0.0, 0.25, -0.25])
    assert bits(w.detach()[3:7]) == bits(torch.zeros(4, dtype=dtype))


IMMENSE = [
    (1e300, 0.0, 1.0),
    (1e300, 0.0, 1e300),
    (0.0, 1e300, 1.0),
    (1e300, 1e300, 1e300),
    (1e38, 1e38, 1e3),
    (3e38, 0.0, 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["floats", "tensors"])
def test_prox_never_makes_a_nan(path: Path, as_tensor: bool, dtype: torch.dtype) -> None:
    impl, device = path
    top = torch.finfo(dtype).max if dtype != torch.float64 else 1e30  # beyond the threshold a weight stays
    values = [0.0, -0.0, 1.0, -1.0, torch.finfo(dtype).tiny, top / 2**6, -top / 2**6, NAN]
    # What an immense divisor leaves of a weight underflows in any dtype but float64.
    limit = 1e-260 if dtype == torch.float64 else 0.0
    for numbers in IMMENSE:
        w = torch.tensor(values, dtype=torch.float64, device=device).to(dtype)
        l1, l2, lr = (torch.tensor(v, dtype=torch.float64, device=device) if as_tensor else v for v in numbers)

        fastreg.elastic_prox_(w, l1, l2, lr=lr, impl=impl)

        with naming(numbers):
            assert torch.isnan(w[-1])
            assert (w[:-1].abs() <= limit).all(), w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_a_step_of_zero_changes_nothing(path: Path, lr: float | Tensor, dtype: torch.dtype) -> None:
    impl, device = path
    w = make("special_values", dtype, path).detach()
    # All but -0.0, which any step makes 0.0.
    w = torch.cat([w[w != 0], torch.randn(BLOCK, device=device).to(dtype), torch.tensor([0.0, INF, -INF]).to(w)])
    before = bits(w)
    fastreg.elastic_prox_(w, 1e30, 1e30, lr=lr.to(device) if isinstance(lr, Tensor) else lr, impl=impl)
    assert bits(w) == before


def test_a_nan_strength_or_step_shows(path: Path) -> None:
    impl, device = path
    # Only a float is checked: a tensor would have to be waited for.
    nan = torch.tensor(NAN, device=device)
    for l1, l2, lr in [(nan, 0.0, 0.5), (0.5, nan, 0.5), (0.5, 0.0, nan)]:
        w = torch.tensor([3.0, -2.0], device=device)
        fastreg.elastic_prox_(w, l1, l2, lr=lr, impl=impl)
        assert torch.isnan(w).all()


def test_inside_inference_mode(path: Path) -> None:
    impl, device = path
    p = nn.Parameter(torch.tensor([3.0, -0.25], device=device))
    with torch.inference_mode():
        plain = torch.tensor([3.0, -0.25], device=device)
        for w in (p, plain):
            fastreg.elastic_prox_(w, 1.0, lr=LR, impl=impl)
            assert w.tolist() == [2.5, 0.0]
        assert fastreg.add_elastic_grad_(p, 1.0, impl=impl).total == 2.5
    assert p.grad is not None
    assert p.grad.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_sparsity_counts_zeros(device: str) -> None:
    net = nn.Module()
    net.a = nn.Parameter(torch.tensor([0.0, -0.0, 1e-45, NAN, INF], device=device))
    net.b = nn.Parameter(torch.tensor([[0.0, 6e-8], [0.0, 1.0]], dtype=torch.float16, device=device).t())
    net.c = nn.Parameter(torch.tensor([[0.0, 1e-300, 2.0]], dtype=torch.float64, device=device))
    net.tied, net.empty = net.a, nn.Parameter(torch.empty(0, 3, device=device))
    net.frozen = nn.Parameter(torch.zeros(100, device=device), requires_grad=False)
    for keywords, expected in [
        ({}, 5 / 12),
        ({"exclude": fastreg.bias_and_norm}, 3 / 7),
        ({"include": "^[ab]$", "exclude": "b"}, 2 / 5),
    ]:
        found = fastreg.sparsity(net, **keywords)
        assert found.dtype == torch.float32
        assert found.device.type == device
        assert not found.requires_grad
        assert float(found) == float(np.float32(expected))


def test_sparsity_of_nothing() -> None:
    for params, message in [([], "params holds no tensors"), (torch.empty(0, 3), "parameters have no elements")]:
        with pytest.raises(ValueError, match=f"nothing selected: .*{message}"):
            fastreg.sparsity(params)


@FEWER_EXAMPLES
@given(tensors=st.lists(weights(), min_size=1, max_size=4), l1=strengths, l2=strengths, lr=st.floats(0.0, 16.0))
def test_any_weights(path: Path, tensors: list[Tensor], l1: float, l2: float, lr: float) -> None:
    impl, device = path
    leaves = [leaf((t if all(t.stride()) else t.clone()).to(device)) for t in tensors]
    shrunk = [oracle.prox(w, l1, l2, lr) for w in leaves]
    gradients = torch.autograd.grad(fastreg.elastic_penalty(leaves, l1, l2, impl=impl), leaves)
    reg = fastreg.ElasticNet(leaves, l1, l2, impl=impl)

    for w in leaves:
        w.grad = torch.ones_like(w)
    reg.add_grad_()
    for w, gradient in zip(leaves, gradients, strict=True):
        assert w.grad is not None
        assert oracle.ulp_distance(w.grad, oracle.array(gradient + 1)) <= slack(path, w.dtype)
    reg.prox_(lr)
    for w, exact in zip(leaves, shrunk, strict=True):
        assert oracle.ulp_distance(w.detach(), exact) <= prox_ulps(path, w.dtype)


def test_steps_that_are_tensors(path: Path) -> None:
    """Learning rates on the device, which nobody may compare: two that are equal, one that is not."""
    impl, device = path
    weights = [torch.randn(n, device=device) for n in (5, 3000, 7)]
    before = [w.clone() for w in weights]
    steps = [torch.tensor(s, device=device) for s in (0.5, 0.5, 0.125)]
    work = Work("abc", weights, [0, 0, 0], 1, ElasticNetPenalty((L1, L2)), impl)
    found = apply_prox_of_groups(work, steps, [0, 1, 2])
    assert found is not None
    assert found.total.item() == pytest.approx(oracle.penalty(before, L1, L2)[0], rel=1e-6)
    for w, old, step in zip(weights, before, steps, strict=True):
        assert oracle.ulp_distance(w, oracle.prox(old, L1, L2, float(step))) <= 2


def test_a_strength_below_zero_that_nobody_checked(path: Path) -> None:
    """A tensor's value is not looked at: the formula holds, and nothing fails half way."""
    impl, device = path
    w = torch.tensor([1.0, -2.0, 0.5], device=device)
    fastreg.elastic_prox_(w, torch.tensor(-1.0, device=device), lr=0.5, impl=impl)
    assert w.tolist() == [1.5, -2.5, 1.0]


def test_factors_whose_memory_does_not_hold_their_value(path: Path) -> None:
    """A negation that is still pending, as complex autograd hands it on, and zeros that were never written."""
    impl, device = path
    negated = torch.tensor(2 - 3j, device=device).conj().imag
    zero = torch._efficientzerotensor((), device=device)  # type: ignore[attr-defined]
    assert negated.is_neg()
    for factor, value in ((negated, 3.0), (zero, 0.0)):
        w = torch.full((3,), 2.0, device=device, requires_grad=True)
        assert float(fastreg.elastic_penalty(w, factor, 0.5, impl=impl).detach()) == 6 * value + 6
        fastreg.elastic_penalty(w, 0.5, 0.25, impl=impl).backward(factor)
        assert w.grad is not None
        assert w.grad.tolist() == [1.5 * value] * 3
        fastreg.elastic_prox_(w, 0.1, 0.0, lr=factor, impl=impl)
        np.testing.assert_allclose(w.detach().cpu().numpy(), 2 - 0.1 * value, rtol=1e-6)
    w = torch.full((3,), 2.0, device=device, requires_grad=True)
    p = fastreg.elastic_penalty(w, 0.5, 0.25, impl=impl)
    torch.view_as_real(torch.complex(torch.zeros_like(p), p).conj().resolve_conj())[1].backward()
    assert w.grad is not None
    assert w.grad.tolist() == [-1.5] * 3
