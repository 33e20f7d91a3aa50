"""From parts to kernel launches: one sweep per dtype, and one kernel that finishes the value."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.formulas import Measure, Mode, Penalty
from fastreg.kernels.sweep_kernel import _finish_kernel, _sweep_kernel
from fastreg.kernels.tables import BLOCK, PointerTables, Tables
from fastreg.layout import Part
from fastreg.strengths import Scale, Strengths

# Whether the kernels were defined under TRITON_INTERPRET=1, and so run on the CPU.
INTERPRETED = not isinstance(_sweep_kernel, triton.runtime.JITFunction)
NUM_WARPS = 4
FINISH_BLOCK = 1024

_TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def kernel_sweep(
    parts: Sequence[Part],
    mode: Mode,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    strengths: Strengths,
    scale: Scale,
    n_groups: int,
    value_dtype: torch.dtype | None,
) -> Measure | None:
    """One sweep over the parts of one device: a launch per dtype, and one more where a value is wanted.

    The arguments are those of `block_sweep`, which does the same without Triton. The addresses of the weights are in
    the parts' tables already.
    """
    device = parts[0].device
    pointers = [part.prepared(PointerTables) for part in parts]
    tables = [each.of_weights for each in pointers]
    chunks = [t.chunk_tensor.numel() for t in tables]
    (l1, l1_ptr), (l2, l2_ptr) = map(_scalar_and_pointer, strengths)
    (factor_l1, scale_l1_ptr), (factor_l2, scale_l2_ptr) = map(_scalar_and_pointer, scale)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        partials = None if value_dtype is None else torch.empty((sum(chunks), 2), dtype=torch.float64, device=device)
        first_partial = 0
        for part, pointer, table, n_chunks in zip(parts, pointers, tables, chunks, strict=True):
            if n_chunks == 0:
                continue
            grad_base, grad_table = _grad_addresses(part, pointer, grads)
            _sweep_kernel[(n_chunks,)](
                table_ptr=table.tensors,
                chunk_tensor_ptr=table.chunk_tensor,
                grad_table_ptr=grad_table,
                partials_ptr=partials[first_partial:] if partials is not None else None,
                l1_ptr=l1_ptr,
                l2_ptr=l2_ptr,
                scale_l1_ptr=scale_l1_ptr,
                scale_l2_ptr=scale_l2_ptr,
                l1=l1 * factor_l1,
                l2=l2 * factor_l2,
                grad_base=grad_base,
                blocks_per_chunk=table.blocks_per_chunk,
                DTYPE=_TRITON_DTYPES[part.dtype],
                MODE=mode.value,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )
            first_partial += n_chunks
        if value_dtype is None:
            return None
        total, l1_term, l2_term = (torch.empty((), dtype=value_dtype, device=device) for _ in range(3))
        sums = torch.empty((n_groups, 2), dtype=torch.float64, device=device)
        _finish_kernel[(1 + n_groups,)](
            partials_ptr=partials,
            chunk_group_ptr=_chunk_groups(pointers, tables) if n_groups > 1 else None,
            total_ptr=total,
            l1_term_ptr=l1_term,
            l2_term_ptr=l2_term,
            sums_ptr=sums,
            l1_ptr=l1_ptr,
            l2_ptr=l2_ptr,
            l1=l1,
            l2=l2,
            n_chunks=first_partial,
            BLOCK=FINISH_BLOCK,
            num_warps=NUM_WARPS,
        )
    return Measure(Penalty(total, l1_term, l2_term), sums)


def _scalar_and_pointer(strength: float | Tensor) -> tuple[float, Tensor | None]:
    return (1.0, strength) if isinstance(strength, Tensor) else (strength, None)


def _grad_addresses(part: Part, pointers: PointerTables, grads: Sequence[Tensor] | None) -> tuple[int, Tensor | None]:
    """A base address and the table of offsets from it: the same table serves gradients that moved as a whole."""
    if grads is None:
        return 0, None
    addresses = [grads[i].data_ptr() for i in part.positions]
    base = addresses[0]
    return base, pointers.of_gradients(tuple([address - base for address in addresses]))


def _chunk_groups(pointers: Sequence[PointerTables], tables: Sequence[Tables]) -> Tensor:
    """int32 [n_chunks of all parts]: the strength group of each chunk."""
    if len(tables) == 1:
        return tables[0].chunk_group
    return pointers[0].cache.get("groups of all parts", lambda: torch.cat([t.chunk_group for t in tables]))
