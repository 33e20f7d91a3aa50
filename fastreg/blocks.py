"""What the PyTorch path does with a block of weights, in scratch memory that stays in cache."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fastreg.plan import ROW, Batch, Block, Mode, Part
from fastreg.strengths import accumulate_dtype

# Between these, no float32 square that over- or underflowed can have cost the sum over a batch a digit.
SAFE_SQUARE_SUMS = (1e-24, 1e37)
_HAS_FUSED_SGD = hasattr(torch, "_fused_sgd_")

# Host memory kept by each thread, at most some blocks of it: to take it anew costs a page fault per 4 KiB.
_KEPT = threading.local()
Pieces = Mapping[int, Sequence[Tensor]]  # by position, the pieces of a weight


class Scratch:
    """Block-sized buffers for one part, and the arithmetic that fills them."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._views: dict[tuple[str, int], Tensor] = {}

    def read(self, block: Block, weights: Pieces) -> Tensor:
        """The block as one vector in the dtype of the arithmetic, zeros filling its last row; no copy if it is that."""
        if block.direct:
            position, number = block.pieces[0]
            return weights[position][number]
        n = sum(block.sizes)
        vector = self.buffer("input", block.padded)
        if block.padded != n:
            vector[n:].zero_()
        _copy(self._split(vector, block), _pieces(weights, block))
        return vector

    def sums(self, batch: Batch, weights: Pieces, to_float32: bool) -> "BatchSums":
        """What adds up the blocks of `batch`; `to_float32` if only float32 digits are wanted."""
        by_rows = to_float32 and self._part.device.type == "cpu" and self._part.compute == torch.float32
        return (RowSums if by_rows else BatchSums)(batch, weights, self)

    def update(
        self, mode: Mode, block: Block, w: Tensor, targets: Pieces, l1: Tensor | float, l2: Tensor | float
    ) -> None:
        """Does to the block of `targets` what `mode` asks for: to gradients, or in PROX to weights.

        What is added is rounded to the storage dtype first: autograd's order, so that its bits are ours.
        """
        pieces = _pieces(targets, block)
        if mode == Mode.ACCUMULATE:
            if not (block.direct and self._add_in_one_pass(pieces[0], w, l1, 2 * l2)):
                result = self.gradient(w, l1, l2, out=self.buffer("result", w.numel()))
                torch._foreach_add_(pieces, self._split(result.to(self._part.dtype), block))
            return
        out = pieces[0] if block.direct else self.buffer("result", w.numel())
        (self.prox if mode == Mode.PROX else self.gradient)(w, l1, l2, out)
        if not block.direct:
            _copy(pieces, self._split(out, block))

    def gradient(self, w: Tensor, l1: Tensor | float, l2: Tensor | float, out: Tensor) -> Tensor:
        """l1 * sign(w) + 2 * l2 * w, rounded once if the strengths are floats, as in the kernel."""
        sign = torch.sign(w, out=self.buffer("sign", w.numel())).mul_(l1)
        slope = 2 * l2
        if self._is_factor(slope):
            return torch.add(sign, w, alpha=slope, out=out)
        return torch.addcmul(sign, w, torch.as_tensor(slope, device=w.device), out=out)

    def _add_in_one_pass(self, grad: Tensor, w: Tensor, l1: Tensor | float, slope: Tensor | float) -> bool:
        """Adds l1 * sign(w) + slope * w by way of a fused optimizer, if that gives the same bits.

        A step of SGD with momentum sets `buffer = momentum * buffer + (1 - dampening) * gradient` and subtracts
        lr * buffer. With sign(w) as the buffer and w in the gradient's place, that buffer is the penalty's gradient.
        """
        if not (_HAS_FUSED_SGD and self._part.device.type == "cpu" and self._is_factor(l1) and self._is_factor(slope)):
            return False
        dampening = 1 - slope
        # SGD takes no momentum for none, and a small slope drowns in the 1.
        if l1 == 0 or abs((1 - dampening) - slope) > 1e-9 * slope:
            return False
        sign = torch.sign(w, out=self.buffer("sign", w.numel()))
        torch._fused_sgd_(
            [grad],
            [w],
            [sign],
            weight_decay=0.0,
            momentum=l1,
            lr=-1.0,
            dampening=dampening,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
        return True

    def prox(self, w: Tensor, l1: Tensor | float, l2: Tensor | float, out: Tensor) -> Tensor:
        """sign(w) * max(|w| - l1, 0) / (1 + 2 * l2); `out` may be `w`."""
        if self._is_factor(l1) and l1 >= 0:
            torch.ops.aten.softshrink.out(w, l1, out=out)
            out.add_(0.0)  # it leaves zeros of either sign
        else:
            sign = torch.sign(w, out=self.buffer("sign", w.numel()))
            torch.abs(w, out=out)
            # Before the arithmetic, whose inf - inf is NaN where the threshold is infinite; NaN is not below anything.
            dropped = torch.le(out, l1)
            out.sub_(l1).mul_(sign).masked_fill_(dropped, 0.0)
        return out if isinstance(l2, float) and l2 == 0 else out.div_(1 + 2 * l2)

    def wide_sums(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of |w| and w², every element converted to float64 first."""
        dtype = accumulate_dtype(w.device)
        wide = self.buffer("wide", w.numel(), dtype)
        if w.dtype != dtype:
            w = wide.copy_(w)
        square_sum = torch.dot(w, w)
        return torch.abs(w, out=wide).sum(), square_sum

    def row_sums(self, w: Tensor, abs_sums: Tensor, norms: Tensor) -> None:
        """For each row of `w` the sum of |w|, and the square root of that of w², in float32."""
        rows = w.view(-1, ROW)
        torch.linalg.vector_norm(rows, 2, dim=1, out=norms)
        torch.sum(torch.abs(rows, out=self.buffer("sign", w.numel()).view(-1, ROW)), 1, out=abs_sums)

    def buffer(self, name: str, n: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for `n` elements, the same at every call with this name."""
        view = self._views.get((name, n))
        if view is None:
            view = self._views[name, n] = _memory(name, n, dtype or self._part.compute, self._part.device)
        return view

    def _is_factor(self, strength: Tensor | float) -> TypeGuard[float]:
        """Whether operators take it as a number: they refuse one that overflows their dtype."""
        return isinstance(strength, float) and abs(strength) <= torch.finfo(self._part.compute).max

    def _split(self, vector: Tensor, block: Block) -> tuple[Tensor, ...]:
        n = sum(block.sizes)
        vector = vector if n == block.padded else vector[:n]
        return (vector,) if len(block.sizes) == 1 else torch.split_with_sizes(vector, block.sizes)  # type: ignore[return-value]


class BatchSums:
    """Sums of |w| and w² over the blocks of one batch, in float64 from the element on."""

    def __init__(self, batch: Batch, weights: Pieces, scratch: Scratch) -> None:
        self._batch, self._weights, self._scratch = batch, weights, scratch
        self._sums: list[Tensor] = []

    def add(self, number: int, w: Tensor) -> None:
        """Adds block `number` of the batch, whose elements are `w`."""
        self._sums += self._scratch.wide_sums(w)

    def total(self) -> list[Tensor]:
        """0-dim tensors, in turn a sum of |w| and one of w²."""
        return self._sums


class RowSums(BatchSums):
    """The same in float32 along the rows of a block and in float64 over these: half the traffic, in host memory.

    Where squares left float32's range, the blocks are read once more, to be summed like those of a `BatchSums`.
    """

    def __init__(self, batch: Batch, weights: Pieces, scratch: Scratch) -> None:
        super().__init__(batch, weights, scratch)
        n_rows = [block.padded // ROW for block in batch.blocks]
        self._rows = scratch.buffer("rows", 2 * sum(n_rows))
        self._of_blocks = [rows.split(n_rows) for rows in self._rows.view(2, -1).unbind()]

    def add(self, number: int, w: Tensor) -> None:  # noqa: D102
        abs_sums, norms = self._of_blocks
        self._scratch.row_sums(w, abs_sums[number], norms[number])

    def total(self) -> list[Tensor]:  # noqa: D102
        wide = self._scratch.buffer("wide rows", self._rows.numel(), torch.float64).copy_(self._rows)
        abs_sums, norms = wide.view(2, -1).unbind()
        sums = [abs_sums.sum(), torch.dot(norms, norms)]
        low, high = SAFE_SQUARE_SUMS
        if not (low <= sums[1].item() <= high or sums[0].item() == 0):
            sums = []
            for block in self._batch.blocks:
                sums += self._scratch.wide_sums(self._scratch.read(block, self._weights))
        return sums


def _memory(name: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty(n, dtype=dtype, device=device)
    kept: dict[Any, Tensor] = _KEPT.__dict__
    memory = kept.get((name, dtype))
    if memory is None or memory.numel() < n:
        with torch.inference_mode(False):
            memory = kept[name, dtype] = torch.empty(n, dtype=dtype, device=device)
    return memory[:n]


def _pieces(of_weights: Pieces, block: Block) -> tuple[Tensor, ...]:
    return tuple([of_weights[position][number] for position, number in block.pieces])


def _copy(targets: tuple[Tensor, ...], sources: tuple[Tensor, ...]) -> None:
    if len(targets) == 1:
        targets[0].copy_(sources[0])
    else:
        torch._foreach_copy_(targets, sources)
