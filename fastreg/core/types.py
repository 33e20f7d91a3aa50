"""The types that all rooms share, and `Work`: what a sweep works on, the one value that every layer hands down."""

import array
import enum
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastreg.core.dtypes import accumulate_dtype, value_dtype
from fastreg.core.layout import Layout


class Mode(enum.Enum):
    """What a sweep does besides reading the weights; the kernels know the modes by these names."""

    VALUE = "value"  # nothing
    GRADIENT = "gradient"  # writes the gradient
    RESCALE = "rescale"  # `grads` hold the gradient for scale 1: writes it anew, or leaves it if the scale is 1
    ACCUMULATE = "accumulate"  # adds the gradient to .grad in place
    PROX = "prox"  # replaces w by its proximal step
    # The modes below read StepInputs.
    ELEMENTWISE_PROX = "elementwise_prox"  # a proximal step with a step size for each element
    SGD = "sgd"  # a step of SGD without a momentum buffer
    MOMENTUM = "momentum"  # a step of SGD with a momentum buffer
    ADAM = "adam"  # a step of Adam or AdamW
    AMSGRAD = "amsgrad"  # a step of Adam or AdamW with amsgrad=True


# The modes that read StepInputs, and the states of each: tensors like the weights. Those of an optimizer's whole step
# have their names in torch.optim. Sweeps take them in this order; kernels/steps.py has a copy of this table.
STATES: dict[Mode, tuple[str, ...]] = {
    Mode.SGD: (),
    Mode.MOMENTUM: ("momentum_buffer",),
    Mode.ADAM: ("exp_avg", "exp_avg_sq"),
    Mode.AMSGRAD: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    Mode.ELEMENTWISE_PROX: ("square",),
}
# The modes that count steps: each weight has a counter, which the sweep increments.
COUNTING = (Mode.ADAM, Mode.AMSGRAD)
# The modes that make an optimizer's whole step: they read gradients and write their states.
STEPS = tuple(mode for mode in STATES if mode is not Mode.ELEMENTWISE_PROX)


def states_of(mode: Mode) -> tuple[str, ...]:
    """Return the names of the states of `mode`; ValueError for a mode that has no entry in STATES."""
    names = STATES.get(mode)
    if names is None:
        raise ValueError(f"{mode} is not a step: fastreg.core.types.STATES has no entry for it")
    return names


Strength: TypeAlias = float | Tensor


class Scale(NamedTuple):
    """Factors on the strengths, floats or 0-dim tensors: upstream gradients, a loss scale, a learning rate."""

    l1: Strength = 1.0
    l2: Strength = 1.0

    def on(self, device: torch.device) -> "Scale":
        """The same scale, readable from `device`."""
        return Scale(*(_moved(s, device) for s in self))


UNSCALED = Scale()


class Strengths(NamedTuple):
    """With one group a float or a 0-dim tensor each; with more a tensor [n_groups] each, on the weights' device."""

    l1: Strength
    l2: Strength

    def of_group(self, group: int, scale: Scale = UNSCALED) -> tuple[Strength, Strength]:
        """The pair for one group, scaled in float64."""
        return _product(self.l1, group, scale.l1), _product(self.l2, group, scale.l2)

    def on(self, device: torch.device) -> "Strengths":
        """The same strengths, readable from `device`."""
        return Strengths(*(_moved(s, device) for s in self))


def _moved(strength: Strength, device: torch.device) -> Strength:
    return strength.to(device, non_blocking=True) if isinstance(strength, Tensor) else strength


def _product(strength: Any, group: int, factor: Strength) -> Strength:
    # The PyTorch path has the strengths of groups as a list of floats.
    if isinstance(strength, list) or (isinstance(strength, Tensor) and strength.ndim):
        strength = strength[group]
    one, other = (f.to(accumulate_dtype(f.device)) if isinstance(f, Tensor) else f for f in (strength, factor))
    return one * other


# The numbers of a strength group, one class for each kind of step. All are floats, or 0-dim tensors where users pass
# some. A kernel reads them as a row of a table: kernels/steps.py has a copy of the order of the fields.


class SGDSettings(NamedTuple):
    """Numbers of SGD and MOMENTUM. The first seven fields are those of every optimizer's whole step."""

    lr: Any
    weight_decay: Any = 0.0
    is_decoupled: float = 0.0  # 1 where weight decay multiplies the weight, as AdamW does, and is not in the gradient
    l1: Any = 0.0  # strengths of the penalty whose gradient is added to the data's
    l2: Any = 0.0
    prox_l1: Any = 0.0  # strengths of the proximal step, which are multiplied by the step size t
    prox_l2: Any = 0.0
    momentum: Any = 0.0
    dampening: Any = 0.0
    nesterov: float = 0.0  # 1 for Nesterov's momentum


