"""The penalty's gradient and proximal step, element by element; imports nothing but Triton."""

import triton
import triton.language as tl


@triton.jit
def _signed(w, l1):
    """Return l1 * sign(w), and 0 for NaN."""
    return tl.where(w > 0, l1, tl.where(w < 0, -l1, 0.0))


@triton.jit
def _with_finite_slope(l1, slope, COMPUTE: tl.constexpr):
    """Return l1 and slope, or inf and 1 if slope is beyond COMPUTE: inf * 0 would be NaN where w is 0."""
    is_beyond = slope.to(COMPUTE) == float("inf")
    return tl.where(is_beyond, float("inf"), l1), tl.where(is_beyond, 1.0, slope)


@triton.jit
def _gradient(w, l1, slope):
    """Return l1 * sign(w) + slope * w, rounded once; slope is 2 * l2, and sign(±0) is 0. NaN passes through."""
    return tl.fma(w, slope, _signed(w, l1))


@triton.jit
def _prox(w, l1, shrinkage):
    """Return sign(w) * max(|w| - l1, 0) * shrinkage; l1 includes the step size."""
    magnitude = tl.abs(w)
    # The comparison is false for NaN, which stays NaN in the arithmetic branch.
    shrunk = tl.where(magnitude <= l1, 0.0, (magnitude - l1) * shrinkage)
    return tl.where(w < 0, -shrunk, shrunk)
