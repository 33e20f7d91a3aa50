"""The readable reference: against NumPy, and everything else against it."""

import pytest
import torch
from torch import Tensor

import fastreg
from fastreg.core import dtypes
from fastreg.core.penalty import Scale
from fastreg.core.types import STEPS, Mode, Request, Want, Work
from fastreg.formulas import penalty as formulas
from fastreg.formulas.penalty import ElasticNetPenalty
from fastreg.sweep.local import local_sweep
from tests import oracle
from tests.support.cases import CASES, DTYPES, L1, L2, make
from tests.support.helpers import Path, naming, slack

GROUPS = 2


def weights_of(dtype: torch.dtype, path: Path) -> list[Tensor]:
    names = [case for case in CASES if case not in ("expanded", "special_values")]
    return [make(case, dtype, path).detach() for case in names]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_expressions_against_numpy(case: str, dtype: torch.dtype) -> None:
    w = make(case, dtype, ("torch", "cpu")).detach()
    exact = oracle.penalty([w], 1.0, 1.0)
    penalty = ElasticNetPenalty((L1, L2))
    found = penalty.sums(w)
    for term, value in zip(found, exact[1:], strict=True):
        assert float(term) == pytest.approx(value, rel=oracle.VALUE_RTOL[dtype])
    assert oracle.ulp_distance(penalty.gradient(w), oracle.gradient(w, L1, L2)) <= 1
    assert oracle.ulp_distance(penalty.prox(w), oracle.prox(w, L1, L2, 1.0)) <= 3


