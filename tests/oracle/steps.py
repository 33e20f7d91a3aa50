"""One step of SGD, Adam or AdamW with a penalty, in NumPy float64, by the formulas of papers and of fastreg.optim.

State is a dict of arrays, changed in place. Written without a look at the library or at torch.optim.
"""

from typing import Any

import numpy as np

Array = np.ndarray
State = dict[str, Any]


def step(kind: str, w: Array, grad: Array, state: State, o: dict[str, Any]) -> tuple[Array, Array]:
    """The weight after a step with options `o`, and the size of the largest number in between, for tolerances."""
    l1, l2 = (0.0, 0.0) if o.get("prox") else (o.get("l1", 0.0), o.get("l2", 0.0))
    full = grad + l1 * np.sign(w) + 2 * l2 * w
    decay = o.get("weight_decay", 1e-2 if kind == "AdamW" else 0.0)
    size = np.abs(w) + o["lr"] * (np.abs(grad) + l1 + np.abs(2 * l2 * w) + np.abs(decay * w))
    if kind == "AdamW":
        w = w - o["lr"] * decay * w
    else:
        full = full + decay * w
    moved, t = _sgd(full, state, o) if kind == "SGD" else _adam(full, state, o)
    w = w - moved
    size = size + np.abs(moved)
    if o.get("prox"):
        size = size + t * o.get("l1", 0.0)
        shrunk = np.maximum(np.abs(w) - t * o.get("l1", 0.0), 0.0) / (1 + 2 * t * o.get("l2", 0.0))
        shrunk = np.where(np.isnan(w), np.nan, np.sign(w) * shrunk)
        w = shrunk if kind == "SGD" else _bounded(shrunk, w, state, o)
    return w, size


def _bounded(shrunk: Array, w: Array, state: State, o: dict[str, Any]) -> Array:
    """No further from `w` than steps of Adam go (Kingma and Ba 2015, 2.1); on a first step without gradient, `w`."""
    beta1, beta2 = o.get("betas", (0.9, 0.999))
    reach = o["lr"] * max(2.0, (1 - beta1) / np.sqrt(1 - beta2)) * (1 + o.get("rounding", 0.0))
    square = state["max_exp_avg_sq" if o.get("amsgrad") else "exp_avg_sq"]
    untouched = (square == 0) & (state["step"] == 1)
    return np.where(untouched, w, np.clip(shrunk, w - reach, w + reach))


def _sgd(grad: Array, state: State, o: dict[str, Any]) -> tuple[Array, Any]:
    momentum, dampening, nesterov = o.get("momentum", 0.0), o.get("dampening", 0.0), o.get("nesterov", False)
    if not momentum:
        return o["lr"] * grad, o["lr"]
    buffer = state.get("momentum_buffer")
    buffer = grad if buffer is None else momentum * buffer + (1 - dampening) * grad
    state["momentum_buffer"] = buffer
    settled = (1 - dampening) / (1 - momentum)  # what the buffer comes to, per unit of a constant gradient
    return o["lr"] * (grad + momentum * buffer if nesterov else buffer), o["lr"] * (
        1 + momentum * settled if nesterov else settled
    )


def _adam(grad: Array, state: State, o: dict[str, Any]) -> tuple[Array, Any]:
    beta1, beta2 = o.get("betas", (0.9, 0.999))
    zeros = np.zeros_like(grad)
    state["step"] = state.get("step", 0) + 1
    state["exp_avg"] = beta1 * state.get("exp_avg", zeros) + (1 - beta1) * grad
    state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * grad * grad
    square = state["exp_avg_sq"]
    if o.get("amsgrad"):
        square = state["max_exp_avg_sq"] = np.maximum(state.get("max_exp_avg_sq", zeros), square)
    mean = state["exp_avg"] / (1 - beta1 ** state["step"])
    denominator = np.sqrt(square / (1 - beta2 ** state["step"])) + o.get("eps", 1e-8)
    return o["lr"] * mean / denominator, o["lr"] / denominator
