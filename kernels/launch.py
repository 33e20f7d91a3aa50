"""From parts to kernel launches: pointer tables, one sweep per dtype, and one kernel that finishes the value."""

import array
import functools
import itertools
import operator
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.device_cache import DeviceCache, to_device
from fastreg.formulas import Measure, Mode
from fastreg.kernels.finish_kernel import _finish_kernel
from fastreg.kernels.sweep_kernel import _sweep_kernel
from fastreg.kernels.target import Target, current_target
from fastreg.layout import Part
from fastreg.strengths import Scale
from fastreg.work import Grads, Work

# Whether the kernels were defined under TRITON_INTERPRET=1, and so run on the CPU.
INTERPRETED = not isinstance(_sweep_kernel, triton.runtime.JITFunction)
# Elements that one Triton program reads at a time: 16 per thread of four warps.
BLOCK = 2048
# About what the largest GPUs hold at a time; beyond that, chunks grow instead.
MOST_CHUNKS = 2048
MOST_BLOCKS_PER_CHUNK = 32
NUM_WARPS = 4
FINISH_BLOCK, FINISH_WARPS = 1024, 8
_ROW_BYTES = 16  # of two float64 sums

_TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Tables(NamedTuple):
    """Device memory that the kernels read; see `_sweep_kernel` for the layout."""

    chunks: Tensor  # int64 [n_chunks, 4]
    n_chunks: int


