"""l1 and l2 on their way to a sweep: checked, grouped, and scaled."""

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from fastreg.device_cache import DeviceCache, to_device
from fastreg.dtensor import is_dtensor

Strength: TypeAlias = float | Tensor
Entry = TypeVar("Entry", bound=tuple[Strength | None, ...])


class Scale(NamedTuple):
    """Factors on the strengths, floats or 0-dim tensors: upstream gradients, a loss scale, a learning rate."""

    l1: Strength = 1.0
    l2: Strength = 1.0

    def on(self, device: torch.device) -> "Scale":
        """The same scale, readable from `device`."""
        return Scale(*(s.to(device) if isinstance(s, Tensor) else s for s in self))


UNSCALED = Scale()


class Strengths(NamedTuple):
    """Each a float or a 0-dim tensor that holds for every weight, or a tensor [n_groups]."""

    l1: Strength
    l2: Strength

    def of_group(self, group: int, scale: Scale = UNSCALED) -> tuple[Strength, Strength]:
        """The pair for one group, scaled in the precision of the accumulator."""
        return _pick(self.l1, group, scale.l1), _pick(self.l2, group, scale.l2)

    def on(self, device: torch.device) -> "Strengths":
        """The same strengths, readable from `device`."""
        return Strengths(*(s.to(device, non_blocking=True) if isinstance(s, Tensor) else s for s in self))


class Measure(NamedTuple):
    """What a sweep that was asked for the value returns."""

    total: Tensor  # 0-dim, of the value's dtype
    l1: Tensor  # 0-dim
    l2: Tensor  # 0-dim
    sums: Tensor  # float64 [n_groups, 2]: sums of |w| and w² of each strength group


def measure(sums: Tensor, strengths: Strengths, dtype: torch.dtype) -> Measure:
    """The weighted terms of `sums`, each rounded once."""
    l1_term, l2_term = (strengths.l1 * sums[:, 0]).sum(), (strengths.l2 * sums[:, 1]).sum()
    return Measure((l1_term + l2_term).to(dtype), l1_term.to(dtype), l2_term.to(dtype), sums)


def value_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The value's, for weights of `dtypes`: float32, or float64 where any weight is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _pick(strength: Strength, group: int, factor: Strength) -> Strength:
    if isinstance(strength, Tensor) and strength.ndim:
        strength = strength[group]
    return _wide(strength) * _wide(factor)


def _wide(factor: Strength) -> Strength:
    return factor.to(accumulate_dtype(factor.device)) if isinstance(factor, Tensor) else factor


def accumulate_dtype(device: torch.device) -> torch.dtype:
    """float64, but on Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_strength(value: object, name: str) -> Strength:
    """`value` as a float or 0-dim tensor.

    Raises:
        ValueError: negative, NaN or infinite, or a tensor that is not 0-dim.
        TypeError: not a real number, or not a floating-point tensor.
    """
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
        raise TypeError(f"{name} must be a float or a 0-dim tensor, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond every float
        number = math.inf
    if not 0 <= number < math.inf:  # which a compiler can follow, unlike math.isfinite
        raise ValueError(f"{name} must be finite and at least 0, got {number}")
    return number


def same(one: Strength | None, other: Strength | None) -> bool:
    """Whether two are known to be equal; tensors would have to be read.

    Not by hash, for which a compiler would take a float for a constant.
    """
    return one is other or not (isinstance(one, Tensor) or isinstance(other, Tensor) or one != other)


def place(entry: Entry, known: list[Entry]) -> int:
    """Where `known` has a tuple the `same` as `entry`, which is added where it has none."""
    for i, one in enumerate(known):
        if all(map(same, one, entry)):
            return i
    known.append(entry)
    return len(known) - 1


def combine(per_group: Sequence[Strength], device: torch.device, name: str) -> Strength:
    """One strength per group as what a sweep takes: a float where all agree, else a 0-dim or [n_groups] tensor."""
    for strength in per_group:
        if isinstance(strength, Tensor) and strength.device != device:
            raise ValueError(
                f"{name} is on {strength.device} but the weights are on {device}; move it with .to({str(device)!r})"
            )
    if len(per_group) == 1:
        return per_group[0]
    constant = _new_constant if torch.compiler.is_compiling() else _constant
    floats = [s for s in per_group if not isinstance(s, Tensor)]
    if len(floats) == len(per_group):
        return floats[0] if all(s == floats[0] for s in floats) else constant(tuple(floats), device)
    dtype = accumulate_dtype(device)
    return torch.stack([s.to(dtype) if isinstance(s, Tensor) else constant((s,), device)[0] for s in per_group])


_CONSTANTS: dict[torch.device, DeviceCache] = {}


def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copied to the device once for each set of values, not at every call."""
    cache = _CONSTANTS.setdefault(device, DeviceCache(device, size=64))
    dtype = accumulate_dtype(device)
    return cache.get(values, lambda: to_device(torch.tensor(values, dtype=dtype, device="cpu"), device))


def _new_constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """For a compiler, which records how a constant is made and does not look into caches; no copy from the host."""
    return torch.stack([torch.full((), v, dtype=accumulate_dtype(device), device=device) for v in values])
