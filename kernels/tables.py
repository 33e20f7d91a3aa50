"""What kernels read from device memory: tables of addresses, of settings, and counters; made once, and kept."""

import array
import functools
import itertools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastreg.core.device_cache import DeviceCache, to_device
from fastreg.core.layout import Part
from fastreg.core.strengths import constant
from fastreg.core.torch_private import foreach_copy_, version
from fastreg.core.types import Settings, StepInputs
from fastreg.kernels.target import Target, current_target

# Elements that one Triton program reads at a time: 16 per thread of four warps.
BLOCK = 2048
# Of the table of states: three states, and the step counter.
STATE_COLUMNS = 4
# About what the largest GPUs hold at a time; beyond that, chunks grow instead.
MOST_CHUNKS = 2048
MOST_BLOCKS_PER_CHUNK = 32


class Tables(NamedTuple):
    """Device memory that the kernels read; see `_sweep_kernel` for the layout."""

    chunks: Tensor  # int64 [n_chunks, TABLE_COLUMNS]
    n_chunks: int


class PointerTables:
    """The tables of one part, built at their first use and kept on its device."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._of_weights = DeviceCache(part.device, size=1)
        self._by_group = DeviceCache(part.device, size=8)
        self._of_gradients = DeviceCache(part.device, size=8)
        self._of_states = DeviceCache(part.device, size=2)
        self._counters = DeviceCache(part.device, size=1)
        # Where gradients were at the last call, their offsets, and these as a key; one value, for the sake of threads.
        self._last_gradients: tuple[list[int], array.array[int], bytes] = [], array.array("q"), b""
        self._last_states: tuple[list[list[int]], object] = [], None
        # How often the optimizer's counters were changed after the last step that was counted here, and a key.
        self._counted: tuple[object, list[int], object] = None, [], None

    @functools.cached_property
    def target(self) -> Target:
        """Asked for while the part's device is the current one."""
        return current_target()

    def of_weights(self) -> Tables:
        """Where the chunks that the weights are cut into are, and how large."""
        return self._of_weights.get(None, self._build)

    def by_group(self, tables: Sequence[Tables], n_groups: int) -> Tensor:
        """Return the table by which `_finish_kernel` finds the chunks of a group, from the tables of all parts.

        Call it on the first part: the parts of a layout stay together. A sweep may have groups without any weight.
        """
        return self._by_group.get(n_groups, lambda: sorted_by_group([t.chunks[:, 2] for t in tables], n_groups))

    def of_gradients(self, grads: Sequence[Tensor]) -> tuple[Tensor, int]:
        """The table and the distance that `_sweep_kernel` finds gradients by; the table outlives a common move."""
        part = self._part
        addresses = list(map(Tensor.data_ptr, self._own(grads)))
        base = addresses[0]
        last, offsets, key = self._last_gradients
        if addresses != last:
            offsets = array.array("q", map(operator.sub, addresses, itertools.repeat(base)))
            key = offsets.tobytes()
            self._last_gradients = addresses, offsets, key
        first_weight = part.addresses[0]

        def build() -> Tensor:
            own_offsets = map(operator.sub, part.addresses, itertools.repeat(first_weight))
            return to_device(_int64(array.array("q", map(operator.sub, offsets, own_offsets))), part.device)

        return self._of_gradients.get(key, build), base - first_weight

    def of_states(self, step: StepInputs) -> Tensor:
        """The table of states, int64 [n_tensors, STATE_COLUMNS]; see `_sweep_kernel`.

        A row holds the distances from a weight to its states, in their order, and the address of its step counter.
        """
        part = self._part
        none = [None] * (STATE_COLUMNS - 1 - len(step.states))
        lists = (*step.states.values(), *none, step.steps)
        columns = [[] if tensors is None else list(map(Tensor.data_ptr, self._own(tensors))) for tensors in lists]
        if columns != self._last_states[0]:
            self._last_states = columns, object()

        def build() -> Tensor:
            weights = torch.tensor(part.addresses)
            states = [torch.tensor(c) - weights if c else torch.zeros_like(weights) for c in columns[:-1]]
            steps = torch.tensor(columns[-1]) if columns[-1] else torch.zeros_like(weights)
            return to_device(torch.stack([*states, steps], 1), part.device)

        return self._of_states.get(self._last_states[1], build)

    def counters(self, steps: Sequence[Tensor]) -> Tensor:
        """How many steps each chunk has seen: kept, unless somebody else has changed what the optimizer counts.

        To be called once per step, after `of_states`: the kernel then counts it in both.
        """
        own = self._own(steps)
        versions = list(map(version, own))
        places, last_versions, key = self._counted
        if places is not self._last_states[1] or versions != last_versions:
            key = object()

        def build() -> Tensor:
            tensor_of_chunk = self.of_weights().chunks[:, 3]
            return torch.stack(own).to(self._part.device, torch.float32)[tensor_of_chunk]

        found = self._counters.get(key, build)
        torch.autograd.graph.increment_version(own)
        self._counted = self._last_states[1], [version + 1 for version in versions], key
        return found

    def _own(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        positions = self._part.positions
        if len(positions) == len(tensors) and isinstance(tensors, list):
            return tensors
        return list(map(tensors.__getitem__, positions))

    def _build(self) -> Tables:
        """With a fixed number of tensor operations: what has a row per chunk is made on the device."""
        part = self._part
        blocks_per_chunk = min(max(-(-sum(part.numels) // (BLOCK * MOST_CHUNKS)), 1), MOST_BLOCKS_PER_CHUNK)
        chunk_size = blocks_per_chunk * BLOCK
        tensors, starts, numels, groups = part.segments
        # One for a tensor without elements, too: its steps are counted.
        n_chunks = [max(-(-numel // chunk_size), 1) for numel in numels]
        first_chunks = itertools.accumulate(n_chunks[:-1], initial=0)
        size = part.dtype.itemsize
        addresses = [part.addresses[tensor] + start * size for tensor, start in zip(tensors, starts, strict=True)]
        rows = zip(addresses, numels, groups, tensors, first_chunks, n_chunks, strict=True)
        numbers = array.array("q", itertools.chain.from_iterable(rows))
        segments = to_device(_int64(numbers).view(-1, 6), part.device)
        chunks = torch.repeat_interleave(segments, segments[:, 5], dim=0, output_size=sum(n_chunks))
        start = (torch.arange(len(chunks), device=part.device) - chunks[:, 4]) * chunk_size
        chunks[:, 0] += start * size
        chunks[:, 1] = (chunks[:, 1] - start).clamp(max=chunk_size)
        return Tables(chunks[:, :4].contiguous(), len(chunks))


def sorted_by_group(groups: Sequence[Tensor], n_groups: int) -> Tensor:
    """What `_finish_kernel` finds the chunks of a group by, from the groups of each part's chunks."""
    group, order = torch.cat(list(groups)).sort(stable=True)
    first = torch.searchsorted(group, torch.arange(n_groups + 1, device=group.device))
    return torch.cat([first, order, group]).int()


def _int64(numbers: "array.array[int]") -> Tensor:
    """A view of `numbers`. Faster than torch.tensor(), which counts where gradients move at every step."""
    return torch.frombuffer(numbers, dtype=torch.int64)


def settings_table(settings: Sequence[Settings], device: torch.device) -> tuple[Tensor, float]:
    """The settings as float64 [n_groups, n_fields], and a factor on their lr.

    Where all have the same lr, it is that factor, and the table has 1: a schedule then changes no table.
    """
    lrs = {s.lr for s in settings if not isinstance(s.lr, Tensor)}
    factor = 1.0
    if len(lrs) == 1 and not any(isinstance(s.lr, Tensor) for s in settings):
        factor = float(lrs.pop())
        settings = [s._replace(lr=1.0) for s in settings]
    numbers = list(itertools.chain.from_iterable(settings))
    in_memory = [i for i, number in enumerate(numbers) if isinstance(number, Tensor)]
    floats = [0.0 if isinstance(number, Tensor) else number for number in numbers] if in_memory else numbers
    table = constant(tuple(floats), device)
    if in_memory:
        table = table.clone()
        foreach_copy_([table[i] for i in in_memory], [torch.as_tensor(numbers[i]).reshape(()) for i in in_memory])
    return table, factor
