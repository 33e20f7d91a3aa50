"""SGD with the penalty inside, and how far its step goes per unit of gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastreg.core.checks import Impl
from fastreg.core.penalty import Strength
from fastreg.core.types import Mode, Settings
from fastreg.optim.base import Penalized, learning_rate, strengths_of


class SGD(Penalized, torch.optim.SGD):
    """torch.optim.SGD with the penalty of each parameter group in its step.

    Takes the arguments of torch.optim.SGD, too; `foreach` and `fused` are accepted, but there is one implementation.

    Args:
        l1, l2: strengths, floats or 0-dim tensors on the parameters' device; options of a parameter group, as lr is.
        prox: whether the penalty goes in as a proximal step, which leaves exact zeros, and not as a gradient; likewise.
        track: whether `last` is the `fastreg.Penalty` of the weights before each step, of those that had gradients. On
            a GPU that moves no more bytes, on a CPU it is one more pass over the weights.
        impl: as of `fastreg.elastic_penalty`.

    State dicts are those of torch.optim.SGD and go both ways: groups of a state without l1 and l2 get 0.

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
        self._penalize(l1, l2, prox, track, impl)

    def _mode(self, group: dict[str, Any]) -> Mode:
        return Mode.SGD if group["momentum"] == 0 else Mode.MOMENTUM

    def _state_names(self, mode: Mode) -> tuple[str, ...]:
        return () if mode is Mode.SGD else ("momentum_buffer",)

    def _settings(self, group: dict[str, Any], number: int, is_first: bool) -> Settings:
        momentum, dampening, nesterov = group["momentum"], group["dampening"], group["nesterov"]
        has_prox = group["prox"] is True and any(isinstance(s, Tensor) or s != 0 for s in (group["l1"], group["l2"]))
        factor = momentum_factor(momentum, dampening, nesterov) if has_prox else 1.0
        # torch.optim's first buffer is the gradient, whatever the dampening; here there were zeros before it.
        return Settings(
            learning_rate(group, number), group["weight_decay"], 0.0, *strengths_of(group, number, factor),
            momentum, 0.0 if is_first else dampening, float(nesterov),
        )  # fmt: skip


def momentum_factor(momentum: float, dampening: float, nesterov: bool) -> float:
    """How much further than lr a step of SGD goes per unit of a gradient that has settled.

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
