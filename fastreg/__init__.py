"""The L1, L2 and elastic-net penalty of a whole PyTorch model, with its gradient, without copying the weights."""

from fastreg import optim
from fastreg.attach import Attachment
from fastreg.collect import Params
from fastreg.elastic_net import ElasticNet
from fastreg.filters import bias_and_norm
from fastreg.formulas import Penalty
from fastreg.penalty import add_elastic_grad_, elastic_penalty, elastic_prox_, sparsity

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "ElasticNet",
    "Params",
    "Penalty",
    "__version__",
    "add_elastic_grad_",
    "bias_and_norm",
    "elastic_penalty",
    "elastic_prox_",
    "optim",
    "sparsity",
]


def __dir__() -> list[str]:
    return __all__  # what users may use; the modules are the library's own
