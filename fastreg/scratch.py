"""Memory that the PyTorch path works in, with views of it that cost an operator call each to make."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastreg import plan

T = TypeVar("T")
MOST_VIEWS = 512


class Memory:
    """Named buffers of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[Any, Any] = {}

    def vector(self, name: str, dtype: torch.dtype, n: int) -> Tensor:
        """`n` elements, the same at every call with this name and dtype."""
        return self.view((name, dtype, n), name, dtype, n, lambda vector: vector)

    def view(self, key: Any, name: str, dtype: torch.dtype, n: int, make: Callable[[Tensor], T]) -> T:
        """What `make` makes of that vector, under a key that says all there is to say of it."""
        found: T | None = self._views.get(key)
        if found is None:
            # Made for every later call, in whatever mode that is.
            with torch.inference_mode(False), torch.no_grad():
                found = make(self._buffer(name, dtype, n)[:n])
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            self._views[key] = found
        return found

    def _buffer(self, name: str, dtype: torch.dtype, n: int) -> Tensor:
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < n:
            self._views.clear()
            # All at once where it will be kept: pages that are never touched take no memory.
            size = max(n, plan.CPU_BLOCK) if self._device.type == "cpu" else n
            buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype, device=self._device)
        return buffer


class _Thread(threading.local):
    def __init__(self) -> None:
        self.memory = Memory(torch.device("cpu"))


_THREAD = _Thread()


def memory_of(device: torch.device) -> Memory:
    """On a CPU what this thread had before: to take it anew would cost a page fault for every 4 KiB of it."""
    return _THREAD.memory if device.type == "cpu" else Memory(device)
