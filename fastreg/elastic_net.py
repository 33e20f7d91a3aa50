"""`ElasticNet`: a penalty that knows its parameters, for use again and again."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastreg.accumulate import add_gradients
from fastreg.autograd import Call, ElasticPenaltyFunction
from fastreg.ops import sweep, traced_sweep
from fastreg.optim import Attachment
from fastreg.plan import Mode
from fastreg.prox import shrink
from fastreg.selection import Filter, Selection
from fastreg.strengths import UNSCALED, Measure, Scale, Strength, Strengths, accumulate_dtype, check_strength
from fastreg.sweep import check_impl


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

    Parameters that are frozen, thawed, moved, converted, replaced or tied, and modules that are replaced or added, are
    noticed at the next call.

    `last` is the `Penalty` of the last step of an optimizer that this is attached to, or None before that.

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
        self._l1 = check_strength(l1, "l1")
        self._l2 = check_strength(l2, "l2")
        self._impl = impl
        # What can be walked only once is walked here.
        self._params = _repeatable(params)
        self._filters = (include, exclude)
        self._selection = Selection(self._params, include, exclude)
        self._selection.strengths(self._l1, self._l2)
        self._attachment: Attachment | None = None
        self.last: Penalty | None = None
        self._buffers: list[Tensor] = []
        self._published: tuple[Tensor | None, ...] | None = None
        self._publish_strengths()

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
        return self._strength(0)

    @l1.setter
    def l1(self, value: Strength) -> None:
        self._l1 = check_strength(value, "l1")
        self._publish_strengths()

    @property
    def l2(self) -> Strength:
        """Strength of Σw² where a group has none of its own: a float, or a 0-dim tensor read on the device."""
        return self._strength(1)

    @l2.setter
    def l2(self, value: Strength) -> None:
        self._l2 = check_strength(value, "l2")
        self._publish_strengths()

    @overload
    def __call__(self, *, return_terms: Literal[False] = False, reduce: bool = True) -> Tensor: ...
    @overload
    def __call__(self, *, return_terms: Literal[True], reduce: bool = True) -> Penalty: ...
    def __call__(self, *, return_terms: bool = False, reduce: bool = True) -> Tensor | Penalty:
        """The penalty of the weights as they are now; see `elastic_penalty`."""
        weights, groups, strengths = self._current()
        if _is_transformed():
            penalty = _penalty(traced_sweep(weights, groups, Mode.VALUE, strengths, impl="torch"))
        elif torch.compiler.is_compiling():
            penalty = _penalty(traced_sweep(weights, groups, Mode.VALUE, strengths, impl=self._impl))
        elif torch.is_grad_enabled():
            call = Call(groups, self._impl, all_reduce=reduce, terms=return_terms)
            found = ElasticPenaltyFunction.apply(call, *strengths, *weights)
            if not return_terms:
                return found[0]  # type: ignore[no-any-return]
            penalty = Penalty(*found)
        else:
            penalty = _penalty(sweep(weights, groups, Mode.VALUE, strengths, impl=self._impl, all_reduce=reduce))
        return penalty if return_terms else penalty.total

    def add_grad_(self, *, reduce: bool = True) -> Penalty:
        """Adds the penalty's gradient to .grad and returns the penalty; see `add_elastic_grad_`."""
        return self._add_grad(UNSCALED, reduce=reduce)

    def prox_(self, lr: Strength) -> None:
        """Shrinks the weights by the proximal step of size `lr`; see `elastic_prox_`."""
        weights, groups, strengths = self._current()
        steps = [check_strength(lr, "lr")] * len(weights)
        shrink(self._selection.names, weights, groups, strengths, steps, impl=self._impl)

    def attach(self, optimizer: torch.optim.Optimizer, mode: Literal["grad", "prox"] = "grad") -> Attachment:
        """Makes every `optimizer.step()` apply the penalty, once, however many micro-batches went before it.

        The loss then goes without: nothing of the penalty passes through backward.

        Args:
            optimizer: any torch.optim.Optimizer that holds all selected weights; foreach, fused and capturable ones,
                and GradScaler, are provided for.
            mode: "grad" adds the gradient right before the step, after any clipping, which therefore does not see it.
                "prox" applies the proximal step right after it, with the learning rate of each weight's param group
                as it is then, and leaves exact zeros; the optimizer's own steps are unaware of it, so that with Adam
                the threshold is lr * l1 and not scaled as Adam scales its updates.

        Returns:
            A handle with `remove()`. `last` is the `Penalty` of the last step: of the weights that the gradient was
            taken at, or that the proximal step was applied to.

        Raises:
            ValueError: a selected weight that the optimizer does not hold, an unknown mode; maximize=True, in mode
                "grad".
            TypeError: not an optimizer; LBFGS, which needs the penalty in its loss; SparseAdam, in mode "grad".
            RuntimeError: attached already; later, from step(), a closure in mode "grad".
        """
        if self._attachment is not None:
            raise RuntimeError("this ElasticNet is attached already; call .remove() on its handle first")
        attachment = Attachment(
            optimizer, mode, add_grad=self._step_grad, prox=self._step_prox, on_remove=self._forget_attachment
        )
        try:
            self._steps(self._current()[0], {id(p): 0.0 for group in optimizer.param_groups for p in group["params"]})
        except ValueError:
            attachment.remove()
            raise
        self._attachment = attachment
        return attachment

    def __getstate__(self) -> dict[str, Any]:
        # Optimizers leave their hooks behind when they are copied or pickled, and so does this.
        return {**self.__dict__, "_attachment": None}

    def __repr__(self) -> str:
        n_elements = sum(w.numel() for w in self._selection.weights)
        return f"ElasticNet({len(self._selection.weights)} tensors, {n_elements} weights, l1={self.l1}, l2={self.l2})"

    def _add_grad(
        self, scale: Scale, learning_rates: dict[int, Strength] | None = None, reduce: bool = True
    ) -> Penalty:
        weights, groups, strengths = self._current()
        if learning_rates is not None:
            self._steps(weights, learning_rates)  # for its check
        keywords: dict[str, Any] = {"scale": scale, "impl": self._impl, "names": self._selection.names}
        keywords["all_reduce"] = reduce
        return _penalty(add_gradients(weights, groups, strengths, reduce=True, **keywords))

    def _step_grad(self, learning_rates: dict[int, Strength], scale: Scale) -> None:
        self.last = self._add_grad(scale, learning_rates)

    def _step_prox(self, learning_rates: dict[int, Strength]) -> None:
        weights, groups, strengths = self._current()
        steps = self._steps(weights, learning_rates)
        found = shrink(self._selection.names, weights, groups, strengths, steps, reduce=True, impl=self._impl)
        self.last = _penalty(found)

    def _steps(self, weights: list[Tensor], learning_rates: dict[int, Strength]) -> list[Strength]:
        for name, w in zip(self._selection.names, weights, strict=True):
            if id(w) not in learning_rates:
                raise ValueError(f"parameter {name!r} is not in the optimizer, which would never step it; exclude it")
        return [learning_rates[id(w)] for w in weights]

    def _forget_attachment(self, attachment: Attachment) -> None:
        if self._attachment is attachment:
            self._attachment = None

    def _current(self) -> tuple[list[Tensor], list[int], Strengths]:
        """Weights, their groups, and the groups' strengths, as they are now."""
        if not self._selection.is_current():
            self._selection = Selection(self._params, *self._filters)
        return self._selection.weights, self._selection.groups, self._selection.strengths(self.l1, self.l2)

    def _publish_strengths(self) -> None:
        """Leaves both strengths as tensors for compiled code, in which nothing then depends on their values.

        The tensor of a float is written in place from then on, so that a CUDA graph of compiled code follows.
        """
        if torch.compiler.is_compiling():
            # Assigned by the very code that is compiled, which knows the value.
            self._published = None
            return
        if not self._buffers:
            device = self._selection.weights[0].device
            with torch.inference_mode(False):
                self._buffers = [torch.zeros((), dtype=accumulate_dtype(device), device=device) for _ in range(2)]
        for strength, buffer in zip((self._l1, self._l2), self._buffers, strict=True):
            if not isinstance(strength, Tensor):
                buffer.fill_(strength)
        self._published = tuple(s if isinstance(s, Tensor) else None for s in (self._l1, self._l2))

    def _strength(self, which: int) -> Strength:
        """l1 or l2; for a compiler without a look at a float, which it would take for a constant."""
        if self._published is None or not torch.compiler.is_compiling():
            return (self._l1, self._l2)[which]
        given = self._published[which]
        return self._buffers[which].to(self._selection.weights[0].device) if given is None else given


def _penalty(measure: Measure | None) -> Penalty:
    assert measure is not None
    return Penalty(measure.total, measure.l1, measure.l2)


class Once(ElasticNet):
    """For a single call: without what only further calls need."""

    def _publish_strengths(self) -> None:
        pass


def _is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation has to see through the penalty."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


# Asked once, while tracing; torch.compiler.assume_constant_result would say so too, but imports the compiler.
_is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _repeatable(params: Any) -> Any:
    """`params` with every iterator in it replaced by a list."""
    if isinstance(params, Iterator):
        return [_repeatable(item) for item in params]
    if isinstance(params, list):
        return [_repeatable(item) if isinstance(item, Mapping) else item for item in params]
    if isinstance(params, Mapping) and isinstance(params.get("params"), Iterator):
        return {**params, "params": list(params["params"])}
    return params
