"""Pointers from int64 addresses, loads and stores; imports nothing but Triton."""

import triton
import triton.language as tl


@triton.jit
def _pointer(address, DTYPE: tl.constexpr):
    # The interpreter passes small arguments, such as 0, as int32.
    return address.to(tl.int64).to(tl.pointer_type(DTYPE))


@triton.jit
def _times(value, address, is_double, index):
    """Return float64 `value` times element `index` of the float64 or float32 vector at `address`, if not 0."""
    if address != 0:
        double = tl.load(_pointer(address, tl.float64) + index, mask=is_double, other=1.0)
        single = tl.load(_pointer(address, tl.float32) + index, mask=is_double == 0, other=1.0)
        value = value * (double * single.to(tl.float64))
    return value


@triton.jit
def _load(ptr, first, lane, mask, COMPUTE: tl.constexpr):
    ptrs = ptr + first + lane
    return (tl.load(ptrs) if mask is None else tl.load(ptrs, mask=mask, other=0.0)).to(COMPUTE)


@triton.jit
def _store(ptr, first, lane, mask, values):
    tl.store(ptr + first + lane, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _beside(address, distance, DTYPE: tl.constexpr):
    """Return a pointer `distance` bytes after `address`, with an alignment hint, and its misalignment in bytes."""
    address += distance
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16), address % 16
