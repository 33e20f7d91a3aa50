"""The second stage of the reduction: from the sums of all chunks to the value; imports nothing but Triton."""

import triton
import triton.language as tl

from fastreg.kernels.pointers import _pointer, _times


@triton.jit(do_not_specialize=range(12))
def _finish_kernel(
    partials: tl.int64,  # of float64 [n_chunks, 2]
    groups: tl.int64,  # of int32, or 0 for one group: where each group's chunks begin [n_groups + 1] among all the
    #   chunks sorted by group [n_chunks], and the groups of these [n_chunks]
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
    first_ptr = _pointer(groups, tl.int32)
    order_ptr = first_ptr + tl.num_programs(0)
    is_part = (groups != 0) & (program > 0)
    first = tl.load(first_ptr + program - 1, mask=is_part, other=0).to(tl.int64)
    end = tl.load(first_ptr + program, mask=is_part, other=0).to(tl.int64)
    end = tl.where(is_part, end, n_chunks)
    found = tl.zeros((BLOCK, 2), tl.float64)
    for start in range(first, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        mask = place < end
        chunk = place
        if groups != 0:
            chunk = tl.load(order_ptr + place, mask=mask, other=0).to(tl.int64)
        ptrs = _pointer(partials, tl.float64) + 2 * chunk[:, None] + tl.arange(0, 2)[None, :]
        partial = tl.load(ptrs, mask=mask[:, None], other=0.0)
        if (groups != 0) & (program == 0):
            group = tl.load(order_ptr + n_chunks + place, mask=mask, other=0)
            factor_l1 = _times(tl.full((BLOCK,), l1, tl.float64), l1_address, (doubles & 1) != 0, group)
            factor_l2 = _times(tl.full((BLOCK,), l2, tl.float64), l2_address, (doubles & 2) != 0, group)
            factor = tl.join(factor_l1, factor_l2)
            # An infinite strength would make NaN of chunks of zeros, and of what is beyond the end.
            is_nothing = (partial == 0) & (factor == float("inf"))
            partial = tl.where(is_nothing | (mask[:, None] == 0), 0.0, partial * factor)
        found += partial
    abs_sums, square_sums = tl.split(found)
    first_sum, second_sum = tl.sum(abs_sums, axis=0), tl.sum(square_sums, axis=0)
    if program == 0:
        if (groups == 0) & (n_chunks > 0):
            one = tl.full((), 1.0, tl.float64)
            first_sum *= _times(one * l1, l1_address, (doubles & 1) != 0, 0)
            second_sum *= _times(one * l2, l2_address, (doubles & 2) != 0, 0)
        tl.store(_pointer(total, VALUE_DTYPE), (first_sum + second_sum).to(VALUE_DTYPE))
        tl.store(_pointer(l1_term, VALUE_DTYPE), first_sum.to(VALUE_DTYPE), mask=l1_term != 0)
        tl.store(_pointer(l2_term, VALUE_DTYPE), second_sum.to(VALUE_DTYPE), mask=l2_term != 0)
    else:
        sums_ptr = _pointer(sums, tl.float64) + 2 * (program - 1)
        tl.store(sums_ptr, first_sum)
        tl.store(sums_ptr + 1, second_sum)
