"""The sweep and its reduction as Triton kernels; this file imports nothing but Triton.

A program of `_sweep_kernel` owns one chunk: a run of at most `blocks_per_chunk * BLOCK` neighbouring elements of one
weight, whose address it reads from a table. One compiled kernel per dtype and mode therefore serves every model.
"""

import triton
import triton.language as tl

TABLE_COLUMNS = tl.constexpr(4)  # address, number of elements, first chunk, strength group


@triton.jit
def _pointer(address, DTYPE: tl.constexpr):
    # Under the interpreter a small argument, such as 0, is an int32.
    return address.to(tl.int64).to(tl.pointer_type(DTYPE))


@triton.jit
def _number(address, is_double, index):
    """What a float64 or float32 vector in device memory holds at `index`, as float64; 1 where there is no vector."""
    exists = address != 0
    double = tl.load(_pointer(address, tl.float64) + index, mask=exists & is_double, other=1.0)
    single = tl.load(_pointer(address, tl.float32) + index, mask=exists & (is_double == 0), other=1.0)
    return double * single.to(tl.float64)


@triton.jit
def _strength(value, address, is_double, group):
    """The float64 product of a host scalar and what the device holds for it."""
    # `value` is a Python float under the interpreter.
    return tl.full((), value, tl.float64) * _number(address, is_double, group)


@triton.jit
def _gradient(w, l1, l2):
    """l1 * sign(w) + 2 * l2 * w with one rounding; sign(±0) = 0, and NaN arrives through the second term."""
    signed_l1 = tl.where(w > 0, l1, tl.where(w < 0, -l1, 0.0))
    return tl.fma(w, 2 * l2, signed_l1)


@triton.jit
def _prox(w, l1, shrinkage):
    """sign(w) * max(|w| - l1, 0) * shrinkage, for an l1 that carries the learning rate."""
    magnitude = tl.abs(w)
    # Compared this way round, NaN takes the arithmetic branch and survives.
    shrunk = tl.where(magnitude <= l1, 0.0, (magnitude - l1) * shrinkage)
    return tl.where(w < 0, -shrunk, shrunk)


