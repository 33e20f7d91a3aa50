"""The mathematics as plain PyTorch expressions: the reference that every other implementation is tested against."""

from fastreg.formulas.penalty import gradient, gradient_derivatives, prox, sums_of_groups, terms, update, weighted_terms
from fastreg.formulas.steps import take_steps

__all__ = [
    "gradient",
    "gradient_derivatives",
    "prox",
    "sums_of_groups",
    "take_steps",
    "terms",
    "update",
    "weighted_terms",
]
