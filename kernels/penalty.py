"""The penalty's gradient and its proximal step, element by element; imports nothing but Triton."""

import triton
import triton.language as tl


@triton.jit
def _signed(w, l1):
    """l1 * sign(w), and 0 for NaN."""
    return tl.where(w > 0, l1, tl.where(w < 0, -l1, 0.0))


@triton.jit
def _gradient(w, l1, slope):
    """l1 * sign(w) + slope * w, where slope is 2 * l2, with one rounding; sign(±0) = 0, and NaN comes by the slope."""
    return tl.fma(w, slope, _signed(w, l1))


@triton.jit
def _prox(w, l1, shrinkage):
    """sign(w) * max(|w| - l1, 0) * shrinkage, for an l1 that carries the step size."""
    magnitude = tl.abs(w)
    # Compared this way round, NaN takes the arithmetic branch and survives.
    shrunk = tl.where(magnitude <= l1, 0.0, (magnitude - l1) * shrinkage)
    return tl.where(w < 0, -shrunk, shrunk)
