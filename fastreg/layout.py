"""What was learnt of the memory of a list of weights, and whether it still holds: the one cache of it.

A layout holds addresses and sizes, never tensors, so that caching it keeps no model alive. A GPU waits for whatever
Python asks of hundreds of tensors: each is asked for its address, and torch.compile's guards ask the rest, in C++.
"""

import operator
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastreg.dtensor import is_dtensor, local_shard
from fastreg.formulas import value_dtype

T = TypeVar("T")

MOST_KEYS = 64
# For each key: guards differ under autocast and in inference mode, and one list of weights may be grouped in two ways.
MOST_PER_KEY = 4

try:
    _TensorGuards: Any = torch._C._dynamo.guards.TensorGuards
except AttributeError:  # nothing is then found again: slower, and the same numbers
    _TensorGuards = None


def snapshot(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Tells of as many tensors whether kind, dtype, device, shape, strides and requires_grad are still those of these.

    It keeps none of them alive.
    """
    if _TensorGuards is None:
        return lambda *others: False
    return _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check  # type: ignore[no-any-return]


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


_VERSION, _SHAPE = map(operator.attrgetter, ("_version", "shape"))


class WeightState:
    """Where each weight lies, its shape, and how often it was changed in place.

    The shard of a DTensor counts by itself. FSDP2 may give a weight another shard object, which is no change.
    """

    def __init__(self, weights: Sequence[Tensor], is_sharded: bool, layout: Layout | None) -> None:
        """`layout` is that of the weights, if it is known: only versions then need to be noted."""
        self._layout = None if is_sharded else layout
        self._facts = _facts(weights, self._layout)
        shards = [(i, local_shard(w)) for i, w in enumerate(weights) if is_dtensor(w)] if is_sharded else ()
        self._shards = [(i, weakref.ref(shard), _facts([shard], None)) for i, shard in shards]

    def check(self, weights: Sequence[Tensor]) -> Layout | None:
        """Raises RuntimeError where one of the same weights was changed since, in place or by assigning `.data`.

        Returns their layout, if it is known and still holds.
        """
        layout = self._layout
        changed = _facts(weights, layout) != self._facts
        if layout is not None and not layout.holds(weights):
            # Not a change by itself: backward may run under autocast, or after a weight was frozen.
            changed |= not layout.is_of(weights)
            layout = None
        for i, shard, facts in self._shards:
            now = local_shard(weights[i])
            changed |= shard() is now and _facts([now], None) != facts
        if changed:
            raise RuntimeError(
                "one of the weights needed for the gradient of the elastic penalty was modified by an in-place "
                "operation, or given other .data, between forward and backward; call backward before optimizer.step(), "
                "or compute the penalty again"
            )
        return layout


def _facts(weights: Sequence[Tensor], layout: Layout | None) -> list[object]:
    try:
        if layout is not None:
            return list(map(_VERSION, weights))
        return [*map(_VERSION, weights), *map(Tensor.data_ptr, weights), *map(_SHAPE, weights)]
    except RuntimeError:  # an inference tensor, a DTensor
        return [(0 if w.is_inference() else w._version, 0 if is_dtensor(w) else w.data_ptr(), w.shape) for w in weights]
