"""Whether a method computes what it is timed for: against NumPy in float64, before any clock starts."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.strengths import L1, L2, LR

# How far a method may be from the truth and still be timed. These bounds tell a lossy method from a wrong one and are
# not fastreg's own promises, which are a thousand times closer: float32 sums of many millions of weights, and results
# rounded after every operation, are what users run today. The error found is recorded beside every figure.
VALUE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# Root mean square over a tensor, relative to that of the gradient, or of the change that the proximal step makes.
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
PROX_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Found(NamedTuple):
    """The errors of a method, and why it is not to be timed, if so."""

    errors: dict[str, float]
    reason: str | None


class Truth:
    """What the tasks have to come to on `weights` as they are now."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights = weights
        self.dtype = weights[0].dtype

    @functools.cached_property
    def value(self) -> float:
        """The exact penalty, but for one rounding per tensor or per thousand weights."""
        parts = [(np.abs(w).sum(), np.dot(w.ravel(), w.ravel())) for w in self._arrays()]
        return L1 * math.fsum(p[0] for p in parts) + L2 * math.fsum(p[1] for p in parts)

    def gradients(self) -> Iterator[np.ndarray]:
        """The gradient of each weight."""
        return (L1 * np.sign(w) + 2 * L2 * w for w in self._arrays())

    def shrunk(self) -> Iterator[np.ndarray]:
        """Each weight after the proximal step."""
        return (np.sign(w) * np.maximum(np.abs(w) - LR * L1, 0) / (1 + 2 * LR * L2) for w in self._arrays())

    def decayed(self) -> Iterator[np.ndarray]:
        """Each weight after a step of gradient descent on the l2 term alone."""
        return ((1 - 2 * LR * L2) * w for w in self._arrays())

    def _arrays(self) -> Iterator[np.ndarray]:
        return (array(w) for w in self.weights)


def array(tensor: Tensor) -> np.ndarray:
    """The elements as float64."""
    return tensor.detach().cpu().to(torch.float64).numpy()


def check(task: str, call: Callable[[], Any], truth: Truth) -> Found:
    """Runs `call` once and compares; weights and gradients are as before afterwards, gradients zero."""
    try:
        errors = _CHECKS[task](call, truth)
    except Exception as error:  # a rival that cannot run is a result, too
        text = str(error).strip().splitlines() or [""]
        return Found({}, f"raised {type(error).__name__}: {text[0][:200]}")
    for what, found in errors.items():
        tolerance = _TOLERANCES[what][truth.dtype]
        if not found <= tolerance:
            return Found(errors, f"{what} off by {found:.2g} (relative), allowed {tolerance:.0e}")
    return Found(errors, None)


def _check_value(call: Callable[[], Any], truth: Truth) -> dict[str, float]:
    return {"value": _relative(call(), truth)}


def _check_gradient(call: Callable[[], Any], truth: Truth) -> dict[str, float]:
    zero_grads(truth.weights)
    value = call()
    grads = [w.grad for w in truth.weights if w.grad is not None]
    pairs = zip(grads, truth.gradients(), strict=True)
    errors = {"gradient": max(_ratio(_rms(array(g) - expected), _rms(expected)) for g, expected in pairs)}
    zero_grads(truth.weights)
    return {**errors, "value": _relative(value, truth)} if isinstance(value, Tensor) else errors


def _check_prox(call: Callable[[], Any], truth: Truth) -> dict[str, float]:
    return {"shrunk weight": _change(call, truth, truth.shrunk())}


def _check_decay(call: Callable[[], Any], truth: Truth) -> dict[str, float]:
    zero_grads(truth.weights)
    return {"shrunk weight": _change(call, truth, truth.decayed())}


def _change(call: Callable[[], Any], truth: Truth, expected: Iterable[np.ndarray]) -> float:
    """The error relative to the change that is due."""
    expected = list(expected)
    before = [w.detach().clone() for w in truth.weights]
    try:
        call()
        triples = zip(truth.weights, expected, before, strict=True)
        return max(_ratio(_rms(array(w) - e), _rms(array(b) - e)) for w, e, b in triples)
    finally:
        restore(truth.weights, before)


_CHECKS = {
    "value": _check_value,
    "backward": _check_gradient,
    "add_grad": _check_gradient,
    "prox": _check_prox,
    "decay": _check_decay,
}
_TOLERANCES = {"value": VALUE_TOLERANCE, "gradient": GRADIENT_TOLERANCE, "shrunk weight": PROX_TOLERANCE}


@torch.no_grad()
def restore(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Writes `values` back into `weights`."""
    torch._foreach_copy_(list(weights), list(values))


def zero_grads(weights: Sequence[nn.Parameter]) -> None:
    """Zeroes every .grad in place, or creates it."""
    for w in weights:
        if w.grad is None:
            w.grad = torch.zeros_like(w)
        else:
            w.grad.zero_()


def _relative(value: Tensor, truth: Truth) -> float:
    # A NaN or an overflow is as wrong as can be.
    error = abs(float(value) - truth.value) / truth.value
    return error if math.isfinite(error) else math.inf


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0


def _ratio(error: float, size: float) -> float:
    # A tensor of zeros, as biases are at first, has to come out exactly.
    return error / size if size else math.inf if error else 0.0
