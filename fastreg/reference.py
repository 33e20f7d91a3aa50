"""The sweep in pure PyTorch: for CPUs, for devices without Triton, and as a second opinion on the kernels.

`sweep` works in blocks through scratch memory that stays in cache. The functions above it state the same mathematics as
expressions, for the places where autograd or a compiler has to see it.
"""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from fastreg.plan import Block, Mode, Part
from fastreg.strengths import Measure, Scale, Strength, Strengths, accumulate_dtype, measure


def group_sums(weights: Sequence[Tensor], groups: Sequence[int]) -> Tensor:
    """Sums of |w| and w² of each strength group, float64 [n_groups, 2], that autograd and compilers see through."""
    device = weights[0].device
    zero = torch.zeros((), dtype=accumulate_dtype(device), device=device)
    sums = [[zero, zero] for _ in range(max(groups) + 1)]
    for w, group in zip(weights, groups, strict=True):
        wide = w.to(_compute_dtype(w.dtype))
        abs_sum = wide.abs().sum(dtype=accumulate_dtype(w.device))
        # Squared in float64, like everywhere: float32 overflows at 2e19.
        square_sum = wide.to(accumulate_dtype(w.device)).square().sum()
        sums[group] = [sums[group][0] + abs_sum.to(device), sums[group][1] + square_sum.to(device)]
    return torch.stack([torch.stack(pair) for pair in sums])


def gradient(w: Tensor, l1: Strength, l2: Strength) -> Tensor:
    """l1 * sign(w) + 2 * l2 * w in float32 or better, rounded once."""
    wide = w.to(_compute_dtype(w.dtype))
    return (wide.sign() * l1 + wide * (2 * l2)).to(w.dtype)


def prox(w: Tensor, l1: Strength, l2: Strength) -> Tensor:
    """sign(w) * max(|w| - l1, 0) / (1 + 2 * l2), for strengths that carry the step, likewise."""
    wide = w.to(_compute_dtype(w.dtype))
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
    """One sweep over the parts of one device.

    Args:
        weights, grads: dense tensors in the caller's order, gradients with the strides of their weights.
        scale: factors on the strengths: the upstream gradients, or the learning rate.
        value_dtype: of the value, or None where none is wanted.
    """
    # Only host memory may be looked at: elsewhere the comparison would wait for the device.
    if mode == Mode.RESCALE and all(isinstance(s, Tensor) and s.device.type == "cpu" and bool(s == 1) for s in scale):
        return None
    of_group = [strengths.of_group(group, scale) for group in range(n_groups)]
    if parts[0].device.type == "cpu":
        # Floats save a pass over every block, and in host memory there is nothing to wait for.
        of_group = [(float(l1), float(l2)) for l1, l2 in of_group]
    sums: list[Tensor] = []
    sum_groups: list[int] = []
    for part in parts:
        flat = {i: _flat(weights[i]) for i in part.positions}
        flat_grads = {i: _flat(grads[i]) for i in part.positions} if grads is not None else flat
        scratch = _Scratch(part)
        for block in part.blocks:
            pieces = _pieces(flat, block)
            if mode == Mode.VALUE:
                sums += scratch.sums(pieces, block.sizes)
                sum_groups.append(block.group)
                continue
            w = scratch.read(pieces, block.sizes)
            if value_dtype is not None:
                sums += scratch.sums([w], (w.numel(),))
                sum_groups.append(block.group)
            l1, l2 = of_group[block.group]
            if mode == Mode.PROX:
                scratch.write(scratch.prox(w, l1, l2), pieces, block.sizes)
            else:
                result = scratch.gradient(w, l1, l2)
                scratch.write(result, _pieces(flat_grads, block), block.sizes, add=mode == Mode.ACCUMULATE)
    if value_dtype is None:
        return None
    device = parts[0].device
    if sums and n_groups == 1:
        totals = torch.stack(sums).view(-1, 2).sum(0, keepdim=True)
    else:
        totals = torch.zeros((n_groups, 2), dtype=accumulate_dtype(device), device=device)
        if sums:
            totals.index_add_(0, torch.tensor(sum_groups, device=device), torch.stack(sums).view(-1, 2))
    return measure(totals, strengths, value_dtype)


