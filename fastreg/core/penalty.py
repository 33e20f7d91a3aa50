"""Base class of penalties. The formulas of each penalty are in `formulas`, `blocks` and `kernels`."""

import abc
import array
import functools
import operator
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor

from fastreg.core.dtypes import accumulate_dtype, value_dtype

Strength: TypeAlias = float | Tensor
# A factor for each strength of a penalty, floats or 0-dim tensors: upstream gradients, a loss scale or a learning rate.
# None means factors of 1.
Scale: TypeAlias = tuple[Strength, ...] | None


class Measure(NamedTuple):
    """Value of a penalty as a sweep computes it."""

    total: Tensor
    terms: tuple[Tensor, ...] | None  # the weighted terms, one per strength; None if only the total was wanted
    memory: "Tensor | array.array[float]"  # float64: the sums of each group; more rows are scratch of the backend

    def sums(self, n_groups: int) -> Tensor:
        """Return the unweighted sums of each group, float64 [n_groups, n_sums]."""
        if not isinstance(self.memory, Tensor):
            # The fastest conversion. The tensor keeps the array alive.
            return torch.frombuffer(self.memory, dtype=torch.float64).view(n_groups, -1)
        return self.memory[:n_groups] if len(self.memory) > n_groups else self.memory


class BasePenalty(abc.ABC):
    """A penalty, Σ strength_i * sum_i: its strengths, sums, gradient and proximal operator.

    With one group, each strength is a float or a 0-dim tensor. With more groups, it is a tensor [n_groups] on the
    weights' device. The methods that take a weight require a penalty of one group, as `of_group` returns.
    """

    NAMES: ClassVar[tuple[str, ...]]  # names of the strengths and of their terms
    RESULT: ClassVar[Any]  # the public NamedTuple: `total`, then one term per strength, with the names in NAMES

    def __init__(self, strengths: Sequence[Strength]) -> None:
        self.strengths = strengths

    def of_group(self, group: int, scale: Scale = None) -> Self:
        """Return the penalty with the strengths of one group, multiplied by `scale` in float64."""
        factors = (1.0,) * len(self.strengths) if scale is None else scale
        return type(self)([_product(s, group, f) for s, f in zip(self.strengths, factors, strict=True)])

    def on(self, device: torch.device) -> Self:
        """Return the penalty with its tensor strengths on `device`."""
        return type(self)(moved(self.strengths, device) or ())

    def result(self, measured: Measure | None) -> Any:
        """Convert a measure with terms to the public NamedTuple."""
        if measured is None or measured.terms is None:
            raise RuntimeError("the sweep did not compute the terms of the penalty; request Want.TERMS")
        return self.RESULT(measured.total, *measured.terms)

    @abc.abstractmethod
    def sums(self, w: Tensor) -> tuple[Tensor, ...]:
        """Return the unweighted sums of `w`, one per strength: 0-dim tensors, float64."""

    @abc.abstractmethod
    def gradient(self, w: Tensor) -> Tensor:
        """Return the gradient with respect to `w`, rounded once to its dtype."""

    @abc.abstractmethod
    def prox(self, w: Tensor) -> Tensor:
        """Return the proximal operator of `w`. The strengths include the step size."""

    def weighted(self, sums: Tensor, dtype: torch.dtype) -> Measure:
        """Return the weighted terms of `sums` [n_groups, n_strengths] and their total, each rounded once to `dtype`."""
        terms = [(s * sums[:, i]).sum() for i, s in enumerate(self.strengths)]
        return Measure(functools.reduce(operator.add, terms).to(dtype), tuple(term.to(dtype) for term in terms), sums)


def moved(strengths: Any, device: torch.device) -> Scale:
    """Return strengths or a scale with its tensors on `device`."""
    if strengths is None:
        return None
    return tuple(s.to(device, non_blocking=True) if isinstance(s, Tensor) else s for s in strengths)


def _product(strength: Any, group: int, factor: Strength) -> Strength:
    if isinstance(strength, Tensor) and strength.ndim:
        strength = strength[group]
    return times(strength, factor)


def times(strength: Strength, factor: Strength) -> Strength:
    """Return the product, in float64: the dtype of a tensor may be narrower than the weights' arithmetic."""
    one, other = (f.to(accumulate_dtype(f.device)) if isinstance(f, Tensor) else f for f in (strength, factor))
    return one * other


def add_results(results: Sequence[Any]) -> Any:
    """Return the sum of results of one class, such as `Penalty`, on the device of the first."""
    if len(results) == 1:
        return results[0]
    device, dtype = results[0].total.device, value_dtype([each.total.dtype for each in results])
    wide = [[x.to(device, accumulate_dtype(device)) for x in column] for column in zip(*results, strict=True)]
    return type(results[0])(*(torch.stack(column).sum().to(dtype) for column in wide))
