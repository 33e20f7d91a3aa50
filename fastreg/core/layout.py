"""Cache of memory layouts: addresses, shapes and dtypes of a list of weights, and whether they are still valid.

A layout holds addresses and sizes but no tensors, so the cache keeps no model alive. A GPU waits while Python inspects
hundreds of tensors. So Python reads each tensor's address only, and torch.compile's guards compare the rest in C++.
"""

import enum
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastreg.core.dtypes import value_dtype
from fastreg.core.torch_private import snapshot

T = TypeVar("T")

MOST_KEYS = 64
# Per key: guards differ under autocast and in inference mode, and one list of weights may be grouped in two ways.
MOST_PER_KEY = 4


class Segments(NamedTuple):
    """Segments: whole weights, or parts such as rows. One entry per segment, in the order of weights and elements."""

    weights: list[int]  # index of the segment's weight in the part
    starts: list[int]  # index of its first element in the weight
    numels: list[int]
    groups: list[int]  # its strength group, whose strengths it uses and to whose sums it adds


class Part:
    """The weights of one dtype on one device; `positions` are their indices in the caller's list."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.positions: list[int] = []
        self.addresses: list[int] = []
        self.numels: list[int] = []
        self.segments = Segments([], [], [], [])
        self._prepared: dict[Hashable, Any] = {}

    def add(self, position: int, address: int, numel: int, group: int | range) -> None:
        """Add a weight. A range of groups cuts it into that many segments of equal size."""
        groups = [group] if isinstance(group, int) else list(group)
        size = numel // max(len(groups), 1)
        if size * len(groups) != numel:
            raise ValueError(f"{numel} elements cannot be cut into {len(groups)} segments of equal size")
        weights, starts, numels, segment_groups = self.segments
        weights += [len(self.positions)] * len(groups)
        starts += [i * size for i in range(len(groups))]
        numels += [size] * len(groups)
        segment_groups += groups
        self.positions.append(position)
        self.addresses.append(address)
        self.numels.append(numel)

    def prepared(self, make: Callable[["Part"], T]) -> T:
        """Return `make(self)`, computed once. A backend stores its own data for this part here."""
        kept = self._prepared.get(make)
        if kept is None:
            kept = self._prepared.setdefault(make, make(self))  # if two threads compute it, both use the first result
        return kept  # type: ignore[no-any-return]


class Notes:
    """Results of earlier calls on the weights of a layout. They are valid while the guards of the layout match."""

    def __init__(self) -> None:
        # Whether hooks had to see the last gradient of these weights; None before the first gradient.
        self.were_hooked: bool | None = None
        # Whether the weights can be changed in place.
        self.are_writable = False
        self._guards: dict[str, Callable[..., bool]] = {}

    def grads_match(self, mode: enum.Enum, tensors: Sequence[Tensor | None]) -> bool:
        """Return whether gradients, followed by states of an optimizer, match the guards stored for a sweep of `mode`.

        If so, all are present, in the weights' memory order, and can be changed in place.
        """
        guards = self._guards.get(mode._value_)  # the hash of an Enum is a call of Python
        return guards is not None and guards(*tensors)

    def store_grads(self, mode: enum.Enum, tensors: Sequence[Tensor]) -> None:
        """Store guards for the gradients and states of a sweep of `mode`, which can be changed in place."""
        self._guards[mode._value_] = snapshot(tensors)


class Layout:
    """Memory layout of dense weights: parts by device, in the order of the devices' first weights."""

    def __init__(self, weights: Sequence[Tensor], groups: Sequence[int | range]) -> None:
        self.addresses = list(map(Tensor.data_ptr, weights))
        self.value_dtype = value_dtype([w.dtype for w in weights])
        self.groups = list(groups)
        self.identity = _identity(weights, self.addresses)
        self.overlap = find_overlap(weights)
        self.notes = Notes()
        self._guards = snapshot(weights)
        by_device: dict[torch.device, dict[torch.dtype, Part]] = {}
        for position, (weight, address, group) in enumerate(zip(weights, self.addresses, groups, strict=True)):
            parts = by_device.setdefault(weight.device, {})
            part = parts.get(weight.dtype) or parts.setdefault(weight.dtype, Part(weight.dtype, weight.device))
            part.add(position, address, weight.numel(), group)
        self.parts = {device: list(parts.values()) for device, parts in by_device.items()}

    def guards_match(self, weights: Sequence[Tensor]) -> bool:
        """Return whether address, shape, strides, dtype, device, class and requires_grad are unchanged."""
        return self._guards(*weights) and list(map(Tensor.data_ptr, weights)) == self.addresses

    def same_memory(self, weights: Sequence[Tensor]) -> bool:
        """Return whether address, dtype, device and shape are unchanged. Other metadata may differ."""
        return self.identity == _identity(weights, list(map(Tensor.data_ptr, weights)))


