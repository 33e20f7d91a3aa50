"""What was learnt of the memory of a list of weights, and whether it still holds: the one cache of it.

A layout holds addresses and sizes, never tensors, so that caching it keeps no model alive. A GPU waits for whatever
Python asks of hundreds of tensors: each is asked for its address, and torch.compile's guards ask the rest, in C++.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastreg.core.dtypes import value_dtype
from fastreg.core.torch_private import snapshot

T = TypeVar("T")

MOST_KEYS = 64
# For each key: guards differ under autocast and in inference mode, and one list of weights may be grouped in two ways.
MOST_PER_KEY = 4


class Part:
    """The weights of one dtype on one device; `positions` are their places in the caller's list."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.positions: list[int] = []
        self.addresses: list[int] = []
        self.numels: list[int] = []
        self.groups: list[int] = []
        self._prepared: dict[Hashable, Any] = {}

    def prepared(self, make: Callable[["Part"], T]) -> T:
        """`make(self)`, made once: what a backend needs beyond the layout, and keeps with it."""
        found = self._prepared.get(make)
        if found is None:
            found = self._prepared.setdefault(make, make(self))  # of two threads, both take the first
        return found  # type: ignore[no-any-return]


class Layout:
    """Where the elements of dense weights lie: parts by device, in the order of the devices' first weights."""

    def __init__(self, weights: Sequence[Tensor], groups: Sequence[int]) -> None:
        self.addresses = list(map(Tensor.data_ptr, weights))
        self.value_dtype = value_dtype([w.dtype for w in weights])
        self.groups = list(groups)
        self.identity = _identity(weights, self.addresses)
        # Whether hooks had to see the last gradient of these weights; None before there was one.
        self.were_hooked: bool | None = None
        # Whether the weights were found to be free to be changed in place, which what is compared covers.
        self.may_be_written = False
        self._is_like = snapshot(weights)
        self._are_like: dict[int, Callable[..., bool]] = {}
        by_device: dict[torch.device, dict[torch.dtype, Part]] = {}
        for position, (weight, address, group) in enumerate(zip(weights, self.addresses, groups, strict=True)):
            parts = by_device.setdefault(weight.device, {})
            part = parts.get(weight.dtype) or parts.setdefault(weight.dtype, Part(weight.dtype, weight.device))
            part.positions.append(position)
            part.addresses.append(address)
            part.numels.append(weight.numel())
            part.groups.append(group)
        self.parts = {device: list(parts.values()) for device, parts in by_device.items()}

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether address, shape, strides, dtype, device, kind and requires_grad are still the same."""
        return self._is_like(*weights) and list(map(Tensor.data_ptr, weights)) == self.addresses

    def is_of(self, weights: Sequence[Tensor]) -> bool:
        """Whether this is their memory, dtype and shape, whatever else may have changed."""
        return self.identity == _identity(weights, list(map(Tensor.data_ptr, weights)))

    def accepts(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether gradients, and states of an optimizer after them, are like as many that were stored last.

        That is, all present, in the weights' memory order, free to be changed.
        """
        are_like = self._are_like.get(len(tensors))
        return are_like is not None and are_like(*tensors)

    def remember(self, tensors: Sequence[Tensor]) -> None:
        """Accepts such gradients and states at the next call: they may be written to as they are."""
        self._are_like[len(tensors)] = snapshot(tensors)


def _identity(weights: Sequence[Tensor], addresses: list[int]) -> list[Any]:
    return [addresses, [(w.dtype, w.device, w.shape) for w in weights]]


_LAYOUTS: dict[tuple[int, int], tuple[Layout, ...]] = {}
_STORING = threading.Lock()


def find_layout(weights: Sequence[Tensor], groups: list[int]) -> Layout | None:
    """The cached layout, or None if an address, shape, stride, dtype, device, kind or group changed."""
    for layout in _LAYOUTS.get((weights[0].data_ptr(), len(weights)), ()):
        if layout.groups == groups and layout.holds(weights):
            return layout
    return None


def store_layout(weights: Sequence[Tensor], groups: list[int]) -> Layout:
    """The layout of dense `weights`, cached for the next call."""
    layout = Layout(weights, groups)
    key = layout.addresses[0], len(layout.addresses)
    with _STORING:
        while len(_LAYOUTS) >= MOST_KEYS and key not in _LAYOUTS:
            del _LAYOUTS[next(iter(_LAYOUTS))]
        others = _LAYOUTS.get(key, ())
        for other in others:  # of the same memory, as under autocast: what was prepared for it serves here
            if other.identity == layout.identity and other.groups == layout.groups:
                layout.parts = other.parts
        _LAYOUTS[key] = (layout, *others)[:MOST_PER_KEY]
    return layout


def forget_layouts() -> None:
    """Empties the cache."""
    with _STORING:
        _LAYOUTS.clear()


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gaps or overlaps, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(tensor.stride(), tensor.shape, strict=True) if si != 1):
        if stride != expected:
            return False
        expected *= size
    return True
