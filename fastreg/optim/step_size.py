"""Step sizes: how far an optimizer moves a weight per unit of gradient, once the gradient has settled.

A proximal step after the optimizer's has to use the same step size t. The table STEP_SIZES has an entry for each class
whose t is known. It is a number per param group, or elementwise:

    SGD                  t = lr * f,  f from `momentum_factor`
    Adam, AdamW          t = lr / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps);  amsgrad: max_exp_avg_sq
    RMSprop              t = lr * f / (sqrt(square_avg) + eps),  f = 1 / (1 - momentum)
                         centered: square_avg - grad_avg^2 in place of square_avg
    Adagrad              t = lr / (1 + (step - 1) * lr_decay) / (sqrt(sum) + eps)
    NAdam                t = lr * f / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps),
                         f = (1 - mu) / (1 - mu_product) + mu_next * (1 - beta1^step) / (1 - mu_product * mu_next)
    Adamax               t = lr / exp_inf

with the state after the step. The steps are those of torch.optim, whose documentation of each class states them. A
settled gradient g is one that the averages have come to: momentum buffers hold g * f, and exp_avg holds
g * (1 - beta1^step). NAdam's step is lr * ((1 - mu) / (1 - mu_product) * g + mu_next / (1 - mu_product * mu_next) *
exp_avg) over the denominator, where mu = beta1 * (1 - 0.96^(step * momentum_decay) / 2), mu_next is that of the next
step and mu_product is the product of all mu so far. Adamax's step is lr * exp_avg / (1 - beta1^step) / exp_inf, in
which both factors of 1 - beta1^step cancel. Weight decay is not part of t.

An elementwise proximal step moves no element further than `reach` times the numerator of t: the longest step that the
optimizer makes, after a gradient that follows zeros only, and at least 2. A constant gradient makes steps of 1; a
proximal step of 1 would only undo them. The longest steps, in these units:

    Adam                 (1 - beta1) / sqrt(1 - beta2)
    RMSprop              1 / sqrt(1 - alpha)
    NAdam                (1 - beta1 / 2 + beta1 * (1 - beta1)) / sqrt(1 - beta2)
    Adagrad, Adamax      1

NAdam's is ((1 - mu) + mu_next * (1 - beta1)) / sqrt(1 - beta2) at the largest 1 - mu and mu_next, as mu lies between
beta1 / 2 and beta1. Centered RMSprop has no longest step: a constant gradient g has a variance of 0 and steps of
g / eps, so any bound would let weights drift away from the solution. There, elements that have seen no gradient are
left alone instead.

The momentum buffer of RMSprop adds up steps, not gradients, and holds g * f / (sqrt(square_avg) + eps) only once
square_avg has settled, too: after several times 1 / (1 - alpha) steps.

Sources: Duchi, Hazan, Singer, "Adaptive subgradient methods for online learning and stochastic optimization", 2011;
Tieleman, Hinton, "Lecture 6.5: RMSprop", 2012; Graves, "Generating sequences with recurrent neural networks", 2013
(centered); Kingma, Ba, "Adam", 2015 (Adamax: section 7.1); Dozat, "Incorporating Nesterov momentum into Adam", 2016.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RMSprop

from fastreg.core.dtypes import accumulate_dtype
from fastreg.core.penalty import Strength, times
from fastreg.core.strengths import penalty_of_groups
from fastreg.core.types import ElementwiseProxSettings, Mode, StepInputs, Work
from fastreg.formulas.penalty import ElasticNetPenalty, no_formulas
from fastreg.optim.adam import adam_reach
from fastreg.optim.base import Penalized, learning_rate
from fastreg.optim.sgd import momentum_factor

Group: TypeAlias = dict[str, Any]  # a param group of an optimizer
State: TypeAlias = dict[str, Any]  # the state of a parameter


class Limits(NamedTuple):
    """The parts of an elementwise step size that a param group alone decides."""

    beta2: float  # 0 without bias correction
    eps: float
    reach: float  # the longest step, in units of lr * factor; at least 2


class ScalarStepSize(NamedTuple):
    """t = lr * factor, the same for all elements of a param group."""

    factor: Callable[[Group], float]


class ElementwiseStepSize(NamedTuple):
    """t = lr * factor / (sqrt(square / (1 - beta2^step)) + eps); no element moves further than lr * factor * reach."""

    squares: Callable[[Group, list[State]], list[Tensor]]  # one for each parameter, after the step
    limits: Callable[[Group], Limits]  # ValueError for options that have no step size
    factor: Callable[[Group, State, Any], Any] | None = None  # by the number of steps; None for 1


_UNBOUNDED = 1e30  # a reach that float32 can hold, times lr


def _sgd_factor(group: Group) -> float:
    return momentum_factor(group["momentum"], group["dampening"], group["nesterov"])


def _adam_squares(group: Group, states: list[State]) -> list[Tensor]:
    name = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    return [state[name] for state in states]


def _adam_limits(group: Group) -> Limits:
    beta1, beta2 = map(float, group["betas"])
    return Limits(beta2, group["eps"], adam_reach(beta1, beta2))


def _rmsprop_squares(group: Group, states: list[State]) -> list[Tensor]:
    squares: list[Tensor] = [state["square_avg"] for state in states]
    if not group["centered"]:
        return squares
    # New tensors, as large as the weights, in the dtype of the states, in which torch.optim computes them, too.
    means = [state["grad_avg"] for state in states]
    variances = [torch.addcmul(s, mean, mean, value=-1.0) for s, mean in zip(squares, means, strict=True)]
    # Rounding may leave a negative one. Where there was no gradient yet, an infinite one makes a step size of 0.
    return [
        torch.where(square == 0, math.inf, variance.clamp(min=0.0))
        for square, variance in zip(squares, variances, strict=True)
    ]


def _rmsprop_limits(group: Group) -> Limits:
    momentum_factor(group["momentum"], 0.0, False)  # ValueError from 1 on
    alpha = float(group["alpha"])
    if not alpha < 1:
        raise ValueError(f"with alpha={alpha} squares are never averaged: a proximal step needs alpha < 1")
    return Limits(0.0, group["eps"], _UNBOUNDED if group["centered"] else max(2.0, 1 / math.sqrt(1 - alpha)))


def _rmsprop_factor(group: Group, state: State, step: Any) -> float:
    return momentum_factor(group["momentum"], 0.0, False)


def _adagrad_squares(group: Group, states: list[State]) -> list[Tensor]:
    return [state["sum"] for state in states]


def _adagrad_limits(group: Group) -> Limits:
    return Limits(0.0, group["eps"], 2.0)


def _adagrad_factor(group: Group, state: State, step: Any) -> Any:
    return 1 / (1 + (step - 1) * group["lr_decay"]) if group["lr_decay"] else 1.0


def _nadam_limits(group: Group) -> Limits:
    beta1, beta2 = map(float, group["betas"])
    longest = (1 - beta1 / 2 + beta1 * (1 - beta1)) / math.sqrt(1 - beta2)
    return Limits(beta2, group["eps"], max(2.0, longest))


def _nadam_factor(group: Group, state: State, step: Any) -> Any:
    beta1, decay = float(group["betas"][0]), group["momentum_decay"]
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (number * decay)) for number in (step, step + 1))
    product = _on_host(state["mu_product"])
    return (1 - mu) / (1 - product) + mu_next * (1 - beta1**step) / (1 - product * mu_next)


# Far below any norm that counts, so that a norm of 0, as of a float16 whose eps is 0, is no division by 0.
_TINY = 1e-30


def _adamax_squares(group: Group, states: list[State]) -> list[Tensor]:
    # New tensors, as large as the weights. torch.optim adds eps to every gradient, so eps is the norm of no gradient.
    norms = [state["exp_inf"] for state in states]
    return [torch.where(norm == group["eps"], 0.0, norm * norm) for norm in norms]


def _adamax_limits(group: Group) -> Limits:
    return Limits(0.0, _TINY, 2.0)


StepSize: TypeAlias = ScalarStepSize | ElementwiseStepSize

_SGD = ScalarStepSize(_sgd_factor)
_ADAM = ElementwiseStepSize(_adam_squares, _adam_limits)
STEP_SIZES: dict[type[Optimizer], StepSize] = {
    SGD: _SGD,
    Adam: _ADAM,
    AdamW: _ADAM,
    RMSprop: ElementwiseStepSize(_rmsprop_squares, _rmsprop_limits, _rmsprop_factor),
    Adagrad: ElementwiseStepSize(_adagrad_squares, _adagrad_limits, _adagrad_factor),
    NAdam: ElementwiseStepSize(_adam_squares, _nadam_limits, _nadam_factor),
    Adamax: ElementwiseStepSize(_adamax_squares, _adamax_limits),
}
# The same for the optimizers of fastreg.optim.
_OF_MODES: dict[Mode, StepSize] = {Mode.SGD: _SGD, Mode.MOMENTUM: _SGD, Mode.ADAM: _ADAM, Mode.AMSGRAD: _ADAM}

# Attributes and options that say that an optimizer steps copies of the weights, or keeps what their roundings lost:
# Apex and Transformer Engine, DeepSpeed, optimi.
_HIDING = ("master_weights", "param_groups_master", "fp32_partitioned_groups_flat", "kahan_sum")
# And names of those copies in its state.
_HIDDEN = ("master_param", "master_weight", "kahan_comp", "fp32_param")


def check_metric(optimizer: Optimizer, metric: str) -> None:
    """Raise ValueError for optimizers whose step size is not known, or that would undo a proximal step."""
    check_hidden_copies(optimizer)
    if metric == "optimizer":
        size = _step_size_of(optimizer)
        if size is None:
            *names, last = [cls.__name__ for cls in STEP_SIZES]
            raise ValueError(
                f"the step size of {type(optimizer).__name__} is not known, only those of torch.optim."
                f'{", ".join(names)} and {last}: a proximal step would solve another problem; metric="lr" shrinks by '
                "the learning rate alone, decoupled from what the optimizer makes of gradients"
            )
        if isinstance(size, ElementwiseStepSize):
            for group in optimizer.param_groups:
                size.limits(group)
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


def _step_size_of(optimizer: Optimizer) -> StepSize | None:
    """Return the entry of the class whose `step` the optimizer has, as subclasses that leave `step` alone; or None."""
    own = inspect.unwrap(type(optimizer).step)
    if isinstance(optimizer, Penalized) and own is inspect.unwrap(Penalized.step):
        first, *others = [_OF_MODES.get(optimizer._mode(group)) for group in optimizer.param_groups]
        return first if all(other is first for other in others) else None
    return next((size for cls, size in STEP_SIZES.items() if own is inspect.unwrap(cls.step)), None)


def is_elementwise(optimizer: Optimizer, metric: str) -> bool:
    """Return whether each element has its own step size, for which `elementwise_inputs` has the numbers."""
    return metric == "optimizer" and isinstance(_step_size_of(optimizer), ElementwiseStepSize)


def step_sizes(optimizer: Optimizer, metric: str) -> list[Strength]:
    """Return the scalar step size of each param group, or its lr. ValueError for invalid options.

    The size is 0 where a fused optimizer found infinite gradients, and so made no step.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    size = _step_size_of(optimizer) if metric == "optimizer" else None
    sizes: list[Strength] = []
    for i, group in enumerate(optimizer.param_groups):
        lr = learning_rate(group, i)
        if isinstance(size, ScalarStepSize):
            lr = times(lr, size.factor(group))
        if found_inf is not None:
            lr = times((found_inf == 0).to(accumulate_dtype(found_inf.device)), lr)
        sizes.append(lr)
    return sizes


