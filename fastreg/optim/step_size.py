"""How far the step of an optimizer went per unit of gradient: what a proximal step after it has to go by.

The formulas and their source are in fastreg.optim.
"""

import inspect
from typing import Any

import torch
from torch.optim import SGD, Adam, Optimizer

from fastreg.core.dtypes import accumulate_dtype
from fastreg.core.penalty import Strength
from fastreg.optim.base import Penalized, _lr
from fastreg.optim.sgd import momentum_factor

# Attributes and options that say that an optimizer steps copies of the weights, or keeps what their roundings lost:
# Apex and Transformer Engine, DeepSpeed, optimi.
_HIDING = ("master_weights", "param_groups_master", "fp32_partitioned_groups_flat", "kahan_sum")
# And names of those copies in its state.
_HIDDEN = ("master_param", "master_weight", "kahan_comp", "fp32_param")


def check_metric(optimizer: Optimizer, metric: str) -> None:
    """Raises ValueError for optimizers whose step size is not known, or that would undo a proximal step."""
    check_hidden_copies(optimizer)
    if metric == "optimizer" and _family(optimizer) is None:
        raise ValueError(
            f"the step size of {type(optimizer).__name__} is not known, only those of torch.optim.SGD, Adam and AdamW: "
            'a proximal step would solve another problem; metric="lr" shrinks by the learning rate alone, decoupled '
            "from what the optimizer makes of gradients"
        )
    step_sizes(optimizer, metric)


def check_hidden_copies(optimizer: Optimizer) -> None:
    """Raises ValueError where the next step would start from other numbers than those in the weights."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    narrow = any(p.dtype in (torch.float16, torch.bfloat16) for p in params)
    places: list[dict[str, Any]] = [vars(optimizer), *optimizer.param_groups]
    hiding = [name for place in places for name in _HIDING if place.get(name) and (narrow or name != "kahan_sum")]
    hiding += [name for state in optimizer.state.values() for name in _HIDDEN if name in state]
    if hiding:
        raise ValueError(
            f"{type(optimizer).__name__} keeps copies of the weights or of their rounding errors ({hiding[0]}), from "
            "which its next step would undo the proximal step; use fastreg.optim, or an optimizer without them"
        )


def _family(optimizer: Optimizer) -> type | None:
    """Whether its step is that of SGD or of Adam, as in subclasses that leave `step` alone."""
    own = inspect.unwrap(type(optimizer).step)
    if own not in [inspect.unwrap(known.step) for known in (SGD, Adam, Penalized)]:
        return None
    return SGD if isinstance(optimizer, SGD) else Adam


def is_elementwise(optimizer: Optimizer, metric: str) -> bool:
    """Whether each element has a step size of its own: `adam_update` then has what these are made of."""
    return metric == "optimizer" and _family(optimizer) is Adam


def step_sizes(optimizer: Optimizer, metric: str) -> list[Strength]:
    """The step size of each param group, or its learning rate; 0 where no step was made. ValueError: invalid ones."""
    # Where a fused optimizer found infinite gradients it left the weights alone, and so does a step of size 0.
    found_inf = getattr(optimizer, "found_inf", None)
    sizes: list[Strength] = []
    for i, group in enumerate(optimizer.param_groups):
        size = _lr(group, i)
        if metric == "optimizer" and _family(optimizer) is SGD:
            size = size * momentum_factor(group["momentum"], group["dampening"], group["nesterov"])
        if found_inf is not None:
            size = (found_inf == 0).to(accumulate_dtype(found_inf.device)) * size
        sizes.append(size)
    return sizes
