"""Memory that the PyTorch path works in, with views of it that cost an operator call each to make."""

import threading
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

# Views that a thread keeps, of some hundred bytes each.
MOST_VIEWS = 1 << 14


class Memory:
    """Named buffers of one device, each of at least `reserve` elements."""

    def __init__(self, device: torch.device, reserve: int = 0) -> None:
        self._device, self._reserve = device, reserve
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[Hashable, Any] = {}
        self._n_views = 0

    def view(
        self, name: str, dtype: torch.dtype, n: int, key: Hashable = None, make: Any = None, n_views: int = 1
    ) -> Any:
        """`n` elements, the same at every call with this name and dtype.

        Or what `make` makes of them: `n_views` views, kept under `key`, which tells all that they depend on.
        """
        found = self._views.get((name, dtype, n, key))
        if found is None:
            # Made for every later call, in whatever mode that is.
            with torch.inference_mode(False), torch.no_grad():
                found = self._buffer(name, dtype, n)[:n]
                found = found if make is None else make(found)
            if self._n_views >= MOST_VIEWS:
                self._forget_views()
            self._views[name, dtype, n, key] = found
            self._n_views += n_views
        return found

    def _buffer(self, name: str, dtype: torch.dtype, n: int) -> Tensor:
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < n:
            self._forget_views()
            # All at once where it will be kept: pages that are never touched take no memory.
            size = max(n, self._reserve)
            buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype, device=self._device)
        return buffer

    def _forget_views(self) -> None:
        self._views.clear()
        self._n_views = 0


class _Kept(threading.local):
    memory: Memory | None = None


_KEPT = _Kept()


def take_memory(device: torch.device, reserve: int) -> Memory:
    """This thread's memory, kept to save page faults; a sweep that interrupts one before `give_back` gets another."""
    if device.type != "cpu" or is_under_a_mode():
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
