"""The penalty as an autograd Function, and the ways in which its gradient reaches .grad."""

from fastreg.autograd.function import compute_penalty

__all__ = ["compute_penalty"]
