"""The sweep as a Triton kernel; this file imports nothing but Triton.

A program of `_sweep_kernel` owns one chunk: a run of neighbouring elements of one weight, whose address it reads from a
table. One compiled kernel per dtype and mode therefore serves every model.

Σ|w| and Σw² are summed in float64 where the GPU adds float64 numbers fast. Elsewhere a sum is two float32 numbers: the
rounded sum, and what its roundings lost. They serve where squares neither overflow nor vanish; a block out of that
range, NaN and infinity included, ends the loop over such pairs, and the rest of the chunk is summed in float64.
"""

import triton
import triton.language as tl

TABLE_COLUMNS = tl.constexpr(4)  # address, number of elements, strength group, tensor
# Of sums of a few |w|. Squares overflow from 2**64 on and are rounded to multiples of 2**-149.
PAIRS_FROM, PAIRS_BELOW = tl.constexpr(2.0**-45), tl.constexpr(2.0**50)


@triton.jit
def _pointer(address, DTYPE: tl.constexpr):
    # Under the interpreter a small argument, such as 0, is an int32.
    return address.to(tl.int64).to(tl.pointer_type(DTYPE))


@triton.jit
def _times(value, address, is_double, index):
    """`value`, a float64, times what a float64 or float32 vector at `address` holds at `index`, if there is one."""
    if address != 0:
        double = tl.load(_pointer(address, tl.float64) + index, mask=is_double, other=1.0)
        single = tl.load(_pointer(address, tl.float32) + index, mask=is_double == 0, other=1.0)
        value = value * (double * single.to(tl.float64))
    return value


@triton.jit
def _gradient(w, l1, slope):
    """l1 * sign(w) + slope * w, where slope is 2 * l2, with one rounding; sign(±0) = 0, and NaN comes by the slope."""
    signed_l1 = tl.where(w > 0, l1, tl.where(w < 0, -l1, 0.0))
    return tl.fma(w, slope, signed_l1)


@triton.jit
def _prox(w, l1, shrinkage):
    """sign(w) * max(|w| - l1, 0) * shrinkage, for an l1 that carries the learning rate."""
    magnitude = tl.abs(w)
    # Compared this way round, NaN takes the arithmetic branch and survives.
    shrunk = tl.where(magnitude <= l1, 0.0, (magnitude - l1) * shrinkage)
    return tl.where(w < 0, -shrunk, shrunk)


@triton.jit
def _add(a, a_lost, b, b_lost):
    """The sum of two sums, and what it lost: of float32 all of it (Knuth's TwoSum), of float64 nothing is kept."""
    total = a + b
    lost = a_lost
    if total.dtype == tl.float32:
        moved = total - a
        lost = (a_lost + b_lost) + ((a - (total - moved)) + (b - moved))
    return total, lost


@triton.jit
def _halves(x, ARE_NEAR: tl.constexpr):
    """The rows of x [n, 2] at even and at odd places, or in the first half and in the second."""
    HALF: tl.constexpr = x.shape[0] // 2
    if ARE_NEAR:
        x = tl.permute(tl.reshape(x, (HALF, 2, 2)), (0, 2, 1))
    else:
        x = tl.permute(tl.reshape(x, (2, HALF, 2)), (1, 2, 0))
    return tl.split(x)


