"""What the kernels need to know of the GPU that they are compiled for, beyond what Triton sees to."""

from typing import NamedTuple

import torch
import triton

# Where float64 numbers are added at no less than half the rate of float32: compute capabilities, by "Throughput of
# Native Arithmetic Instructions" in NVIDIA's CUDA C++ Programming Guide, and AMD's CDNA, by the data sheets of its
# Instinct accelerators. Elsewhere it is 1/16 to 1/64 of that rate, less than what memory delivers.
_FAST_FLOAT64 = {60, 70, 80, 90, 100, "gfx908", "gfx90a", "gfx942", "gfx950"}


class Target(NamedTuple):
    """Facts about a GPU."""

    sum_dtype: torch.dtype  # of Σ|w| and Σw² over narrower weights than float64
    threads_per_warp: int


def current_target() -> Target:
    """That of the current device, or of most GPUs where there is none, as under the interpreter."""
    try:
        found = triton.runtime.driver.active.get_current_target()
    except RuntimeError:
        return Target(torch.float32, 32)
    return Target(torch.float64 if found.arch in _FAST_FLOAT64 else torch.float32, found.warp_size)