class _Scratch:
    """Block-sized buffers, and the operations that fill them without touching other memory."""

    def __init__(self, part: Part) -> None:
        size = max((sum(block.sizes) for block in part.blocks), default=0)
        self.compute = _compute_dtype(part.dtype)
        self.storage = part.dtype
        self._input = torch.empty(size, dtype=self.compute, device=part.device)
        self._result = torch.empty_like(self._input)
        self._second = torch.empty_like(self._input)
        self._wide = torch.empty(size, dtype=accumulate_dtype(part.device), device=part.device)

    def read(self, pieces: list[Tensor], sizes: tuple[int, ...]) -> Tensor:
        """The pieces as one vector in the dtype of the arithmetic; no copy where they are that already."""
        if len(pieces) == 1 and self.storage == self.compute:
            return pieces[0]
        return _gather(self._input, pieces, sizes)

    def sums(self, pieces: list[Tensor], sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Sums of |w| and w². float32 sums lose the promised digits on repeated or badly scaled values."""
        wide = _gather(self._wide, pieces, sizes)
        square_sum = torch.dot(wide, wide)
        return wide.abs_().sum(), square_sum

    def gradient(self, w: Tensor, l1: Tensor | float, l2: Tensor | float) -> Tensor:
        sign = torch.sign(w, out=self._second[: w.numel()])
        result = torch.mul(w, 2 * l2, out=self._result[: w.numel()])
        if self._is_factor(l1):
            return result.add_(sign, alpha=l1)  # the product is exact, so that a fused one gives the same bits
        return result.add_(sign.mul_(l1))

    def prox(self, w: Tensor, l1: Tensor | float, l2: Tensor | float) -> Tensor:
        shrunk = self._result[: w.numel()]
        if self._is_factor(l1) and l1 >= 0:
            torch.ops.aten.softshrink.out(w, l1, out=shrunk)
            shrunk.add_(0.0)  # it leaves zeros of either sign
        else:
            torch.abs(w, out=shrunk)
            # Before the arithmetic, whose inf - inf is NaN where the threshold is infinite; NaN is not below anything.
            dropped = torch.le(shrunk, l1)
            shrunk.sub_(l1).mul_(torch.sign(w, out=self._second[: w.numel()])).masked_fill_(dropped, 0.0)
        return shrunk.div_(1 + 2 * l2)

    def _is_factor(self, strength: Tensor | float) -> TypeGuard[float]:
        """Whether operators take it as a number: they refuse one that overflows their dtype."""
        return isinstance(strength, float) and abs(strength) <= torch.finfo(self.compute).max

    def write(self, result: Tensor, pieces: list[Tensor], sizes: tuple[int, ...], add: bool = False) -> None:
        """Rounds to the storage dtype, then stores or adds: autograd's order, so that its bits are ours."""
        if add:
            torch._foreach_add_(pieces, torch.split_with_sizes(result.to(self.storage), sizes))
        else:
            torch._foreach_copy_(pieces, torch.split_with_sizes(result, sizes))


def _gather(buffer: Tensor, pieces: list[Tensor], sizes: tuple[int, ...]) -> Tensor:
    """The pieces side by side in `buffer`, converted to its dtype."""
    if len(pieces) == 1:
        return buffer[: sizes[0]].copy_(pieces[0])
    vector = buffer[: sum(sizes)]
    torch._foreach_copy_(torch.split_with_sizes(vector, sizes), pieces)
    return vector


def _pieces(flat: dict[int, Tensor], block: Block) -> list[Tensor]:
    return [flat[i] if bounds is None else flat[i].narrow(0, *bounds) for i, bounds in block.pieces]


def _flat(dense: Tensor) -> Tensor:
    """A vector over the storage of a dense tensor, whatever the order of its strides."""
    return dense.view(-1) if dense.is_contiguous() else dense.as_strided((dense.numel(),), (1,))


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
