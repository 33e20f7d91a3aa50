"""The elastic net as plain PyTorch expressions: the reference that every other implementation is tested against.

`kernels/penalty.py` and `blocks/penalty.py` state the same formulas. Autograd, torch.compile and
torch.func trace the expressions here.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreg.core.dtypes import accumulate_dtype, compute_dtype
from fastreg.core.penalty import BasePenalty, Scale, Strength, times
from fastreg.core.types import Mode


class Penalty(NamedTuple):
    """A penalty and its weighted terms, as they enter the loss: `l1` and `l2` sum to `total`.

    All are 0-dim tensors, float32 (float64 if any weight is float64), on the first weight's device.
    """

    total: Tensor
    l1: Tensor
    l2: Tensor


class ElasticNetPenalty(BasePenalty):
    """The elastic net, l1 * Σ|w| + l2 * Σw²."""

    NAMES = ("l1", "l2")
    RESULT = Penalty

    def sums(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return Σ|w| and Σw², both 0-dim, summed in float64."""
        # Convert before squaring: float32 squares overflow at 2e19, and so does backward through them.
        wide = w.to(accumulate_dtype(w.device))
        return wide.abs().sum(), wide.square().sum()

    def gradient(self, w: Tensor) -> Tensor:
        """Return l1 * sign(w) + 2 * l2 * w, in float32 or float64, rounded once to the dtype of `w`."""
        l1, l2 = self.strengths
        wide = w.to(compute_dtype(w.dtype))
        slope: Any = 2 * l2
        if not isinstance(slope, Tensor):
            # torch.full also accepts a float that torch.compile holds as a symbol.
            slope = torch.full((), slope, dtype=accumulate_dtype(w.device), device=w.device)
        l1, slope = with_finite_slope(l1, slope, wide.dtype)
        # An l1 beyond the range of float32 is infinite, and inf * sign(0) is NaN. Adding 0 turns -0 into +0.
        signed = torch.where(wide == 0, 0.0, wide.sign() * l1) + 0.0
        return torch.addcmul(signed, wide, slope).to(w.dtype)

    def prox(self, w: Tensor) -> Tensor:
        """Return sign(w) * max(|w| - l1, 0) / (1 + 2 * l2), rounded once, with one division for all elements."""
        l1, l2 = self.strengths
        wide = w.to(compute_dtype(w.dtype))
        magnitude = wide.abs()
        shrunk = (magnitude - l1) * (1 / (1 + 2 * l2)) * wide.sign()
        return torch.where(magnitude <= l1, 0.0, shrunk).to(w.dtype)


def no_formulas(penalty: BasePenalty, file: str) -> NotImplementedError:
    """Return the error for a penalty whose formulas `file` does not have, and which it would compute wrongly."""
    return NotImplementedError(f"{file} does not have the formulas of {type(penalty).__name__}; add them there")


def with_finite_slope(l1: Strength, slope: Strength, dtype: torch.dtype) -> tuple[Strength, Strength]:
    """Return `l1` and `slope`, or inf and 1 if `slope` is beyond `dtype`.

    The gradient of so large an l2 is infinite, too, except at 0, where inf * 0 would be NaN.
    """
    most = torch.finfo(dtype).max
    if isinstance(slope, Tensor):
        is_beyond = slope > most
        return torch.zeros_like(slope).masked_fill(is_beyond, math.inf) + l1, slope.masked_fill(is_beyond, 1.0)
    return (math.inf, 1.0) if slope > most else (l1, slope)


def gradient_derivatives(w: Tensor, l2: Strength, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `upstream` times the derivatives of the gradient by w (like w), by l1 and by l2 (0-dim float64)."""
    wide = upstream.double()
    return (upstream * times(2.0, l2)).to(w.dtype), (wide * w.sign()).sum(), (wide * (2 * w)).sum()


def sums_of_groups(
    weights: Sequence[Tensor], groups: Sequence[int | range], n_groups: int, penalty: BasePenalty
) -> Tensor:
    """Return the sums of each strength group, float64 [n_groups, n_sums], on the first weight's device."""
    device = weights[0].device
    of_groups: list[list[Tensor]] = [[] for _ in range(n_groups)]
    for w, group in zip(weights, groups, strict=True):
        for segment, number in segments_of(w, group):
            of_groups[number].append(torch.stack(penalty.sums(segment)).to(device))
    zeros = torch.zeros_like(next(each[0] for each in of_groups if each))
    return torch.stack([sum(each, zeros) for each in of_groups])


def apply_penalty(
    mode: Mode,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    groups: Sequence[int | range],
    penalty: BasePenalty,
    scale: Scale,
) -> None:
    """Write to `grads`, or in PROX to `weights`, as `mode` says."""
    for w, grad, group in zip(weights, grads or weights, groups, strict=True):
        targets = segments_of(w if mode is Mode.PROX else grad, group)
        for (segment, number), (target, _) in zip(segments_of(w, group), targets, strict=True):
            own = penalty.of_group(number, scale)
            if mode is Mode.PROX:
                target.copy_(own.prox(segment))
            elif mode is Mode.ACCUMULATE:
                target.add_(own.gradient(segment))
            elif mode is not Mode.VALUE:
                target.copy_(own.gradient(segment))


def gradient_of_segments(w: Tensor, group: int | range, penalty: BasePenalty, scale: Scale) -> Tensor:
    """Return the gradient of one weight. Each segment uses the strengths of its group."""
    gradients = [penalty.of_group(number, scale).gradient(segment) for segment, number in segments_of(w, group)]
    return gradients[0] if isinstance(group, int) else torch.stack(gradients).view_as(w)


def segments_of(tensor: Tensor, group: int | range) -> Iterator[tuple[Tensor, int]]:
    """Yield the segments of a tensor with their groups. A tensor with several segments must be contiguous."""
    if isinstance(group, int):
        yield tensor, group
    else:
        yield from zip(tensor.view(len(group), -1), group, strict=True)
