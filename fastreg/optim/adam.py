"""Adam and AdamW with the penalty inside, and what a proximal step by their elementwise step sizes needs."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fastreg.core.checks import Impl
from fastreg.core.penalty import Strength
from fastreg.core.strengths import penalty_of_groups
from fastreg.core.types import Mode, Settings, Update, Work
from fastreg.optim.base import Penalized, _lr, learning_rate, strengths_of


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


def adam_reach(beta1: float, beta2: float) -> float:
    """The furthest that a proximal step moves an element, in units of lr: the longest step of Adam, and at least 2.

    Kingma and Ba (2015), section 2.1: no step of Adam is longer than max(1, (1 - beta1) / sqrt(1 - beta2)). Under a
    constant gradient each one is 1 long. A proximal step of 1 would only undo it, and the weight would never reach 0.
    """
    return max(2.0, (1 - beta1) / math.sqrt(1 - beta2))


def adam_update(optimizer: Optimizer, work: Work, param_groups: Sequence[int]) -> tuple[Work, Update]:
    """The weights in groups of one setting each, and what ADAM_PROX needs; weight i is in `param_groups[i]`.

    All of them have made a step, and so have a state.
    """
    options = [optimizer.param_groups[i] for i in param_groups]
    states = [optimizer.state[w] for w in work.weights]
    names = ["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq" for group in options]
    squares = [state[name] for state, name in zip(states, names, strict=True)]
    counts = [state["step"] for state in states]
    steps = None
    if all(not isinstance(count, Tensor) or count.device.type == "cpu" for count in counts):
        counts = list(map(float, counts))
    else:
        # Read where they are: nothing waits for the device.
        devices = [w.device for w in work.weights]
        steps = [torch.as_tensor(c, dtype=torch.float32, device=d) for c, d in zip(counts, devices, strict=True)]
        counts = [0.0] * len(counts)
    finer, keys = work.regrouped(list(zip(param_groups, counts, strict=True)))
    rows = [work.penalty.of_group(group).strengths for group, _ in keys]
    settings = []
    for (_, (i, count)), (l1, l2) in zip(keys, rows, strict=True):
        group = optimizer.param_groups[i]
        beta1, beta2 = map(float, group["betas"])
        numbers_of_adam = {"second": beta2, "third": group["eps"], "step": count, "reach": adam_reach(beta1, beta2)}
        settings.append(Settings(_lr(group, i), prox_l1=l1, prox_l2=l2, **numbers_of_adam))
    penalty = penalty_of_groups(type(work.penalty), rows, work.weights[0].device)
    step = Update(settings, (None, squares, None), steps, found_inf=getattr(optimizer, "found_inf", None))
    return finer._replace(penalty=penalty), step
