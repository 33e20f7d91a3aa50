"""The arithmetic of the PyTorch path on a block of weights, in scratch memory that stays in cache."""

import functools
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor

from fastreg.formulas import Mode, compute_dtype
from fastreg.scratch import Memory
from fastreg.strengths import Strength, accumulate_dtype

_HAS_FUSED_SGD = hasattr(torch, "_fused_sgd_")
_PLAIN_SGD: Any = {"weight_decay": 0.0, "lr": -1.0, "nesterov": False, "maximize": False, "is_first_step": False}

Pieces: TypeAlias = Mapping[int, Sequence[Tensor]]  # by position, the pieces of a weight
Pack: TypeAlias = tuple[Tensor, tuple[Tensor, ...], Tensor | None]  # a vector, its parts, and what is behind them


class Block(NamedTuple):
    """Pieces of weights of one strength group that are worked on together."""

    group: int
    pieces: tuple[tuple[int, int], ...]  # the weight's position, and which of its pieces
    sizes: tuple[int, ...]
    padded: int  # elements, with those that fill up the vector units
    in_place: bool  # whether the one piece can be worked on where it is


class BlockOps:
    """Operations on the blocks of weights of one dtype on one device, whose scratch memory is `memory`."""

    def __init__(self, dtype: torch.dtype, device: torch.device, memory: Memory) -> None:
        self._dtype = dtype
        self._compute = compute_dtype(dtype)
        self._accumulate = accumulate_dtype(device)
        self._memory = memory
        self._most = torch.finfo(self._compute).max
        self._on_host = device.type == "cpu"

    def read(self, block: Block, weights: Pieces, for_sums: bool) -> Tensor:
        """The block as a vector, filled up with zeros: itself if it is one; in the dtype of sums if only `for_sums`."""
        if block.in_place:
            return _only_piece(weights, block)
        pieces = _pieces(weights, block)
        name, dtype = ("wide", self._accumulate) if for_sums else ("input", self._compute)
        vector, parts, rest = self._packed(name, dtype, block, pieces)
        if rest is not None:
            rest.zero_()
        _copy(parts, pieces)
        return vector

    def sums(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of |w| and w². float32 sums lose the promised digits on repeated or badly scaled values."""
        wide = self._memory.view("wide", self._accumulate, w.numel())
        if w.dtype != self._accumulate:
            w = wide.copy_(w)
        square_sum = torch.dot(w, w)
        return torch.abs(w, out=wide).sum(), square_sum

    def update(self, mode: Mode, block: Block, w: Tensor, targets: Pieces, l1: Strength, l2: Strength) -> None:
        """Does to the block of `targets`, gradients or in PROX weights, what `mode` asks for."""
        change = self.prox if mode is Mode.PROX else self.gradient
        if block.in_place:
            target = _only_piece(targets, block)
            if mode is not Mode.ACCUMULATE:
                change(w, l1, l2, target)
            elif not self._add_in_one_pass(target, w, l1, 2 * l2):
                target.add_(self.gradient(w, l1, l2, out=self._vector("result", w)))
            return
        pieces = _pieces(targets, block)
        result, parts, _ = self._packed("result", self._compute, block, pieces)
        change(w, l1, l2, result)
        if mode is not Mode.ACCUMULATE:
            _copy(pieces, parts)
        else:
            # Rounded to the storage dtype before the addition: autograd's order, so that its bits are ours.
            same = self._dtype == self._compute
            torch._foreach_add_(pieces, parts if same else [part.to(self._dtype) for part in parts])

    def gradient(self, w: Tensor, l1: Strength, l2: Strength, out: Tensor) -> Tensor:
        """l1 * sign(w) + 2 * l2 * w, rounded once if the strengths are floats, as in the kernel."""
        sign = self._vector("sign", w)
        if self._is_factor(l1) and l1 == 0:
            sign.zero_()  # and not -0.0 where w is negative
        else:
            torch.sign(w, out=sign).mul_(l1)
            if not self._is_factor(l1):
                sign.masked_fill_(w == 0, 0.0)  # infinity times sign(0) is NaN
        slope = 2 * l2
        if self._is_factor(slope):
            return torch.add(sign, w, alpha=slope, out=out)
        return torch.addcmul(sign, w, torch.as_tensor(slope, device=w.device), out=out)

    def _add_in_one_pass(self, grad: Tensor, w: Tensor, l1: Strength, slope: Strength) -> bool:
        """Adds l1 * sign(w) + slope * w by way of a fused optimizer, if that gives the same bits.

        A step of SGD with momentum sets `buffer = momentum * buffer + (1 - dampening) * gradient` and subtracts
        lr * buffer. With sign(w) as the buffer and w in the gradient's place, that buffer is the penalty's gradient.
        """
        if not (_HAS_FUSED_SGD and self._on_host and self._is_factor(l1) and self._is_factor(slope)):
            return False
        dampening = 1 - slope
        # A momentum of 0 turns the buffer off, and 1 - (1 - slope) loses digits of a small slope.
        if l1 == 0 or self._rounded(1 - dampening) != self._rounded(slope):
            return False
        sign = torch.sign(w, out=self._vector("sign", w))
        torch._fused_sgd_([grad], [w], [sign], momentum=l1, dampening=dampening, **_PLAIN_SGD)
        return True

    def prox(self, w: Tensor, l1: Strength, l2: Strength, out: Tensor) -> Tensor:
        """sign(w) * max(|w| - l1, 0) / (1 + 2 * l2); `out` may be `w`."""
        if self._is_factor(l1) and l1 >= 0:
            torch.ops.aten.softshrink.out(w, l1, out=out)
            out.add_(0.0)  # it leaves zeros of either sign
        else:
            sign = torch.sign(w, out=self._vector("sign", w))
            torch.abs(w, out=out)
            # Before the arithmetic, whose inf - inf is NaN where the threshold is infinite; NaN is not below anything.
            dropped = torch.le(out, l1)
            out.sub_(l1).mul_(sign).masked_fill_(dropped, 0.0)
        return out if isinstance(l2, float) and l2 == 0 else out.div_(1 + 2 * l2)

    def _vector(self, name: str, like: Tensor) -> Tensor:
        return self._memory.view(name, self._compute, like.numel())  # type: ignore[no-any-return]

    def _packed(self, name: str, dtype: torch.dtype, block: Block, pieces: Sequence[Tensor]) -> Pack:
        """A vector for the block, with parts in the shapes of `pieces`."""
        shapes = tuple([piece.shape for piece in pieces])
        cut = functools.partial(_cut_pack, block, shapes)
        return self._memory.view(name, dtype, block.padded, shapes, cut, len(shapes))  # type: ignore[no-any-return]

    def _rounded(self, number: float) -> float:
        """As the operators will take it."""
        return number if self._compute == torch.float64 else float(struct.unpack("f", struct.pack("f", number))[0])

    def _is_factor(self, strength: Strength) -> TypeGuard[float]:
        """Whether operators take it as a number: they refuse one that overflows their dtype."""
        return isinstance(strength, float) and abs(strength) <= self._most


def _cut_pack(block: Block, shapes: Sequence[torch.Size], vector: Tensor) -> Pack:
    n = sum(block.sizes)
    parts = torch.split_with_sizes(vector[:n], block.sizes)
    shaped = tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))
    return vector, shaped, vector[n:] if n < block.padded else None


def _only_piece(of_weights: Pieces, block: Block) -> Tensor:
    position, number = block.pieces[0]
    piece = of_weights[position][number]
    return piece if piece.ndim == 1 else piece.view(-1)


def _pieces(of_weights: Pieces, block: Block) -> tuple[Tensor, ...]:
    return tuple([of_weights[position][number] for position, number in block.pieces])


def _copy(targets: tuple[Tensor, ...], sources: tuple[Tensor, ...]) -> None:
    if len(targets) == 1:
        targets[0].copy_(sources[0])
    else:
        torch._foreach_copy_(targets, sources)
