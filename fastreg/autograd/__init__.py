"""The penalty as an autograd Function, and how its gradient reaches .grad."""

from fastreg.autograd.function import penalty_of

__all__ = ["penalty_of"]
