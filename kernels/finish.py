"""The second stage of the reduction: from the chunks' sums to the value; imports nothing but Triton."""

import triton
import triton.language as tl

from fastreg.kernels.pointers import _pointer, _times


@triton.jit(do_not_specialize=range(12))
def _finish_kernel(
    partials_ptr: tl.int64,  # float64 [n_chunks, 2]: each chunk's sums of |w| and w * w
    groups_ptr: tl.int64,  # int32, three vectors: the first chunk of each group [n_groups + 1] in the order of groups,
    #   the chunks in this order [n_chunks], and their groups [n_chunks]; 0 for one group
    total_ptr: tl.int64,  # VALUE_DTYPE []
    l1_term_ptr: tl.int64,  # VALUE_DTYPE []; 0 if terms are not wanted
    l2_term_ptr: tl.int64,  # VALUE_DTYPE []; 0 if terms are not wanted
    sums_ptr: tl.int64,  # float64 [n_groups, 2]: each group's sums of |w| and w * w
    l1: tl.float64,
    l2: tl.float64,
    l1_ptr: tl.int64,  # these three as in `_sweep_kernel`
    l2_ptr: tl.int64,
    doubles: tl.int32,
    n_chunks: tl.int64,
    VALUE_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program 0 computes the weighted terms, program 1 + g the plain sums of group g. Fixed order, no atomics."""
    program = tl.program_id(0)
    first_ptr = _pointer(groups_ptr, tl.int32)
    order_ptr = first_ptr + tl.num_programs(0)
    is_part = (groups_ptr != 0) & (program > 0)
    first = tl.load(first_ptr + program - 1, mask=is_part, other=0).to(tl.int64)
    end = tl.load(first_ptr + program, mask=is_part, other=0).to(tl.int64)
    end = tl.where(is_part, end, n_chunks)
    sums = tl.zeros((BLOCK, 2), tl.float64)
    for start in range(first, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        mask = place < end
        chunk = place
        if groups_ptr != 0:
            chunk = tl.load(order_ptr + place, mask=mask, other=0).to(tl.int64)
        ptrs = _pointer(partials_ptr, tl.float64) + 2 * chunk[:, None] + tl.arange(0, 2)[None, :]
        partial = tl.load(ptrs, mask=mask[:, None], other=0.0)
        if (groups_ptr != 0) & (program == 0):
            group = tl.load(order_ptr + n_chunks + place, mask=mask, other=0)
            factor_l1 = _times(tl.full((BLOCK,), l1, tl.float64), l1_ptr, (doubles & 1) != 0, group)
            factor_l2 = _times(tl.full((BLOCK,), l2, tl.float64), l2_ptr, (doubles & 2) != 0, group)
            factor = tl.join(factor_l1, factor_l2)
            # inf * 0 is NaN: skip products of an infinite strength with chunks of zeros, and masked chunks.
            is_nothing = (partial == 0) & (factor == float("inf"))
            partial = tl.where(is_nothing | (mask[:, None] == 0), 0.0, partial * factor)
        sums += partial
    abs_sums, square_sums = tl.split(sums)
    first_sum, second_sum = tl.sum(abs_sums, axis=0), tl.sum(square_sums, axis=0)
    if program == 0:
        if (groups_ptr == 0) & (n_chunks > 0):
            one = tl.full((), 1.0, tl.float64)
            first_sum *= _times(one * l1, l1_ptr, (doubles & 1) != 0, 0)
            second_sum *= _times(one * l2, l2_ptr, (doubles & 2) != 0, 0)
        tl.store(_pointer(total_ptr, VALUE_DTYPE), (first_sum + second_sum).to(VALUE_DTYPE))
        tl.store(_pointer(l1_term_ptr, VALUE_DTYPE), first_sum.to(VALUE_DTYPE), mask=l1_term_ptr != 0)
        tl.store(_pointer(l2_term_ptr, VALUE_DTYPE), second_sum.to(VALUE_DTYPE), mask=l2_term_ptr != 0)
    else:
        row_ptr = _pointer(sums_ptr, tl.float64) + 2 * (program - 1)
        tl.store(row_ptr, first_sum)
        tl.store(row_ptr + 1, second_sum)