@triton.jit
def _block_sums(w, DTYPE: tl.constexpr, LANES: tl.constexpr):
    """Σ|w| and Σw² of each thread's elements and what they lost, both [LANES, 2].

    In float32 one rounding is not kept, that of the first of all sums: it is what halves the work.
    """
    BLOCK: tl.constexpr = w.shape[0]
    AT_ONCE: tl.constexpr = 128 // DTYPE.primitive_bitwidth  # elements, in 16 bytes
    a, b = tl.split(tl.reshape(w, (BLOCK // 2, 2)))
    square = a * a
    sums = tl.join(tl.abs(a) + tl.abs(b), tl.fma(b, b, square))
    # To a compiler, -0.0 is the number that changes nothing when it is added.
    lost = tl.full((BLOCK // 2, 2), -0.0, w.dtype)
    if w.dtype == tl.float32 and DTYPE == tl.float32:  # squares of narrower floats are exact
        lost = tl.join(tl.full((BLOCK // 2,), -0.0, w.dtype), tl.fma(a, a, -square))
    # First what a thread reads at once, then its reads: nothing changes threads.
    for _ in tl.static_range(16):
        if sums.shape[0] > LANES:
            a, b = _halves(sums, sums.shape[0] > BLOCK // AT_ONCE)
            a_lost, b_lost = _halves(lost, sums.shape[0] > BLOCK // AT_ONCE)
            sums, lost = _add(a, a_lost, b, b_lost)
    return sums, lost


@triton.jit
def _suit_pairs(sums):
    """Whether the largest Σ|w| of a thread is in range, or 0; what is too small beside it does not count in the sum.

    A NaN may be seen here or not: it arrives either way.
    """
    abs_sums, _ = tl.split(sums)
    largest = tl.max(abs_sums, axis=0)
    return (largest == 0) | ((largest >= PAIRS_FROM) & (largest < PAIRS_BELOW))


@triton.jit
def _load(ptrs, mask):
    return tl.load(ptrs) if mask is None else tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _sweep_block(weight_ptrs, grad_ptrs, mask, l1, factor, sums, lost, MODE: tl.constexpr, SUM_DTYPE: tl.constexpr):
    """One block: reads w, adds to the sums and does what MODE asks, or nothing of both where it does not suit pairs.

    Returns the sums, what they lost, and whether it was done.
    """
    DTYPE: tl.constexpr = weight_ptrs.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    w = _load(weight_ptrs, mask).to(COMPUTE)
    if MODE == "accumulate":
        old = _load(grad_ptrs, mask).to(COMPUTE)
    is_done = True
    if SUM_DTYPE is not None:
        block_sums, block_lost = _block_sums(w.to(SUM_DTYPE), DTYPE, sums.shape[0])
        if SUM_DTYPE == tl.float32:
            is_done = _suit_pairs(block_sums)
    if is_done:
        if SUM_DTYPE is not None:
            sums, lost = _add(sums, lost, block_sums, block_lost)
        if MODE == "prox":
            tl.store(weight_ptrs, _prox(w, l1, factor).to(DTYPE), mask=mask)
        elif MODE != "value":
            grad = _gradient(w, l1, factor).to(DTYPE)
            if MODE == "accumulate":
                # Rounded before the addition, as autograd's own accumulation does: the two ways give the same bits.
                grad = (old + grad.to(COMPUTE)).to(DTYPE)
            tl.store(grad_ptrs, grad, mask=mask)
    return sums, lost, is_done


@triton.jit
def _sweep_blocks(
    block, end, count, weight_ptr, grad_ptr, l1, factor, sums, lost,
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
        sums, lost, is_done = _sweep_block(
            weight_ptr + first + lane, grad_ptr + first + lane, mask, l1, factor, sums, lost, MODE, SUM_DTYPE
        )
        block += tl.where(is_done, 1, 0)
    return block, sums, lost


# Device memory comes as addresses, and nothing is specialised for its value: another model, strength or learning rate,
# whatever its dtype and wherever it lies, must not compile a kernel again.
@triton.jit(do_not_specialize=range(11))
def _sweep_kernel(
    table: tl.int64,  # of int64 [n_chunks, 4]: address of the chunk, number of elements, strength group, tensor
    grad_table: tl.int64,  # of int64 [n_tensors]: bytes from a weight to its gradient, less grad_distance
    grad_distance: tl.int64,  # the same from the first weight to its gradient; both 0 in "value" and "prox"
    partials: tl.int64,  # of float64 [n_chunks, 2]: each chunk's sums of |w| and w * w; 0 without SUM_DTYPE
    l1: tl.float64,
    l2: tl.float64,
    l1_address: tl.int64,  # of floats [n_groups] to multiply l1 with, or 0
    l2_address: tl.int64,
    scale_l1_address: tl.int64,  # of a float: upstream gradient or learning rate for the l1 term, or 0
    scale_l2_address: tl.int64,
    doubles: tl.int32,  # a bit for each of these four addresses: 1 for float64, 0 for float32
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,  # one of the names of fastreg.formulas.Mode
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
    grad_ptr = weight_ptr
    misaligned = address % 16
    if MODE != "value" and MODE != "prox":
        grad_address = address + grad_distance + tl.load(_pointer(grad_table, tl.int64) + tensor)
        grad_ptr = tl.multiple_of(grad_address.to(tl.pointer_type(DTYPE)), 16)
        misaligned += grad_address % 16
    one = tl.full((), 1.0, tl.float64)
    scale_l1 = _times(one, scale_l1_address, (doubles & 4) != 0, 0)
    scale_l2 = _times(one, scale_l2_address, (doubles & 8) != 0, 0)
    if MODE == "rescale":
        count = tl.where((scale_l1 == 1.0) & (scale_l2 == 1.0), 0, count)
    l1 = _times(l1 * scale_l1, l1_address, (doubles & 1) != 0, group)
    l2 = _times(l2 * scale_l2, l2_address, (doubles & 2) != 0, group)
    # Once for all elements, in float64.
    factor = 1 / (1 + 2 * l2) if MODE == "prox" else 2 * l2
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    l1, factor = l1.to(COMPUTE), factor.to(COMPUTE)

    sums = tl.zeros((LANES, 2), tl.float64 if SUM_DTYPE is None else SUM_DTYPE)
    lost = sums
    # Full blocks of aligned tensors; then the tail, or all of a misaligned tensor.
    block = tl.full((), 0, tl.int32)
    full = tl.where(misaligned == 0, count - (BLOCK - 1), 0)
    block, sums, lost = _sweep_blocks(
        block, full, count, weight_ptr, grad_ptr, l1, factor, sums, lost, MODE, SUM_DTYPE, BLOCK, True
    )
    block, sums, lost = _sweep_blocks(
        block, count, count, weight_ptr, grad_ptr, l1, factor, sums, lost, MODE, SUM_DTYPE, BLOCK, False
    )
    if SUM_DTYPE is not None:
        wide = sums.to(tl.float64) + lost.to(tl.float64)
        if SUM_DTYPE == tl.float32:
            # What does not suit pairs.
            if block * BLOCK < count:
                block, wide, _ = _sweep_blocks(
                    block, count, count, weight_ptr, grad_ptr, l1, factor, wide, wide, MODE, tl.float64, BLOCK, False
                )
        tl.store(_pointer(partials, tl.float64) + 2 * chunk + tl.arange(0, 2), tl.sum(wide, axis=0))
