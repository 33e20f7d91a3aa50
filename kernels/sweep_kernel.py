"""The sweep and its reduction as Triton kernels; this file imports nothing but Triton.

A program of `_sweep_kernel` owns one chunk: a run of at most `blocks_per_chunk * BLOCK` neighbouring elements of one
weight, whose address it reads from a table. One compiled kernel per dtype and mode therefore serves every model.
"""

import triton
import triton.language as tl

TABLE_COLUMNS = tl.constexpr(4)  # address, number of elements, first chunk, strength group


@triton.jit
def _strength(value, value_ptr, scale_ptr, group):
    """The float64 product of a host scalar and what the device holds for it."""
    strength = tl.full((), value, tl.float64)  # a Python float under the interpreter, and else a float32 there
    if value_ptr is not None:
        strength *= tl.load(value_ptr + group).to(tl.float64)
    if scale_ptr is not None:
        strength *= tl.load(scale_ptr).to(tl.float64)
    return strength


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


# A strength that moves to another address or value must not compile the kernel again.
@triton.jit(
    do_not_specialize=["l1_ptr", "l2_ptr", "scale_l1_ptr", "scale_l2_ptr", "grad_base", "blocks_per_chunk"],
)
def _sweep_kernel(
    table_ptr,  # int64 [n_tensors, 4]: address of the weight, number of elements, first chunk, strength group
    chunk_tensor_ptr,  # int32 [n_chunks]: which tensor a chunk belongs to
    grad_table_ptr,  # int64 [n_tensors]: byte offset of the gradient from grad_base; None in VALUE and PROX
    partials_ptr,  # float64 [n_chunks, 2]: each chunk's sums of |w| and w * w; None where no value is asked for
    l1_ptr,  # any float [n_groups], or None
    l2_ptr,  # any float [n_groups], or None
    scale_l1_ptr,  # any float []: upstream gradient or learning rate for the l1 term, or None
    scale_l2_ptr,  # any float []: the same for the l2 term, or None
    l1: tl.float64,
    l2: tl.float64,
    grad_base: tl.int64,
    blocks_per_chunk: tl.int32,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,  # one of the names of fastreg.formulas.Mode
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunk_tensor_ptr + chunk).to(tl.int64)
    row_ptr = table_ptr + tensor * TABLE_COLUMNS
    address = tl.load(row_ptr)
    n_elements = tl.load(row_ptr + 1)
    first_chunk = tl.load(row_ptr + 2)
    group = tl.load(row_ptr + 3)

    chunk_size = blocks_per_chunk.to(tl.int64) * BLOCK
    start = (chunk - first_chunk) * chunk_size
    count = tl.minimum(n_elements - start, chunk_size)
    if MODE == "rescale":
        unit = tl.load(scale_l1_ptr).to(tl.float64) == 1.0
        unit = unit & (tl.load(scale_l2_ptr).to(tl.float64) == 1.0)
        count = tl.where(unit, 0, count)
    l1 = _strength(l1, l1_ptr, scale_l1_ptr, group)
    l2 = _strength(l2, l2_ptr, scale_l2_ptr, group)

    weight_ptr = address.to(tl.pointer_type(DTYPE))
    misaligned = address % 16
    grad_ptr = weight_ptr
    if grad_table_ptr is not None:
        grad_address = grad_base + tl.load(grad_table_ptr + tensor)
        grad_ptr = grad_address.to(tl.pointer_type(DTYPE))
        misaligned += grad_address % 16

    lane = tl.arange(0, BLOCK)
    ACCUMULATORS: tl.constexpr = BLOCK * DTYPE.primitive_bitwidth // 128
    abs_sum = tl.zeros((ACCUMULATORS,), tl.float64)
    square_sum = tl.zeros((ACCUMULATORS,), tl.float64)
    REDUCE: tl.constexpr = partials_ptr is not None

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
        tl.store(partials_ptr + 2 * chunk, tl.sum(abs_sum, axis=0))
        tl.store(partials_ptr + 2 * chunk + 1, tl.sum(square_sum, axis=0))


@triton.jit(do_not_specialize=["l1_ptr", "l2_ptr", "n_chunks"])
def _finish_kernel(
    partials_ptr,  # float64 [n_chunks, 2]
    chunk_group_ptr,  # int32 [n_chunks]: strength group of a chunk, or None where there is one group
    total_ptr,  # float32 or float64 []
    l1_term_ptr,  # float32 or float64 []
    l2_term_ptr,  # float32 or float64 []
    sums_ptr,  # float64 [n_groups, 2]: sums of |w| and w * w of each group
    l1_ptr,  # any float [n_groups], or None
    l2_ptr,  # any float [n_groups], or None
    l1: tl.float64,
    l2: tl.float64,
    n_chunks: tl.int64,
    BLOCK: tl.constexpr,
):
    """Program 0 forms the weighted terms; program 1 + g the plain sums of group g. Fixed order, no atomics."""
    program = tl.program_id(0)
    first = tl.zeros((BLOCK,), tl.float64)
    second = tl.zeros((BLOCK,), tl.float64)
    lane = tl.arange(0, BLOCK)
    for start in range(0, n_chunks, BLOCK):
        chunk = start + lane
        mask = chunk < n_chunks
        abs_sum = tl.load(partials_ptr + 2 * chunk, mask=mask, other=0.0)
        square_sum = tl.load(partials_ptr + 2 * chunk + 1, mask=mask, other=0.0)
        group = tl.zeros((BLOCK,), tl.int32)
        if chunk_group_ptr is not None:
            group = tl.load(chunk_group_ptr + chunk, mask=mask, other=0)
        if program == 0:
            first += tl.where(mask, abs_sum * _strength(l1, l1_ptr, None, group), 0.0)
            second += tl.where(mask, square_sum * _strength(l2, l2_ptr, None, group), 0.0)
        else:
            first += tl.where(group == program - 1, abs_sum, 0.0)
            second += tl.where(group == program - 1, square_sum, 0.0)
    first_sum = tl.sum(first, axis=0)
    second_sum = tl.sum(second, axis=0)
    if program == 0:
        tl.store(total_ptr, (first_sum + second_sum).to(total_ptr.dtype.element_ty))
        tl.store(l1_term_ptr, first_sum.to(l1_term_ptr.dtype.element_ty))
        tl.store(l2_term_ptr, second_sum.to(l2_term_ptr.dtype.element_ty))
    else:
        tl.store(sums_ptr + 2 * (program - 1), first_sum)
        tl.store(sums_ptr + 2 * (program - 1) + 1, second_sum)
