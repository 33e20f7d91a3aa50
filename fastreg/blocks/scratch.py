"""Scratch memory of the PyTorch path, with cached views, because each new view costs an operator call."""

import math
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# The most views that a thread keeps, of some hundred bytes each.
MOST_VIEWS = 1 << 14


class Pack(NamedTuple):
    """A vector and its consecutive parts. Padding after the last part has arbitrary values."""

    vector: Tensor
    parts: tuple[Tensor, ...]


class Memory:
    """Named buffers on one device, each of at least `reserve` elements."""

    def __init__(self, device: torch.device, reserve: int = 0) -> None:
        self._device, self._reserve = device, reserve
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[Hashable, Any] = {}
        self._makers: dict[Hashable, Any] = {}
        self._n_views = 0

    def pack(self, name: str, dtype: torch.dtype, shapes: tuple[torch.Size, ...], multiple: int = 1) -> Pack:
        """Return parts in these shapes of a vector whose length is a `multiple`. Calls with one name share memory."""
        pack = self._views.get((name, dtype, shapes, multiple))
        if pack is None:
            sizes = list(map(math.prod, shapes))
            n = sum(sizes)
            with torch.inference_mode(False), torch.no_grad():
                vector = self._buffer(name, dtype, -(-n // multiple) * multiple)
                parts = torch.split_with_sizes(vector[:n], sizes)
                pack = Pack(vector, tuple([part.view(shape) for part, shape in zip(parts, shapes, strict=True)]))
            self._keep((name, dtype, shapes, multiple), pack, len(shapes) + 1)
        return pack  # type: ignore[no-any-return]

    def spares(self, dtype: torch.dtype, shapes: tuple[torch.Size, ...]) -> tuple[Tensor, ...]:
        """Return tensors in these shapes that share memory, for use one after the other."""
        spares = self._views.get((dtype, shapes))
        if spares is None:
            with torch.inference_mode(False), torch.no_grad():
                spares = tuple([self._buffer("spare", dtype, math.prod(shape)).view(shape) for shape in shapes])
            self._keep((dtype, shapes), spares, len(shapes))
        return spares  # type: ignore[no-any-return]

    def number(self, number: float, dtype: torch.dtype) -> Tensor:
        """Return `number` as a read-only tensor."""
        tensor = self._views.get((number, dtype))
        if tensor is None:
            with torch.inference_mode(False), torch.no_grad():
                tensor = torch.scalar_tensor(number, dtype=dtype, device=self._device)
            self._keep((number, dtype), tensor, 1)
        return tensor  # type: ignore[no-any-return]

    def kept(self, dtype: torch.dtype, make: Callable[[torch.dtype, torch.device, "Memory"], T]) -> T:
        """Return `make(dtype, device, self)`, made once."""
        kept = self._makers.get((dtype, make))
        if kept is None:
            kept = self._makers[dtype, make] = make(dtype, self._device, self)
        return kept  # type: ignore[no-any-return]

    def _buffer(self, name: str, dtype: torch.dtype, n: int) -> Tensor:
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < n:
            self._forget_views()
            # Allocate the whole reserve at once: untouched pages take no memory.
            size = max(n, self._reserve)
            buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype, device=self._device)
        return buffer[:n]

    def _keep(self, key: Hashable, views: Any, n_views: int) -> None:
        """Cache `views` for later calls, in or outside of inference mode."""
        if self._n_views >= MOST_VIEWS:
            self._forget_views()
        self._views[key] = views
        self._n_views += n_views

    def _forget_views(self) -> None:
        self._views.clear()
        self._n_views = 0


class _Kept(threading.local):
    memory: Memory | None = None


_KEPT = _Kept()


def take_memory(device: torch.device, reserve: int) -> Memory:
    """Return this thread's memory, kept to save page faults, or new memory if `reserve` is 0.

    A sweep that interrupts another one before `give_back` gets new memory.
    """
    if not reserve:
        return Memory(device)
    memory, _KEPT.memory = _KEPT.memory, None
    return Memory(device, reserve) if memory is None else memory


def give_back(memory: Memory) -> None:
    """Keep `memory` for this thread's next sweep."""
    if memory._reserve:
        _KEPT.memory = memory
