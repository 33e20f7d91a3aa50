"""The arithmetic of the penalty on a block of weights, in scratch memory that stays in cache."""

import functools
import struct
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor

from fastreg.blocks.plan import LANES, Block
from fastreg.blocks.scratch import Memory
from fastreg.core.dtypes import accumulate_dtype, compute_dtype
from fastreg.core.penalty import Strength
from fastreg.core.torch_private import foreach_add_, foreach_copy_, fused_sgd_
from fastreg.core.types import Mode
from fastreg.formulas.penalty import with_finite_slope

_LIMITS = {dtype: torch.finfo(dtype) for dtype in (torch.float32, torch.float64)}
_softshrink = torch.ops.aten.softshrink.out
_PLAIN_SGD: Any = {"weight_decay": 0.0, "lr": -1.0, "nesterov": False, "maximize": False, "is_first_step": False}

Pieces: TypeAlias = Sequence[Tensor]


class BlockOps:
    """Operations on blocks of weights of one dtype on one device, with scratch memory from `memory`."""

    def __init__(self, dtype: torch.dtype, device: torch.device, memory: Memory) -> None:
        self._dtype = dtype
        self._compute = compute_dtype(dtype)
        self._accumulate = accumulate_dtype(device)
        self._memory = memory
        self._limits = _LIMITS[self._compute]
        self._on_host = device.type == "cpu"

    def sums(self, block: Block, weights: Pieces) -> tuple[Tensor, Tensor]:
        """Return Σ|w| and Σw². float32 sums would lose the promised digits on repeated or badly scaled values."""
        pieces = [weights[i] for i in block.pieces]
        wide, parts = self._memory.pack("wide", self._accumulate, shapes_of(pieces))
        w = wide
        if len(pieces) == 1 and self._dtype == self._accumulate:
            w = pieces[0].view(-1)
        else:
            copy_pieces(parts, pieces)
        square_sum = torch.dot(w, w)
        return torch.abs(w, out=wide).sum(), square_sum

    def update(self, mode: Mode, block: Block, weights: Pieces, targets: Pieces, l1: Strength, l2: Strength) -> None:
        """Apply `mode` to a block of `targets`: the weights in PROX, gradients in the other modes."""
        inputs = [weights[i] for i in block.in_place]
        if block.packed:
            pieces = [weights[i] for i in block.packed]
            w, parts = self._memory.pack("input", self._compute, shapes_of(pieces), LANES if self._on_host else 1)
            copy_pieces(parts, pieces)
            inputs.append(w)
        spares = self._memory.spares(self._compute, shapes_of(inputs))
        for i, w, spare in zip(block.in_place, inputs, spares, strict=False):
            if mode is Mode.PROX:
                self.prox(targets[i], l1, l2, spare)
            elif mode is not Mode.ACCUMULATE:
                self.gradient(w, l1, l2, spare, out=targets[i])
            elif not self._add_in_one_pass(targets[i], w, l1, 2 * l2, spare):
                targets[i].add_(self.gradient(w, l1, l2, spare, out=spare))
        if not block.packed:
            return
        if mode is Mode.PROX:
            self.prox(inputs[-1], l1, l2, spares[-1])
        else:
            self.gradient(inputs[-1], l1, l2, spares[-1], out=inputs[-1])
        copies = [targets[i] for i in block.packed]
        if mode is not Mode.ACCUMULATE:
            copy_pieces(copies, parts)
        else:
            # Round to the storage dtype before the addition, as autograd does, for the same bits.
            same = self._dtype == self._compute
            foreach_add_(copies, parts if same else [part.to(self._dtype) for part in parts])

    def gradient(self, w: Tensor, l1: Strength, l2: Strength, sign: Tensor, out: Tensor) -> Tensor:
        """Write l1 * sign(w) + 2 * l2 * w to `out`, rounded once if the strengths are floats, as in the kernel.

        Overwrite `sign`. `out` may be `sign` or `w`.
        """
        slope: Any = 2 * l2
        is_factor = self._is_factor(slope)
        if not is_factor:
            l1, slope = with_finite_slope(l1, slope, self._compute)
            is_factor = self._is_factor(slope)
        if self._is_factor(l1) and l1 == 0:
            sign.zero_()  # a product would be -0.0 where w is negative
        else:
            torch.sign(w, out=sign).mul_(self._operand(l1))
            if not self._is_factor(l1):
                sign.masked_fill_(w == 0, 0.0)  # infinity times sign(0) is NaN
        if is_factor:
            return torch.add(sign, w, alpha=slope, out=out)
        return torch.addcmul(sign, w, torch.as_tensor(slope, device=w.device), out=out)

    def _add_in_one_pass(self, grad: Tensor, w: Tensor, l1: Strength, slope: Strength, sign: Tensor) -> bool:
        """Add l1 * sign(w) + slope * w with PyTorch's fused SGD. Return False and add nothing if the bits would differ.

        SGD with momentum sets `buffer = momentum * buffer + (1 - dampening) * gradient` and subtracts lr * buffer. With
        sign(w) as the buffer and w as the gradient, the new buffer is the penalty's gradient.
        """
        if not (fused_sgd_ is not None and self._on_host and self._is_factor(l1) and self._is_factor(slope)):
            return False
        if not _fits_fused_sgd(l1, slope, self._compute):
            return False
        torch.sign(w, out=sign)
        fused_sgd_([grad], [w], [sign], momentum=l1, dampening=1 - slope, **_PLAIN_SGD)
        return True

    def prox(self, w: Tensor, l1: Strength, l2: Strength, spare: Tensor) -> None:
        """Replace `w` by sign(w) * max(|w| - l1, 0) * (1 / (1 + 2 * l2)). Overwrite `spare`."""
        shrinkage = 1 / (1 + 2 * l2)  # in float64
        if self._on_host and self._is_factor(l1) and l1 >= 0 and self._is_factor(shrinkage):
            _softshrink(w, l1, out=w)
            # softshrink may return -0.0; the addition to 0 makes it 0.0.
            torch.add(self._memory.number(0.0, self._compute), w, alpha=shrinkage, out=w)
            return
        torch.sign(w, out=spare)
        w.abs_()
        # Compare before the subtraction, where inf - inf would be NaN. A NaN weight compares as false and stays NaN.
        dropped = torch.le(w, l1)
        w.sub_(l1).mul_(spare).masked_fill_(dropped, 0.0)
        w.mul_(shrinkage)

    def _operand(self, number: Strength) -> Strength:
        """Return a float as a cached tensor, because operators would convert the float to a tensor at every call."""
        is_number = self._on_host and self._is_factor(number)
        return self._memory.number(number, self._compute) if is_number else number  # type: ignore[arg-type]

    def _is_factor(self, strength: Strength) -> TypeGuard[float]:
        """Return whether operators take the strength as a number: they raise an error if it overflows their dtype."""
        return isinstance(strength, float) and abs(strength) <= self._limits.max


@functools.lru_cache
def _fits_fused_sgd(l1: float, slope: float, dtype: torch.dtype) -> bool:
    """Return whether SGD of `dtype` with momentum `l1` and dampening 1 - slope has the exact factors l1 and slope."""

    def rounded(number: float) -> float:
        return number if dtype == torch.float64 else float(struct.unpack("f", struct.pack("f", number))[0])

    # A momentum of 0 turns the buffer off. 1 - (1 - slope) loses digits of a small slope.
    return l1 != 0 and rounded(1 - (1 - slope)) == rounded(slope)


def shapes_of(pieces: Pieces) -> tuple[torch.Size, ...]:
    """Return the shapes of the pieces, as a key for scratch memory."""
    return tuple([piece.shape for piece in pieces])


def copy_pieces(targets: Pieces, sources: Pieces) -> None:
    """Copy each source to its target, in one operator call."""
    if len(targets) == 1:
        targets[0].copy_(sources[0])
    else:
        foreach_copy_(targets, sources)
