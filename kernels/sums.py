"""Σ|w| and Σw² within a program of the sweep's kernel; imports nothing but Triton.

They are summed in float64 where the GPU adds float64 numbers fast. Elsewhere a sum is two float32 numbers: the rounded
sum, and what its roundings lost. They serve where squares neither overflow nor vanish.
"""

import triton
import triton.language as tl

# Of sums of a few |w|. Squares overflow from 2**64 on and are rounded to multiples of 2**-149.
PAIRS_FROM, PAIRS_BELOW = tl.constexpr(2.0**-45), tl.constexpr(2.0**50)


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
