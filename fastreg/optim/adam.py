"""Adam and AdamW with the penalty inside, and the longest step of Adam."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastreg.core.checks import Impl
from fastreg.core.penalty import Strength
from fastreg.core.types import AdamSettings, Mode
from fastreg.optim.base import Penalized, learning_rate, penalty_strengths


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
        self._init_penalty(l1, l2, prox, track, impl)

    def _mode(self, group: dict[str, Any]) -> Mode:
        return Mode.AMSGRAD if group["amsgrad"] else Mode.ADAM

    def _settings(self, group: dict[str, Any], number: int, is_first: bool) -> AdamSettings:
        beta1, beta2 = map(float, group["betas"])
        is_decoupled = float(group["decoupled_weight_decay"])
        strengths = penalty_strengths(group, number)
        lr, decay, eps = learning_rate(group, number), group["weight_decay"], group["eps"]
        return AdamSettings(lr, decay, is_decoupled, *strengths, beta1, beta2, eps, adam_reach(beta1, beta2))


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


def adam_reach(beta1: float, beta2: float) -> float:
    """Return the bound on Adam's proximal step in units of lr: the longest step of Adam, and at least 2.

    Kingma and Ba (2015), section 2.1: no step of Adam is longer than max(1, (1 - beta1) / sqrt(1 - beta2)). Under a
    constant gradient each step is 1 long. A proximal step of 1 would only undo it, and the weight would never reach 0.
    """
    return max(2.0, (1 - beta1) / math.sqrt(1 - beta2))
