"""Contexts that change how PyTorch computes: the value keeps its precision in all of them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastreg
from tests import oracle
from tests.support.cases import DTYPES, L1, L2
from tests.support.helpers import Path

CONTEXTS: dict[str, Callable[[str], AbstractContextManager[object]]] = {
    "none": lambda device: nullcontext(),
    "no_grad": lambda device: torch.no_grad(),
    "inference_mode": lambda device: torch.inference_mode(),
    "autocast to bfloat16": lambda device: torch.autocast(device, dtype=torch.bfloat16),
    "autocast to float16": lambda device: torch.autocast(device, dtype=torch.float16),
    "deterministic algorithms": lambda device: Deterministic(),
    "default device meta": lambda device: torch.device("meta"),
}


class Deterministic:
    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *error: object) -> None:
        torch.use_deterministic_algorithms(False)


def weights_on(device: str, dtype: torch.dtype) -> list[Tensor]:
    # A mean away from 0, so that sums in half precision would be far off.
    return [
        torch.full(shape, 0.3, device=device).add_(torch.randn(shape, device=device) / 10).to(dtype).requires_grad_()
        for shape in ((5000,), (70, 30))
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_value_and_gradient(context: str, dtype: torch.dtype, path: Path) -> None:
    impl, device = path
    weights = weights_on(device, dtype)
    with CONTEXTS[context](device):
        penalty = fastreg.elastic_penalty(weights, L1, L2, return_terms=True, impl=impl)
        if penalty.total.requires_grad:
            penalty.total.backward()
    assert penalty.total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [t.item() for t in penalty] == pytest.approx(oracle.penalty(weights, L1, L2), rel=oracle.VALUE_RTOL[dtype])
    for w in weights:
        assert (w.grad is None) == (context in ("no_grad", "inference_mode"))
        if w.grad is not None:
            assert oracle.ulp_distance(w.grad, oracle.gradient(w, L1, L2)) <= 1


@pytest.mark.parametrize("context", CONTEXTS)
def test_in_place_calls(context: str, path: Path) -> None:
    impl, device = path
    if context == "inference_mode":
        pytest.skip("tests/sweep/test_inplace.py: only tensors made there can be changed there")
    weights = weights_on(device, torch.bfloat16)
    before = [w.detach().clone() for w in weights]
    with CONTEXTS[context](device):
        found = fastreg.add_elastic_grad_(weights, L1, L2, impl=impl)
        fastreg.elastic_prox_(weights, L1, L2, lr=0.1, impl=impl)
    assert [t.item() for t in found] == pytest.approx(oracle.penalty(before, L1, L2), rel=1e-6)
    for w, old in zip(weights, before, strict=True):
        assert w.grad is not None
        assert oracle.ulp_distance(w.grad, oracle.gradient(old, L1, L2)) <= 1
        assert oracle.ulp_distance(w, oracle.prox(old, L1, L2, 0.1)) <= 2


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_under_autocast(use_reentrant: bool, path: Path) -> None:
    """The penalty is computed twice there, in a backward pass, and counts once."""
    impl, device = path
    weights = weights_on(device, torch.float16)
    x = torch.ones((), device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        total = checkpoint(
            lambda x: x * fastreg.elastic_penalty(weights, L1, L2, impl=impl), x, use_reentrant=use_reentrant
        )
    total.backward()
    expected = oracle.penalty(weights, L1, L2)[0]
    assert [total.item(), x.grad.item()] == pytest.approx([expected] * 2, rel=1e-6)
    for w in weights:
        assert oracle.ulp_distance(w.grad, oracle.gradient(w, L1, L2)) <= 1


def test_gradients_made_in_inference_mode_serve_training(path: Path) -> None:
    impl, device = path
    w = torch.ones(3, device=device, requires_grad=True)
    with torch.inference_mode():
        fastreg.add_elastic_grad_(w, 0.5, impl=impl)
    (2 * w).sum().backward()
    assert w.grad is not None
    assert w.grad.tolist() == [2.5, 2.5, 2.5]
