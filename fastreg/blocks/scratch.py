"""Memory that the PyTorch path works in, with views of it that cost an operator call each to make."""

import math
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

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
        self._views: dict[Hashable, Any] = {}
        self._makers: dict[Hashable, Any] = {}
        self._n_views = 0

    def pack(self, name: str, dtype: torch.dtype, shapes: tuple[torch.Size, ...], multiple: int = 1) -> Pack:
        """Parts in these shapes of a vector whose length is a `multiple`: the same at every call with the same name."""
        found = self._views.get((name, dtype, shapes, multiple))
        if found is None:
            sizes = list(map(math.prod, shapes))
            n = sum(sizes)
            with torch.inference_mode(False), torch.no_grad():
                vector = self._buffer(name, dtype, -(-n // multiple) * multiple)
                parts = torch.split_with_sizes(vector[:n], sizes)
                found = Pack(vector, tuple([part.view(shape) for part, shape in zip(parts, shapes, strict=True)]))
            self._keep((name, dtype, shapes, multiple), found, len(shapes) + 1)
        return found  # type: ignore[no-any-return]

    def spares(self, dtype: torch.dtype, shapes: tuple[torch.Size, ...]) -> tuple[Tensor, ...]:
        """Tensors in these shapes, which are used one after the other, as they share their memory."""
        found = self._views.get((dtype, shapes))
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = tuple([self._buffer("spare", dtype, math.prod(shape)).view(shape) for shape in shapes])
            self._keep((dtype, shapes), found, len(shapes))
        return found  # type: ignore[no-any-return]

    def number(self, number: float, dtype: torch.dtype) -> Tensor:
        """`number` as a tensor, to be read only."""
        found = self._views.get((number, dtype))
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = torch.scalar_tensor(number, dtype=dtype, device=self._device)
            self._keep((number, dtype), found, 1)
        return found  # type: ignore[no-any-return]

    def kept(self, dtype: torch.dtype, make: Callable[[torch.dtype, torch.device, "Memory"], T]) -> T:
        """`make(dtype, device, self)`, made once."""
        found = self._makers.get((dtype, make))
        if found is None:
            found = self._makers[dtype, make] = make(dtype, self._device, self)
        return found  # type: ignore[no-any-return]

    def _buffer(self, name: str, dtype: torch.dtype, n: int) -> Tensor:
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < n:
            self._forget_views()
            # All at once where it will be kept: pages that are never touched take no memory.
            size = max(n, self._reserve)
            buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype, device=self._device)
        return buffer[:n]

    def _keep(self, key: Hashable, views: Any, n_views: int) -> None:
        """For every later call, in whatever mode that is."""
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
