"""Values and gradients of the public functions against the oracle, in every lane."""

import numpy as np
import pytest
import torch
from torch import nn

import fastreg
from tests import oracle
from tests.support.cases import BLOCK, CASES, DTYPES, L1, L2, leaf, mixed_model
from tests.support.helpers import Path, assert_gradient, assert_value, naming


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradient(path: Path, dtype: torch.dtype) -> None:
    """Of each weight alone, and of all of them in one call."""
    impl, device = path
    weights = {case: leaf(make(dtype, device)) for case, make in CASES.items()}
    if path == ("triton", "cpu") and dtype == torch.bfloat16:
        # The interpreter reads bfloat16 subnormals as zero; a GPU does not.
        tiny = torch.finfo(dtype).tiny
        weights = {case: leaf(torch.where(w.abs() < tiny, 0.0, w)) for case, w in weights.items()}

    for case, w in weights.items():
        with naming(f"{case}, alone"):
            found = fastreg.elastic_penalty(w, L1, L2, return_terms=True, impl=impl)
            for actual, exact in zip(found, oracle.penalty([w], L1, L2), strict=True):
                assert_value(actual, exact, path, dtype)
            found.total.backward()
            assert_gradient(w, L1, L2, path)
            w.grad = None

    del weights["special_values"]  # which would hide the value of the others
    found = fastreg.elastic_penalty(list(weights.values()), L1, L2, return_terms=True, impl=impl)
    for actual, exact in zip(found, oracle.penalty(weights.values(), L1, L2), strict=True):
        assert_value(actual, exact, path, dtype)
    found.total.backward()
    for case, w in weights.items():
        with naming(f"{case}, among the others"):
            assert_gradient(w, L1, L2, path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", [0, BLOCK - 1, BLOCK, -1])
def test_nan_and_inf_show(path: Path, bad: float, dtype: torch.dtype, position: int) -> None:
    impl, device = path
    values = torch.randn(BLOCK + 3, device=device).to(dtype)
    values[position] = bad
    w = leaf(values)

    found = fastreg.elastic_penalty(w, L1, L2, return_terms=True, impl=impl)
    found.total.backward()

    for actual in found:
        assert torch.isnan(actual) if np.isnan(bad) else actual == float("inf")
    assert_gradient(w, L1, L2, path)


def test_nan_shows_with_a_strength_of_zero(path: Path) -> None:
    impl, device = path
    w = torch.tensor([1.0, float("nan")], device=device)
    for l1, l2 in [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]:
        assert torch.isnan(fastreg.elastic_penalty(w, l1, l2, impl=impl))


def test_the_sign_of_zero_is_zero(path: Path) -> None:
    impl, device = path
    w = leaf(torch.tensor([0.0, -0.0, 1e-45, -1e-45], device=device))
    fastreg.elastic_penalty(w, 1.0, 0.0, impl=impl).backward()
    assert w.grad is not None
    assert w.grad.tolist() == [0.0, 0.0, 1.0, -1.0]


def test_a_model_of_everything(path: Path) -> None:
    impl, device = path
    model = mixed_model(device)
    weights = [p for p in model.parameters() if p.requires_grad]

    found = fastreg.elastic_penalty(model, L1, L2, return_terms=True, impl=impl)

    for actual, exact in zip(found, oracle.penalty(weights, L1, L2), strict=True):
        assert_value(actual, exact, path, torch.float64)
    assert found.total.device == weights[0].device
    found.total.backward()
    for w in weights:
        assert_gradient(w, L1, L2, path)
        assert w.grad is not None
        assert w.grad.stride() == w.stride()
    assert all(p.grad is None for p in model.frozen.parameters())


def test_the_value_is_float32_without_float64_weights(path: Path) -> None:
    impl, device = path
    weights = [leaf(torch.randn(100, device=device).to(dtype)) for dtype in DTYPES[1:]]
    found = fastreg.elastic_penalty(weights, L1, L2, impl=impl)
    assert_value(found, oracle.penalty(weights, L1, L2)[0], path)


def test_a_penalty_sums_to_its_total(path: Path) -> None:
    impl, device = path
    found = fastreg.elastic_penalty(torch.randn(1000, device=device), L1, L2, return_terms=True, impl=impl)
    assert isinstance(found, fastreg.Penalty)
    # Three roundings to float32, each of half a unit.
    torch.testing.assert_close(found.l1 + found.l2, found.total, rtol=2 * oracle.FLOAT32_ULP, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "values",
    [
        pytest.param(lambda n: torch.full((n,), 0.1), id="constant"),
        pytest.param(lambda n: torch.cat([torch.full((3,), 3e4), torch.full((n - 3,), 0.13)]), id="outliers"),
        pytest.param(lambda n: torch.linspace(1e-4, 1, n), id="ramp"),
        pytest.param(lambda n: torch.randn(n) * 0.02, id="normal"),
    ],
)
def test_long_sums_keep_their_digits(path: Path, dtype: torch.dtype, values) -> None:  # type: ignore[no-untyped-def]
    impl, device = path
    # A plain float32 sum of equal values is off by 1e-3 here, a float32 dot product by 2e-5.
    w = values(300_000 if path == ("triton", "cpu") else 3_000_000).to(dtype).to(device)
    found = fastreg.elastic_penalty(w, L1, L2, return_terms=True, impl=impl)
    for actual, exact in zip(found, oracle.penalty([w], L1, L2), strict=True):
        assert_value(actual, exact, path)


def test_fp16_models_do_not_overflow(path: Path) -> None:
    impl, device = path
    w = leaf(torch.full((70_000,), 60_000.0, dtype=torch.float16, device=device))
    found = fastreg.elastic_penalty(w, 1e-5, 1e-9, impl=impl)
    assert_value(found, oracle.penalty([w], 1e-5, 1e-9)[0], path)
    found.backward()
    assert_gradient(w, 1e-5, 1e-9, path)


def test_large_float64_weights_keep_their_l1(path: Path) -> None:
    impl, device = path
    w = leaf(torch.tensor([1e150, -3e153, 2.0], dtype=torch.float64, device=device))
    assert_value(fastreg.elastic_penalty(w, L1, L2, impl=impl), oracle.penalty([w], L1, L2)[0], path, torch.float64)


def test_bitwise_the_same_from_run_to_run(path: Path) -> None:
    impl, device = path
    w = [leaf(torch.randn(n, device=device)) for n in (5, 40_000, 3 * BLOCK + 1)]
    bits = set()
    for _ in range(5):
        found = fastreg.elastic_penalty(w, L1, L2, impl=impl)
        grads = torch.autograd.grad(found, w)
        bits.add((float(found.detach()), *(g.cpu().numpy().tobytes() for g in grads)))
    assert len(bits) == 1


def test_the_order_of_the_parameters_does_not_matter(path: Path) -> None:
    impl, device = path
    w = [torch.randn(n, device=device).to(dtype) for n in (3, 5000, 70) for dtype in DTYPES[1:]]
    forth = fastreg.elastic_penalty(w, L1, L2, impl=impl)
    back = fastreg.elastic_penalty(w[::-1], L1, L2, impl=impl)
    torch.testing.assert_close(forth, back, rtol=oracle.FLOAT32_ULP, atol=0)


def test_many_small_tensors(path: Path) -> None:
    impl, device = path
    w = [leaf(torch.randn(1 + i % 7, device=device)) for i in range(300)]
    found = fastreg.elastic_penalty(w, L1, L2, impl=impl)
    assert_value(found, oracle.penalty(w, L1, L2)[0], path)
    found.backward()
    for one in w:
        assert_gradient(one, L1, L2, path)


def test_no_write_outside_the_gradient(path: Path) -> None:
    impl, device = path
    w = leaf(torch.randn(BLOCK + 5, device=device))
    # Not among NaN, to which one can add without a trace.
    memory = torch.full((BLOCK + 37,), 7.0, device=device)
    w.grad = memory[16 : 16 + w.numel()].zero_()
    fastreg.elastic_penalty(w, L1, L2, impl=impl).backward()
    assert_gradient(w, L1, L2, path)
    assert (memory[:16] == 7.0).all()
    assert (memory[16 + w.numel() :] == 7.0).all()


def test_weights_are_seen_as_they_are_now(path: Path) -> None:
    impl, device = path
    model = nn.Linear(7, 3).to(device)
    reg = fastreg.ElasticNet(model, L1, L2, impl=impl)
    for change in (
        lambda: None,
        lambda: model.weight.data.mul_(-3),
        lambda: setattr(model.weight, "data", torch.randn(3, 7, device=device)),
        lambda: model.load_state_dict(nn.Linear(7, 3).state_dict(), assign=True),
        lambda: model.to(device).half(),
        lambda: setattr(model, "weight", nn.Parameter(torch.randn(20, 7, device=device))),
        lambda: model.bias.requires_grad_(False),
        lambda: model.bias.requires_grad_(True),
    ):
        change()
        model.to(device)
        weights = [p for p in model.parameters() if p.requires_grad]
        assert_value(reg(), oracle.penalty(weights, L1, L2)[0], path)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    n = 2**31 + 2 * BLOCK + 3
    w = torch.full((n,), 0.5, dtype=torch.bfloat16, device="cuda").requires_grad_()
    with torch.no_grad():
        w[-1] = 4.0
    found = fastreg.elastic_penalty(w, 1.0, 1.0, return_terms=True)
    assert float(found.l1.detach()) == pytest.approx((n - 1) * 0.5 + 4.0, rel=oracle.FLOAT32_ULP)
    assert float(found.l2.detach()) == pytest.approx((n - 1) * 0.25 + 16.0, rel=oracle.FLOAT32_ULP)
    found.total.backward()
    assert w.grad is not None
    assert w.grad[-1] == 9.0
    assert w.grad[-2] == 2.0
