"""One step of SGD, Adam or AdamW with a penalty in it, as plain PyTorch expressions: the reference for all others.

The steps are those of torch.optim. A penalty goes in as a gradient, before everything else, or as a proximal step of
size t after everything else, where t is the step per unit of gradient once the gradient has settled (fastreg.optim).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastreg.core.dtypes import accumulate_dtype, compute_dtype
from fastreg.core.types import Mode, Settings, Update
from fastreg.formulas.penalty import ElasticNetPenalty

STEPS = (Mode.SGD, Mode.MOMENTUM, Mode.ADAM, Mode.AMSGRAD)


def with_rounding(reach: float, dtype: torch.dtype) -> float:
    """`reach` and what roundings add to it: a zero that Adam's longest step has moved must come back to zero."""
    return reach * (1 + 8 * torch.finfo(compute_dtype(dtype)).eps + torch.finfo(dtype).eps)


def take_steps(
    mode: Mode, weights: Sequence[Tensor], grads: Sequence[Tensor] | None, groups: Iterable[int], update: Update
) -> None:
    """Does to the weights, states and counters what `mode` says, weight by weight."""
    for i, (w, group) in enumerate(zip(weights, groups, strict=True)):
        s = update.settings[group]
        s = s._replace(reach=with_rounding(s.reach, w.dtype))
        wide = compute_dtype(w.dtype)
        states = [None if state is None else state[i] for state in update.states]
        first, second, third = (None if state is None else state.to(wide) for state in states)
        step = update.steps[i] if update.steps is not None else None
        new_step = None
        if mode is Mode.ADAM_PROX:
            assert second is not None
            made = s.step if step is None else s.step + step
            found = [_prox_of_adam(w.to(wide), second, made, s), None, None, None]
        else:
            assert grads is not None
            grad = grads[i].to(wide) if update.grad_scale is None else grads[i].to(wide) / update.grad_scale
            grad = _with_penalty(grad, w.to(wide), s)
            if first is None or second is None:
                found = [*_sgd(w.to(wide), grad, first, s), None, None]
            else:
                assert step is not None
                new_step = step + 1
                found = list(_adam(w.to(wide), grad, first, second, third, new_step, s))
        for old, new in zip([w, *states, step], [*found, new_step], strict=True):
            if old is not None and new is not None:
                new = new.to(old.dtype)
                # Nothing that comes of infinite gradients may stay.
                old.copy_(new if update.found_inf is None else torch.where(update.found_inf == 0, new, old))


def _with_penalty(grad: Tensor, w: Tensor, s: Settings) -> Tensor:
    """The gradient with that of the penalty and of weight decay that is not decoupled."""
    slope = 2 * s.l2 + s.weight_decay * (1 - s.is_decoupled)
    grad = grad + torch.where(w == 0, 0.0, w.sign() * s.l1)
    return grad if not isinstance(slope, Tensor) and slope == 0 else grad + w * slope  # infinity times 0 is NaN


def _sgd(w: Tensor, grad: Tensor, buffer: Tensor | None, s: Settings) -> tuple[Tensor, Tensor | None]:
    """torch.optim.SGD; a first step has a buffer of zeros and no dampening."""
    if buffer is not None:
        buffer = s.first * buffer + (1 - s.second) * grad
        grad = grad + s.first * buffer if s.third else buffer
    w = w - s.lr * grad
    return w if _has_no_prox(s) else ElasticNetPenalty((s.lr * s.prox_l1, s.lr * s.prox_l2)).prox(w), buffer


def _adam(
    w: Tensor, grad: Tensor, mean: Tensor, square: Tensor, largest: Tensor | None, step: Tensor, s: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """torch.optim.Adam and AdamW."""
    w = w * (1 - s.lr * s.weight_decay * s.is_decoupled)
    # The one of the two that weighs more is not rounded.
    mean = mean + (1 - s.first) * (grad - mean) if s.first > 0.5 else grad - s.first * (grad - mean)
    square = s.second * square + (1 - s.second) * grad * grad
    largest = None if largest is None else torch.maximum(largest, square)
    used = square if largest is None else largest
    step = step.to(accumulate_dtype(w.device))
    w = w - s.lr / (1 - s.first**step) * mean / _denominator(used, step, s)
    return _prox_of_adam(w, used, step, s), mean, square, largest


def _denominator(square: Tensor, step: Tensor | float, s: Settings) -> Tensor:
    denominator: Tensor = square.sqrt() / (1 - s.second**step) ** 0.5 + s.third
    return denominator


def _prox_of_adam(w: Tensor, square: Tensor, step: Tensor | float, s: Settings) -> Tensor:
    """By t = lr / (sqrt(v / (1 - beta2^step)) + eps), elementwise, and no further than steps of Adam go.

    Where there has been no gradient, t is lr / eps: without the bound, weights would be zero before they are trained.
    A first step leaves them alone, as engines make one with zero gradients to allocate the states.
    """
    if _has_no_prox(s):
        return w
    t = s.lr / _denominator(square, step, s)
    reach = s.lr * s.reach
    moved = ElasticNetPenalty((t * s.prox_l1, t * s.prox_l2)).prox(w)
    moved = torch.minimum(torch.maximum(moved, w - reach), w + reach)
    return torch.where((square == 0) & (step == 1), w, moved)


def _has_no_prox(s: Settings) -> bool:
    """Whether the proximal step would change nothing; tensors are not looked into."""
    return not any(isinstance(strength, Tensor) or strength != 0 for strength in (s.prox_l1, s.prox_l2))
