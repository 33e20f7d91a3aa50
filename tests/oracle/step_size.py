"""The step size of each optimizer in NumPy float64, by the formulas of torch.optim's documentation."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, NAdam, Optimizer, RMSprop

from tests.oracle.penalty import array, rounding


def step_size(optimizer: Optimizer, group: dict[str, Any], state: Any, left_out: str = "") -> float | np.ndarray:
    """t of the last step, once the gradient has settled; `left_out` names what a wrong formula forgets."""
    if isinstance(optimizer, SGD):
        return numerator(optimizer, group, state, left_out)
    root = np.sqrt(_square(optimizer, group, state, left_out))
    return numerator(optimizer, group, state, left_out) / (
        root + (0.0 if left_out == "eps" else _eps(optimizer, group))
    )


def numerator(optimizer: Optimizer, group: dict[str, Any], state: Any, left_out: str = "") -> float:
    """lr times what makes the step of a constant gradient longer or shorter."""
    lr = float(group["lr"])
    if isinstance(optimizer, SGD | RMSprop):
        m, kept = group["momentum"], 1 - group.get("dampening", 0.0)
        if not m or left_out == "momentum":
            return lr
        return lr * (1 + m * kept / (1 - m) if group.get("nesterov") else kept / (1 - m))
    if isinstance(optimizer, Adagrad) and left_out != "lr_decay":
        return lr / (1 + (float(state["step"]) - 1) * group["lr_decay"])
    if isinstance(optimizer, NAdam):
        beta1, k, psi = group["betas"][0], float(state["step"]), group["momentum_decay"]
        # Dozat (2016), algorithm 8, with the gradient and its average taken apart.
        now, after = (beta1 * (1 - 0.96 ** (i * psi) / 2) for i in (k, k + 1))
        product = float(state["mu_product"])
        own, average = (1 - now) / (1 - product), after / (1 - product * after) * (1 - beta1**k)
        return float(lr * (own if left_out == "average" else own + average))
    return lr


def _square(optimizer: Optimizer, group: dict[str, Any], state: Any, left_out: str) -> np.ndarray:
    """The square that the denominator is the root of; where it is computed, rounded to the dtype of the state."""
    if isinstance(optimizer, RMSprop):
        mean_square = array(state["square_avg"])
        if not group["centered"] or left_out == "centered":
            return mean_square
        variance = np.maximum(_rounded(mean_square - array(state["grad_avg"]) ** 2, state["square_avg"]), 0.0)
        return np.where(mean_square == 0, np.inf, variance)  # no gradient, no step
    if isinstance(optimizer, Adagrad):
        return array(state["sum"])
    if isinstance(optimizer, Adamax):
        return _rounded(array(state["exp_inf"]) ** 2, state["exp_inf"])
    assert isinstance(optimizer, Adam | NAdam)  # as AdamW is
    v = array(state["max_exp_avg_sq" if group.get("amsgrad") and left_out != "maximum" else "exp_avg_sq"])
    if left_out != "bias correction":
        v = v / (1 - float(group["betas"][1]) ** float(state["step"]))
    return v


def _rounded(values: np.ndarray, like: Tensor) -> np.ndarray:
    return array(torch.from_numpy(np.asarray(values)).float().to(like.dtype)) if like.dtype != torch.float64 else values


def _eps(optimizer: Optimizer, group: dict[str, Any]) -> float:
    return 0.0 if isinstance(optimizer, Adamax) else group["eps"]  # Adamax has it in its norm


def reach(optimizer: Optimizer, group: dict[str, Any], state: Any) -> float | np.ndarray:
    """How far the proximal step may move each weight: the longest step of the optimizer, and at least 2 settled ones.

    For Adam that is Kingma and Ba (2015), 2.1. Nothing moves on a first step without gradient.
    """
    if isinstance(optimizer, SGD) or group.get("centered"):
        return np.inf
    longest = 1.0
    if isinstance(optimizer, Adam):
        beta1, beta2 = map(float, group["betas"])
        longest = (1 - beta1) / (1 - beta2) ** 0.5
    elif isinstance(optimizer, NAdam):
        beta1, beta2 = group["betas"]
        longest = ((1 - beta1 / 2) + beta1 * (1 - beta1)) / (1 - beta2) ** 0.5
    elif isinstance(optimizer, RMSprop):
        longest = 1 / (1 - group["alpha"]) ** 0.5
    bound = numerator(optimizer, group, state) * max(2.0, longest)
    like = next(state[name] for name in ("square_avg", "sum", "exp_inf", "exp_avg_sq") if name in state)
    square = _square(optimizer, group, state, "")
    # Adamax adds eps to gradients of 0.
    nothing = (
        float(torch.tensor(group["eps"], dtype=torch.float64).to(like.dtype)) if isinstance(optimizer, Adamax) else 0.0
    )
    untouched = ((array(like) == nothing) | (square == 0)) & (float(state["step"]) == 1)
    return np.where(untouched, 0.0, bound * (1 + rounding(like.dtype)))
