"""Launches for the parts of a layout: pointer tables, one sweep per dtype, and one kernel that finishes the value."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.core.layout import Part
from fastreg.core.penalty import Measure
from fastreg.core.torch_private import is_zerotensor
from fastreg.core.types import Mode, Request, Want, Work
from fastreg.formulas.penalty import ElasticNetPenalty, no_formulas
from fastreg.kernels.finish import _finish_kernel
from fastreg.kernels.sweep import _sweep_kernel
from fastreg.kernels.tables import BLOCK, PointerTables, Tables, settings_table

# Whether the kernels were defined under TRITON_INTERPRET=1 and run on the CPU.
INTERPRETED = not isinstance(_sweep_kernel, triton.runtime.JITFunction)
NUM_WARPS = 4
# Elements per thread in the modes of optimizers: 16 bytes of each 16-bit tensor.
STEP_ELEMENTS = 8
FINISH_BLOCK, FINISH_WARPS = 1024, 8
_ROW_BYTES = 16  # two float64 sums

_NO_STEP: dict[str, Any] = {
    "settings_ptr": 0,
    "lr": 1.0,
    "states_ptr": 0,
    "counters_ptr": 0,
    "grad_scale_ptr": 0,
    "found_inf_ptr": 0,
}
_TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def kernel_sweep(parts: Sequence[Part], work: Work, request: Request) -> Measure | None:
    """Make one sweep over the parts of one device: one launch per dtype, and one more if a value is wanted.

    Take the arguments of `block_sweep`. The parts' tables have the addresses of the weights already.
    """
    device = parts[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device.
        with torch.cuda.device(device):
            return kernel_sweep(parts, work, request)
    mode, grads, step, penalty = request.mode, request.grads, request.step, work.penalty
    if type(penalty) is not ElasticNetPenalty:
        raise no_formulas(penalty, "kernels/penalty.py")
    value_dtype: Any = None
    if request.want is not Want.NOTHING and work.layout is not None:
        value_dtype = work.layout.value_dtype
    tables: list[tuple[Part, PointerTables, Tables]] = []
    n_chunks = 0
    for part in parts:
        pointers = part.prepared(PointerTables)
        tables.append((part, pointers, pointers.of_weights()))
        n_chunks += tables[-1][2].n_chunks
    n_groups = work.n_groups
    # Kernels take each strength and scale as a float, times a number in device memory if there is an address.
    factors: list[Any] = [*penalty.strengths, *(request.scale or (1.0,) * len(penalty.strengths))]
    values, addresses, doubles = factors[:], [0, 0, 0, 0], 0
    for i, factor in enumerate(factors):
        if isinstance(factor, Tensor):
            if factor.is_neg() or is_zerotensor(factor):  # its memory does not hold its value
                factor = factors[i] = torch.empty_like(factor, dtype=torch.float64).copy_(factor)
            elif factor.dtype not in (torch.float64, torch.float32):
                factor = factors[i] = factor.double()  # `factors` keeps it until the kernels are launched
            values[i], addresses[i] = 1.0, factor.data_ptr()
            doubles |= (factor.dtype == torch.float64) << i
    l1, l2, scale_l1, scale_l2 = values
    l1_ptr, l2_ptr, scale_l1_ptr, scale_l2_ptr = addresses
    sums = None if value_dtype is None else torch.empty((n_groups + n_chunks, 2), dtype=torch.float64, device=device)
    next_partials = partials = 0 if sums is None else sums.data_ptr() + n_groups * _ROW_BYTES
    settings, lr, grad_scale, found_inf = 0, 1.0, None, None
    if step is not None:
        settings_of_groups, lr = settings_table(step.settings, device)
        settings = settings_of_groups.data_ptr()
        if step.grad_scale is not None:
            grad_scale = step.grad_scale.to(device, torch.float32, non_blocking=True)
        if step.found_inf is not None:
            found_inf = step.found_inf.to(device, torch.float32, non_blocking=True)
    for part, pointers, table in tables:
        grad_table, grad_distance = (None, 0) if grads is None else pointers.of_gradients(grads)
        target = pointers.target
        lanes = NUM_WARPS * target.threads_per_warp
        block = BLOCK if step is None else STEP_ELEMENTS * lanes
        # If any weight is float64, so is the value, and all sums are float64.
        sum_dtype = target.sum_dtype if value_dtype is torch.float32 else value_dtype
        of_step, counters = _NO_STEP, None
        if step is not None:
            states = pointers.of_states(step)
            if step.steps is not None and mode is not Mode.ELEMENTWISE_PROX:
                counters = pointers.counters(step.steps)
            of_step = {
                "settings_ptr": settings,
                "lr": lr,
                "states_ptr": states.data_ptr(),
                "counters_ptr": 0 if counters is None else counters.data_ptr(),
                "grad_scale_ptr": 0 if grad_scale is None else grad_scale.data_ptr(),
                "found_inf_ptr": 0 if found_inf is None else found_inf.data_ptr(),
            }
        _launch(
            _sweep_kernel,
            table.n_chunks,
            (device.index, part.dtype, mode._value_, sum_dtype, block, NUM_WARPS),
            {
                "table_ptr": table.chunks.data_ptr(),
                "grad_table_ptr": 0 if grad_table is None else grad_table.data_ptr(),
                "grad_distance": grad_distance,
                "partials_ptr": next_partials,
                "l1": l1 * scale_l1,
                "l2": l2 * scale_l2,
                "l1_ptr": l1_ptr,
                "l2_ptr": l2_ptr,
                "scale_l1_ptr": scale_l1_ptr,
                "scale_l2_ptr": scale_l2_ptr,
                "doubles": doubles,
                **of_step,
            },
            {
                "DTYPE": _TRITON_DTYPES[part.dtype],
                "MODE": mode._value_,  # the property `mode.value` is slower
                "SUM_DTYPE": None if sum_dtype is None else _TRITON_DTYPES[sum_dtype],
                "LANES": lanes,
                "BLOCK": block,
            },
            NUM_WARPS,
        )
        next_partials += table.n_chunks * _ROW_BYTES
    if sums is None or value_dtype is None:
        return None
    total = torch.empty((), dtype=value_dtype, device=device)
    terms = (torch.empty_like(total), torch.empty_like(total)) if request.want is Want.TERMS else None
    by_group = None
    if n_groups > 1:
        by_group = tables[0][1].by_group([table for _, _, table in tables], n_groups)
    _launch(
        _finish_kernel,
        1 + n_groups,
        (device.index, value_dtype, FINISH_BLOCK, FINISH_WARPS),
        {
            "partials_ptr": partials,
            "groups_ptr": 0 if by_group is None else by_group.data_ptr(),
            "total_ptr": total.data_ptr(),
            "l1_term_ptr": 0 if terms is None else terms[0].data_ptr(),
            "l2_term_ptr": 0 if terms is None else terms[1].data_ptr(),
            "sums_ptr": sums.data_ptr(),
            "l1": l1,
            "l2": l2,
            "l1_ptr": l1_ptr,
            "l2_ptr": l2_ptr,
            "doubles": doubles,
            "n_chunks": n_chunks,
        },
        {"VALUE_DTYPE": _TRITON_DTYPES[value_dtype], "BLOCK": FINISH_BLOCK},
        FINISH_WARPS,
    )
    return Measure(total, terms, sums)


_COMPILED: dict[Hashable, Any] = {}


def _launch(
    kernel: Any,
    n_programs: int,
    variant: tuple[Hashable, ...],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    num_warps: int,
) -> None:
    """Call `kernel[(n_programs,)](**arguments, **constants)`, both in the order of the kernel's parameters.

    From the second launch on, call the compiled kernel itself, as in Triton's tutorial on fused softmax: the JIT would
    inspect every argument at each call. `variant` identifies the compiled kernel by its device and its constants.
    """
    key = (id(kernel), *variant)
    compiled = _COMPILED.get(key)
    if compiled is not None:
        compiled[n_programs, 1, 1](*arguments.values(), *constants.values())
        return
    launched = kernel[(n_programs,)](**arguments, **constants, num_warps=num_warps, enable_fp_fusion=False)
    # The interpreter, and stand-ins for a kernel in tests, return no compiled kernel.
    if isinstance(kernel, triton.runtime.JITFunction) and isinstance(launched, triton.compiler.CompiledKernel):
        _COMPILED[key] = launched
