"""The sweep in pure PyTorch: for CPUs, for devices without Triton, and as a second opinion on the kernels.

`sweep` visits weights block by block. The functions above it state the same mathematics as expressions, for the places
where autograd or a compiler has to see it.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.blocks import BlockOps
from fastreg.plan import Mode, Part, compute_dtype
from fastreg.scratch import is_watched
from fastreg.strengths import Measure, Scale, Strength, Strengths, accumulate_dtype, measure


def group_sums(weights: Sequence[Tensor], groups: Sequence[int]) -> Tensor:
    """Sums of |w| and w² of each strength group, float64 [n_groups, 2], that autograd and compilers see through."""
    device = weights[0].device
    zero = torch.zeros((), dtype=accumulate_dtype(device), device=device)
    sums = [[zero, zero] for _ in range(max(groups) + 1)]
    for w, group in zip(weights, groups, strict=True):
        wide = w.to(compute_dtype(w.dtype))
        abs_sum = wide.abs().sum(dtype=accumulate_dtype(w.device))
        # Squared in float64, like everywhere: float32 overflows at 2e19.
        square_sum = wide.to(accumulate_dtype(w.device)).square().sum()
        sums[group] = [sums[group][0] + abs_sum.to(device), sums[group][1] + square_sum.to(device)]
    return torch.stack([torch.stack(pair) for pair in sums])


def gradient(w: Tensor, l1: Strength, l2: Strength) -> Tensor:
    """l1 * sign(w) + 2 * l2 * w in float32 or better, with one rounding for product and sum where the processor can."""
    wide = w.to(compute_dtype(w.dtype))
    slope = 2 * l2
    if not isinstance(slope, Tensor):
        # full, which takes a float that a compiler holds as a symbol.
        slope = torch.full((), slope, dtype=accumulate_dtype(w.device), device=w.device)
    return torch.addcmul(wide.sign() * l1, wide, slope).to(w.dtype)


def prox(w: Tensor, l1: Strength, l2: Strength) -> Tensor:
    """sign(w) * max(|w| - l1, 0) / (1 + 2 * l2), for strengths that carry the step, likewise."""
    wide = w.to(compute_dtype(w.dtype))
    magnitude = wide.abs()
    shrunk = (magnitude - l1) / (1 + 2 * l2) * wide.sign()
    return torch.where(magnitude <= l1, 0.0, shrunk).to(w.dtype)


def traced_update(
    weights: Sequence[Tensor],
    groups: Sequence[int],
    mode: Mode,
    strengths: Strengths,
    scale: Scale,
    grads: Sequence[Tensor] | None,
) -> None:
    """What `sweep` does to weights or gradients, of any device and strides, without blocks or scratch memory."""
    for i, (w, group) in enumerate(zip(weights, groups, strict=True)):
        l1, l2 = strengths.of_group(group, scale)
        if mode == Mode.ACCUMULATE and grads is not None:
            grads[i].add_(gradient(w, l1, l2))
        elif mode == Mode.PROX:
            w.copy_(prox(w, l1, l2))


def sweep(
    parts: Sequence[Part],
    mode: Mode,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    strengths: Strengths,
    scale: Scale,
    n_groups: int,
    value_dtype: torch.dtype | None,
) -> Measure | None:
    """One sweep over the parts of one device, block by block through scratch memory that stays in cache.

    Args:
        weights, grads: dense tensors in the caller's order, gradients with the strides of their weights.
        scale: factors on the strengths: the upstream gradients, or the learning rate.
        value_dtype: of the value, or None where none is wanted.
    """
    device = parts[0].device
    # Only host memory may be looked at: elsewhere the comparison would wait for the device.
    if mode == Mode.RESCALE and all(isinstance(s, Tensor) and s.device.type == "cpu" and bool(s == 1) for s in scale):
        return None
    of_group: list[tuple[Any, Any]] = []
    if mode != Mode.VALUE:
        if device.type == "cpu":
            # Floats save a pass over every block, and in host memory there is nothing to wait for.
            scale = Scale(*(s.detach().item() if isinstance(s, Tensor) else s for s in scale))
        of_group = [strengths.of_group(group, scale) for group in range(n_groups)]
        if device.type == "cpu":
            of_group = [(float(l1), float(l2)) for l1, l2 in of_group]
    sums: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(n_groups)]
    for part in parts:
        sources = _pieces(weights, part)
        targets = sources if grads is None else _pieces(grads, part)
        ops = BlockOps(part)
        for block in part.blocks:
            w = ops.read(block, sources, for_sums=mode == Mode.VALUE)
            if value_dtype is not None:
                sums[block.group].append(ops.sums(w))
            if mode != Mode.VALUE:
                ops.update(mode, block, w, targets, *of_group[block.group])
    if value_dtype is None:
        return None
    if device.type == "cpu" and not is_watched():
        return _measure_on_host(sums, strengths, value_dtype)
    zeros = torch.zeros((1, 2), dtype=accumulate_dtype(device), device=device)
    totals = [torch.stack([*zeros, *map(torch.stack, pairs)]).sum(0) for pairs in sums]
    return measure(torch.stack(totals), strengths, value_dtype)


def _measure_on_host(pairs: list[list[tuple[Tensor, Tensor]]], strengths: Strengths, dtype: torch.dtype) -> Measure:
    """`fastreg.strengths.measure` in Python's float64: an operator call would take longer than its work."""
    totals = [[sum([pair[i].item() for pair in of_group]) for i in range(2)] for of_group in pairs]
    sums = torch.tensor(totals, dtype=torch.float64, device="cpu")
    l1, l2 = strengths
    if isinstance(l1, Tensor) or isinstance(l2, Tensor):
        return measure(sums, strengths, dtype)
    l1_term, l2_term = sum([l1 * total[0] for total in totals]), sum([l2 * total[1] for total in totals])
    most = torch.finfo(dtype).max
    total, l1_term, l2_term = [math.inf if x > most else x for x in (l1_term + l2_term, l1_term, l2_term)]
    make = functools.partial(torch.scalar_tensor, dtype=dtype, device="cpu")
    return Measure(make(total), make(l1_term), make(l2_term), sums)


def _pieces(tensors: Sequence[Tensor], part: Part) -> dict[int, Sequence[Tensor]]:
    """The part's share of dense `tensors`, by position: contiguous, and cut in storage order as the part says."""
    pieces: dict[int, Sequence[Tensor]] = {}
    for i, sizes in part.piece_sizes.items():
        tensor = tensors[i]
        if not tensor.is_contiguous():
            tensor = tensor.as_strided((tensor.numel(),), (1,))
        pieces[i] = (tensor,) if len(sizes) == 1 else tensor.view(-1).split(sizes)
    return pieces
