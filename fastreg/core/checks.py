"""Checks of tensors and arguments, and warnings that name the user's line."""

import sys
import warnings
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from fastreg.core.dtensor import dtensor_problem, is_dtensor, local_shard

Impl: TypeAlias = Literal["triton", "torch"] | None


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_kinds(names: Sequence[str], weights: Sequence[Tensor]) -> None:
    """Raises TypeError for the first weight of a kind that has no penalty here, with its name and a way out."""
    for name, weight in zip(names, weights, strict=True):
        problem = _problem(weight)
        if problem is None and is_dtensor(weight):
            # What the ranks agree on: they all raise, or none does.
            problem = dtensor_problem(weight) or _problem(local_shard(weight))
        if problem is not None:
            raise TypeError(f"parameter {name!r} {problem}")


def _problem(tensor: Tensor) -> str | None:
    if isinstance(tensor, nn.UninitializedParameter):
        return "is not initialised yet; run a batch through its lazy module first"
    if tensor.is_quantized:
        return "is quantized; exclude it, or dequantize() it"
    if tensor.layout != torch.strided:
        return f"is sparse or otherwise not strided ({tensor.layout}); exclude it, or pass to_dense()"
    if tensor.dtype not in DTYPES:
        return f"has dtype {tensor.dtype}; supported are float64, float32, bfloat16 and float16, so exclude it"
    if tensor.device.type == "meta":
        return "is on the meta device and has no values; materialise it with to_empty() and initialise it"
    wraps_others = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if wraps_others and not is_dtensor(tensor) and not torch.compiler.is_compiling():
        return f"is a {type(tensor).__name__}, a tensor subclass whose memory cannot be read; exclude it"
    return None


def warn_user(message: str) -> None:
    """A UserWarning of the line outside of fastreg that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_back.f_globals.get("__name__", "").startswith("fastreg."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level + 1)


def check_impl(impl: object) -> None:
    """Raises ValueError where `impl` names no implementation."""
    if impl not in (None, "triton", "torch"):
        raise ValueError(f'impl must be "triton", "torch" or None, got {impl!r}')


def check_reduce(reduce: object) -> None:
    """Raises TypeError where `reduce` is not a bool: it does not name a reduction, as in a loss of torch.nn."""
    if not isinstance(reduce, bool):
        raise TypeError(f"reduce must be True (sum over ranks) or False, got {reduce!r}")