class PointerTables:
    """The tables of one part, built at their first use and kept on its device."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self.cache = DeviceCache(part.device, size=2)
        self._of_gradients = DeviceCache(part.device, size=8)
        # Where gradients were at the last call, their offsets, and these as a key; one value, for the sake of threads.
        self._last_gradients: tuple[list[int], array.array[int], bytes] = [], array.array("q"), b""

    @functools.cached_property
    def target(self) -> Target:
        """Asked for while the part's device is the current one."""
        return current_target()

    def of_weights(self) -> Tables:
        """Where the chunks that the weights are cut into are, and how large."""
        return self.cache.get("weights", self._build)

    def of_gradients(self, grads: Sequence[Tensor]) -> tuple[Tensor, int]:
        """The table and the distance that `_sweep_kernel` finds gradients by; the table outlives a common move."""
        part = self._part
        own = grads if len(part.positions) == len(grads) else map(grads.__getitem__, part.positions)
        addresses = list(map(Tensor.data_ptr, own))
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

    def _build(self) -> Tables:
        """With a fixed number of tensor operations: what has a row per chunk is made on the device."""
        part = self._part
        blocks_per_chunk = min(max(-(-sum(part.numels) // (BLOCK * MOST_CHUNKS)), 1), MOST_BLOCKS_PER_CHUNK)
        chunk_size = blocks_per_chunk * BLOCK
        n_chunks = [-(-numel // chunk_size) for numel in part.numels]
        first_chunks = itertools.accumulate(n_chunks[:-1], initial=0)
        rows = zip(part.addresses, part.numels, part.groups, range(len(n_chunks)), first_chunks, n_chunks, strict=True)
        numbers = array.array("q", itertools.chain.from_iterable(rows))
        tensors = to_device(_int64(numbers).view(-1, 6), part.device)
        chunks = torch.repeat_interleave(tensors, tensors[:, 5], dim=0, output_size=sum(n_chunks))
        start = (torch.arange(len(chunks), device=part.device) - chunks[:, 4]) * chunk_size
        chunks[:, 0] += start * part.dtype.itemsize
        chunks[:, 1] = (chunks[:, 1] - start).clamp(max=chunk_size)
        return Tables(chunks[:, :4].contiguous(), len(chunks))


def _sorted_by_group(groups: Sequence[Tensor], n_groups: int) -> Tensor:
    """What `_finish_kernel` finds the chunks of a group by, from the groups of each part's chunks."""
    group, order = torch.cat(list(groups)).sort(stable=True)
    first = torch.searchsorted(group, torch.arange(n_groups + 1, device=group.device))
    return torch.cat([first, order, group]).int()


def kernel_sweep(
    parts: Sequence[Part],
    mode: Mode,
    work: Work,
    grads: Grads,
    scale: Scale,
    value_dtype: torch.dtype | None,
    with_terms: bool = True,
) -> Measure | None:
    """One sweep over the parts of one device: a launch per dtype, and one more where a value is wanted.

    The arguments are those of `block_sweep`, which does the same without Triton. The addresses of the weights are in
    the parts' tables already.
    """
    device = parts[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device.
        with torch.cuda.device(device):
            return kernel_sweep(parts, mode, work, grads, scale, value_dtype, with_terms)
    tables: list[tuple[Part, PointerTables, Tables]] = []
    n_chunks = 0
    for part in parts:
        pointers = part.prepared(PointerTables)
        tables.append((part, pointers, pointers.of_weights()))
        n_chunks += tables[-1][2].n_chunks
    n_groups = work.n_groups
    # Strengths and scales as kernels take them: as floats, and by address those that are in device memory.
    factors: list[Any] = [*work.strengths, *scale]
    values, addresses, doubles = factors[:], [0, 0, 0, 0], 0
    for i, factor in enumerate(factors):
        if isinstance(factor, Tensor):
            if factor.is_neg() or factor._is_zerotensor():  # what is in its memory is not its value
                factor = factors[i] = torch.empty_like(factor, dtype=torch.float64).copy_(factor)
            elif factor.dtype not in (torch.float64, torch.float32):
                factor = factors[i] = factor.double()  # which has to live until the kernels are launched
            values[i], addresses[i] = 1.0, factor.data_ptr()
            doubles |= (factor.dtype == torch.float64) << i
    l1, l2, scale_l1, scale_l2 = values
    at_l1, at_l2, at_scale_l1, at_scale_l2 = addresses
    sums = None if value_dtype is None else torch.empty((n_groups + n_chunks, 2), dtype=torch.float64, device=device)
    next_partial = partials = 0 if sums is None else sums.data_ptr() + n_groups * _ROW_BYTES
    for part, pointers, table in tables:
        if table.n_chunks == 0:
            continue
        grad_table, grad_distance = (None, 0) if grads is None else pointers.of_gradients(grads)
        target = pointers.target
        # A value in float64, of models with any such weights, deserves sums in float64.
        sum_dtype = target.sum_dtype if value_dtype is torch.float32 else value_dtype
        _launch(
            _sweep_kernel,
            table.n_chunks,
            (device.index, part.dtype, mode._value_, sum_dtype, BLOCK, NUM_WARPS),
            {
                "table": table.chunks.data_ptr(),
                "grad_table": 0 if grad_table is None else grad_table.data_ptr(),
                "grad_distance": grad_distance,
                "partials": next_partial,
                "l1": l1 * scale_l1,
                "l2": l2 * scale_l2,
                "l1_address": at_l1,
                "l2_address": at_l2,
                "scale_l1_address": at_scale_l1,
                "scale_l2_address": at_scale_l2,
                "doubles": doubles,
            },
            {
                "DTYPE": _TRITON_DTYPES[part.dtype],
                "MODE": mode._value_,  # `mode.value` is a slower property
                "SUM_DTYPE": None if sum_dtype is None else _TRITON_DTYPES[sum_dtype],
                "LANES": NUM_WARPS * target.threads_per_warp,
                "BLOCK": BLOCK,
            },
            NUM_WARPS,
        )
        next_partial += table.n_chunks * _ROW_BYTES
    if sums is None or value_dtype is None:
        return None
    total = torch.empty((), dtype=value_dtype, device=device)
    terms = (torch.empty_like(total), torch.empty_like(total)) if with_terms else None
    by_group = None
    if n_groups > 1:
        of_all = functools.partial(_sorted_by_group, [table.chunks[:, 2] for _, _, table in tables], n_groups)
        by_group = tables[0][1].cache.get("groups of all parts", of_all)
    _launch(
        _finish_kernel,
        1 + n_groups,
        (device.index, value_dtype, FINISH_BLOCK, FINISH_WARPS),
        {
            "partials": partials,
            "groups": 0 if by_group is None else by_group.data_ptr(),
            "total": total.data_ptr(),
            "l1_term": 0 if terms is None else terms[0].data_ptr(),
            "l2_term": 0 if terms is None else terms[1].data_ptr(),
            "sums": sums.data_ptr(),
            "l1": l1,
            "l2": l2,
            "l1_address": at_l1,
            "l2_address": at_l2,
            "doubles": doubles,
            "n_chunks": n_chunks,
        },
        {"VALUE_DTYPE": _TRITON_DTYPES[value_dtype], "BLOCK": FINISH_BLOCK},
        FINISH_WARPS,
    )
    return Measure(total, terms, sums)


def _int64(numbers: "array.array[int]") -> Tensor:
    """A view of `numbers`. Faster than torch.tensor(), which counts where gradients move at every step."""
    return torch.frombuffer(numbers, dtype=torch.int64)


_COMPILED: dict[Hashable, Any] = {}


def _launch(
    kernel: Any,
    n_programs: int,
    variant: tuple[Hashable, ...],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    num_warps: int,
) -> None:
    """`kernel[(n_programs,)](**arguments, **constants)`, both in the order of the kernel's parameters.

    From the second launch on by the compiled kernel itself, as in Triton's tutorial on fused softmax: the JIT looks at
    every argument anew to find it. `variant` tells where it was loaded, and what it was compiled for.
    """
    key = (id(kernel), *variant)
    compiled = _COMPILED.get(key)
    if compiled is not None:
        compiled[n_programs, 1, 1](*arguments.values(), *constants.values())
        return
    launched = kernel[(n_programs,)](**arguments, **constants, num_warps=num_warps, enable_fp_fusion=False)
    # Neither the interpreter returns one, nor what tests put in the place of a kernel.
    if isinstance(kernel, triton.runtime.JITFunction) and isinstance(launched, triton.compiler.CompiledKernel):
        _COMPILED[key] = launched
