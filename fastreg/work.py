"""`Work`: what a sweep works on, the one value that every layer hands down."""

from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple, TypeAlias

from torch import Tensor

from fastreg.layout import Layout
from fastreg.strengths import Strengths

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
