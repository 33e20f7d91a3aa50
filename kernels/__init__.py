"""The Triton path. Only this folder imports Triton."""

from fastreg.kernels.launch import INTERPRETED, kernel_sweep

__all__ = ["INTERPRETED", "kernel_sweep"]
