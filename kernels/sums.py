"""Σ|w| and Σw² within a program of the sweep kernel; imports nothing but Triton.

Sums are float64 on GPUs that add float64 numbers fast. Elsewhere a sum is a pair of float32 numbers: the rounded sum
and its rounding error. Pairs are accurate where squares neither overflow nor underflow.
"""

import triton
import triton.language as tl

# Range of Σ|w| of a few elements. Squares overflow from 2**64 on and are rounded to multiples of 2**-149.
PAIRS_FROM, PAIRS_BELOW = tl.constexpr(2.0**-45), tl.constexpr(2.0**50)


@triton.jit
def _add(a, a_lost, b, b_lost):
    """Return the sum of two sums and its rounding error: exact in float32 (Knuth's TwoSum), unused in float64."""
    total = a + b
    lost = a_lost
    if total.dtype == tl.float32:
        moved = total - a
        lost = (a_lost + b_lost) + ((a - (total - moved)) + (b - moved))
    return total, lost


@triton.jit
def _halves(x, ARE_NEAR: tl.constexpr):
    """Split x [n, 2] into even and odd rows if ARE_NEAR, else into its first and second half."""
    HALF: tl.constexpr = x.shape[0] // 2
    if ARE_NEAR:
        x = tl.permute(tl.reshape(x, (HALF, 2, 2)), (0, 2, 1))
    else:
        x = tl.permute(tl.reshape(x, (2, HALF, 2)), (1, 2, 0))
    return tl.split(x)


@triton.jit
def _block_sums(w, DTYPE: tl.constexpr, LANES: tl.constexpr):
    """Return Σ|w| and Σw² of each thread's elements and their rounding errors, both [LANES, 2].

    In float32 the error of the first addition is dropped, which halves the work.
    """
    BLOCK: tl.constexpr = w.shape[0]
    AT_ONCE: tl.constexpr = 128 // DTYPE.primitive_bitwidth  # elements in 16 bytes
    a, b = tl.split(tl.reshape(w, (BLOCK // 2, 2)))
    square = a * a
    sums = tl.join(tl.abs(a) + tl.abs(b), tl.fma(b, b, square))
    # Compilers remove an addition of -0.0, which changes no number. An addition of 0.0 changes -0.0.
    lost = tl.full((BLOCK // 2, 2), -0.0, w.dtype)
    if w.dtype == tl.float32 and DTYPE == tl.float32:  # squares of narrower floats are exact
        lost = tl.join(tl.full((BLOCK // 2,), -0.0, w.dtype), tl.fma(a, a, -square))
    # Add the elements of one read first, then the reads of a thread. No element moves to another thread.
    for _ in tl.static_range(16):
        if sums.shape[0] > LANES:
            a, b = _halves(sums, sums.shape[0] > BLOCK // AT_ONCE)
            a_lost, b_lost = _halves(lost, sums.shape[0] > BLOCK // AT_ONCE)
            sums, lost = _add(a, a_lost, b, b_lost)
    return sums, lost


@triton.jit
def _suit_pairs(sums):
    """Return whether the largest Σ|w| of a thread is 0 or in range. A much smaller one is negligible in the sum.

    A NaN may or may not be in range. Both branches return NaN.
    """
    abs_sums, _ = tl.split(sums)
    largest = tl.max(abs_sums, axis=0)
    return (largest == 0) | ((largest >= PAIRS_FROM) & (largest < PAIRS_BELOW))
