"""The step size of each optimizer in NumPy float64, by the formulas in fastreg.optim."""

from typing import Any

import numpy as np
from torch.optim import SGD, Adam, Optimizer

from tests.oracle.penalty import array, rounding


def step_size(optimizer: Optimizer, group: dict[str, Any], state: Any, left_out: str = "") -> float | np.ndarray:
    """t of the last step, once the gradient has settled; `left_out` names what a wrong formula forgets."""
    lr = float(group["lr"])
    if isinstance(optimizer, SGD):
        m, kept = group["momentum"], 1 - group["dampening"]
        if not m or left_out == "momentum":
            return lr
        return lr * (1 + m * kept / (1 - m) if group["nesterov"] else kept / (1 - m))
    assert isinstance(optimizer, Adam)  # as AdamW is
    v = array(state["max_exp_avg_sq" if group["amsgrad"] and left_out != "maximum" else "exp_avg_sq"])
    if left_out != "bias correction":
        v = v / (1 - float(group["betas"][1]) ** float(state["step"]))
    return lr / (np.sqrt(v) + (0.0 if left_out == "eps" else group["eps"]))


def reach(optimizer: Optimizer, group: dict[str, Any], state: Any) -> float | np.ndarray:
    """How far the proximal step may move each weight: the longest step of Adam (Kingma and Ba 2015, 2.1), or 2 * lr."""
    if isinstance(optimizer, SGD):
        return np.inf
    beta1, beta2 = map(float, group["betas"])
    longest = float(group["lr"]) * max(2.0, (1 - beta1) / (1 - beta2) ** 0.5)
    longest *= 1 + rounding(state["exp_avg_sq"].dtype)
    v = array(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"])
    return np.where((v == 0) & (float(state["step"]) == 1), 0.0, longest)