def _identity(weights: Sequence[Tensor], addresses: list[int]) -> list[Any]:
    return [addresses, [(w.dtype, w.device, w.shape) for w in weights]]


_LAYOUTS: dict[tuple[int, int], tuple[Layout, ...]] = {}
_STORING = threading.Lock()


def find_layout(weights: Sequence[Tensor], groups: list[int | range]) -> Layout | None:
    """Return the cached layout, or None if an address, a group or metadata that the guards compare changed."""
    for layout in _LAYOUTS.get((weights[0].data_ptr(), len(weights)), ()):
        if layout.groups == groups and layout.guards_match(weights):
            return layout
    return None


def store_layout(weights: Sequence[Tensor], groups: list[int | range]) -> Layout:
    """Create the layout of dense `weights` and cache it."""
    layout = Layout(weights, groups)
    key = layout.addresses[0], len(layout.addresses)
    if not any(layout.addresses):
        # Empty tensors have no address by which others, such as placeholders of a sharding engine, would be noticed.
        return layout
    with _STORING:
        while len(_LAYOUTS) >= MOST_KEYS and key not in _LAYOUTS:
            del _LAYOUTS[next(iter(_LAYOUTS))]
        others = _LAYOUTS.get(key, ())
        for other in others:  # layouts of the same memory, as under autocast, share the backends' data
            if other.identity == layout.identity and other.groups == layout.groups:
                layout.parts = other.parts
        _LAYOUTS[key] = (layout, *others)[:MOST_PER_KEY]
    return layout


def forget_layouts() -> None:
    """Clear the cache."""
    with _STORING:
        _LAYOUTS.clear()


def find_overlap(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Return the indices of two plain tensors that have elements in common in memory, or None."""
    spans = sorted([(str(t.device), t.data_ptr(), i) for i, t in enumerate(tensors) if t.numel()])
    clusters: list[list[int]] = []  # tensors whose spans of memory overlap
    here, end = "", 0
    for device, start, i in spans:
        if device != here or start >= end:
            clusters.append([])
            here, end = device, start
        clusters[-1].append(i)
        end = max(end, start + memory_span(tensors[i]))
    pairs = [_overlap_in(tensors, cluster) for cluster in clusters if len(cluster) > 1]
    return next((pair for pair in pairs if pair is not None), None)


def _overlap_in(tensors: Sequence[Tensor], cluster: Sequence[int]) -> tuple[int, int] | None:
    """Return two tensors of a cluster that have elements in common. Without gaps, the first two have some."""
    if is_dense(tensors[cluster[0]]) and is_dense(tensors[cluster[1]]):
        return cluster[0], cluster[1]
    start = tensors[cluster[0]].data_ptr()
    end = max(tensors[i].data_ptr() + memory_span(tensors[i]) for i in cluster)
    lengths = [t.element_size() * n for t in map(tensors.__getitem__, cluster) for n in (1, *t.stride())]
    unit = math.gcd(*lengths, *[tensors[i].data_ptr() - start for i in cluster])
    is_used = torch.zeros((end - start) // unit, dtype=torch.bool, device="cpu")

    def elements(i: int) -> Tensor:
        size, strides = tensors[i].element_size() // unit, tensors[i].stride()
        shape = [n if stride else 1 for n, stride in zip(tensors[i].shape, strides, strict=True)]
        steps = [stride * size for stride in strides]
        return is_used.as_strided((*shape, size), (*steps, 1), (tensors[i].data_ptr() - start) // unit)

    for n, i in enumerate(cluster):
        if elements(i).any():
            is_used.zero_()
            elements(i).fill_(True)
            return next(j for j in cluster[:n] if elements(j).any()), i
        elements(i).fill_(True)
    return None


def memory_span(tensor: Tensor) -> int:
    """Return the number of bytes from the first element of a non-empty tensor to the end of the last one."""
    last = sum([(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)])
    return (last + 1) * tensor.element_size()


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill one block of memory without gaps or overlaps, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(tensor.stride(), tensor.shape, strict=True) if si != 1):
        if stride != expected:
            return False
        expected *= size
    return True
