"""One step of SGD, Adam or AdamW with a penalty in it, as plain PyTorch expressions: the reference for all others.

The steps are those of torch.optim. A penalty enters as a gradient, before everything else, or as a proximal step of
size t, after everything else. t is the step per unit of gradient once the gradient has settled: fastreg.optim has the
formulas.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastreg.core.dtypes import accumulate_dtype, compute_dtype
from fastreg.core.penalty import times
from fastreg.core.types import COUNTING, AdamSettings, ElementwiseProxSettings, Mode, SGDSettings, StepInputs
from fastreg.formulas.penalty import ElasticNetPenalty, segments_of, with_finite_slope


def with_rounding(reach: float, dtype: torch.dtype) -> float:
    """Return `reach` plus what rounding may add: a zero that a longest step has moved must come back to zero."""
    return reach * (1 + 8 * torch.finfo(compute_dtype(dtype)).eps + torch.finfo(dtype).eps)


def take_steps(
    mode: Mode,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    groups: Iterable[int | range],
    step: StepInputs,
) -> None:
    """Make the step of `mode` weight by weight: change weights, states and counters in place.

    Raises ValueError for a mode that has no formula here, before anything is written.
    """
    formula = formula_of(mode)
    # Products of the numbers are formed in float64, whatever the dtypes of those that are tensors.
    given: Any = step.settings
    settings = [type(s)(*[times(x, 1.0) if isinstance(x, Tensor) else x for x in s]) for s in given]
    for i, (w, group) in enumerate(zip(weights, groups, strict=True)):
        count = None if step.steps is None else step.steps[i]
        made = count + 1 if count is not None and mode in COUNTING else count
        tensors = [w, *(state[i] for state in step.states.values())]
        if grads is not None:
            tensors.append(grads[i])
        for segments in zip(*(segments_of(t, group) for t in tensors), strict=True):
            number = segments[0][1]
            targets = [segment for segment, _ in segments]
            grad = None if grads is None else targets.pop()
            s = settings[number]
            results = formula(*_in_float(targets, grad, step, s), made, s, w.dtype)
            _write(targets, results, step.found_inf)
        if count is not None and mode in COUNTING:
            _write([count], [made], step.found_inf)


def _in_float(
    targets: Sequence[Tensor], grad: Tensor | None, step: StepInputs, s: Any
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Return weight, gradient with the penalty's, and states in float32 or float64."""
    w, *states = [t.to(compute_dtype(targets[0].dtype)) for t in targets]
    if grad is not None:
        grad = grad.to(w.dtype) if step.grad_scale is None else grad.to(w.dtype) / step.grad_scale
        grad = _with_penalty(grad, w, s)
    return w, grad, states


def _write(targets: Sequence[Tensor], results: Sequence[Any], found_inf: Tensor | None) -> None:
    """Write the results, fewer where the states stay as they are, unless gradients were infinite."""
    for target, result in zip(targets, results, strict=False):
        result = result.to(target.dtype)
        target.copy_(result if found_inf is None else torch.where(found_inf == 0, result, target))


def _with_penalty(grad: Tensor, w: Tensor, s: SGDSettings | AdamSettings) -> Tensor:
    """Add the gradients of the penalty and of weight decay that is not decoupled."""
    l1, slope = with_finite_slope(s.l1, 2 * s.l2 + s.weight_decay * (1 - s.is_decoupled), w.dtype)
    grad = grad + torch.where(w == 0, 0.0, w.sign() * l1)
    return grad if not isinstance(slope, Tensor) and slope == 0 else grad + w * slope  # infinity times 0 is NaN


# The formulas, one for each mode. They get the weight, its gradient and its states in float32 or float64, the number of
# steps, the settings, and the weight's own dtype. They return the new weight, and the new states if they change.


def _sgd(
    w: Tensor, grad: Tensor, states: list[Tensor], count: None, s: SGDSettings, dtype: torch.dtype
) -> list[Tensor]:
    return [_moved_by_sgd(w, grad, s)]


def _momentum(
    w: Tensor, grad: Tensor, states: list[Tensor], count: None, s: SGDSettings, dtype: torch.dtype
) -> list[Tensor]:
    """A first step has a buffer of zeros and no dampening."""
    (buffer,) = states
    buffer = s.momentum * buffer + (1 - s.dampening) * grad
    return [_moved_by_sgd(w, grad + s.momentum * buffer if s.nesterov else buffer, s), buffer]


