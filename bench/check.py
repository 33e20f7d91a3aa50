"""Whether a method computes what it is timed for: against NumPy in float64, before any clock starts."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.peers import L1, L2, LR, Weights

# How far a method may be from the truth and still be timed. These bounds tell a lossy method from a wrong one and are
# not fastreg's own promises, which are a thousand times closer: float32 sums of many millions of weights, and results
# rounded after every operation, are what users run today. The error found is recorded beside every figure.
# Errors of tensors are root mean squares, relative to the gradient's or to the change that a proximal step makes.
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
TOLERANCES = {
    "value": {F64: 1e-9, F32: 1e-3, BF16: 2e-2, F16: 2e-3},
    "gradient": {F64: 1e-12, F32: 1e-6, BF16: 1e-2, F16: 1e-3},
    "shrunk weight": {F64: 1e-12, F32: 1e-5, BF16: 2e-2, F16: 3e-3},
}


class Found(NamedTuple):
    """The errors of a method, and why it is not to be timed, if so."""

    errors: dict[str, float]
    reason: str | None


def check(task: str, call: Callable[[], Any], weights: Weights) -> Found:
    """Runs `call` once and compares; weights are as before afterwards, gradients zero.

    Beside the peers' tasks there is "decay", a step of gradient descent on the l2 term alone.
    """
    try:
        errors = _errors(task, call, weights)
    except Exception as error:  # a rival that cannot run is a result, too
        text = str(error).strip().splitlines() or [""]
        return Found({}, f"raised {type(error).__name__}: {text[0][:200]}")
    for what, found in errors.items():
        allowed = TOLERANCES[what][weights[0].dtype]
        if not found <= allowed:
            return Found(errors, f"{what} off by {found:.2g} (relative), allowed {allowed:.0e}")
    return Found(errors, None)


def _errors(task: str, call: Callable[[], Any], weights: Weights) -> dict[str, float]:
    zero_grads(weights)
    if task in ("prox", "decay"):
        before = [w.detach().clone() for w in weights]
        try:
            call()
            errors = []
            for w, old in zip(weights, map(array, before), strict=True):
                new = (1 - 2 * LR * L2) * old
                if task == "prox":
                    new = np.sign(old) * np.maximum(np.abs(old) - LR * L1, 0) / (1 + 2 * LR * L2)
                errors.append(_ratio(array(w) - new, old - new))
        finally:
            restore(weights, before)
        return {"shrunk weight": max(errors)}
    value, found = call(), {}
    if task != "value":
        expected = ((w, L1 * np.sign(array(w)) + 2 * L2 * array(w)) for w in weights)
        found["gradient"] = max(_ratio(array(w.grad) - gradient, gradient) for w, gradient in expected)
        zero_grads(weights)
    if task == "value" or isinstance(value, Tensor):
        exact = L1 * math.fsum(np.abs(array(w)).sum() for w in weights)
        exact += L2 * math.fsum(np.square(array(w)).sum() for w in weights)
        error = abs(float(value) - exact) / exact
        found["value"] = error if math.isfinite(error) else math.inf  # a NaN is as wrong as can be
    return found


def array(tensor: Tensor) -> np.ndarray:
    """The elements as float64."""
    return tensor.detach().cpu().to(torch.float64).numpy()


@torch.no_grad()
def restore(weights: Weights, values: Sequence[Tensor]) -> None:
    """Writes `values` back into `weights`."""
    torch._foreach_copy_(list(weights), list(values))


def zero_grads(weights: Weights) -> None:
    """Zeroes every .grad in place, or creates it."""
    for w in weights:
        if w.grad is None:
            w.grad = torch.zeros_like(w)
        else:
            w.grad.zero_()


def _ratio(error: np.ndarray, reference: np.ndarray) -> float:
    size = float(np.linalg.norm(reference))
    # A tensor of zeros, as biases are at first, has to come out exactly.
    return float(np.linalg.norm(error)) / size if size else math.inf if error.any() else 0.0
