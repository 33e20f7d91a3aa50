"""What several test files ask of values, gradients and bits, and how one test goes through many cases."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import oracle

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# (impl, device)
Path = tuple[str, str]

# By lane.
PATHS = [
    pytest.param(("torch", "cpu"), id="torch"),
    pytest.param(("triton", "cpu"), id="interpreter", marks=pytest.mark.interpreter),
    pytest.param(("triton", "cuda"), id="triton-gpu", marks=pytest.mark.gpu),
    pytest.param(("torch", "cuda"), id="torch-gpu", marks=pytest.mark.gpu),
]

needs_compiler = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="needs the compiler of PyTorch 2.11"
)


@contextmanager
def naming(case: object) -> Iterator[None]:
    """Says which of the cases of a test it was that failed."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{case}: {error}") from error


def bits(*tensors: Tensor | None) -> list[bytes | None]:
    """What two tensors share only if they agree in every bit, the sign of zero included."""
    dense = [None if t is None else t.detach().cpu().clone(memory_format=torch.contiguous_format) for t in tensors]
    return [None if t is None else t.view(-1).view(torch.uint8).numpy().tobytes() for t in dense]


def memory(tensor: Tensor) -> Tensor:
    """The whole allocation that `tensor` lies in."""
    return tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def outside(tensor: Tensor) -> Tensor:
    """Where in `memory(tensor)` none of its elements lie."""
    mask = torch.ones_like(memory(tensor), dtype=torch.bool)
    mask.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(False)
    return mask


def slack(path: Path, dtype: torch.dtype) -> float:
    """One unit where the interpreter truncates float32 -> bfloat16 stores, which rounding to nearest never does."""
    return 1.0 if path == ("triton", "cpu") and dtype == torch.bfloat16 else 0.0


def prox_ulps(path: Path, dtype: torch.dtype) -> float:
    """A difference, a divisor and a quotient, each rounded by at most a unit of the result; narrow dtypes hide that."""
    division = 2.0 if path == ("triton", "cuda") and dtype == torch.float32 else 0.0  # what PTX says of div.full.f32
    return (3.0 if dtype in (torch.float64, torch.float32) else 1.0) + division + slack(path, dtype)


def assert_value(actual: Tensor, expected: float, path: Path, dtype: torch.dtype = torch.float32) -> None:
    assert actual.ndim == 0
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert type(actual) is Tensor
    if dtype != torch.float64 and expected > torch.finfo(torch.float32).max:
        expected = float("inf")
    # The kernels promise the neighbouring float32; sums of float64 weights are themselves rounded.
    kernel_rtol = oracle.VALUE_RTOL[dtype] if dtype == torch.float64 else oracle.FLOAT32_ULP
    rtol = kernel_rtol if path[0] == "triton" else oracle.VALUE_RTOL[dtype]
    np.testing.assert_allclose(float(actual.detach()), expected, rtol=rtol, atol=0)


def assert_gradient(w: Tensor, l1: float, l2: float, path: Path, factor: float = 1.0) -> None:
    assert w.grad is not None
    assert w.grad.dtype == w.dtype
    limit = oracle.GRADIENT_ULPS[w.dtype] + slack(path, w.dtype)
    assert oracle.ulp_distance(w.grad, oracle.gradient(w, l1 * factor, l2 * factor)) <= limit
