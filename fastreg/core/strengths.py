"""Checks of strengths, strengths per group, and constants on a device."""

import math
import numbers
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fastreg.core.device_cache import DeviceCache, to_device
from fastreg.core.dtensor import is_dtensor
from fastreg.core.dtypes import accumulate_dtype
from fastreg.core.penalty import BasePenalty, Strength

P = TypeVar("P", bound=BasePenalty)


def check_strength(value: object, name: str) -> Strength:
    """Return `value` as a float or a 0-dim tensor.

    Raise ValueError if it is negative, NaN, infinite or not 0-dim, and TypeError if it is neither a real number nor a
    floating-point tensor. The value of a tensor is not read.
    """
    if type(value) is float and 0 <= value < math.inf:
        return value  # the usual case; a check for numbers.Real takes ten times as long
    if isinstance(value, Tensor):
        if is_dtensor(value):
            raise TypeError(f"{name} must be a float or a plain tensor, got a DTensor; pass its full_tensor()")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}; convert it with .float()")
        if value.ndim != 0:
            raise ValueError(
                f"{name} must be a float or a 0-dim tensor, got shape {tuple(value.shape)}"
                + ("" if name == "lr" else "; for strengths per layer pass a list of group dicts")
            )
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a float or a 0-dim tensor, got {type(value).__name__} {value!r:.40}")
    try:
        number = float(value)
    except OverflowError:  # an int that is too large for a float
        number = math.inf
    if not 0 <= number < math.inf:  # torch.compile can trace this, unlike math.isfinite
        raise ValueError(f"{name} must be finite and at least 0, got {number}")
    return number


def checked(penalty: type[P], *strengths: object) -> P:
    """Return a penalty with these strengths, each checked by `check_strength`."""
    return penalty(tuple(map(check_strength, strengths, penalty.NAMES)))


def penalty_of_groups(penalty: type[P], rows: Sequence[Sequence[Strength]], device: torch.device) -> P:
    """Return a penalty with one row of strengths per group. Raise ValueError for a tensor that is not on `device`."""
    columns = zip(*rows, strict=True)
    named = zip(penalty.NAMES, columns, strict=True)
    return penalty([per_group(column, device, name) for name, column in named])


def check_device(penalty: BasePenalty, device: torch.device) -> None:
    """Raise ValueError for a strength that is a tensor and not on `device`."""
    for name, value in zip(penalty.NAMES, penalty.strengths, strict=True):
        if isinstance(value, Tensor) and value.device != device:
            raise ValueError(
                f"{name} is on {value.device} but the weights are on {device}; move it with .to({str(device)!r})"
            )


def per_group(values: Sequence[Strength], device: torch.device, name: str) -> Strength:
    """Return one strength of all groups in the form that a penalty stores.

    The form depends only on the number of groups, never on the values, because a new form recompiles kernels. Raise
    ValueError for a tensor that is not on `device`.
    """
    for value in values:
        if isinstance(value, Tensor) and value.device != device:
            raise ValueError(
                f"{name} is on {value.device} but the weights are on {device}; move it with .to({str(device)!r})"
            )
    if len(values) == 1:
        return values[0]
    floats = tuple([s for s in values if not isinstance(s, Tensor)])
    if len(floats) == len(values) and not torch.compiler.is_compiling():
        return constant(floats, device)
    dtype = accumulate_dtype(device)
    return torch.stack([s.to(dtype) if isinstance(s, Tensor) else constant((s,), device)[0] for s in values])


_CONSTANTS: dict[torch.device, DeviceCache] = {}


def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return `values` as a tensor on `device`, copied there once for each set of values."""
    if torch.compiler.is_compiling():
        # torch.compile cannot trace the cache, so it records how the tensor is made.
        return torch.stack([torch.full((), v, dtype=accumulate_dtype(device), device=device) for v in values])
    cache = _CONSTANTS.get(device) or _CONSTANTS.setdefault(device, DeviceCache(device, size=64))
    dtype = accumulate_dtype(device)
    return cache.get(values, lambda: to_device(torch.tensor(values, dtype=dtype, device="cpu"), device))
