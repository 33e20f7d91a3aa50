"""The public functions: the elastic-net penalty of a whole model, as a loss term, in place, and as a proximal step.

For weights w_t with strengths l1 and l2 (a group's own, or the call's) the penalty, its gradient and its proximal
operator are

    penalty     l1 * Σ_t Σ|w_t|  +  l2 * Σ_t Σ w_t²
    gradient    l1 * sign(w)  +  2 * l2 * w                               with sign(±0) = 0
    prox_lr     sign(w) * max(|w| - lr * l1, 0) / (1 + 2 * lr * l2)

There is no factor ½: l2 multiplies the plain sum of squares, as in Keras. So l2 acts as weight_decay = 2 * l2 does in
torch.optim.SGD, and scikit-learn's ElasticNet(alpha, l1_ratio) has l1 = alpha * l1_ratio and
l2 = alpha * (1 - l1_ratio) / 2.
The proximal operator is the closed form in Parikh and Boyd, Proximal Algorithms (2014), section 6.5.3.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastreg.autograd import Call, ElasticPenaltyFunction
from fastreg.plan import Mode
from fastreg.selection import Filter, Selection
from fastreg.strengths import Strength, check_strength
from fastreg.sweep import check_impl, sweep


class Penalty(NamedTuple):
    """A penalty and its parts: 0-dim tensors, float32 (float64 if any weight is), on the first weight's device.

    `l1` and `l2` are the weighted terms, as they enter the loss: they sum to `total`.
    """

    total: Tensor
    l1: Tensor
    l2: Tensor


class ElasticNet:
    """`elastic_penalty` for the same parameters again and again: names, filters and pointer tables are kept.

    Args: as `elastic_penalty`. `l1` and `l2` may be assigned at any time, by a schedule for instance; nothing is
    recompiled and nothing waits for the device.

    A parameter that is frozen, thawed, moved, converted or replaced in its module is noticed at the next call. Modules
    added later are not: make a new ElasticNet then.

    Example:
        >>> reg = fastreg.ElasticNet(model, l1=1e-5, l2=1e-4, exclude=fastreg.bias_and_norm)
        >>> loss = criterion(model(x), y) + reg()
    """

    def __init__(
        self,
        params: Any,
        l1: Strength = 0.0,
        l2: Strength = 0.0,
        *,
        include: Filter = None,
        exclude: Filter = None,
        impl: Literal["triton", "torch"] | None = None,
    ) -> None:
        check_impl(impl)
        self.l1 = l1
        self.l2 = l2
        self._impl = impl
        # What can be walked only once is walked here.
        self._params = _repeatable(params)
        self._filters = (include, exclude)
        self._selection = Selection(self._params, include, exclude)
        self._selection.strengths(self._l1, self._l2)

    @classmethod
    def from_alpha(cls, params: Any, alpha: float, l1_ratio: float, **keywords: Any) -> "ElasticNet":
        """The same in scikit-learn's parametrisation: l1 = alpha * l1_ratio, l2 = alpha * (1 - l1_ratio) / 2.

        Source: the objective in the documentation of sklearn.linear_model.ElasticNet.

        Raises:
            ValueError: negative or infinite alpha, or l1_ratio outside [0, 1].
        """
        alpha_checked, ratio = check_strength(alpha, "alpha"), check_strength(l1_ratio, "l1_ratio")
        if not isinstance(ratio, Tensor) and ratio > 1:
            raise ValueError(f"l1_ratio must be between 0 and 1, got {ratio}")
        return cls(params, alpha_checked * ratio, alpha_checked * (1 - ratio) / 2, **keywords)

    @property
    def l1(self) -> Strength:
        """Strength of Σ|w| where a group has none of its own: a float, or a 0-dim tensor read on the device."""
        return self._l1

    @l1.setter
    def l1(self, value: Strength) -> None:
        self._l1 = check_strength(value, "l1")

    @property
    def l2(self) -> Strength:
        """Strength of Σw² where a group has none of its own: a float, or a 0-dim tensor read on the device."""
        return self._l2

    @l2.setter
    def l2(self, value: Strength) -> None:
        self._l2 = check_strength(value, "l2")

    @overload
    def __call__(self, *, return_terms: Literal[False] = False) -> Tensor: ...
    @overload
    def __call__(self, *, return_terms: Literal[True]) -> Penalty: ...
    def __call__(self, *, return_terms: bool = False) -> Tensor | Penalty:
        """The penalty of the weights as they are now; see `elastic_penalty`."""
        selection = self._current()
        strengths = selection.strengths(self._l1, self._l2)
        call = Call(selection.groups, self._impl)
        needs_graph = torch.is_grad_enabled()
        if needs_graph:
            found = ElasticPenaltyFunction.apply(call, *strengths, *selection.weights)
            penalty = Penalty(*found)
        else:
            measure = sweep(selection.weights, selection.groups, Mode.VALUE, strengths, impl=self._impl)
            assert measure is not None
            penalty = Penalty(*measure[:3])
        return penalty if return_terms else penalty.total

    def __repr__(self) -> str:
        n_elements = sum(w.numel() for w in self._selection.weights)
        return f"ElasticNet({len(self._selection.weights)} tensors, {n_elements} weights, l1={self.l1}, l2={self.l2})"

    def _current(self) -> Selection:
        if not self._selection.is_current():
            self._selection = Selection(self._params, *self._filters)
        return self._selection


@overload
def elastic_penalty(
    params: Any,
    l1: Strength = 0.0,
    l2: Strength = 0.0,
    *,
    include: Filter = None,
    exclude: Filter = None,
    return_terms: Literal[False] = False,
    impl: Literal["triton", "torch"] | None = None,
) -> Tensor: ...
@overload
def elastic_penalty(
    params: Any,
    l1: Strength = 0.0,
    l2: Strength = 0.0,
    *,
    include: Filter = None,
    exclude: Filter = None,
    return_terms: Literal[True],
    impl: Literal["triton", "torch"] | None = None,
) -> Penalty: ...
def elastic_penalty(
    params: Any,
    l1: Strength = 0.0,
    l2: Strength = 0.0,
    *,
    include: Filter = None,
    exclude: Filter = None,
    return_terms: bool = False,
    impl: Literal["triton", "torch"] | None = None,
) -> Tensor | Penalty:
    """The L1 + L2 penalty of all weights, l1 * Σ|w| + l2 * Σw², to add to a loss.

    The same number as `l1 * torch.cat([p.flatten() for p in params]).abs().sum() + l2 * (the same).square().sum()`, in
    one pass over the weights and without copying them. Formulas and conventions: the docstring of fastreg.penalty.

    Args:
        params: an nn.Module, a tensor, an iterable of tensors or of (name, tensor) pairs, or a list of group dicts as
            optimizers take them, `{"params": <any of these>, "l1": ..., "l2": ...}`; a strength that a group leaves out
            is the call's. Weights are float64, float32, bfloat16 or float16, mixed as you like, of any shape and
            strides. Tied weights count once; frozen ones (requires_grad=False) not at all, unless everything passed is
            a plain tensor without gradients: then all count, and the value is not differentiable in them.
        l1, l2: floats, or 0-dim floating-point tensors on the weights' device, which are read there and may require
            gradients themselves. A tensor's value is not checked: that would mean waiting for the device.
        include, exclude: which parameters count: a regular expression searched in the name, or a callable
            (name, param) -> bool. exclude wins. `bias_and_norm` is a ready one for `exclude`.
        return_terms: return the `Penalty` (total, l1, l2) instead of the total alone.
        impl: "triton" or "torch" to force an implementation; None takes Triton for CUDA and ROCm tensors where it is
            installed, else PyTorch.

    Returns:
        A 0-dim tensor, float32 (float64 if any weight is), on the first weight's device; or a `Penalty` of three.

    Raises:
        ValueError: a negative, NaN or infinite strength, a strength that is not 0-dim or on another device, nothing
            selected, a weight in two groups.
        TypeError: integer, complex, sparse, quantized or meta weights, arguments of another kind.
        RuntimeError: impl="triton" where it cannot run.

    Example:
        >>> loss = criterion(model(x), y) + fastreg.elastic_penalty(model, l1=1e-5, l2=1e-4)
    """
    reg = ElasticNet(params, l1, l2, include=include, exclude=exclude, impl=impl)
    return reg(return_terms=True) if return_terms else reg()


def _repeatable(params: Any) -> Any:
    """`params` with every iterator in it replaced by a list."""
    if isinstance(params, Iterator):
        return [_repeatable(item) for item in params]
    if isinstance(params, list):
        return [_repeatable(item) if isinstance(item, Mapping) else item for item in params]
    if isinstance(params, Mapping) and isinstance(params.get("params"), Iterator):
        return {**params, "params": list(params["params"])}
    return params
