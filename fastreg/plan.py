"""What a sweep will visit: weights grouped by device and dtype, cut into chunks, with their pointer tables.

A plan holds addresses and sizes, never tensors, so that caching it keeps no model alive. It is looked up by everything
it was built from: a weight that moved, grew or changed its dtype finds another plan.
"""

import enum
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreg.device_cache import DeviceCache, to_device
from fastreg.strengths import value_dtype

# Elements that one Triton program reads at a time: 16 per thread of four warps.
BLOCK = 2048
# Enough programs to fill the largest GPUs several times over; beyond that, chunks grow instead.
MOST_CHUNKS = 8192
MOST_BLOCKS_PER_CHUNK = 32
# The PyTorch path works through scratch memory of this many elements: small enough for the cores' caches, large enough
# that the cost of an operator call disappears (bench/results/tuning). Other devices pay for launches, not cache misses.
CPU_BLOCK = 1 << 19
# There, larger pieces than this are not copied to be packed with others, unless the whole model is smaller than that.
CPU_SMALL = 1 << 14
CPU_PACK = 1 << 17
DEVICE_BLOCK = 1 << 26
# The PyTorch path fills blocks up to a multiple of this. What is left over after a vector unit's last full step might
# be rounded in another way there, and differ between two operators for the same thing.
LANES = 16
# Tables are filled on the host, whatever the user's default device is.
HOST_INT64: Any = {"dtype": torch.int64, "device": "cpu"}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for weights of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Mode(enum.IntEnum):
    """What a sweep does besides reading the weights; the numbers are those of the Triton kernel."""

    VALUE = 0
    GRADIENT = 1
    RESCALE = 2
    ACCUMULATE = 3
    PROX = 4


class Block(NamedTuple):
    """Pieces of weights of one strength group that the PyTorch path handles together."""

    group: int
    pieces: tuple[tuple[int, int], ...]  # the weight's position, and which of its pieces
    sizes: tuple[int, ...]
    padded: int  # elements, with those that fill up the vector units
    direct: bool  # whether the one piece can be worked on where it is


class Tables(NamedTuple):
    """Device memory that the Triton kernels read; see `_sweep_kernel` for the layout."""

    tensors: Tensor  # int64 [n_tensors, 4]
    chunk_tensor: Tensor  # int32 [n_chunks]
    chunk_group: Tensor  # int32 [n_chunks]
    blocks_per_chunk: int


