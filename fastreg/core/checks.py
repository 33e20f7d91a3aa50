"""Checks of tensors and arguments, and warnings that name the user's line."""

import sys
import warnings
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from fastreg.core.dtensor import dtensor_problem, is_dtensor, local_shard, local_shards
from fastreg.core.layout import find_overlap, memory_span
from fastreg.core.torch_private import is_alias, is_transformed, is_zerotensor

Impl: TypeAlias = Literal["triton", "torch"] | None

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensors(names: Sequence[str], weights: Sequence[Tensor]) -> None:
    """Raise TypeError or RuntimeError for the first weight that cannot be penalized, with its name and a way out.

    RuntimeError is for a weight whose values are not in memory at the moment.
    """
    has_memory = not torch.compiler.is_compiling() and not is_transformed()
    for name, weight in zip(names, weights, strict=True):
        problem = _problem(weight)
        if problem is None and is_dtensor(weight):
            # Ranks agree on placements and dtypes, so all of them raise or none does.
            problem = dtensor_problem(weight) or _problem(local_shard(weight))
        if problem is not None:
            raise TypeError(f"parameter {name!r} {problem}")
        problem = _missing_values(local_shard(weight)) if has_memory else None
        if problem is not None:
            raise RuntimeError(f"parameter {name!r} {problem}")


def warn_of_overlap(names: Sequence[str], weights: Sequence[Tensor]) -> None:
    """Warn if two weights have elements in common, which count twice."""
    pair = find_overlap(local_shards(weights))
    if pair is not None:
        warn_user(
            f"{_shared(names, pair)}: their common elements count twice; exclude one of them, or make them one "
            "parameter"
        )


def warn_of_detached(names: Sequence[str], weights: Sequence[Tensor], also: str = "") -> None:
    """Warn if a weight shares the memory of another tensor, which gets no gradient. `also` names another way out."""
    if torch.compiler.is_compiling() or is_transformed():
        return
    name = next((name for name, w in zip(names, weights, strict=True) if is_alias(local_shard(w))), None)
    if name is not None:
        warn_user(
            f"{name!r} requires no gradient and shares the memory of another tensor, as after detach(), .data or "
            f"state_dict(): that tensor gets no gradient of the penalty; pass the parameters or the model{also}"
        )


def check_overlap(names: Sequence[str], pair: tuple[int, int] | None) -> None:
    """Raise ValueError if `pair`, the result of `find_overlap`, is not None. Such weights cannot be written."""
    if pair is not None:
        raise ValueError(
            f"{_shared(names, pair)}: a step would change their common elements once or twice, by chance; leave one "
            "of them out, or make them one parameter"
        )


def _shared(names: Sequence[str], pair: tuple[int, int]) -> str:
    first, second = sorted(pair)
    return f"parameters {names[first]!r} and {names[second]!r} share memory"


def _missing_values(tensor: Tensor) -> str | None:
    """Return why the values of a supported tensor are not in its memory, as the end of a sentence, or None."""
    n_elements = getattr(tensor, "ds_numel", None)
    if n_elements is not None and n_elements != tensor.numel():
        return (
            f"is a placeholder of DeepSpeed's ZeRO-3, which keeps its {n_elements} elements on several ranks; call "
            "this inside deepspeed.zero.GatheredParameters(...), or train with an optimizer of fastreg.optim"
        )
    offset = tensor.storage_offset() * tensor.element_size()
    needed = offset + memory_span(tensor) if tensor.numel() else 0
    present = tensor.untyped_storage().nbytes()
    if present < needed and not is_zerotensor(tensor):
        return (
            f"has no memory for its values: its storage has {present} of {needed} bytes, as after "
            "untyped_storage().resize_(0); restore it first, or exclude it"
        )
    return None


def _problem(tensor: Tensor) -> str | None:
    if isinstance(tensor, nn.UninitializedParameter):
        return "is not initialized yet; run a batch through its lazy module first"
    if tensor.is_quantized:
        return "is quantized; exclude it, or dequantize() it"
    if tensor.layout != torch.strided:
        return f"is sparse or otherwise not strided ({tensor.layout}); exclude it, or pass to_dense()"
    if tensor.dtype not in DTYPES:
        return f"has dtype {tensor.dtype}; supported are float64, float32, bfloat16 and float16, so exclude it"
    if tensor.device.type == "meta":
        return "is on the meta device and has no values; materialize it with to_empty() and initialize it"
    wraps_others = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if wraps_others and not is_dtensor(tensor) and not torch.compiler.is_compiling():
        return f"is a {type(tensor).__name__}, a tensor subclass whose memory cannot be read; exclude it"
    return None


def warn_user(message: str) -> None:
    """Issue a UserWarning that points to the first caller outside fastreg."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_back.f_globals.get("__name__", "").startswith("fastreg."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level + 1)


def check_impl(impl: object) -> None:
    """Raise ValueError unless `impl` is "triton", "torch" or None."""
    if impl not in (None, "triton", "torch"):
        raise ValueError(f'impl must be "triton", "torch" or None, got {impl!r}')


def check_reduce(reduce: object) -> None:
    """Raise TypeError unless `reduce` is a bool. It is not the name of a reduction, as in torch.nn's losses."""
    if not isinstance(reduce, bool):
        raise TypeError(f"reduce must be True (sum over ranks) or False, got {reduce!r}")
