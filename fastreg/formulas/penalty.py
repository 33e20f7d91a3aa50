"""The mathematics as plain PyTorch expressions: the reference that every other implementation is tested against.

`terms`, `gradient` and `prox` state the formulas of fastreg.functional, as `kernels/penalty.py` and
`blocks/penalty.py` do for their own purposes. Autograd, compilers and transforms see through what is here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.core.dtypes import accumulate_dtype, compute_dtype
from fastreg.core.types import Measure, Mode, Scale, Strength, Strengths


def terms(w: Tensor) -> tuple[Tensor, Tensor]:
    """Σ|w| and Σw², both 0-dim, summed in float64."""
    # Float64 from the element on: float32 squares overflow at 2e19, and so does what comes back through autograd.
    wide = w.to(accumulate_dtype(w.device))
    return wide.abs().sum(), wide.square().sum()


def gradient(w: Tensor, l1: Strength, l2: Strength) -> Tensor:
    """l1 * sign(w) + 2 * l2 * w, in float32 or better, rounded once to the dtype of `w`."""
    wide = w.to(compute_dtype(w.dtype))
    slope = 2 * l2
    if not isinstance(slope, Tensor):
        # full() also takes a float that a compiler holds as a symbol.
        slope = torch.full((), slope, dtype=accumulate_dtype(w.device), device=w.device)
    # An l1 beyond float32 is infinite there, and infinity times sign(0) would be NaN; one of 0 leaves no sign on zeros.
    signed = torch.where(wide == 0, 0.0, wide.sign() * l1) + 0.0
    return torch.addcmul(signed, wide, slope).to(w.dtype)


def prox(w: Tensor, l1: Strength, l2: Strength) -> Tensor:
    """sign(w) * max(|w| - l1, 0) / (1 + 2 * l2), rounded likewise, with one division for all elements."""
    wide = w.to(compute_dtype(w.dtype))
    magnitude = wide.abs()
    shrunk = (magnitude - l1) * (1 / (1 + 2 * l2)) * wide.sign()
    return torch.where(magnitude <= l1, 0.0, shrunk).to(w.dtype)


def gradient_derivatives(w: Tensor, l2: Strength, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`upstream` times the derivatives of `gradient` in w (like w), in l1 and in l2 (0-dim float64)."""
    wide = upstream.double()
    return (upstream * (2 * l2)).to(w.dtype), (wide * w.sign()).sum(), (wide * (2 * w)).sum()


def sums_of_groups(weights: Sequence[Tensor], groups: Sequence[int], n_groups: int) -> Tensor:
    """The terms of each strength group, float64 [n_groups, 2], on the first weight's device."""
    device = weights[0].device
    zero = torch.zeros((), dtype=accumulate_dtype(device), device=device)
    sums = [[zero, zero] for _ in range(n_groups)]
    for w, group in zip(weights, groups, strict=True):
        abs_sum, square_sum = terms(w)
        sums[group] = [sums[group][0] + abs_sum.to(device), sums[group][1] + square_sum.to(device)]
    return torch.stack([torch.stack(pair) for pair in sums])


def update(
    mode: Mode,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    groups: Sequence[int],
    strengths: Strengths,
    scale: Scale,
) -> None:
    """Does to `grads`, or in PROX to `weights`, what `mode` says."""
    for i, (w, group) in enumerate(zip(weights, groups, strict=True)):
        l1, l2 = strengths.of_group(group, scale)
        if mode is Mode.PROX:
            w.copy_(prox(w, l1, l2))
        elif mode is Mode.ACCUMULATE and grads is not None:
            grads[i].add_(gradient(w, l1, l2))
        elif mode is not Mode.VALUE and grads is not None:
            grads[i].copy_(gradient(w, l1, l2))


def weighted_terms(sums: Tensor, strengths: Strengths, dtype: torch.dtype) -> Measure:
    """The weighted terms of `sums` [n_groups, 2] and their total, each rounded once to `dtype`."""
    l1_term, l2_term = (strengths.l1 * sums[:, 0]).sum(), (strengths.l2 * sums[:, 1]).sum()
    return Measure((l1_term + l2_term).to(dtype), (l1_term.to(dtype), l2_term.to(dtype)), sums)
