"""The PyTorch path: a sweep block by block, through scratch memory that stays in cache."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.block_ops import Block, BlockOps
from fastreg.formulas import Measure, Mode, Penalty, compute_dtype, weighted_terms
from fastreg.layout import Part
from fastreg.scratch import give_back, is_under_a_mode, take_memory
from fastreg.strengths import Scale, Strengths, accumulate_dtype
from fastreg.work import Grads, Work

# Elements of a block on a CPU: small enough for the cores' caches, large enough that the cost of an operator call
# disappears (bench/results/tuning). Other devices pay for launches, not cache misses.
CPU_BLOCK = 1 << 19
# On a CPU, pieces of CPU_SMALL elements or more are not packed with others, in models of more than CPU_PACK elements.
CPU_SMALL = 1 << 14
CPU_PACK = 1 << 17
DEVICE_BLOCK = 1 << 26
# Blocks are filled up to a multiple of this. What is left over after a vector unit's last full step might be rounded in
# another way there, and differ between two operators for the same thing.
LANES = 16


class Walk:
    """The blocks of a part: large pieces of weights by themselves, small ones of a strength group together."""

    def __init__(self, part: Part) -> None:
        self._on_host = part.device.type == "cpu"
        self._is_computed_in_place = part.dtype == compute_dtype(part.dtype)
        size, small = DEVICE_BLOCK, DEVICE_BLOCK
        if self._on_host:
            # A model that fits into one pack needs no more operator calls than one tensor.
            size, small = CPU_BLOCK, min(CPU_BLOCK, CPU_SMALL if sum(part.numels) > CPU_PACK else CPU_BLOCK)
        # By position, the sizes of a weight's pieces: whole blocks, and the rest with its tail apart, to be packed.
        self.piece_sizes: dict[int, tuple[int, ...]] = {}
        for position, numel in zip(part.positions, part.numels, strict=True):
            left, tail = numel % size, numel % LANES
            rest = (left - tail, tail) if left - tail >= small else (left,)
            self.piece_sizes[position] = (size,) * (numel // size) + tuple(n for n in rest if n)
        blocks: list[Block] = []
        packs: dict[int, tuple[list[tuple[int, int]], list[int]]] = {}
        free: dict[int, int] = {}
        for position, group in zip(part.positions, part.groups, strict=True):
            for number, n in enumerate(self.piece_sizes[position]):
                if n >= small:
                    blocks.append(self._block(group, [(position, number)], [n]))
                    continue
                if free.get(group, 0) < n:
                    if group in packs:
                        blocks.append(self._block(group, *packs[group]))
                    packs[group], free[group] = ([], []), size
                packs[group][0].append((position, number))
                packs[group][1].append(n)
                free[group] -= n
        self.blocks = (*blocks, *(self._block(group, *pack) for group, pack in packs.items()))

    def pieces_of(self, tensors: Sequence[Tensor]) -> dict[int, Sequence[Tensor]]:
        """The part's share of dense `tensors`, by position: cut in storage order."""
        pieces: dict[int, Sequence[Tensor]] = {}
        for i, sizes in self.piece_sizes.items():
            tensor = tensors[i]
            if not tensor.is_contiguous():
                tensor = tensor.as_strided((tensor.numel(),), (1,))
            pieces[i] = (tensor,) if len(sizes) == 1 else tensor.view(-1).split(sizes)
        return pieces

    def _block(self, group: int, pieces: list[tuple[int, int]], sizes: list[int]) -> Block:
        lanes = LANES if self._on_host else 1
        padded = -(-sum(sizes) // lanes) * lanes
        in_place = len(sizes) == 1 and padded == sizes[0] and self._is_computed_in_place
        return Block(group, tuple(pieces), tuple(sizes), padded, in_place)


def block_sweep(
    parts: Sequence[Part], mode: Mode, work: Work, grads: Grads, scale: Scale, value_dtype: torch.dtype | None
) -> Measure | None:
    """One sweep over the parts of one device.

    Args:
        work: with dense weights, and strengths on that device, as `scale`.
        grads: with the strides of their weights.
        value_dtype: of the value, or None where none is wanted.
    """
    device = parts[0].device
    on_host = device.type == "cpu"
    # Only host memory may be looked at: elsewhere the comparison would wait for the device.
    if mode is Mode.RESCALE and on_host and all(isinstance(s, Tensor) and bool(s == 1) for s in scale):
        return None
    of_group: list[tuple[Any, Any]] = []
    if mode is not Mode.VALUE:
        strengths = work.strengths
        if on_host:
            # Floats save a pass over every block, and in host memory there is nothing to wait for.
            strengths, scale = Strengths(*map(_on_host, strengths)), Scale(*map(_on_host, scale))
        of_group = [strengths.of_group(group, scale) for group in range(work.n_groups)]
    sums: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(work.n_groups)]
    memory = take_memory(device, CPU_BLOCK)
    try:
        for part in parts:
            walk = part.prepared(Walk)
            sources = walk.pieces_of(work.weights)
            targets = sources if grads is None else walk.pieces_of(grads)
            ops = BlockOps(part.dtype, device, memory)
            for block in walk.blocks:
                w = ops.read(block, sources, for_sums=mode is Mode.VALUE)
                if value_dtype is not None:
                    sums[block.group].append(ops.sums(w))
                if mode is not Mode.VALUE:
                    ops.update(mode, block, w, targets, *of_group[block.group])
    finally:
        give_back(memory)
    if value_dtype is None:
        return None
    if on_host and not is_under_a_mode():
        return _measure_on_host(sums, work.strengths, value_dtype)
    zeros = torch.zeros((1, 2), dtype=accumulate_dtype(device), device=device)
    totals = [torch.stack([*zeros, *map(torch.stack, pairs)]).sum(0) for pairs in sums]
    return weighted_terms(torch.stack(totals), work.strengths, value_dtype)


def _measure_on_host(pairs: list[list[tuple[Tensor, Tensor]]], strengths: Strengths, dtype: torch.dtype) -> Measure:
    """`formulas.weighted_terms` in Python's float64: an operator call would take longer than its work."""
    strengths = Strengths(*map(_on_host, strengths))
    sums = [[sum([pair[i].item() for pair in of_group]) for i in range(2)] for of_group in pairs]
    l1_term: Any = 0.0
    l2_term: Any = 0.0
    for group, (abs_sum, square_sum) in enumerate(sums):
        l1, l2 = strengths.of_group(group)
        l1_term, l2_term = l1_term + l1 * abs_sum, l2_term + l2 * square_sum
    most = torch.finfo(dtype).max
    # scalar_tensor refuses what overflows its dtype.
    values = [math.inf if x > most else x for x in (l1_term + l2_term, l1_term, l2_term)]
    penalty = Penalty(*[torch.scalar_tensor(x, dtype=dtype, device="cpu") for x in values])
    return Measure(penalty, torch.tensor(sums, dtype=torch.float64, device="cpu"))


def _on_host(strength: Any) -> Any:
    """A strength in host memory as a float, or a list of floats with one for each group."""
    return strength.detach().tolist() if isinstance(strength, Tensor) else strength