@triton.jit
def _load(ptrs, mask):
    return tl.load(ptrs) if mask is None else tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _sweep_block(weight_ptrs, grad_ptrs, mask, l1, l2, abs_sum, square_sum, MODE: tl.constexpr, REDUCE: tl.constexpr):
    """One block: reads w, does what MODE asks, and returns the two running vectors of float64 sums."""
    DTYPE: tl.constexpr = weight_ptrs.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    w = _load(weight_ptrs, mask).to(COMPUTE)
    if REDUCE:
        # |w| and w * w of float32 are exact in float64.
        wide = w.to(tl.float64)
        # What a thread reads at once it sums at once: a float64 accumulator per element would fill its registers.
        lanes: tl.constexpr = abs_sum.shape[0]
        wide = tl.reshape(wide, (lanes, wide.shape[0] // lanes))
        abs_sum += tl.sum(tl.abs(wide), axis=1)
        square_sum += tl.sum(wide * wide, axis=1)
    if MODE == "prox":
        # One division for all elements, in float64.
        shrinkage = (1 / (1 + 2 * l2)).to(COMPUTE)
        tl.store(weight_ptrs, _prox(w, l1.to(COMPUTE), shrinkage).to(DTYPE), mask=mask)
    elif MODE != "value":
        grad = _gradient(w, l1.to(COMPUTE), l2.to(COMPUTE)).to(DTYPE)
        if MODE == "accumulate":
            # Rounded before the addition, as autograd's own accumulation does: the two ways give the same bits.
            old = _load(grad_ptrs, mask).to(COMPUTE)
            grad = (old + grad.to(COMPUTE)).to(DTYPE)
        tl.store(grad_ptrs, grad, mask=mask)
    return abs_sum, square_sum


# Device memory comes as addresses, and nothing is specialised for its value: another model, strength or learning rate,
# whatever its dtype and wherever it lies, must not compile a kernel again.
@triton.jit(do_not_specialize=range(13))
def _sweep_kernel(
    table: tl.int64,  # of int64 [n_tensors, 4]: address of the weight, number of elements, first chunk, strength group
    chunk_tensor: tl.int64,  # of int32 [n_chunks]: which tensor a chunk belongs to
    grad_table: tl.int64,  # of int64 [n_tensors]: byte offset of the gradient from grad_base; 0 in "value" and "prox"
    grad_base: tl.int64,
    partials: tl.int64,  # of float64 [n_chunks, 2]: each chunk's sums of |w| and w * w; 0 without REDUCE
    l1: tl.float64,
    l2: tl.float64,
    l1_address: tl.int64,  # of floats [n_groups] to multiply l1 with, or 0
    l2_address: tl.int64,
    scale_l1_address: tl.int64,  # of a float: upstream gradient or learning rate for the l1 term, or 0
    scale_l2_address: tl.int64,
    doubles: tl.int32,  # a bit for each of these four addresses: 1 for float64, 0 for float32
    blocks_per_chunk: tl.int32,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,  # one of the names of fastreg.formulas.Mode
    REDUCE: tl.constexpr,  # whether a value is asked for
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(_pointer(chunk_tensor, tl.int32) + chunk).to(tl.int64)
    row_ptr = _pointer(table, tl.int64) + tensor * TABLE_COLUMNS
    address = tl.load(row_ptr)
    n_elements = tl.load(row_ptr + 1)
    first_chunk = tl.load(row_ptr + 2)
    group = tl.load(row_ptr + 3)

    chunk_size = blocks_per_chunk.to(tl.int64) * BLOCK
    start = (chunk - first_chunk) * chunk_size
    count = tl.minimum(n_elements - start, chunk_size)
    scale_l1 = _number(scale_l1_address, (doubles & 4) != 0, 0)
    scale_l2 = _number(scale_l2_address, (doubles & 8) != 0, 0)
    if MODE == "rescale":
        count = tl.where((scale_l1 == 1.0) & (scale_l2 == 1.0), 0, count)
    l1 = _strength(l1, l1_address, (doubles & 1) != 0, group) * scale_l1
    l2 = _strength(l2, l2_address, (doubles & 2) != 0, group) * scale_l2

    weight_ptr = address.to(tl.pointer_type(DTYPE))
    misaligned = address % 16
    grad_ptr = weight_ptr
    if MODE != "value" and MODE != "prox":
        grad_address = grad_base + tl.load(_pointer(grad_table, tl.int64) + tensor)
        grad_ptr = grad_address.to(tl.pointer_type(DTYPE))
        misaligned += grad_address % 16

    lane = tl.arange(0, BLOCK)
    ACCUMULATORS: tl.constexpr = BLOCK * DTYPE.primitive_bitwidth // 128
    abs_sum = tl.zeros((ACCUMULATORS,), tl.float64)
    square_sum = tl.zeros((ACCUMULATORS,), tl.float64)

    # Full blocks of aligned tensors. Without the hints Triton cannot see the alignment and emits scalar loads.
    full = tl.where(misaligned == 0, count // BLOCK * BLOCK, 0)
    aligned_weight_ptr = tl.multiple_of(weight_ptr, 16)
    aligned_grad_ptr = tl.multiple_of(grad_ptr, 16)
    for block in range(0, full, BLOCK):
        offsets = tl.multiple_of(start + block, BLOCK) + lane
        abs_sum, square_sum = _sweep_block(
            aligned_weight_ptr + offsets, aligned_grad_ptr + offsets, None, l1, l2, abs_sum, square_sum, MODE, REDUCE
        )
    # The tail, or all of a misaligned tensor.
    for block in range(full, count, BLOCK):
        first = start + block  # a scalar: 64-bit offsets in every lane would double the registers
        mask = lane < tl.minimum(count - block, BLOCK).to(tl.int32)
        abs_sum, square_sum = _sweep_block(
            weight_ptr + first + lane, grad_ptr + first + lane, mask, l1, l2, abs_sum, square_sum, MODE, REDUCE
        )
    if REDUCE:
        partials_ptr = _pointer(partials, tl.float64)
        tl.store(partials_ptr + 2 * chunk, tl.sum(abs_sum, axis=0))
        tl.store(partials_ptr + 2 * chunk + 1, tl.sum(square_sum, axis=0))


@triton.jit(do_not_specialize=range(12))
def _finish_kernel(
    partials: tl.int64,  # of float64 [n_chunks, 2]
    chunk_group: tl.int64,  # of int32 [n_chunks]: strength group of a chunk; 0 where there is one group
    total: tl.int64,  # of a VALUE_DTYPE
    l1_term: tl.int64,  # of a VALUE_DTYPE, or 0 where it is not asked for
    l2_term: tl.int64,  # of a VALUE_DTYPE, or 0
    sums: tl.int64,  # of float64 [n_groups, 2]: sums of |w| and w * w of each group
    l1: tl.float64,
    l2: tl.float64,
    l1_address: tl.int64,  # these three as in `_sweep_kernel`
    l2_address: tl.int64,
    doubles: tl.int32,
    n_chunks: tl.int64,
    VALUE_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program 0 forms the weighted terms; program 1 + g the plain sums of group g. Fixed order, no atomics."""
    program = tl.program_id(0)
    partials_ptr = _pointer(partials, tl.float64)
    group_ptr = _pointer(chunk_group, tl.int32)
    first = tl.zeros((BLOCK,), tl.float64)
    second = tl.zeros((BLOCK,), tl.float64)
    lane = tl.arange(0, BLOCK)
    for start in range(0, n_chunks, BLOCK):
        chunk = start + lane
        mask = chunk < n_chunks
        abs_sum = tl.load(partials_ptr + 2 * chunk, mask=mask, other=0.0)
        square_sum = tl.load(partials_ptr + 2 * chunk + 1, mask=mask, other=0.0)
        group = tl.load(group_ptr + chunk, mask=mask & (chunk_group != 0), other=0)
        if program == 0:
            first += tl.where(mask, abs_sum * _strength(l1, l1_address, (doubles & 1) != 0, group), 0.0)
            second += tl.where(mask, square_sum * _strength(l2, l2_address, (doubles & 2) != 0, group), 0.0)
        else:
            first += tl.where(group == program - 1, abs_sum, 0.0)
            second += tl.where(group == program - 1, square_sum, 0.0)
    first_sum = tl.sum(first, axis=0)
    second_sum = tl.sum(second, axis=0)
    if program == 0:
        tl.store(_pointer(total, VALUE_DTYPE), (first_sum + second_sum).to(VALUE_DTYPE))
        tl.store(_pointer(l1_term, VALUE_DTYPE), first_sum.to(VALUE_DTYPE), mask=l1_term != 0)
        tl.store(_pointer(l2_term, VALUE_DTYPE), second_sum.to(VALUE_DTYPE), mask=l2_term != 0)
    else:
        sums_ptr = _pointer(sums, tl.float64) + 2 * (program - 1)
        tl.store(sums_ptr, first_sum)
        tl.store(sums_ptr + 1, second_sum)
