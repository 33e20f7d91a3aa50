"""The PyTorch path: a sweep block by block, in scratch memory that stays in cache."""

import array
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.blocks.penalty import BlockOps
from fastreg.blocks.plan import BlockPlan, reserve
from fastreg.blocks.scratch import give_back, take_memory
from fastreg.blocks.steps import take_block_steps
from fastreg.core.dtypes import accumulate_dtype
from fastreg.core.layout import Part
from fastreg.core.penalty import Measure
from fastreg.core.torch_private import is_under_a_mode
from fastreg.core.types import Mode, Request, Want, Work
from fastreg.formulas.penalty import ElasticNetPenalty, no_formulas

_FLOAT32_MAX = torch.finfo(torch.float32).max


def block_sweep(parts: Sequence[Part], work: Work, request: Request) -> Measure | None:
    """Make one sweep over the parts of one device.

    The weights are dense, gradients and states have the strides of their weights, and strengths and scale are on the
    device of the parts.
    """
    mode, want, penalty = request.mode, request.want, work.penalty
    if request.step is not None:
        measured = None
        if want is not Want.NOTHING:
            measured = block_sweep(parts, work, Request(Mode.VALUE, want))
        take_block_steps(parts, work, request)
        return measured
    if type(penalty) is not ElasticNetPenalty:
        raise no_formulas(penalty, "fastreg/blocks/penalty.py")
    device = parts[0].device
    on_host = device.type == "cpu"
    # Under a TorchDispatchMode, use no cached tensors and keep strengths as tensors.
    is_plain = on_host and not is_under_a_mode()
    scale = request.scale or (1.0,) * len(penalty.strengths)
    # Compare in host memory only: elsewhere the comparison would wait for the device.
    if mode is Mode.RESCALE and on_host and all(isinstance(s, Tensor) and s.item() == 1 for s in scale):
        return None
    strengths: list[Sequence[Any]] = []
    scaled = strengths
    if on_host and (is_plain or mode is not Mode.VALUE):
        # Floats save a pass over every block, and reading them from host memory needs no wait.
        if work.n_groups == 1 and set(map(type, penalty.strengths)) == {float}:
            strengths = [penalty.strengths]
        else:
            strengths = list(zip(*[_floats(strength, work.n_groups) for strength in penalty.strengths], strict=True))
        if mode is not Mode.VALUE:
            factors = [s.item() if isinstance(s, Tensor) else s for s in scale]
            scaled = [tuple(map(operator.mul, own, factors)) for own in strengths]
    elif mode is not Mode.VALUE:
        scaled = [penalty.of_group(group, scale).strengths for group in range(work.n_groups)]
    sums: list[list[tuple[Tensor, ...]]] = [[] for _ in range(work.n_groups)]
    memory = take_memory(device, reserve() if is_plain else 0)
    try:
        for part in parts:
            plan = part.prepared(BlockPlan)
            weights = plan.pieces_of(work.weights)
            targets = weights if request.grads is None else plan.pieces_of(request.grads)
            ops = memory.kept(part.dtype, BlockOps)
            for block in plan.blocks:
                if want is not Want.NOTHING:
                    sums[block.group].append(ops.sums(block, weights))
                if mode is not Mode.VALUE:
                    ops.update(mode, block, weights, targets, *scaled[block.group])
    finally:
        give_back(memory)
    if want is Want.NOTHING:
        return None
    dtype: Any = work.layout.value_dtype if work.layout is not None else None
    if is_plain:
        return _measure_on_host(sums, strengths, dtype, device, want)
    n_sums = max([len(each[0]) for each in sums if each], default=len(penalty.strengths))
    zeros = torch.zeros((1, n_sums), dtype=accumulate_dtype(device), device=device)
    totals = [torch.stack([*zeros, *map(torch.stack, each)]).sum(0) for each in sums]
    return penalty.weighted(torch.stack(totals), dtype)


def _measure_on_host(
    sums: list[list[tuple[Tensor, ...]]],
    strengths: Sequence[Sequence[float]],
    dtype: torch.dtype,
    device: torch.device,
    want: Want,
) -> Measure:
    """Compute `BasePenalty.weighted` in Python floats: on so few numbers, operator calls take longer."""
    memory = array.array("d")
    terms = [0.0] * len(strengths[0])
    for of_group, own in zip(sums, strengths, strict=True):
        totals = [0.0] * len(terms)
        for of_block in of_group:
            totals = list(map(operator.add, totals, map(Tensor.item, of_block)))
        terms = list(map(operator.add, terms, map(operator.mul, own, totals)))
        memory.extend(totals)
    values = [sum(terms), *terms]
    if not values[0] <= _FLOAT32_MAX:
        # scalar_tensor raises an error for a number that overflows its dtype.
        most = torch.finfo(dtype).max
        values = [math.inf if x > most else x for x in values]
    if want is Want.TOTAL:
        return Measure(torch.scalar_tensor(values[0], dtype=dtype, device=device), None, memory)
    total, *of_terms = [torch.scalar_tensor(x, dtype=dtype, device=device) for x in values]
    return Measure(total, tuple(of_terms), memory)


def _floats(strength: Any, n_groups: int) -> list[float]:
    """Return a strength in host memory as one float per group."""
    if isinstance(strength, Tensor):
        strength = strength.tolist() if strength.ndim else strength.item()
    return strength if isinstance(strength, list) else [strength] * n_groups
