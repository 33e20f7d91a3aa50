"""The L1, L2 and elastic-net penalty of a whole PyTorch model, with its gradient, in one pass over the weights."""

from fastreg._version import __version__
from fastreg.penalty import ElasticNet, Penalty, elastic_penalty
from fastreg.selection import bias_and_norm

__all__ = ["ElasticNet", "Penalty", "__version__", "bias_and_norm", "elastic_penalty"]