def _moved_by_sgd(w: Tensor, direction: Tensor, s: SGDSettings) -> Tensor:
    w = w - s.lr * direction
    return ElasticNetPenalty((s.lr * s.prox_l1, s.lr * s.prox_l2)).prox(w) if has_prox(s) else w


def _adam(
    w: Tensor, grad: Tensor, states: list[Tensor], count: Tensor, s: AdamSettings, dtype: torch.dtype
) -> list[Tensor]:
    mean, square = _moments(grad, states, s)
    return [_moved_by_adam(w, mean, square, count, s, dtype), mean, square]


def _amsgrad(
    w: Tensor, grad: Tensor, states: list[Tensor], count: Tensor, s: AdamSettings, dtype: torch.dtype
) -> list[Tensor]:
    mean, square = _moments(grad, states[:2], s)
    largest = torch.maximum(states[2], square)
    return [_moved_by_adam(w, mean, largest, count, s, dtype), mean, square, largest]


def _moments(grad: Tensor, states: list[Tensor], s: AdamSettings) -> tuple[Tensor, Tensor]:
    mean, square = states
    # The term with the larger weight is not rounded.
    mean = mean + (1 - s.beta1) * (grad - mean) if s.beta1 > 0.5 else grad - s.beta1 * (grad - mean)
    return mean, s.beta2 * square + (1 - s.beta2) * grad * grad


def _moved_by_adam(
    w: Tensor, mean: Tensor, square: Tensor, count: Tensor, s: AdamSettings, dtype: torch.dtype
) -> Tensor:
    w = w * (1 - s.lr * s.weight_decay * s.is_decoupled)
    count = count.to(accumulate_dtype(w.device))
    w = w - s.lr / (1 - s.beta1**count) * mean / _denominator(square, count, s)
    return _shrunk(w, square, count, s, dtype)


def _elementwise_prox(
    w: Tensor, grad: None, states: list[Tensor], count: Tensor | None, s: ElementwiseProxSettings, dtype: torch.dtype
) -> list[Tensor]:
    (square,) = states
    return [_shrunk(w, square, s.steps_made if count is None else s.steps_made + count, s, dtype)]


def _denominator(square: Tensor, count: Tensor | float, s: AdamSettings | ElementwiseProxSettings) -> Tensor:
    denominator: Tensor = square.sqrt() / (1 - s.beta2**count) ** 0.5 + s.eps
    return denominator


def _shrunk(
    w: Tensor, square: Tensor, count: Tensor | float, s: AdamSettings | ElementwiseProxSettings, dtype: torch.dtype
) -> Tensor:
    """The proximal step of size t = lr / (sqrt(square / (1 - beta2^count)) + eps), elementwise, within reach.

    Where there has been no gradient, t is lr / eps: without the reach, weights would be zero before they are trained.
    A first step leaves them alone, as engines make one with zero gradients to allocate the states.
    """
    if not has_prox(s):
        return w
    t = s.lr / _denominator(square, count, s)
    reach = s.lr * with_rounding(s.reach, dtype)
    moved = ElasticNetPenalty((t * s.prox_l1, t * s.prox_l2)).prox(w)
    moved = torch.minimum(torch.maximum(moved, w - reach), w + reach)
    return torch.where((square == 0) & (count == 1), w, moved)


def has_prox(s: SGDSettings | AdamSettings | ElementwiseProxSettings) -> bool:
    """Return whether the proximal step may change anything. Tensors are not read."""
    return any(isinstance(strength, Tensor) or strength != 0 for strength in (s.prox_l1, s.prox_l2))


Formula: TypeAlias = Callable[..., list[Tensor]]
_FORMULAS: dict[Mode, Formula] = {
    Mode.SGD: _sgd,
    Mode.MOMENTUM: _momentum,
    Mode.ADAM: _adam,
    Mode.AMSGRAD: _amsgrad,
    Mode.ELEMENTWISE_PROX: _elementwise_prox,
}


def formula_of(mode: Mode) -> Formula:
    """Return the formula of a step; ValueError for a mode that has none."""
    formula = _FORMULAS.get(mode)
    if formula is None:
        raise ValueError(f"fastreg.formulas.steps has no formula for a step of {mode}")
    return formula
