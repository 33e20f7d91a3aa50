"""The pointer tables through which one compiled kernel finds the tensors of any model."""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreg.device_cache import DeviceCache, to_device
from fastreg.layout import Part

# Elements that one Triton program reads at a time: 16 per thread of four warps.
BLOCK = 2048
# Enough programs to fill the largest GPUs several times over; beyond that, chunks grow instead.
MOST_CHUNKS = 8192
MOST_BLOCKS_PER_CHUNK = 32
# Tables are filled on the host, whatever the user's default device is.
_HOST_INT64: Any = {"dtype": torch.int64, "device": "cpu"}


class Tables(NamedTuple):
    """Device memory that the kernels read; see `_sweep_kernel` for the layout."""

    tensors: Tensor  # int64 [n_tensors, 4]
    chunk_tensor: Tensor  # int32 [n_chunks]
    chunk_group: Tensor  # int32 [n_chunks]
    blocks_per_chunk: int


class PointerTables:
    """The tables of one part, built at their first use and kept on its device."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self.cache = DeviceCache(part.device, size=8)

    @property
    def of_weights(self) -> Tables:
        """Addresses and sizes of the weights, and how they are cut into chunks."""
        return self.cache.get("weights", self._build)

    def of_gradients(self, offsets: tuple[int, ...]) -> Tensor:
        """int64 [n_tensors]: byte offsets of the gradients from a common base."""
        return self.cache.get(offsets, lambda: to_device(torch.tensor(offsets, **_HOST_INT64), self._part.device))

    def _build(self) -> Tables:
        """With a fixed number of tensor operations; the tables with a row per chunk are made on the device."""
        part = self._part
        blocks_per_chunk = min(max(-(-sum(part.numels) // (BLOCK * MOST_CHUNKS)), 1), MOST_BLOCKS_PER_CHUNK)
        chunk_size = blocks_per_chunk * BLOCK
        n_chunks = [-(-numel // chunk_size) for numel in part.numels]
        first_chunks = itertools.accumulate(n_chunks[:-1], initial=0)
        rows = list(zip(part.addresses, part.numels, first_chunks, part.groups, strict=True))
        tensors = to_device(torch.tensor(rows, **_HOST_INT64), part.device)
        counts = (tensors[:, 1] + chunk_size - 1) // chunk_size
        chunk_tensor = torch.repeat_interleave(counts, output_size=sum(n_chunks))
        return Tables(tensors, chunk_tensor.int(), tensors[:, 3][chunk_tensor].int(), blocks_per_chunk)
