"""The mathematics as plain PyTorch expressions: the reference that every other implementation is tested against.

`terms`, `gradient` and `prox` state the formulas of fastreg.penalty, as `kernels/sweep_kernel.py` and `block_ops.py` do
for their own purposes. Autograd, compilers and transforms see through what is here.
"""

import array
import enum
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastreg.strengths import Scale, Strength, Strengths, accumulate_dtype


class Mode(enum.Enum):
    """What a sweep does besides reading the weights; the kernels know the modes by these names."""

    VALUE = "value"  # nothing
    GRADIENT = "gradient"  # writes the gradient
    RESCALE = "rescale"  # `grads` hold the gradient for scale 1: writes it anew, or leaves it if the scale is 1
    ACCUMULATE = "accumulate"  # adds the gradient to .grad in place
    PROX = "prox"  # replaces w by its proximal step
    ADAM_PROX = "adam_prox"  # the same with the step sizes of Adam, elementwise; this and the others have an Update
    SGD = "sgd"  # a step of SGD without a momentum buffer
    MOMENTUM = "momentum"  # with one
    ADAM = "adam"  # a step of Adam or AdamW
    AMSGRAD = "amsgrad"  # which also keeps the largest second moment


class Penalty(NamedTuple):
    """A penalty and its parts: 0-dim tensors, float32 (float64 if any weight is), on the first weight's device.

    `l1` and `l2` are the weighted terms, as they enter the loss: they sum to `total`.
    """

    total: Tensor
    l1: Tensor
    l2: Tensor


class Measure(NamedTuple):
    """The value that a sweep found."""

    total: Tensor
    terms: tuple[Tensor, Tensor] | None  # the weighted l1 and l2 terms; None where only the total was asked for
    memory: "Tensor | array.array[float]"  # what `sums` are read from: float64, pairs, those of the groups first

    @property
    def penalty(self) -> Penalty:
        """The value as users see it, of a measure with terms."""
        assert self.terms is not None
        return Penalty(self.total, *self.terms)

    def sums(self, n_groups: int) -> Tensor:
        """Σ|w| and Σw² of each strength group, float64 [n_groups, 2]."""
        if not isinstance(self.memory, Tensor):
            # The quickest way from floats to a tensor, which then owns their memory.
            return torch.frombuffer(self.memory, dtype=torch.float64).view(-1, 2)
        return self.memory[:n_groups] if len(self.memory) > n_groups else self.memory


def together(one: Measure, other: Measure) -> Measure:
    """The value of two lists of weights; not the sums."""
    parts = zip(one.penalty, other.penalty, strict=True)
    total, l1_term, l2_term = (a.double() + b.to(a.device) for a, b in parts)
    dtype = value_dtype([one.total.dtype, other.total.dtype])
    return Measure(total.to(dtype), (l1_term.to(dtype), l2_term.to(dtype)), torch.empty(0))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for weights of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def value_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype of the value for weights of `dtypes`."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


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
