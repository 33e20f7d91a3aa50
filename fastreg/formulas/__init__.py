"""The mathematics as plain PyTorch expressions: the reference that every other implementation is tested against."""

from fastreg.formulas.penalty import ElasticNetPenalty, Penalty
from fastreg.formulas.steps import take_steps

__all__ = ["ElasticNetPenalty", "Penalty", "take_steps"]
