"""What the library asks of a penalty. The mathematics of each penalty is in `formulas`, `blocks` and `kernels`."""

import abc
import array
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor

from fastreg.core.dtypes import accumulate_dtype, value_dtype

Strength: TypeAlias = float | Tensor
# A factor on each strength of a penalty, floats or 0-dim tensors: upstream gradients, a loss scale, a learning rate.
# None stands for factors of 1.
Scale: TypeAlias = tuple[Strength, ...] | None


class Measure(NamedTuple):
    """The value that a sweep computed."""

    total: Tensor
    terms: tuple[Tensor, ...] | None  # the weighted terms, one per strength; None where only the total was wanted
    memory: "Tensor | array.array[float]"  # float64: the sums of each group, then whatever a backend keeps with them

    def sums(self, n_groups: int) -> Tensor:
        """The unweighted sums of each group, float64 [n_groups, n_sums]."""
        if not isinstance(self.memory, Tensor):
            # The quickest way from floats to a tensor, which then owns their memory.
            return torch.frombuffer(self.memory, dtype=torch.float64).view(n_groups, -1)
        return self.memory[:n_groups] if len(self.memory) > n_groups else self.memory


class BasePenalty(abc.ABC):
    """A penalty: its strengths, and what a sweep measures, forms and applies.

    With one group each strength is a float or a 0-dim tensor; with more groups it is a tensor [n_groups] on the
    weights' device. The methods for weights are for a penalty of one group, as `of_group` returns it.
    """

    NAMES: ClassVar[tuple[str, ...]]  # of the strengths and of their terms
    RESULT: ClassVar[Any]  # the NamedTuple that users get: the total, then a term for each strength

    def __init__(self, strengths: Sequence[Strength]) -> None:
        self.strengths = strengths

    def of_group(self, group: int, scale: Scale = None) -> Self:
        """The penalty with the strengths of one group, times `scale` in float64."""
        factors = (1.0,) * len(self.strengths) if scale is None else scale
        return type(self)([_product(s, group, f) for s, f in zip(self.strengths, factors, strict=True)])

    def on(self, device: torch.device) -> Self:
        """The same penalty with strengths that are readable from `device`."""
        return type(self)(moved(self.strengths, device) or ())

    def result(self, measured: Measure | None) -> Any:
        """The value as users see it, from a measure with terms."""
        if measured is None or measured.terms is None:
            raise RuntimeError("the sweep was not asked for the terms of the penalty")
        return self.RESULT(measured.total, *measured.terms)

    @abc.abstractmethod
    def sums(self, w: Tensor) -> tuple[Tensor, ...]:
        """What a sweep measures of `w`: 0-dim tensors, float64."""

    @abc.abstractmethod
    def gradient(self, w: Tensor) -> Tensor:
        """The gradient in `w`, rounded once to its dtype."""

    @abc.abstractmethod
    def prox(self, w: Tensor) -> Tensor:
        """The proximal map of `w`, for strengths that carry the step size."""

    @abc.abstractmethod
    def weighted(self, sums: Tensor, dtype: torch.dtype) -> Measure:
        """The terms of `sums` [n_groups, n_sums] times the strengths of the groups, and their total, in `dtype`."""


def moved(strengths: Any, device: torch.device) -> Scale:
    """Strengths or a scale, readable from `device`."""
    if strengths is None:
        return None
    return tuple(s.to(device, non_blocking=True) if isinstance(s, Tensor) else s for s in strengths)


def _product(strength: Any, group: int, factor: Strength) -> Strength:
    if isinstance(strength, Tensor) and strength.ndim:
        strength = strength[group]
    one, other = (f.to(accumulate_dtype(f.device)) if isinstance(f, Tensor) else f for f in (strength, factor))
    return one * other


def add_results(results: Sequence[Any]) -> Any:
    """The sum of several results of one kind, such as `Penalty`, on the device of the first."""
    if len(results) == 1:
        return results[0]
    device, dtype = results[0].total.device, value_dtype([each.total.dtype for each in results])
    wide = [[x.to(device, accumulate_dtype(device)) for x in column] for column in zip(*results, strict=True)]
    return type(results[0])(*(torch.stack(column).sum().to(dtype) for column in wide))
