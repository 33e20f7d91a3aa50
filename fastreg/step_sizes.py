"""How far the step of an optimizer went per unit of gradient: what a proximal step after it has to go by.

The formulas and their source are in fastreg.optim.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from fastreg.penalized import Penalized
from fastreg.rules import Settings, Update, adam_reach, momentum_factor
from fastreg.strengths import Strength, Strengths, accumulate_dtype, check_strength, per_group
from fastreg.work import Work

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


def _lr(group: dict[str, Any], number: int) -> Strength:
    lr = group.get("lr")
    if lr is None:
        raise ValueError(f"param group {number} of the optimizer has no lr, by which a proximal step would shrink")
    if isinstance(lr, Tensor):
        # In host memory there is nothing to wait for.
        lr = lr.item() if lr.device.type == "cpu" else lr.reshape(())
    return check_strength(lr, f"lr of param group {number}")


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
    keys = list(zip(work.groups, param_groups, counts, strict=True))
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    pairs = [work.strengths.of_group(group) for group, _, _ in numbers]
    settings = []
    for (_, i, count), (l1, l2) in zip(numbers, pairs, strict=True):
        group = optimizer.param_groups[i]
        beta1, beta2 = map(float, group["betas"])
        numbers_of_adam = {"second": beta2, "third": group["eps"], "step": count, "reach": adam_reach(beta1, beta2)}
        settings.append(Settings(_lr(group, i), prox_l1=l1, prox_l2=l2, **numbers_of_adam))
    device = work.weights[0].device
    strengths = Strengths(*(per_group(column, device, "strength") for column in zip(*pairs, strict=True)))
    finer = work.regrouped([numbers[key] for key in keys], len(numbers), strengths)
    return finer, Update(settings, (None, squares, None), steps, found_inf=getattr(optimizer, "found_inf", None))
