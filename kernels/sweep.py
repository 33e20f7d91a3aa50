"""The sweep as a Triton kernel; this file imports nothing but Triton.

A program of `_sweep_kernel` owns one chunk: a run of neighbouring elements of one weight, whose address it reads from a
table. One compiled kernel per dtype and mode therefore serves every model.
A block that pairs of float32 sums do not suit ends the loop over such pairs, and the rest is summed in float64.
"""

import triton
import triton.language as tl

from fastreg.kernels.penalty import _gradient, _prox
from fastreg.kernels.pointers import _beside, _load, _pointer, _store, _times
from fastreg.kernels.steps import (
    _counts_steps,
    _has_grad,
    _has_settings,
    _has_state,
    _is_step,
    _n_columns,
    _rule,
    _setting,
    _step,
)
from fastreg.kernels.sums import _add, _block_sums, _suit_pairs

TABLE_COLUMNS = tl.constexpr(4)  # address, number of elements, strength group, tensor
STATE_COLUMNS = tl.constexpr(4)


@triton.jit
def _sweep_block(pointers, start, lane, mask, numbers, sums, lost, MODE: tl.constexpr, SUM_DTYPE: tl.constexpr):
    """One block: reads w, adds to the sums and does what MODE asks, or nothing of both where it does not suit pairs.

    Returns the sums, what they lost, and whether it was done.
    """
    weight_ptr, grad_ptr, first_ptr, second_ptr, third_ptr = pointers
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    w = _load(weight_ptr, start, lane, mask, COMPUTE)
    old, first, second, third = w, w, w, w
    if MODE == "accumulate" or _is_step(MODE):
        old = _load(grad_ptr, start, lane, mask, COMPUTE)
    if _has_state(MODE, 1):
        first = _load(first_ptr, start, lane, mask, COMPUTE)
    if _has_state(MODE, 2):
        second = _load(second_ptr, start, lane, mask, COMPUTE)
    if _has_state(MODE, 3):
        third = _load(third_ptr, start, lane, mask, COMPUTE)
    is_done = True
    if SUM_DTYPE is not None:
        block_sums, block_lost = _block_sums(w.to(SUM_DTYPE), DTYPE, sums.shape[0])
        if SUM_DTYPE == tl.float32:
            is_done = _suit_pairs(block_sums)
    if is_done:
        if SUM_DTYPE is not None:
            sums, lost = _add(sums, lost, block_sums, block_lost)
        if MODE == "prox":
            _store(weight_ptr, start, lane, mask, _prox(w, numbers[0], numbers[1]))
        elif _has_settings(MODE):
            w, first, second, third = _step(w, old, first, second, third, numbers[0], numbers[1], MODE, DTYPE)
            written = mask if mask is None else mask & (numbers[2] != 0)
            _store(weight_ptr, start, lane, written, w)
            if _is_step(MODE) and _has_state(MODE, 1):
                _store(first_ptr, start, lane, written, first)
            if _is_step(MODE) and _has_state(MODE, 2):
                _store(second_ptr, start, lane, written, second)
            if _is_step(MODE) and _has_state(MODE, 3):
                _store(third_ptr, start, lane, written, third)
        elif MODE != "value":
            grad = _gradient(w, numbers[0], numbers[1])
            if MODE == "accumulate":
                # Rounded before the addition, as autograd's own accumulation does: the two ways give the same bits.
                grad = old + grad.to(DTYPE).to(COMPUTE)
            _store(grad_ptr, start, lane, mask, grad)
    return sums, lost, is_done


@triton.jit
def _sweep_blocks(
    block, end, count, pointers, numbers, sums, lost,
    MODE: tl.constexpr, SUM_DTYPE: tl.constexpr, BLOCK: tl.constexpr, ARE_FULL: tl.constexpr,
):  # fmt: skip
    """Blocks from number `block` on that begin before element `end`, until the first that was not done.

    Returns the number of the block that comes next, the sums, and what they lost.
    """
    lane = tl.arange(0, BLOCK)
    is_done = True
    while (block * BLOCK < end) & is_done:
        first = block * BLOCK
        mask = None if ARE_FULL else lane < count - first
        sums, lost, is_done = _sweep_block(pointers, first, lane, mask, numbers, sums, lost, MODE, SUM_DTYPE)
        block += tl.where(is_done, 1, 0)
    return block, sums, lost