def elementwise_inputs(optimizer: Optimizer, work: Work, param_groups: Sequence[int]) -> tuple[Work, StepInputs]:
    """Return the weights in groups of equal settings, and the inputs of ELEMENTWISE_PROX.

    Weight i is in `param_groups[i]`, has made a step, and so has a state.
    """
    size = _step_size_of(optimizer)
    assert isinstance(size, ElementwiseStepSize)
    if type(work.penalty) is not ElasticNetPenalty:
        raise no_formulas(work.penalty, "fastreg/formulas/steps.py")
    states = [optimizer.state[w] for w in work.weights]
    squares: list[Any] = [None] * len(states)
    for number in dict.fromkeys(param_groups):
        places = [i for i, other in enumerate(param_groups) if other == number]
        own = size.squares(optimizer.param_groups[number], [states[i] for i in places])
        for place, square in zip(places, own, strict=True):
            squares[place] = square
    steps = [_on_host(state["step"]) for state in states]
    # Counters on a device are read there, so that nothing waits for it.
    counters = None
    if any(isinstance(step, Tensor) for step in steps):
        placed = zip(steps, work.weights, strict=True)
        counters = [torch.as_tensor(step, dtype=torch.float32, device=w.device) for step, w in placed]
    keys: list[tuple[int, float, Any]] = []
    for i, (number, step) in enumerate(zip(param_groups, steps, strict=True)):
        factor = 1.0 if size.factor is None else size.factor(optimizer.param_groups[number], states[i], step)
        steps_made = step if counters is None else 0.0
        # Factors on a device cannot be compared: each has a group of its own.
        keys.append((number, steps_made, Unequal(factor) if isinstance(factor, Tensor) else factor))
    finer, pairs = work.regrouped(keys)
    rows = [work.penalty.of_group(group).strengths for group, _ in pairs]
    settings = []
    for (_, (number, steps_made, factor)), (l1, l2) in zip(pairs, rows, strict=True):
        options = optimizer.param_groups[number]
        lr = learning_rate(options, number)
        if size.factor is not None:
            lr = times(lr, factor.number if isinstance(factor, Unequal) else factor)
        settings.append(ElementwiseProxSettings(lr, l1, l2, *size.limits(options), steps_made))
    penalty = penalty_of_groups(type(work.penalty), rows, work.weights[0].device)
    found_inf = getattr(optimizer, "found_inf", None)
    inputs = StepInputs(settings, {"square": squares}, counters, found_inf=found_inf)
    return finer._replace(penalty=penalty), inputs


class Unequal:
    """A number on a device, which must not be compared; equal to itself only."""

    def __init__(self, number: Tensor) -> None:
        self.number = number


def _on_host(number: Any) -> Any:
    """Return a number of a state as a float, or as the tensor that it is on a device."""
    return number if isinstance(number, Tensor) and number.device.type != "cpu" else float(number)
