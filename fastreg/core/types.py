"""The types that all rooms share, and `Work`: what a sweep works on, the one value that every layer hands down."""

import array
import enum
from collections.abc import Callable, Sequence
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
    ADAM_PROX = "adam_prox"  # the same with the step sizes of Adam, elementwise; this and the others have an Update
    SGD = "sgd"  # a step of SGD without a momentum buffer
    MOMENTUM = "momentum"  # with one
    ADAM = "adam"  # a step of Adam or AdamW
    AMSGRAD = "amsgrad"  # which also keeps the largest second moment


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
