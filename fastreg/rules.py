"""One step of SGD, Adam or AdamW with a penalty in it, as plain PyTorch expressions: the reference for all others.

The steps are those of torch.optim. A penalty goes in as a gradient, before everything else, or as a proximal step of
size t after everything else, where t is the step per unit of gradient once the gradient has settled (fastreg.optim).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreg.formulas import Mode, compute_dtype, prox
from fastreg.strengths import accumulate_dtype


class Settings(NamedTuple):
    """The numbers of a strength group: floats, or 0-dim tensors where users have some. Kernels go by their places."""

    lr: Any
    weight_decay: Any = 0.0
    is_decoupled: float = 0.0  # whether weight decay is AdamW's
    l1: Any = 0.0  # of these two the gradient is added to that of the data
    l2: Any = 0.0
    prox_l1: Any = 0.0  # and by these the weights are shrunk after the step, times lr, or Adam's elementwise t
    prox_l2: Any = 0.0
    first: Any = 0.0  # momentum, or beta1
    second: Any = 0.0  # dampening, or beta2
    third: Any = 0.0  # whether momentum is Nesterov's, or eps
    step: float = 0.0  # in ADAM_PROX: how many steps were made, to which the counter is added if there is one
    reach: float = 0.0  # of Adam: times lr the furthest that a proximal step may move an element


class Update(NamedTuple):
    """What an optimizer brings to a sweep: settings for each strength group, and tensors for each weight."""

    settings: Sequence[Settings]
    # Momentum buffers or first moments, second moments, the largest of those; None where the mode has none.
    states: tuple[Sequence[Tensor] | None, Sequence[Tensor] | None, Sequence[Tensor] | None] = (None, None, None)
    steps: Sequence[Tensor] | None = None  # 0-dim float32, counted up by the sweep unless it is ADAM_PROX
    grad_scale: Tensor | None = None  # what the gradients were multiplied with
    found_inf: Tensor | None = None  # where this is not 0, nothing is changed

    def mapped(self, f: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> "Update":
        """The same with `f` of each list of states."""
        first, second, third = (None if state is None else f(state) for state in self.states)
        return self._replace(states=(first, second, third))

    def tensors(self) -> list[Tensor]:
        """All states, one list after the other."""
        return [t for state in self.states if state is not None for t in state]


STEPS = (Mode.SGD, Mode.MOMENTUM, Mode.ADAM, Mode.AMSGRAD)


def momentum_factor(momentum: float, dampening: float, nesterov: bool) -> float:
    """How much further than lr a step of SGD goes per unit of a gradient that has settled.

    A buffer b = m * b + (1 - d) * g ends at g * (1 - d) / (1 - m); Nesterov's step is g + m * b. ValueError for m >= 1
    and for d > 1.
    """
    if momentum == 0:
        return 1.0
    if not momentum < 1:
        raise ValueError(f"with momentum={momentum} steps grow without end: a proximal step needs momentum < 1")
    if dampening > 1:
        raise ValueError(
            f"with dampening={dampening} steps go up the gradient, and a proximal step would grow the weights: it "
            "needs dampening <= 1"
        )
    settled = (1 - dampening) / (1 - momentum)
    return 1 + momentum * settled if nesterov else settled


def adam_reach(beta1: float, beta2: float) -> float:
    """The furthest that a proximal step moves an element, in units of lr: the longest step of Adam, and at least 2.

    Kingma and Ba (2015), section 2.1: no step of Adam is longer than max(1, (1 - beta1) / sqrt(1 - beta2)). Under a
    constant gradient each one is 1 long. A proximal step of 1 would only undo it, and the weight would never reach 0.
    """
    return max(2.0, (1 - beta1) / math.sqrt(1 - beta2))


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
    return w if _has_no_prox(s) else prox(w, s.lr * s.prox_l1, s.lr * s.prox_l2), buffer


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
    moved = torch.minimum(torch.maximum(prox(w, t * s.prox_l1, t * s.prox_l2), w - reach), w + reach)
    return torch.where((square == 0) & (step == 1), w, moved)


def _has_no_prox(s: Settings) -> bool:
    """Whether the proximal step would change nothing; tensors are not looked into."""
    return not any(isinstance(strength, Tensor) or strength != 0 for strength in (s.prox_l1, s.prox_l2))
