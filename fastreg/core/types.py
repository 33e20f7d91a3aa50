"""Arguments that each layer passes to the next: `Work`, weights with their penalty, and `Request`, what to do."""

import enum
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from fastreg.core.layout import Layout
from fastreg.core.penalty import BasePenalty, Scale


class Mode(enum.Enum):
    """What a sweep does besides reading the weights; the kernels know the modes by these names."""

    VALUE = "value"  # nothing
    GRADIENT = "gradient"  # writes the gradient
    RESCALE = "rescale"  # `grads` hold the gradient for scale 1: recomputes it unless the scale is 1
    ACCUMULATE = "accumulate"  # adds the gradient to .grad in place
    PROX = "prox"  # replaces w by its proximal step
    # The modes below read StepInputs.
    ELEMENTWISE_PROX = "elementwise_prox"  # a proximal step with a step size for each element
    SGD = "sgd"  # a step of SGD without a momentum buffer
    MOMENTUM = "momentum"  # a step of SGD with a momentum buffer
    ADAM = "adam"  # a step of Adam or AdamW
    AMSGRAD = "amsgrad"  # a step of Adam or AdamW with amsgrad=True


# The modes that read StepInputs, and the states of each: tensors like the weights. Optimizer states
# have torch.optim's names. Sweeps take them in this order; kernels/steps.py has a copy of this table.
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


# The numbers of a strength group, one class for each kind of step. All are floats, or 0-dim tensors that
# the user passed. A kernel reads them as a row of a table: kernels/steps.py has a copy of the order of the fields.


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
    step: StepInputs | None = None  # of the modes in STATES
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
    # If the caller sums the value of sharded weights over ranks: the mesh of each strength group, and their number.
    meshes: Sequence[int] | None = None
    n_meshes: int = 0

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
        meshes = None if self.meshes is None else [self.meshes[group] for group, _ in pairs]
        return self._replace(groups=groups, n_groups=len(pairs), layout=None, meshes=meshes), pairs
