"""The arithmetic of the PyTorch path on blocks: the same bits in every way and at every length, and signs of zero."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastreg
from fastreg.blocks import penalty, plan, scratch
from fastreg.blocks.penalty import BlockOps
from fastreg.blocks.plan import LANES
from tests import oracle
from tests.support.cases import DTYPES, L1, L2, leaf
from tests.support.helpers import bits, naming

SMALL, BLOCK = plan.CPU_SMALL, plan.CPU_BLOCK


@pytest.mark.parametrize("l1", [0.0, 1e-45, 1e-5, 1e30, 1e300])
@pytest.mark.parametrize("l2", [0.0, 1e-45, 1e-13, 1e-9, 1e-5, 0.5, 1e30, 1e300])
def test_strengths_that_a_fused_optimizer_cannot_take(l1: float, l2: float) -> None:
    w = leaf(torch.cat([torch.randn(BLOCK), torch.zeros(LANES)]))
    w.grad = torch.zeros_like(w)
    fastreg.add_elastic_grad_([w], l1, l2)
    # An infinite strength times zero is no number, here as in the formula.
    with np.errstate(over="ignore"):
        expected = oracle.gradient(w, l1, l2)
    assert oracle.ulp_distance(w.grad, expected) <= 1


def test_where_pytorch_has_no_fused_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    w, other = (leaf(torch.randn(BLOCK + 5, generator=torch.Generator().manual_seed(0))) for _ in range(2))
    fastreg.add_elastic_grad_([w], L1, L2)
    monkeypatch.setattr(penalty, "fused_sgd_", None)
    fastreg.add_elastic_grad_([other], L1, L2)
    assert w.grad is not None
    assert other.grad is not None
    assert torch.equal(w.grad, other.grad)


@pytest.mark.parametrize("l2", [1e-4, 1e-5, 1e-6, 2.0**-23 * (1 + 2.0**-24 + 2.0**-40)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_both_ways_have_the_bits_of_any_strength(dtype: torch.dtype, l2: float) -> None:
    w = leaf(torch.randn(BLOCK, dtype=dtype))
    (formed,) = torch.autograd.grad(fastreg.elastic_penalty([w], 1e-12, l2), [w])
    fastreg.elastic_penalty([w], 1e-12, l2).backward()
    assert w.grad is not None
    assert torch.equal(w.grad, formed)
    assert oracle.ulp_distance(w.grad, oracle.gradient(w, 1e-12, l2)) <= 1


@pytest.mark.parametrize("l1", [0.0, 1e-60, 1e-45, 1e-39, 2e-38, 0.1, 1e300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [5, SMALL, 1 << 18])
def test_zeros_of_a_proximal_step_have_no_sign(n: int, dtype: torch.dtype, l1: float) -> None:
    w = torch.tensor([-0.0, 0.0, -0.05, 1e-42, -1e-42], dtype=dtype).repeat(-(-n // 5))[:n]
    expected = oracle.prox(w, l1, L2, 1.0)
    fastreg.elastic_prox_([w], l1, L2, lr=1.0)
    assert oracle.ulp_distance(w, expected) <= 2
    assert not w[w == 0].signbit().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_have_the_same_bits_in_tensors_of_every_size(dtype: torch.dtype) -> None:
    """Also where a tensor is shorter than a vector unit; those of zeros of either sign are positive zeros."""
    values = torch.tensor([-0.0, 0.0, -1.1, 2.3, -1e-45], dtype=torch.float64).to(dtype)
    sizes = (2, 5, LANES - 1, LANES + 1, SMALL - 1, SMALL)
    for l1, l2, old in itertools.product((0.0, 0.3, 1e300), (0.0, 0.1, 0.7), (None, -0.0)):
        weights = [values.repeat(-(-n // 5))[:n].requires_grad_() for n in sizes]
        found: list[Tensor] = []
        for params in (weights, *([w] for w in weights)):
            for w in params:
                w.grad = None if old is None else torch.full_like(w, old, requires_grad=False)
            found += torch.autograd.grad(fastreg.elastic_penalty(params, l1, l2), params)
            fastreg.add_elastic_grad_(params, l1, l2)
            found += [w.grad for w in params if w.grad is not None]
        expected = max(found, key=len)
        assert bits(expected[:2]) == bits(torch.zeros(2, dtype=dtype))
        for grad in found:
            with naming(f"{len(grad)} elements, {l1}, {l2}, {old}"):
                assert bits(grad) == bits(expected[: len(grad)])


@pytest.mark.parametrize("l1", [0.0, 1e-45, 0.1, 1e300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_operators_leave_zeros_no_sign_where_a_vector_unit_is_not_filled(dtype: torch.dtype, l1: float) -> None:
    ops = BlockOps(dtype, torch.device("cpu"), scratch.Memory(torch.device("cpu")))
    for n in range(1, 2 * LANES):
        w = torch.tensor([-0.0, 0.0, -0.05], dtype=dtype).repeat(n)[:n]
        spare, grad = torch.empty_like(w), torch.empty_like(w)
        ops.gradient(w, l1, L2, spare, out=grad)
        assert not grad[w == 0].signbit().any(), n
        ops.prox(w, l1, L2, spare)
        assert not w[w == 0].signbit().any(), n


def test_operators_are_given_vectors_that_fill_the_vector_units(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def spied(own: Callable[..., Any]) -> Callable[..., Any]:
        def spy(ops: BlockOps, w: Tensor, *rest: Any, **more: Any) -> Any:
            lengths.append(w.numel())
            return own(ops, w, *rest, **more)

        return spy

    for name in ("gradient", "prox"):
        monkeypatch.setattr(BlockOps, name, spied(getattr(BlockOps, name)))
    weights = [leaf(torch.ones(n)) for n in (1, 5, LANES + 1, SMALL + 3, BLOCK + 7)]
    torch.autograd.grad(fastreg.elastic_penalty(weights, L1, L2), weights)
    fastreg.add_elastic_grad_(weights, L1, L2)
    fastreg.elastic_prox_(weights, L1, L2, lr=0.5)
    assert len(lengths) >= 3
    assert not any(n % LANES for n in lengths)
