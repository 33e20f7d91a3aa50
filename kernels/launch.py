"""From parts to kernel launches: pointer tables, one sweep per dtype, and one kernel that finishes the value."""

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.device_cache import DeviceCache, to_device
from fastreg.formulas import Measure, Mode, Penalty
from fastreg.kernels.sweep_kernel import _finish_kernel, _sweep_kernel
from fastreg.layout import Part
from fastreg.strengths import Scale
from fastreg.work import Grads, Work

# Whether the kernels were defined under TRITON_INTERPRET=1, and so run on the CPU.
INTERPRETED = not isinstance(_sweep_kernel, triton.runtime.JITFunction)
# Elements that one Triton program reads at a time: 16 per thread of four warps.
BLOCK = 2048
# Enough programs to fill the largest GPUs several times over; beyond that, chunks grow instead.
MOST_CHUNKS = 8192
MOST_BLOCKS_PER_CHUNK = 32
NUM_WARPS = 4
FINISH_BLOCK = 1024

_TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# Tables are filled on the host, whatever the user's default device is.
_HOST_INT64: Any = {"dtype": torch.int64, "device": "cpu"}


class Tables(NamedTuple):
    """Device memory that the kernels read; see `_sweep_kernel` for the layout."""

    tensors: Tensor  # int64 [n_tensors, 4]
    chunk_tensor: Tensor  # int32 [n_chunks]
    chunk_group: Tensor  # int32 [n_chunks]
    n_chunks: int
    blocks_per_chunk: int


class PointerTables:
    """The tables of one part, built at their first use and kept on its device."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self.cache = DeviceCache(part.device, size=8)

    def of_weights(self) -> Tables:
        """Addresses and sizes of the weights, and how they are cut into chunks."""
        return self.cache.get("weights", self._build)

    def of_gradients(self, grads: Sequence[Tensor]) -> tuple[int, Tensor]:
        """A base address, and int64 [n_tensors] byte offsets from it, which outlive a common move."""
        addresses = list(map(Tensor.data_ptr, map(grads.__getitem__, self._part.positions)))
        base = addresses[0]
        offsets = tuple(map(operator.sub, addresses, itertools.repeat(base)))
        table = self.cache.get(offsets, lambda: to_device(torch.tensor(offsets, **_HOST_INT64), self._part.device))
        return base, table

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
        chunk_group = tensors[:, 3][chunk_tensor].int()
        return Tables(tensors, chunk_tensor.int(), chunk_group, sum(n_chunks), blocks_per_chunk)


def kernel_sweep(
    parts: Sequence[Part], mode: Mode, work: Work, grads: Grads, scale: Scale, value_dtype: torch.dtype | None
) -> Measure | None:
    """One sweep over the parts of one device: a launch per dtype, and one more where a value is wanted.

    The arguments are those of `block_sweep`, which does the same without Triton. The addresses of the weights are in
    the parts' tables already.
    """
    device = parts[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device.
        with torch.cuda.device(device):
            return kernel_sweep(parts, mode, work, grads, scale, value_dtype)
    pointers = [part.prepared(PointerTables) for part in parts]
    tables = list(map(PointerTables.of_weights, pointers))
    n_chunks = sum([table.n_chunks for table in tables])
    factors = *work.strengths, *scale
    l1_ptr, l2_ptr, scale_l1_ptr, scale_l2_ptr = [s if isinstance(s, Tensor) else None for s in factors]
    # A tensor is read through its pointer, and multiplied by a float of 1.
    l1, l2, factor_l1, factor_l2 = [1.0 if isinstance(s, Tensor) else s for s in factors]
    partials = None if value_dtype is None else torch.empty((n_chunks, 2), dtype=torch.float64, device=device)
    first_partial = 0
    for part, pointer, table in zip(parts, pointers, tables, strict=True):
        if table.n_chunks == 0:
            continue
        grad_base, grad_table = (0, None) if grads is None else pointer.of_gradients(grads)
        _sweep_kernel[(table.n_chunks,)](
            table_ptr=table.tensors,
            chunk_tensor_ptr=table.chunk_tensor,
            grad_table_ptr=grad_table,
            partials_ptr=None if partials is None else partials[first_partial:],
            l1_ptr=l1_ptr,
            l2_ptr=l2_ptr,
            scale_l1_ptr=scale_l1_ptr,
            scale_l2_ptr=scale_l2_ptr,
            l1=l1 * factor_l1,
            l2=l2 * factor_l2,
            grad_base=grad_base,
            blocks_per_chunk=table.blocks_per_chunk,
            DTYPE=_TRITON_DTYPES[part.dtype],
            MODE=mode._value_,  # `mode.value` is a slower property
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
        first_partial += table.n_chunks
    if value_dtype is None:
        return None
    total, l1_term, l2_term = [torch.empty((), dtype=value_dtype, device=device) for _ in range(3)]
    sums = torch.empty((work.n_groups, 2), dtype=torch.float64, device=device)
    chunk_group = None
    if work.n_groups > 1:
        cache = pointers[0].cache
        chunk_group = cache.get("groups of all parts", lambda: torch.cat([t.chunk_group for t in tables]))
    _finish_kernel[(1 + work.n_groups,)](
        partials_ptr=partials,
        chunk_group_ptr=chunk_group,
        total_ptr=total,
        l1_term_ptr=l1_term,
        l2_term_ptr=l2_term,
        sums_ptr=sums,
        l1_ptr=l1_ptr,
        l2_ptr=l2_ptr,
        l1=l1,
        l2=l2,
        n_chunks=n_chunks,
        BLOCK=FINISH_BLOCK,
        num_warps=NUM_WARPS,
    )
    return Measure(Penalty(total, l1_term, l2_term), sums)
