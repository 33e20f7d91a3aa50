"""Selects the weights to penalize from `params`, `include` and `exclude`."""

from fastreg.selection.filters import Filter, bias_and_norm, check_filter
from fastreg.selection.params import Params
from fastreg.selection.selection import Selection, select

__all__ = ["Filter", "Params", "Selection", "bias_and_norm", "check_filter", "select"]
