"""Facts about the GPU that decide how kernels are compiled and that Triton does not handle itself."""

from typing import NamedTuple

import torch
import triton

# GPUs that add float64 numbers at half the float32 rate or faster: compute capabilities from "Throughput of Native
# Arithmetic Instructions" in NVIDIA's CUDA C++ Programming Guide, and AMD's CDNA from the data sheets of its Instinct
# accelerators. The rate of other GPUs is 1/16 to 1/64 of float32, which is slower than memory delivers numbers.
_FAST_FLOAT64 = {60, 70, 80, 90, 100, "gfx908", "gfx90a", "gfx942", "gfx950"}


class Target(NamedTuple):
    """Facts about a GPU."""

    sum_dtype: torch.dtype  # of Σ|w| and Σw², for weights narrower than float64
    threads_per_warp: int


def current_target() -> Target:
    """Return the target of the current device, or that of most GPUs without a device, as in the interpreter."""
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError:
        return Target(torch.float32, 32)
    return Target(torch.float64 if target.arch in _FAST_FLOAT64 else torch.float32, target.warp_size)
