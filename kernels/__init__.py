"""Launches of the Triton kernels. Nothing outside this package imports Triton."""

from fastreg.kernels.launch import INTERPRETED, sweep

__all__ = ["INTERPRETED", "sweep"]
