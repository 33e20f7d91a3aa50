"""l1 and l2 on their way to a sweep: checked, one per group, and scaled."""

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastreg.device_cache import DeviceCache, to_device
from fastreg.dtensor import is_dtensor

Strength: TypeAlias = float | Tensor


class Scale(NamedTuple):
    """Factors on the strengths, floats or 0-dim tensors: upstream gradients, a loss scale, a learning rate."""

    l1: Strength = 1.0
    l2: Strength = 1.0

    def on(self, device: torch.device) -> "Scale":
        """The same scale, readable from `device`."""
        return Scale(*(_moved(s, device) for s in self))


UNSCALED = Scale()


class Strengths(NamedTuple):
    """With one group a float or a 0-dim tensor each; with more a tensor [n_groups] each, on the weights' device."""

    l1: Strength
    l2: Strength

    def of_group(self, group: int, scale: Scale = UNSCALED) -> tuple[Strength, Strength]:
        """The pair for one group, scaled in float64."""
        return _product(self.l1, group, scale.l1), _product(self.l2, group, scale.l2)

    def on(self, device: torch.device) -> "Strengths":
        """The same strengths, readable from `device`."""
        return Strengths(*(_moved(s, device) for s in self))


def _moved(strength: Strength, device: torch.device) -> Strength:
    return strength.to(device, non_blocking=True) if isinstance(strength, Tensor) else strength


def _product(strength: Any, group: int, factor: Strength) -> Strength:
    # The PyTorch path has the strengths of groups as a list of floats.
    if isinstance(strength, list) or (isinstance(strength, Tensor) and strength.ndim):
        strength = strength[group]
    one, other = (f.to(accumulate_dtype(f.device)) if isinstance(f, Tensor) else f for f in (strength, factor))
    return one * other


def accumulate_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums: float64, but on Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_strength(value: object, name: str) -> Strength:
    """`value` as a float or 0-dim tensor.

    ValueError: negative, NaN, infinite, not 0-dim. TypeError: not a real number, not a floating-point tensor.
    """
    if type(value) is float and 0 <= value < math.inf:
        return value  # as nearly always; to ask for a numbers.Real takes ten times as long
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
    except OverflowError:  # an int beyond every float
        number = math.inf
    if not 0 <= number < math.inf:  # a compiler can follow this, unlike math.isfinite
        raise ValueError(f"{name} must be finite and at least 0, got {number}")
    return number


def per_group(values: Sequence[Strength], device: torch.device, name: str) -> Strength:
    """One strength per group in the form that `Strengths` holds; ValueError for a tensor that is not on `device`.

    That form depends on the number of groups only, never on the values: another form would compile kernels again.
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
    """`values` as a tensor on `device`, copied there once for each set of values."""
    if torch.compiler.is_compiling():
        # A compiler records how a constant is made, and cannot look into caches.
        return torch.stack([torch.full((), v, dtype=accumulate_dtype(device), device=device) for v in values])
    cache = _CONSTANTS.get(device) or _CONSTANTS.setdefault(device, DeviceCache(device, size=64))
    dtype = accumulate_dtype(device)
    return cache.get(values, lambda: to_device(torch.tensor(values, dtype=dtype, device="cpu"), device))
