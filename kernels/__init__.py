"""Launches of the Triton kernels. Nothing outside this package imports Triton."""

from fastreg.kernels.launch import INTERPRETED, kernel_sweep

__all__ = ["INTERPRETED", "kernel_sweep"]
