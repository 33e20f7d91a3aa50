"""Cache of small tables that kernels read, copied to a device once and kept for later calls and CUDA graphs."""

import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastreg.core.torch_private import foreach_add_

T = TypeVar("T")

# Tables that captured graphs read at every replay, some kilobytes per model. They are never freed, because PyTorch does
# not tell when a graph is gone.
_CAPTURED: dict[int, object] = {}


class _Entry(NamedTuple):
    table: Any  # a tensor, or a tuple that contains tensors
    filled: Any  # the event and the stream of the copy; None on devices without streams


class DeviceCache:
    """Cache of the tables of one device, by key. It holds `size` tables and evicts the oldest first."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.device = device
        self._size = size
        self._entries: dict[Hashable, _Entry] = {}
        self._storing = threading.Lock()

    def get(self, key: Hashable, build: Callable[[], T]) -> T:
        """Return the table of `key`. Call `build` if it is not cached."""
        entry = self._entries.get(key)
        if entry is not None:
            if is_capturing(self.device):
                _CAPTURED[id(entry.table)] = entry.table
            elif entry.filled is not None:
                _follow(entry)
            return entry.table  # type: ignore[no-any-return]
        # A table built in inference mode must serve calls outside of it, too.
        with torch.inference_mode(False):
            built = build()
        # Not during capture: the table then lies in the graph's memory, and only its replays fill it.
        if not is_capturing(self.device):
            stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
            entry = _Entry(built, stream and (stream.record_event(), stream))
            with self._storing:
                while len(self._entries) >= self._size:
                    del self._entries[next(iter(self._entries))]
                self._entries[key] = entry
        return built


def _follow(entry: _Entry) -> None:
    """Make the current stream wait for the stream that filled a table, and the allocator for the current stream."""
    filled, producer = entry.filled
    stream = torch.cuda.current_stream(producer.device)
    if stream != producer:
        stream.wait_event(filled)
        for part in entry.table if isinstance(entry.table, tuple) else (entry.table,):
            if isinstance(part, torch.Tensor):
                part.record_stream(stream)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device` without waiting for the copy."""
    if device.type != "cuda":
        return tensor.to(device, copy=True)
    if is_capturing(device):
        return written_by_kernels(tensor, device)
    # PyTorch's allocator keeps the pinned memory until the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True)


def written_by_kernels(tensor: Tensor, device: torch.device) -> Tensor:
    """Create the tensor on `device` from kernel arguments, which a CUDA graph stores."""
    flat = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=device)
    if tensor.numel():
        foreach_add_(flat.unbind(), tensor.flatten().tolist())
    return flat.view(tensor.shape)


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph captures the current stream of `device`."""
    if device.type == "cuda" and device.index is not None and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # the query is for the current device
            return torch.cuda.is_current_stream_capturing()
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
