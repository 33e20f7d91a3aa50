"""SGD with the penalty inside, and the factor of momentum in its step size."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastreg.core.checks import Impl
from fastreg.core.penalty import Strength
from fastreg.core.types import Mode, SGDSettings
from fastreg.optim.base import Penalized, learning_rate, penalty_strengths


class SGD(Penalized, torch.optim.SGD):
    """torch.optim.SGD with the penalty of each parameter group in its step.

    Takes the arguments of torch.optim.SGD, too; `foreach` and `fused` are accepted, but there is one implementation.

    Args:
        l1, l2: strengths, floats or 0-dim tensors on the parameters' device; options of a parameter group, as lr is.
        prox: whether the penalty goes in as a proximal step, which leaves exact zeros, and not as a gradient; likewise.
        track: whether `last` is the `fastreg.Penalty` of the weights before each step, of those that had gradients. On
            a GPU that moves no more bytes, on a CPU it is one more pass over the weights.
        impl: as of `fastreg.elastic_penalty`.

    State dicts are those of torch.optim.SGD and go both ways: groups of a state without l1, l2 or prox get 0 or False,
    with a warning if they had others.

    Raises:
        ValueError: negative, NaN or infinite strengths; maximize or differentiable; momentum from 1 on with prox.
        TypeError: strengths or options of another kind; complex, integer or sparse parameters, from step().
        RuntimeError: sparse gradients, from step().
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        l1: Strength = 0.0,
        l2: Strength = 0.0,
        prox: bool = False,
        track: bool = False,
        impl: Impl = None,
    ) -> None:
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, differentiable=differentiable
        )  # type: ignore[call-arg]
        self._init_penalty(l1, l2, prox, track, impl)

    def _mode(self, group: dict[str, Any]) -> Mode:
        return Mode.SGD if group["momentum"] == 0 else Mode.MOMENTUM

    def _settings(self, group: dict[str, Any], number: int, is_first: bool) -> SGDSettings:
        momentum, dampening, nesterov = group["momentum"], group["dampening"], group["nesterov"]
        has_prox = group["prox"] is True and any(isinstance(s, Tensor) or s != 0 for s in (group["l1"], group["l2"]))
        factor = momentum_factor(momentum, dampening, nesterov) if has_prox else 1.0
        lr, strengths = learning_rate(group, number), penalty_strengths(group, number, factor)
        # torch.optim's first buffer is the gradient, without dampening. Here the buffer starts at zero.
        dampening = 0.0 if is_first else dampening
        return SGDSettings(lr, group["weight_decay"], 0.0, *strengths, momentum, dampening, float(nesterov))


def momentum_factor(momentum: float, dampening: float, nesterov: bool) -> float:
    """Return how far a step of SGD goes, in units of lr, per unit of a gradient that has settled.

    A buffer b = m * b + (1 - d) * g ends at g * (1 - d) / (1 - m); Nesterov's step is g + m * b. ValueError for m >= 1
    and for d > 1.
    """
    if momentum == 0:
        return 1.0
    if not momentum < 1:
        raise ValueError(f"with momentum={momentum} steps grow without end: a proximal step needs momentum < 1")
    if dampening > 1:
        raise ValueError(
            f"with dampening={dampening} steps go up the gradient, and a proximal step would grow the weights: it "
            "needs dampening <= 1"
        )
    settled = (1 - dampening) / (1 - momentum)
    return 1 + momentum * settled if nesterov else settled
