"""Arguments that each layer passes to the next: `Work`, weights with their penalty, and `Request`, what to do."""

import enum
from collections.abc import Callable, Hashable, Sequence
from itertools import compress
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from fastreg.core.layout import Layout
from fastreg.core.penalty import BasePenalty, Scale


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


class Want(enum.IntEnum):
    """The value that a sweep returns. TERMS include the total."""

    NOTHING = 0
    TOTAL = 1
    TERMS = 2


# The strength groups of weights. An int is the group of a whole weight. A range cuts a contiguous weight into as many
# segments of equal size, such as its rows, each with its own group.
Groups: TypeAlias = list[int | range]


class Request(NamedTuple):
    """The task of a sweep."""

    mode: Mode
    want: Want = Want.TERMS  # the value before any change
    # Tensors like the weights. GRADIENT writes them, RESCALE corrects them, ACCUMULATE adds to them, steps read them.
    grads: Sequence[Tensor] | None = None
    scale: Scale = None  # factors on the strengths, read on the device
    step: Update | None = None  # for the modes of optimizers; its states and counters are updated as the weights are
    are_checked: bool = False  # whether the layout's guards match the gradients and states


class Work(NamedTuple):
    """Selected weights with their penalty. `names`, `weights` and `groups` have one entry per weight."""

    names: Sequence[str]
    weights: Sequence[Tensor]
    groups: Groups
    n_groups: int
    penalty: BasePenalty  # with strengths for `n_groups`
    impl: str | None  # "triton", "torch", or None to choose by device
    is_sharded: bool = False  # whether any weight is a DTensor
    is_traced: bool = False  # whether torch.compile or a torch.func transform has to see the computation
    all_reduce: bool = True  # whether to sum the value of sharded weights over all ranks
    is_attached: bool = False  # whether an optimizer applies the same penalty at its steps
    are_leaves: bool | None = None  # whether all weights are leaves; None if unknown
    layout: Layout | None = None  # the layout of the weights, if this call has checked its guards

    def subset(self, is_in: Sequence[bool]) -> "Work":
        """Return a Work with some of the weights. The strength groups stay the same."""
        if all(is_in):
            return self
        names, weights = list(compress(self.names, is_in)), list(compress(self.weights, is_in))
        return self._replace(names=names, weights=weights, groups=list(compress(self.groups, is_in)), layout=None)

    def regrouped(self, keys: Sequence[Hashable]) -> "tuple[Work, list[tuple[int, Any]]]":
        """Return the same weights with one strength group per pair of (group, key), and the list of these pairs.

        The caller must replace the penalty. The layout is dropped, because it depends on the groups.
        """
        pairs: list[tuple[int, Any]] = []
        number_of: dict[Any, int | range] = {}
        groups: Groups = []
        for group, key in zip(self.groups, keys, strict=True):
            number = number_of.get((group, key))
            if number is None:
                first = len(pairs)
                pairs += [(each, key) for each in ([group] if isinstance(group, int) else group)]
                number = number_of[group, key] = first if isinstance(group, int) else range(first, len(pairs))
            groups.append(number)
        return self._replace(groups=groups, n_groups=len(pairs), layout=None), pairs