@triton.jit
def _advance(counters, step_address, chunk, is_first, is_counted, LANES: tl.constexpr):
    """The number of the step that is made now. The tensor's first chunk tells the optimizer.

    Each chunk has its counter: one for all would be read by some programs after others have written it. And one thread
    reads and writes it, which others might otherwise read too late.
    """
    lane = tl.arange(0, LANES)
    counter_ptrs = _pointer(counters, tl.float32) + chunk + lane
    step = tl.sum(tl.load(counter_ptrs, mask=lane == 0, other=0.0), axis=0) + 1.0
    tl.store(counter_ptrs, step, mask=(lane == 0) & (is_counted != 0))
    tl.store(_pointer(step_address, tl.float32), step, mask=(is_counted != 0) & is_first)
    return step


# Device memory comes as addresses, and nothing is specialised for its value: another model, strength or learning rate,
# whatever its dtype and wherever it lies, must not compile a kernel again.
@triton.jit(do_not_specialize=range(17))
def _sweep_kernel(
    table: tl.int64,  # of int64 [n_chunks, 4]: address of the chunk, number of elements, strength group, tensor
    grad_table: tl.int64,  # of int64 [n_tensors]: bytes from a weight to its gradient, less grad_distance
    grad_distance: tl.int64,  # the same from the first weight to its gradient; both 0 where there are no gradients
    partials: tl.int64,  # of float64 [n_chunks, 2]: each chunk's sums of |w| and w * w; 0 without SUM_DTYPE
    l1: tl.float64,
    l2: tl.float64,
    l1_address: tl.int64,  # of floats [n_groups] to multiply l1 with, or 0
    l2_address: tl.int64,
    scale_l1_address: tl.int64,  # of a float: upstream gradient or learning rate for the l1 term, or 0
    scale_l2_address: tl.int64,
    doubles: tl.int32,  # a bit for each of these four addresses: 1 for float64, 0 for float32
    # For the modes that `_has_settings` names; else 0.
    settings: tl.int64,  # of float64 [n_groups, _n_columns(MODE)]
    lr: tl.float64,  # a factor on that of the settings
    states: tl.int64,  # of int64 [n_tensors, STATE_COLUMNS]: bytes from a weight to its states, 0 for what it has not,
    #   and the address of a float32 that counts its steps, or 0
    counters: tl.int64,  # of float32 [n_chunks]: the same count for each chunk
    grad_scale: tl.int64,  # of a float32 that the gradients carry, or 0
    found_inf: tl.int64,  # of a float32: if it is not 0, nothing is to be changed; or 0
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,  # one of the names of fastreg.core.types.Mode
    SUM_DTYPE: tl.constexpr,  # None where no value is asked for
    LANES: tl.constexpr,  # threads per program
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    row_ptr = _pointer(table, tl.int64) + chunk * TABLE_COLUMNS
    address = tl.load(row_ptr)
    count = tl.load(row_ptr + 1).to(tl.int32)
    group = tl.load(row_ptr + 2)
    tensor = tl.load(row_ptr + 3)

    # Without the hints Triton cannot see the alignment of full blocks and emits scalar accesses. Misaligned memory is
    # accessed through masks only, of which nothing is known.
    weight_ptr = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
    grad_ptr, first_ptr, second_ptr, third_ptr = weight_ptr, weight_ptr, weight_ptr, weight_ptr
    misaligned = address % 16
    if _has_grad(MODE):
        grad_distance += tl.load(_pointer(grad_table, tl.int64) + tensor)
        grad_ptr, beyond = _beside(address, grad_distance, DTYPE)
        misaligned += beyond
    state_ptr = _pointer(states, tl.int64) + tensor * STATE_COLUMNS
    if _has_state(MODE, 1):
        first_ptr, beyond = _beside(address, tl.load(state_ptr), DTYPE)
        misaligned += beyond
    if _has_state(MODE, 2):
        second_ptr, beyond = _beside(address, tl.load(state_ptr + 1), DTYPE)
        misaligned += beyond
    if _has_state(MODE, 3):
        third_ptr, beyond = _beside(address, tl.load(state_ptr + 2), DTYPE)
        misaligned += beyond
    pointers = (weight_ptr, grad_ptr, first_ptr, second_ptr, third_ptr)
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    one = tl.full((), 1.0, tl.float64)
    # Full blocks of aligned tensors; then the tail, or all of a misaligned tensor.
    full = tl.where(misaligned == 0, count - (BLOCK - 1), 0)
    if _has_settings(MODE):
        # Not a bool, of which the interpreter cannot make a block.
        is_made = (tl.load(_pointer(found_inf, tl.float32), mask=found_inf != 0, other=0.0) == 0).to(tl.int32)
        full = tl.where(is_made != 0, full, 0)  # only the loop with masks can leave everything as it is
        setting_ptr = _pointer(settings, tl.float64) + group * _n_columns(MODE)
        step = tl.full((), 0.0, tl.float32)
        if MODE == "elementwise_prox":
            step_address = tl.load(state_ptr + 3)
            step = _setting(setting_ptr, MODE, "steps_made").to(tl.float32)
            step += tl.load(_pointer(step_address, tl.float32), mask=step_address != 0, other=0.0)
        if _counts_steps(MODE):
            step_address = tl.load(state_ptr + 3)
            before = tl.load(row_ptr + 3 - TABLE_COLUMNS, mask=chunk > 0, other=-1)
            step = _advance(counters, step_address, chunk, before != tensor, is_made, LANES)
        scale = tl.load(_pointer(grad_scale, tl.float32), mask=grad_scale != 0, other=1.0).to(tl.float64)
        common, own = _rule(setting_ptr, step.to(tl.int32), one * lr, scale, MODE, DTYPE, COMPUTE)
        numbers = (common, own, is_made)
    else:
        scale_l1 = _times(one, scale_l1_address, (doubles & 4) != 0, 0)
        scale_l2 = _times(one, scale_l2_address, (doubles & 8) != 0, 0)
        if MODE == "rescale":
            count = tl.where((scale_l1 == 1.0) & (scale_l2 == 1.0), 0, count)
        l1 = _times(l1 * scale_l1, l1_address, (doubles & 1) != 0, group)
        l2 = _times(l2 * scale_l2, l2_address, (doubles & 2) != 0, group)
        # Once for all elements, in float64.
        factor = 1 / (1 + 2 * l2) if MODE == "prox" else 2 * l2
        numbers = (l1.to(COMPUTE), factor.to(COMPUTE))

    sums = tl.zeros((LANES, 2), tl.float64 if SUM_DTYPE is None else SUM_DTYPE)
    lost = sums
    block = tl.full((), 0, tl.int32)
    block, sums, lost = _sweep_blocks(block, full, count, pointers, numbers, sums, lost, MODE, SUM_DTYPE, BLOCK, True)
    block, sums, lost = _sweep_blocks(block, count, count, pointers, numbers, sums, lost, MODE, SUM_DTYPE, BLOCK, False)
    if SUM_DTYPE is not None:
        wide = sums.to(tl.float64) + lost.to(tl.float64)
        if SUM_DTYPE == tl.float32:
            # What does not suit pairs.
            if block * BLOCK < count:
                block, wide, _ = _sweep_blocks(
                    block, count, count, pointers, numbers, wide, wide, MODE, tl.float64, BLOCK, False
                )
        tl.store(_pointer(partials, tl.float64) + 2 * chunk + tl.arange(0, 2), tl.sum(wide, axis=0))
