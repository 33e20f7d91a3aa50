"""SGD, Adam and AdamW with the penalty inside: one sweep makes the whole step.

    >>> optimizer = fastreg.optim.AdamW(model.parameters(), lr=1e-3, l1=1e-5, prox=True)
    >>> criterion(model(x), y).backward()
    >>> optimizer.step()

The penalty l1 * Σ|w| + l2 * Σw² of each parameter group is part of the step in one of two ways.

prox=False: its gradient l1 * sign(w) + 2 * l2 * w is added to that of the data before everything else, as if the
penalty were part of the loss. `.grad` itself is left as it is.

prox=True: only the data's gradient goes through the moments. After the step each weight makes a proximal step,
w = sign(w) * max(|w| - t * l1, 0) / (1 + 2 * t * l2), which leaves exact zeros. t is the step per unit of a gradient
that has settled:

    SGD                  t = lr * f,  f = 1
    with momentum m      f = (1 - dampening) / (1 - m)
    Nesterov's           f = 1 + m * (1 - dampening) / (1 - m)
    Adam, AdamW          t = lr / (sqrt(v / (1 - beta2^step)) + eps)

elementwise, with v the second moment after the step, so that training ends where the penalised problem has its minimum,
whatever the optimizer. Source: J. Yun, A. C. Lozano, E. Yang, "Adaptive proximal gradient methods for structured neural
networks", 2021.

Under Adam the proximal step moves no element further than lr * max(2, (1 - beta1) / sqrt(1 - beta2)), the longest step
that Adam itself can make, and at least 2 * lr (D. P. Kingma, J. Ba, "Adam", 2015, section 2.1). The bound matters where
v is 0 or nearly so: there t is lr / eps, and would make zeros of weights that the data has not reached yet. The first
step leaves elements with v = 0 alone.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastreg.formulas import Mode
from fastreg.options import learning_rate, strengths_of
from fastreg.penalized import Penalized
from fastreg.rules import Settings, adam_reach, momentum_factor
from fastreg.selection import Impl
from fastreg.strengths import Strength

__all__ = ["SGD", "Adam", "AdamW"]


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


class Adam(Penalized, torch.optim.Adam):
    """torch.optim.Adam with the penalty of each parameter group in its step.

    Args: those of torch.optim.Adam; `foreach` and `fused` are accepted, but there is one implementation. The others,
    and what is raised, are as in `SGD`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        l1: Strength = 0.0,
        l2: Strength = 0.0,
        prox: bool = False,
        track: bool = False,
        impl: Impl = None,
    ) -> None:
        torch.optim.Adam.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, capturable=capturable,
            differentiable=differentiable, decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip
        self._penalize(l1, l2, prox, track, impl)

    def _mode(self, group: dict[str, Any]) -> Mode:
        return Mode.AMSGRAD if group["amsgrad"] else Mode.ADAM

    def _state_names(self, mode: Mode) -> tuple[str, ...]:
        names = ("step", "exp_avg", "exp_avg_sq")
        return names if mode is Mode.ADAM else (*names, "max_exp_avg_sq")

    def _settings(self, group: dict[str, Any], number: int, is_first: bool) -> Settings:
        beta1, beta2 = map(float, group["betas"])
        is_decoupled = float(group["decoupled_weight_decay"])
        strengths = strengths_of(group, number)
        lr = learning_rate(group, number)
        reach = adam_reach(beta1, beta2)
        return Settings(lr, group["weight_decay"], is_decoupled, *strengths, beta1, beta2, group["eps"], reach=reach)


class AdamW(Adam, torch.optim.AdamW):
    """torch.optim.AdamW with the penalty of each parameter group in its step; weight decay stays decoupled from it.

    Args: those of torch.optim.AdamW; the others, and what is raised, are as in `Adam` and `SGD`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        l1: Strength = 0.0,
        l2: Strength = 0.0,
        prox: bool = False,
        track: bool = False,
        impl: Impl = None,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, capturable=capturable,
            differentiable=differentiable, decoupled_weight_decay=True,
            l1=l1, l2=l2, prox=prox, track=track, impl=impl,
        )  # fmt: skip