@pytest.mark.parametrize(
    "mode", [m for m in Mode if m not in (*STEPS, Mode.ELEMENTWISE_PROX)], ids=lambda mode: mode.value
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sweeps_against_expressions(path: Path, dtype: torch.dtype, mode: Mode) -> None:
    """Every mode, with two groups, a scale of each kind, and gradients that are there already."""
    impl, device = path
    weights = weights_of(dtype, path)
    groups: list[int | range] = [i % GROUPS for i in range(len(weights))]
    penalty = ElasticNetPenalty((*torch.tensor([[L1, 0.1], [L2, 0.0]], dtype=torch.float64, device=device),))
    scales: list[Scale] = [None, (0.5, 2.0), (*torch.tensor([0.5, 2.0], device=device),)]
    for scale in scales[2:] if mode is Mode.RESCALE else scales:
        copies = [[w.clone() for w in weights] for _ in range(2)]
        grads = [[torch.full_like(w, 64.0) for w in weights] for _ in range(2)]
        sums = formulas.sums_of_groups(weights, groups, GROUPS, penalty)
        expected = penalty.weighted(sums, dtypes.value_dtype([dtype]))
        formulas.apply_penalty(mode, copies[0], grads[0], groups, penalty, scale)

        work = Work([str(i) for i in groups], copies[1], groups, GROUPS, penalty, impl)
        writes_gradient = mode not in (Mode.VALUE, Mode.PROX)
        found = local_sweep(work, Request(mode, grads=grads[1] if writes_gradient else None, scale=scale))

        if mode is not Mode.RESCALE:
            assert found is not None
            torch.testing.assert_close(penalty.result(found), penalty.result(expected), rtol=1e-6, atol=0)
            torch.testing.assert_close(found.sums(GROUPS), expected.sums(GROUPS), rtol=1e-6, atol=0)
        for i, (w, other, grad, other_grad) in enumerate(zip(*copies, *grads, strict=True)):
            with naming(f"weight {i}, {scale}"):
                ulps = 3 if mode is Mode.PROX and dtype in (torch.float32, torch.float64) else 1
                assert oracle.ulp_distance(other, oracle.array(w)) <= ulps + slack(path, dtype)
                assert oracle.ulp_distance(other_grad, oracle.array(grad)) <= 1 + slack(path, dtype)


def test_rescaling_by_one_writes_nothing(path: Path) -> None:
    """Seen by gradients that are wrong on purpose."""
    impl, device = path
    w, grad = torch.ones(5, device=device), torch.full((5,), 7.0, device=device)
    one = torch.ones((), device=device)
    for scale, is_left in (((one, one), True), ((one, 2 * one), False), ((2 * one, one), False)):
        grad.fill_(7.0)
        work = Work(["w"], [w], [0], 1, ElasticNetPenalty((0.25, 0.5)), impl)
        local_sweep(work, Request(Mode.RESCALE, Want.NOTHING, [grad], scale))
        assert bool((grad == 7.0).all()) == is_left


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_strength_beyond_float32_leaves_the_gradient_of_zero_at_zero(path: Path, dtype: torch.dtype) -> None:
    impl, device = path
    w = torch.tensor([0.0, -0.0, 1.0, -1.0], device=device).to(dtype).requires_grad_()
    expected = torch.tensor([0.0, 0.0, torch.inf, -torch.inf], device=device).to(dtype)
    for _ in range(2):
        fastreg.elastic_penalty(w, 1e300, 0.0, impl=impl).backward()
        assert torch.equal(w.grad, expected)  # type: ignore[arg-type]
    w.grad = None
    fastreg.add_elastic_grad_(w, 1e300, 0.5, impl=impl)
    assert torch.equal(w.grad, expected)  # type: ignore[arg-type]
    assert torch.equal(ElasticNetPenalty((1e300, 0.5)).gradient(w.detach()), expected)
    penalty = fastreg.elastic_penalty(w, 1e300, 0.5, impl=impl)
    (differentiable,) = torch.autograd.grad(penalty, w, create_graph=True)
    assert torch.equal(differentiable, expected)
    by_transform = torch.func.grad(lambda w: fastreg.elastic_penalty(w, 1e300, 0.5, impl=impl))(w.detach())
    assert torch.equal(by_transform, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_no_strength_have_the_same_signs_of_zero_on_every_path(path: Path, dtype: torch.dtype) -> None:
    impl, device = path
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 3e-5, -3e-5], device=device).to(dtype)
    for l1, l2 in ((0.0, 0.0), (torch.zeros((), device=device), torch.zeros((), device=device))):
        w = values.clone().requires_grad_()
        (returned,) = torch.autograd.grad(fastreg.elastic_penalty(w, l1, l2, impl=impl), w)
        fastreg.elastic_penalty(w, l1, l2, impl=impl).backward()
        added = values.clone().requires_grad_()
        fastreg.add_elastic_grad_(added, l1, l2, impl=impl)
        for grad in (returned, w.grad, added.grad, ElasticNetPenalty((l1, l2)).gradient(values)):
            assert grad is not None
            assert not grad.any()
            assert not torch.signbit(grad).any()


def test_infinite_weight_and_overflowing_threshold(path: Path) -> None:
    """A threshold beyond float32 is infinite there, and no weight lies above it."""
    impl, device = path
    for l1, lr in ((1e300, 1.0), (1e30, 1e30), (torch.tensor(1e38, device=device), 1e3)):
        w = torch.tensor([torch.inf, -torch.inf, 1.0, 0.0], device=device)
        fastreg.elastic_prox_(w, l1, 0.5, lr=lr, impl=impl)
        assert w.tolist() == [0.0, 0.0, 0.0, 0.0]
    w = torch.tensor([torch.inf, -torch.inf], device=device)
    fastreg.elastic_prox_(w, 3e38, 0.0, lr=1.0, impl=impl)
    assert w.tolist() == [torch.inf, -torch.inf]


def test_sizes_of_one_may_have_any_stride(path: Path) -> None:
    """A stride of 0 over one element shares nothing."""
    impl, device = path
    memory = torch.randn(8, device=device)
    w = memory.as_strided((1, 4, 1), (0, 2, 0))
    before = w.clone()
    fastreg.elastic_prox_(w, L1, L2, lr=0.5, impl=impl)
    assert oracle.ulp_distance(w, oracle.prox(before, L1, L2, 0.5)) <= 3
    w = memory.as_strided((2, 4), (0, 2))
    with pytest.raises(ValueError, match="is expanded"):
        fastreg.elastic_prox_(w, L1, L2, lr=0.5, impl=impl)
