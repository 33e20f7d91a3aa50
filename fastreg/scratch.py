"""Memory that the PyTorch path works in, with views of it that cost an operator call each to make."""

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastreg import plan

T = TypeVar("T")
# Views that a thread keeps, of some hundred bytes each.
MOST_VIEWS = 1 << 14


class Memory:
    """Named buffers of one device, for one sweep or to be kept."""

    def __init__(self, device: torch.device, keep: bool = False) -> None:
        self._device, self._keep = device, keep
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[Hashable, Any] = {}
        self._n_views = 0

    def vector(self, name: str, dtype: torch.dtype, n: int) -> Tensor:
        """`n` elements, the same at every call with this name and dtype."""
        return self.view((dtype, n), name, n, _whole, 1)

    def view(
        self, key: tuple[torch.dtype, Hashable], name: str, n: int, make: Callable[[Tensor], T], n_views: int
    ) -> T:
        """What `make` makes of that vector: `n_views` views, under a dtype and whatever else it depends on."""
        found: T | None = self._views.get((name, key))
        if found is None:
            # Made for every later call, in whatever mode that is.
            with torch.inference_mode(False), torch.no_grad():
                found = make(self._buffer(name, key[0], n)[:n])
            if self._n_views >= MOST_VIEWS:
                self._forget_views()
            self._views[name, key] = found
            self._n_views += n_views
        return found

    def _buffer(self, name: str, dtype: torch.dtype, n: int) -> Tensor:
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < n:
            self._forget_views()
            # All at once where it will be kept: pages that are never touched take no memory.
            size = max(n, plan.CPU_BLOCK) if self._keep else n
            buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype, device=self._device)
        return buffer

    def _forget_views(self) -> None:
        self._views.clear()
        self._n_views = 0


class _Thread(threading.local):
    def __init__(self) -> None:
        self.memory = Memory(torch.device("cpu"), keep=True)


_THREAD = _Thread()


def memory_of(device: torch.device) -> Memory:
    """On a CPU what this thread had before: to take it anew would cost a page fault for every 4 KiB of it."""
    return _THREAD.memory if device.type == "cpu" and not is_watched() else Memory(device)


def is_watched() -> bool:
    """Whether modes or transforms look on, which record operators or put tensors of their own in place of others."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _whole(vector: Tensor) -> Tensor:
    return vector
