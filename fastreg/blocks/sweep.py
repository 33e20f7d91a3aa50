"""The PyTorch path: a sweep block by block, through scratch memory that stays in cache."""

import array
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.blocks.penalty import BlockOps
from fastreg.blocks.plan import Walk, reserve
from fastreg.blocks.scratch import give_back, take_memory
from fastreg.blocks.steps import take_block_steps
from fastreg.core.dtypes import accumulate_dtype
from fastreg.core.layout import Part
from fastreg.core.torch_private import is_under_a_mode
from fastreg.core.types import Grads, Measure, Mode, Scale, StepInputs, Work
from fastreg.formulas.penalty import weighted_terms

_FLOAT32_MAX = torch.finfo(torch.float32).max


def block_sweep(
    parts: Sequence[Part],
    mode: Mode,
    work: Work,
    grads: Grads,
    scale: Scale,
    value_dtype: torch.dtype | None,
    with_terms: bool = True,
    update: StepInputs | None = None,
) -> Measure | None:
    """One sweep over the parts of one device.

    Args:
        work: with dense weights, and strengths on that device, as `scale`.
        grads: with the strides of their weights.
        value_dtype: of the value, or None where none is wanted.
        with_terms: whether its two terms are wanted, too.
        update: for the modes of optimizers, with states that have the strides of their weights.
    """
    if update is not None:
        found = None
        if value_dtype is not None:
            found = block_sweep(parts, Mode.VALUE, work, None, scale, value_dtype, with_terms)
        take_block_steps(parts, mode, work, grads, update)
        return found
    device = parts[0].device
    on_host = device.type == "cpu"
    # Modes must meet neither what is kept from call to call nor, in a value, floats in their tensors' place.
    is_plain = on_host and not is_under_a_mode()
    # Only host memory may be looked at: elsewhere the comparison would wait for the device.
    if mode is Mode.RESCALE and on_host and all(isinstance(s, Tensor) and s.item() == 1 for s in scale):
        return None
    strengths: list[tuple[Any, Any]] = []
    scaled = strengths
    if on_host and (is_plain or mode is not Mode.VALUE):
        # Floats save a pass over every block, and in host memory there is nothing to wait for.
        strengths = list(zip(*[_floats(strength, work.n_groups) for strength in work.strengths], strict=True))
        if mode is not Mode.VALUE:
            l1_scale, l2_scale = [s.item() if isinstance(s, Tensor) else s for s in scale]
            scaled = [(l1 * l1_scale, l2 * l2_scale) for l1, l2 in strengths]
    elif mode is not Mode.VALUE:
        scaled = [work.strengths.of_group(group, scale) for group in range(work.n_groups)]
    sums: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(work.n_groups)]
    memory = take_memory(device, reserve() if is_plain else 0)
    try:
        for part in parts:
            walk = part.prepared(Walk)
            weights = walk.pieces_of(work.weights)
            targets = weights if grads is None else walk.pieces_of(grads)
            ops = memory.kept(part.dtype, BlockOps)
            for block in walk.blocks:
                if value_dtype is not None:
                    sums[block.group].append(ops.sums(block, weights))
                if mode is not Mode.VALUE:
                    ops.update(mode, block, weights, targets, *scaled[block.group])
    finally:
        give_back(memory)
    if value_dtype is None:
        return None
    if is_plain:
        return _measure_on_host(sums, strengths, value_dtype, device, with_terms)
    zeros = torch.zeros((1, 2), dtype=accumulate_dtype(device), device=device)
    totals = [torch.stack([*zeros, *map(torch.stack, pairs)]).sum(0) for pairs in sums]
    return weighted_terms(torch.stack(totals), work.strengths, value_dtype)


def _measure_on_host(
    pairs: list[list[tuple[Tensor, Tensor]]],
    strengths: list[tuple[float, float]],
    dtype: torch.dtype,
    device: torch.device,
    with_terms: bool,
) -> Measure:
    """`formulas.weighted_terms` in Python's float64: an operator call would take longer than its work."""
    sums = array.array("d")
    l1_term = l2_term = 0.0
    for of_group, (l1, l2) in zip(pairs, strengths, strict=True):
        abs_sum = square_sum = 0.0
        for abs_tensor, square_tensor in of_group:
            abs_sum, square_sum = abs_sum + abs_tensor.item(), square_sum + square_tensor.item()
        l1_term, l2_term = l1_term + l1 * abs_sum, l2_term + l2 * square_sum
        sums.extend((abs_sum, square_sum))
    values = [l1_term + l2_term, l1_term, l2_term]
    if not values[0] <= _FLOAT32_MAX:
        # scalar_tensor refuses what overflows its dtype.
        most = torch.finfo(dtype).max
        values = [math.inf if x > most else x for x in values]
    total, *terms = [torch.scalar_tensor(x, dtype=dtype, device=device) for x in values[: 3 if with_terms else 1]]
    return Measure(total, (terms[0], terms[1]) if terms else None, sums)


def _floats(strength: Any, n_groups: int) -> list[float]:
    """A strength in host memory for each group, or one of all groups for each of them."""
    if isinstance(strength, Tensor):
        strength = strength.tolist() if strength.ndim else strength.item()
    return strength if isinstance(strength, list) else [strength] * n_groups
