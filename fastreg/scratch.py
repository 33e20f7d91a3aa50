"""Memory that the PyTorch path works in, with views of it that cost an operator call each to make."""

import math
import threading
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Views that a thread keeps, of some hundred bytes each.
MOST_VIEWS = 1 << 14


class Pack(NamedTuple):
    """A vector, and parts of it one after the other; behind them it may be filled up with what happens to be there."""

    vector: Tensor
    parts: tuple[Tensor, ...]


class Memory:
    """Named buffers of one device, each of at least `reserve` elements."""

    def __init__(self, device: torch.device, reserve: int = 0) -> None:
        self._device, self._reserve = device, reserve
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._packs: dict[Hashable, Pack] = {}
        self._n_views = 0

    def pack(self, name: str, dtype: torch.dtype, shapes: tuple[torch.Size, ...], multiple: int = 1) -> Pack:
        """Parts in these shapes of a vector whose length is a `multiple`: the same at every call with the same name."""
        key = name, dtype, shapes, multiple
        found = self._packs.get(key)
        if found is None:
            # Made for every later call, in whatever mode that is.
            with torch.inference_mode(False), torch.no_grad():
                found = self._cut(name, dtype, shapes, multiple)
            if self._n_views >= MOST_VIEWS:
                self._forget_packs()
            self._packs[key] = found
            self._n_views += 1 + len(shapes)
        return found

    def _cut(self, name: str, dtype: torch.dtype, shapes: Sequence[torch.Size], multiple: int) -> Pack:
        sizes = list(map(math.prod, shapes))
        n = sum(sizes)
        padded = -(-n // multiple) * multiple
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < padded:
            self._forget_packs()
            # All at once where it will be kept: pages that are never touched take no memory.
            size = max(padded, self._reserve)
            buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype, device=self._device)
        parts = torch.split_with_sizes(buffer[:n], sizes)
        return Pack(buffer[:padded], tuple([part.view(shape) for part, shape in zip(parts, shapes, strict=True)]))

    def _forget_packs(self) -> None:
        self._packs.clear()
        self._n_views = 0


class _Kept(threading.local):
    memory: Memory | None = None


_KEPT = _Kept()


def take_memory(device: torch.device, reserve: int) -> Memory:
    """This thread's memory, kept to save page faults, if there is anything to `reserve`.

    A sweep that interrupts one before `give_back` gets another.
    """
    if not reserve:
        return Memory(device)
    memory, _KEPT.memory = _KEPT.memory, None
    return Memory(device, reserve) if memory is None else memory


def give_back(memory: Memory) -> None:
    """Keeps `memory` for this thread's next sweep."""
    if memory._reserve:
        _KEPT.memory = memory


def is_under_a_mode() -> bool:
    """Whether a TorchDispatchMode or a torch.func transform is active, which must not meet kept tensors."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None