class Part:
    """The weights of one dtype on one device; `positions` are their places in the caller's list."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.positions: list[int] = []
        self.addresses: list[int] = []
        self.numels: list[int] = []
        self.groups: list[int] = []
        self.cache = DeviceCache(device, size=8)

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return compute_dtype(self.dtype)

    @functools.cached_property
    def piece_sizes(self) -> dict[int, tuple[int, ...]]:
        """By position, how the PyTorch path cuts a weight: into blocks, and the rest so that its tail can be packed."""
        size, small = self._walk
        cuts = {}
        for position, numel in zip(self.positions, self.numels, strict=True):
            left, tail = numel % size, numel % LANES
            rest = (left - tail, tail) if left - tail >= small else (left,)
            cuts[position] = (size,) * (numel // size) + tuple(n for n in rest if n)
        return cuts

    @functools.cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The walk of the PyTorch path: large pieces are blocks by themselves, small ones of a group share some."""
        size, small = self._walk
        blocks: list[Block] = []
        packs: dict[int, tuple[list[tuple[int, int]], list[int]]] = {}
        free: dict[int, int] = {}
        for position, group in zip(self.positions, self.groups, strict=True):
            for number, n in enumerate(self.piece_sizes[position]):
                if n >= small:
                    blocks.append(self._block(group, [(position, number)], [n]))
                    continue
                if free.get(group, 0) < n:
                    if group in packs:
                        blocks.append(self._block(group, *packs[group]))
                    packs[group], free[group] = ([], []), size
                packs[group][0].append((position, number))
                packs[group][1].append(n)
                free[group] -= n
        return (*blocks, *(self._block(group, *pack) for group, pack in packs.items()))

    def _block(self, group: int, pieces: list[tuple[int, int]], sizes: list[int]) -> Block:
        lanes = LANES if self.device.type == "cpu" else 1
        padded = -(-sum(sizes) // lanes) * lanes
        direct = len(sizes) == 1 and padded == sizes[0] and self.dtype == self.compute
        return Block(group, tuple(pieces), tuple(sizes), padded, direct)

    @functools.cached_property
    def _walk(self) -> tuple[int, int]:
        """Elements of a block, and of the smallest piece that is one by itself."""
        if self.device.type != "cpu":
            return DEVICE_BLOCK, DEVICE_BLOCK
        # A model that fits into one pack needs no more operator calls than one tensor.
        return CPU_BLOCK, min(CPU_BLOCK, CPU_SMALL if sum(self.numels) > CPU_PACK else CPU_BLOCK)

    @property
    def tables(self) -> Tables:
        """The pointer tables of the Triton path."""
        return self.cache.get("tables", self._build_tables)

    def grad_table(self, offsets: tuple[int, ...]) -> Tensor:
        """int64 [n_tensors]: byte offsets of the gradients from a common base, on the device."""
        return self.cache.get(offsets, lambda: to_device(torch.tensor(offsets, **HOST_INT64), self.device))

    def _build_tables(self) -> Tables:
        """With a fixed number of tensor operations; the tables with a row per chunk are made on the device."""
        total = sum(self.numels)
        blocks_per_chunk = min(max(-(-total // (BLOCK * MOST_CHUNKS)), 1), MOST_BLOCKS_PER_CHUNK)
        chunk_size = blocks_per_chunk * BLOCK
        n_chunks = [-(-numel // chunk_size) for numel in self.numels]
        first_chunks = itertools.accumulate(n_chunks[:-1], initial=0)
        rows = list(zip(self.addresses, self.numels, first_chunks, self.groups, strict=True))
        tensors = to_device(torch.tensor(rows, **HOST_INT64), self.device)
        counts = (tensors[:, 1] + chunk_size - 1) // chunk_size
        chunk_tensor = torch.repeat_interleave(counts, output_size=sum(n_chunks))
        return Tables(tensors, chunk_tensor.int(), tensors[:, 3][chunk_tensor].int(), blocks_per_chunk)


class Plan:
    """Parts by device, in the order of the devices' first weights; `uses` is how often it was found."""

    def __init__(self, shards: dict[torch.device, list[Part]], n_groups: int, value_dtype: torch.dtype) -> None:
        self.shards = shards
        self.n_groups = n_groups
        self.value_dtype = value_dtype
        self.uses = 0


def plan_for(weights: Sequence[Tensor], groups: Sequence[int]) -> Plan:
    """The plan for dense `weights`, from the cache where nothing about them changed."""
    plan = _build(
        tuple([w.data_ptr() for w in weights]),
        tuple([w.numel() for w in weights]),
        tuple([w.dtype for w in weights]),
        tuple([w.device for w in weights]),
        tuple(groups),
    )
    plan.uses += 1
    return plan


@functools.lru_cache(maxsize=32)
def _build(
    addresses: tuple[int, ...],
    numels: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[torch.device, ...],
    groups: tuple[int, ...],
) -> Plan:
    shards: dict[torch.device, dict[torch.dtype, Part]] = {}
    for position, (address, numel, dtype, device) in enumerate(zip(addresses, numels, dtypes, devices, strict=True)):
        parts = shards.setdefault(device, {})
        if dtype not in parts:
            parts[dtype] = Part(dtype, device)
        part = parts[dtype]
        part.positions.append(position)
        part.addresses.append(address)
        part.numels.append(numel)
        part.groups.append(groups[position])
    by_device = {device: list(parts.values()) for device, parts in shards.items()}
    return Plan(by_device, max(groups) + 1, value_dtype(dtypes))