class AdamSettings(NamedTuple):
    """Numbers of ADAM and AMSGRAD."""

    lr: Any
    weight_decay: Any = 0.0
    is_decoupled: float = 0.0
    l1: Any = 0.0
    l2: Any = 0.0
    prox_l1: Any = 0.0
    prox_l2: Any = 0.0
    beta1: Any = 0.9
    beta2: Any = 0.999
    eps: Any = 1e-8
    reach: float = 2.0  # the proximal step moves no element further than lr * reach


class ElementwiseProxSettings(NamedTuple):
    """Numbers of ELEMENTWISE_PROX, whose step size is t = lr / (sqrt(square / (1 - beta2^steps)) + eps)."""

    lr: Any
    prox_l1: Any = 0.0
    prox_l2: Any = 0.0
    beta2: Any = 0.0  # 0 for a square without bias correction
    eps: Any = 1e-8
    reach: Any = 2.0  # no element moves further than lr * reach
    steps_made: float = 0.0  # the number of steps, to which the weight's counter is added if there is one


Settings: TypeAlias = SGDSettings | AdamSettings | ElementwiseProxSettings


class StepInputs(NamedTuple):
    """What the modes of STATES read: settings for each strength group, and tensors for each weight."""

    settings: Sequence[Settings]
    states: Mapping[str, Sequence[Tensor]]  # by name, in the order of STATES
    steps: Sequence[Tensor] | None = None  # 0-dim float32 counters; the modes of COUNTING increment them
    grad_scale: Tensor | None = None  # the factor that the gradients carry
    found_inf: Tensor | None = None  # where this is not 0, nothing is changed

    def mapped(self, f: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> "StepInputs":
        """Return the same inputs with `f` applied to each list of states."""
        return self._replace(states={name: f(tensors) for name, tensors in self.states.items()})

    def tensors(self) -> list[Tensor]:
        """Return all states, one list after the other."""
        return [t for tensors in self.states.values() for t in tensors]


class Penalty(NamedTuple):
    """A penalty and its parts: 0-dim tensors, float32 (float64 if any weight is), on the first weight's device.

    `l1` and `l2` are the weighted terms, as they enter the loss: they sum to `total`.
    """

    total: Tensor
    l1: Tensor
    l2: Tensor


class Measure(NamedTuple):
    """The value that a sweep found."""

    total: Tensor
    terms: tuple[Tensor, Tensor] | None  # the weighted l1 and l2 terms; None where only the total was asked for
    memory: "Tensor | array.array[float]"  # what `sums` are read from: float64, pairs, those of the groups first

    @property
    def penalty(self) -> Penalty:
        """The value as users see it, of a measure with terms."""
        assert self.terms is not None
        return Penalty(self.total, *self.terms)

    def sums(self, n_groups: int) -> Tensor:
        """Σ|w| and Σw² of each strength group, float64 [n_groups, 2]."""
        if not isinstance(self.memory, Tensor):
            # The quickest way from floats to a tensor, which then owns their memory.
            return torch.frombuffer(self.memory, dtype=torch.float64).view(-1, 2)
        return self.memory[:n_groups] if len(self.memory) > n_groups else self.memory


def together(one: Measure, other: Measure) -> Measure:
    """The value of two lists of weights; not the sums."""
    parts = zip(one.penalty, other.penalty, strict=True)
    total, l1_term, l2_term = (a.double() + b.to(a.device) for a, b in parts)
    dtype = value_dtype([one.total.dtype, other.total.dtype])
    return Measure(total.to(dtype), (l1_term.to(dtype), l2_term.to(dtype)), torch.empty(0))


Grads: TypeAlias = Sequence[Tensor] | None  # one for each weight


class Work(NamedTuple):
    """Selected weights with their strengths; `names`, `weights` and `groups` have one entry per weight."""

    names: Sequence[str]
    weights: Sequence[Tensor]
    groups: list[int]  # the strength group of each weight
    n_groups: int
    strengths: Strengths
    impl: str | None  # "triton", "torch", or None for the best there is
    is_sharded: bool = False  # whether any weight is a DTensor
    all_reduce: bool = True  # whether their value is to be that of all ranks
    is_attached: bool = False  # whether an optimizer applies the same penalty at its steps
    are_leaves: bool | None = None  # whether all weights are leaves of the graph, if that is known
    layout: Layout | None = None  # of the weights, where this call has found that it still holds

    def subset(self, is_in: Sequence[bool]) -> "Work":
        """Some of the weights; the strength groups stay the same."""
        names, weights = list(compress(self.names, is_in)), list(compress(self.weights, is_in))
        return self._replace(names=names, weights=weights, groups=list(compress(self.groups, is_in)), layout=None)

    def regrouped(self, groups: list[int], n_groups: int, strengths: Strengths) -> "Work":
        """The same weights in other strength groups, of which no layout is known: a layout has groups in it."""
        return self._replace(groups=groups, n_groups=n_groups, strengths=strengths, layout=None)
