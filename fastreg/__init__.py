"""L1, L2 and elastic-net penalties of a whole PyTorch model, with their gradients, without a copy of the weights."""

from fastreg import optim
from fastreg.elastic_net import ElasticNet
from fastreg.formulas.penalty import Penalty
from fastreg.functional import add_elastic_grad_, elastic_penalty, elastic_prox_
from fastreg.optim.attachment import Attachment
from fastreg.selection.filters import bias_and_norm
from fastreg.selection.params import Params
from fastreg.sparsity import sparsity

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
    return __all__  # public names only, without the submodules
