"""`ElasticNet`: the L1 + L2 penalty of parameters that it knows, for use at every step."""

from torch import Tensor

from fastreg.core.checks import Impl
from fastreg.core.penalty import Strength
from fastreg.core.strengths import check_strength
from fastreg.formulas.penalty import ElasticNetPenalty, Penalty
from fastreg.regularizer import Regularizer
from fastreg.selection.filters import Filter
from fastreg.selection.params import Params


class ElasticNet(Regularizer[Penalty]):
    """`elastic_penalty` of the same parameters at every step: names, filters and pointer tables are kept.

    Takes the arguments of `elastic_penalty`. `l1` and `l2` can be assigned at any time; nothing is recompiled.

    The next call notices parameters that were frozen, thawed, moved, converted, replaced or tied, and modules that were
    replaced or added. Lists and group dicts are copied, so later changes of them have no effect.

    `last` is the `Penalty` at the last step of the optimizer that this is attached to, or None before the first step.

    Examples:
        >>> reg = fastreg.ElasticNet(model, l1=1e-5, l2=1e-4, exclude=fastreg.bias_and_norm)
        >>> loss = criterion(model(x), y) + reg()
    """

    __slots__ = ()
    _PENALTY = ElasticNetPenalty

    def __init__(
        self,
        params: Params,
        l1: Strength = 0.0,
        l2: Strength = 0.0,
        *,
        include: Filter = None,
        exclude: Filter = None,
        impl: Impl = None,
    ) -> None:
        super().__init__(params, (l1, l2), include, exclude, impl)

    @classmethod
    def from_alpha(
        cls, params: Params, alpha: float, l1_ratio: float,
        *, include: Filter = None, exclude: Filter = None, impl: Impl = None,
    ) -> "ElasticNet":  # fmt: skip
        """As scikit-learn's ElasticNet (its documentation): l1 = alpha * l1_ratio, l2 = alpha * (1 - l1_ratio) / 2.

        Raises ValueError for alpha < 0 and for l1_ratio outside [0, 1].
        """
        alpha_checked, ratio = check_strength(alpha, "alpha"), check_strength(l1_ratio, "l1_ratio")
        if not isinstance(ratio, Tensor) and ratio > 1:
            raise ValueError(f"l1_ratio must be between 0 and 1, got {ratio}")
        l1, l2 = alpha_checked * ratio, alpha_checked * (1 - ratio) / 2
        return cls(params, l1, l2, include=include, exclude=exclude, impl=impl)

    @property
    def l1(self) -> Strength:
        """Strength of Σ|w| where a group has none of its own: a float, or a 0-dim tensor read on the device."""
        return self._strength(0)

    @l1.setter
    def l1(self, value: Strength) -> None:
        self._assign(0, value)

    @property
    def l2(self) -> Strength:
        """Strength of Σw² where a group has none of its own: a float, or a 0-dim tensor read on the device."""
        return self._strength(1)

    @l2.setter
    def l2(self, value: Strength) -> None:
        self._assign(1, value)
