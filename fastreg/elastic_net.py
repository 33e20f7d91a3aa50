"""`ElasticNet`: the elastic-net penalty of a model, for use at every step."""

from torch import Tensor

from fastreg.core.checks import Impl
from fastreg.core.penalty import Strength, times
from fastreg.core.strengths import check_strength
from fastreg.formulas.penalty import ElasticNetPenalty, Penalty
from fastreg.regularizer import Regularizer
from fastreg.selection.filters import Filter
from fastreg.selection.params import Params


class ElasticNet(Regularizer[Penalty]):
    """The elastic-net penalty of a model, for use at every step. See `elastic_penalty` for the formulas.

    Names, filters and pointer tables are kept between calls. `l1` and `l2` can be assigned at any time; nothing is
    recompiled. The next call notices parameters that were frozen, thawed, moved, converted, replaced or tied, and
    modules that were replaced or added. Lists and group dicts are copied, so later changes of them have no effect.

    `last` is the `Penalty` at the last step of the attached optimizer, or None before the first step.

    Args:
        params, l1, l2, include, exclude, impl: As in `elastic_penalty`.

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
        """Create an `ElasticNet` with the strengths that scikit-learn's ElasticNet(alpha, l1_ratio) has.

        They are l1 = alpha * l1_ratio and l2 = alpha * (1 - l1_ratio) / 2.

        Args:
            params, include, exclude, impl: As in `elastic_penalty`.
            alpha: The strength of both terms, at least 0.
            l1_ratio: The share of L1, from 0 to 1.

        Raises:
            ValueError: As in `elastic_penalty`, or `alpha` is negative, or `l1_ratio` is outside [0, 1].
            TypeError: As in `elastic_penalty`.
        """
        alpha_checked, ratio = check_strength(alpha, "alpha"), check_strength(l1_ratio, "l1_ratio")
        if not isinstance(ratio, Tensor) and ratio > 1:
            raise ValueError(f"l1_ratio must be between 0 and 1, got {ratio}")
        l1, l2 = times(alpha_checked, ratio), times(alpha_checked, (1 - times(ratio, 1.0)) / 2)
        return cls(params, l1, l2, include=include, exclude=exclude, impl=impl)

    @property
    def l1(self) -> Strength:
        """Strength of Σ|w| for groups without their own: a float, or a 0-dim tensor that is read on the device."""
        return self._strength(0)

    @l1.setter
    def l1(self, value: Strength) -> None:
        self._assign(0, value)

    @property
    def l2(self) -> Strength:
        """Strength of Σw² for groups without their own: a float, or a 0-dim tensor that is read on the device."""
        return self._strength(1)

    @l2.setter
    def l2(self, value: Strength) -> None:
        self._assign(1, value)
