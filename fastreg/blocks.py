"""The PyTorch path: a sweep block by block, through scratch memory that stays in cache."""

import array
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.block_ops import LANES, Block, BlockOps
from fastreg.formulas import Measure, Mode, compute_dtype, weighted_terms
from fastreg.layout import Part
from fastreg.scratch import give_back, is_under_a_mode, take_memory
from fastreg.strengths import Scale, accumulate_dtype
from fastreg.work import Grads, Work

# Elements of a block on a CPU: small enough for the cores' caches, large enough that the cost of an operator call
# disappears (bench/results/tuning). Other devices pay for launches, not cache misses.
CPU_BLOCK = 1 << 19
# On a CPU, pieces of CPU_SMALL elements or more are changed where they are, not in copies together with others.
CPU_SMALL = 1 << 14
# PyTorch's operators use several cores from here on. Such pieces are worked on by themselves: each core then comes back
# to its own share of scratch memory, while one core copies all that is packed.
CPU_ALONE = 1 << 15
DEVICE_BLOCK = 1 << 26
_FLOAT32_MAX = torch.finfo(torch.float32).max


class Walk:
    """The blocks of a part: pieces of weights of one strength group, as many as fit into a block."""

    def __init__(self, part: Part) -> None:
        size, small, alone, lanes = DEVICE_BLOCK, DEVICE_BLOCK, DEVICE_BLOCK, 1
        if part.device.type == "cpu":
            size, small, lanes = CPU_BLOCK, min(CPU_BLOCK, CPU_SMALL), LANES
            # A model of one block needs no more operator calls than one tensor.
            alone = min(CPU_BLOCK, CPU_ALONE) if sum(part.numels) > CPU_BLOCK else CPU_BLOCK
        is_computed_in_place = part.dtype == compute_dtype(part.dtype)
        self._positions = part.positions
        # Weights that are cut, by their place among the part's, and their pieces' sizes. The pieces follow all weights.
        self._cuts: list[tuple[int, list[int]]] = []
        n_pieces = len(part.positions)
        blocks: list[Block] = []
        filled: dict[int, tuple[list[int], list[int], list[int]]] = {}
        free: dict[int, int] = {}
        for place, (numel, group) in enumerate(zip(part.numels, part.groups, strict=True)):
            left, tail = numel % size, numel % lanes
            # A piece that is changed where it is fills the vector units.
            rest = [left - tail, tail] if is_computed_in_place and left - tail >= small else [left]
            sizes = [size] * (numel // size) + [n for n in rest if n]
            numbers = range(place, place + 1)
            if len(sizes) > 1:
                self._cuts.append((place, sizes))
                numbers = range(n_pieces, n_pieces + len(sizes))
                n_pieces += len(sizes)
            for number, n in zip(numbers, sizes, strict=bool(sizes)):
                is_in_place = is_computed_in_place and n >= small
                if n >= alone:
                    one, none = (number,), ()
                    blocks.append(Block(group, one, one, none) if is_in_place else Block(group, one, none, one))
                    continue
                if free.get(group, 0) < n:
                    if group in filled:
                        blocks.append(Block(group, *map(tuple, filled[group])))
                    filled[group], free[group] = ([], [], []), size
                pieces, in_place, packed = filled[group]
                pieces.append(number)
                (in_place if is_in_place else packed).append(number)
                free[group] -= n
        self.blocks = (*blocks, *(Block(group, *map(tuple, lists)) for group, lists in filled.items()))

    def pieces_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The part's share of dense `tensors`: each in storage order, then the pieces of those that are cut."""
        pieces = [tensors[i] for i in self._positions]
        if not all(map(Tensor.is_contiguous, pieces)):
            pieces = [t if t.is_contiguous() else t.as_strided((t.numel(),), (1,)) for t in pieces]
        for place, sizes in self._cuts:
            pieces += pieces[place].view(-1).split(sizes)
        return pieces


def block_sweep(
    parts: Sequence[Part],
    mode: Mode,
    work: Work,
    grads: Grads,
    scale: Scale,
    value_dtype: torch.dtype | None,
    with_terms: bool = True,
) -> Measure | None:
    """One sweep over the parts of one device.

    Args:
        work: with dense weights, and strengths on that device, as `scale`.
        grads: with the strides of their weights.
        value_dtype: of the value, or None where none is wanted.
        with_terms: whether its two terms are wanted, too.
    """
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
    memory = take_memory(device, CPU_BLOCK if is_plain else 0)
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
