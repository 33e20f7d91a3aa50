"""Small tables that kernels read: copied to a device once, and kept for the next call and for CUDA graphs."""

import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastreg.core.torch_private import foreach_add_

T = TypeVar("T")

# What captured graphs read at every replay. It only grows, by some kilobytes a model: nothing tells when they are gone.
_CAPTURED: dict[int, object] = {}


class _Entry(NamedTuple):
    table: Any  # a tensor, or a tuple with tensors in it
    filled: Any  # the event recorded when it was filled, and its stream; None where there are no streams


class DeviceCache:
    """The tables of one device, by a key; the oldest makes room for the one after `size`."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.device = device
        self._size = size
        self._entries: dict[Hashable, _Entry] = {}
        self._storing = threading.Lock()

    def get(self, key: Hashable, build: Callable[[], T]) -> T:
        """What `build` made for `key`, now or earlier."""
        entry = self._entries.get(key)
        if entry is not None:
            if is_capturing(self.device):
                _CAPTURED[id(entry.table)] = entry.table
            elif entry.filled is not None:
                _follow(entry)
            return entry.table  # type: ignore[no-any-return]
        # In inference mode too, tables are for every later call.
        with torch.inference_mode(False):
            built = build()
        # A table built during capture is in the graph's own memory, and filled by its replays only.
        if not is_capturing(self.device):
            stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
            entry = _Entry(built, stream and (stream.record_event(), stream))
            with self._storing:
                while len(self._entries) >= self._size:
                    del self._entries[next(iter(self._entries))]
                self._entries[key] = entry
        return built


def _follow(entry: _Entry) -> None:
    """Makes the current stream wait for a table that another one has filled, and the allocator for the current one."""
    filled, producer = entry.filled
    stream = torch.cuda.current_stream(producer.device)
    if stream != producer:
        stream.wait_event(filled)
        for part in entry.table if isinstance(entry.table, tuple) else (entry.table,):
            if isinstance(part, torch.Tensor):
                part.record_stream(stream)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a host tensor on `device`, without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device, copy=True)
    if is_capturing(device):
        return written_by_kernels(tensor, device)
    # PyTorch keeps pinned memory until the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True)


def written_by_kernels(tensor: Tensor, device: torch.device) -> Tensor:
    """The same without a copy: the numbers travel as arguments of kernels, which a graph keeps with them."""
    flat = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=device)
    if tensor.numel():
        foreach_add_(flat.unbind(), tensor.flatten().tolist())
    return flat.view(tensor.shape)


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on `device` now goes into a CUDA graph."""
    if device.type == "cuda" and device.index is not None and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # PyTorch asks the current device's stream
            return torch.cuda.is_current_stream_capturing()
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
