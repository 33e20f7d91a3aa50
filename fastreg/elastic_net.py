"""`ElasticNet`: a penalty that knows its parameters, for use again and again."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastreg.autograd.function import penalty_of
from fastreg.core.checks import Impl, check_impl, check_reduce
from fastreg.core.dtypes import accumulate_dtype
from fastreg.core.strengths import check_strength
from fastreg.core.torch_private import is_transformed
from fastreg.core.types import Measure, Penalty, Strength, Work
from fastreg.optim.attachment import Attachment
from fastreg.selection.filters import Filter
from fastreg.selection.params import Params, copied
from fastreg.selection.selection import Selection
from fastreg.sparsity import summary_of
from fastreg.sweep.gradient import add_gradient
from fastreg.sweep.prox import apply_prox


class ElasticNet:
    """`elastic_penalty` for the same parameters again and again: names, filters and pointer tables are kept.

    Takes the arguments of `elastic_penalty`. `l1` and `l2` may be assigned at any time: nothing is recompiled.

    Parameters that are frozen, thawed, moved, converted, replaced or tied, and modules that are replaced or added, are
    noticed at the next call. Lists and group dicts are copied: what is changed in them later is not seen.

    `last` is the `Penalty` of the last step of an optimizer that this is attached to, or None before that.

    Examples:
        >>> reg = fastreg.ElasticNet(model, l1=1e-5, l2=1e-4, exclude=fastreg.bias_and_norm)
        >>> loss = criterion(model(x), y) + reg()
    """

    # No other attributes: a misspelt `reg.lambda1 = 0.1` would be no strength.
    __slots__ = (
        "__weakref__",
        "_attachment",
        "_buffers",
        "_filters",
        "_for_compilers",
        "_impl",
        "_params",
        "_selection",
        "_strengths",
        "_work",
        "last",
    )  # fmt: skip

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
        check_impl(impl)
        self._strengths: list[Strength] = [check_strength(l1, "l1"), check_strength(l2, "l2")]
        self._impl = impl
        self._params = copied(params)
        self._filters = (include, exclude)
        self._selection = Selection(self._params, include, exclude)
        weights = self._selection.candidates.tensors
        self._selection.work(weights, self._strengths[0], self._strengths[1], impl)  # checks the strengths' devices
        self._work: Work | None = None
        self._attachment: Attachment | None = None
        self.last: Penalty | None = None
        self._buffers: list[Tensor] = []
        self._for_compilers: list[Tensor] | None = None
        self._store_for_compilers()

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
        self._assign(0, check_strength(value, "l1"))

    @property
    def l2(self) -> Strength:
        """Strength of Σw² where a group has none of its own: a float, or a 0-dim tensor read on the device."""
        return self._strength(1)

    @l2.setter
    def l2(self, value: Strength) -> None:
        self._assign(1, check_strength(value, "l2"))

    @overload
    def __call__(self, *, return_terms: Literal[False] = False, reduce: bool = True) -> Tensor: ...
    @overload
    def __call__(self, *, return_terms: Literal[True], reduce: bool = True) -> Penalty: ...
    @overload
    def __call__(self, *, return_terms: bool, reduce: bool = True) -> Tensor | Penalty: ...
    def __call__(self, *, return_terms: bool = False, reduce: bool = True) -> Tensor | Penalty:
        """The penalty of the weights as they are now; see `elastic_penalty`."""
        work = self._current()
        if reduce is not True:
            check_reduce(reduce)
            work = work._replace(all_reduce=False)
        if self._attachment is not None and self._attachment.is_active:
            work = work._replace(is_attached=True)
        return penalty_of(work, return_terms)

    def add_grad_(self, *, reduce: bool = True) -> Penalty:
        """Adds the penalty's gradient to .grad and returns the penalty; see `add_elastic_grad_`."""
        work = self._current()
        if reduce is not True:
            check_reduce(reduce)
            work = work._replace(all_reduce=False)
        with torch.no_grad():
            return _penalty(add_gradient(work))

    def prox_(self, lr: Strength) -> None:
        """Shrinks the weights by the proximal step of size `lr`; see `elastic_prox_`."""
        step = check_strength(lr, "lr")
        with torch.no_grad():
            apply_prox(self._current(), [step])

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        mode: Literal["grad", "prox"] = "grad",
        *,
        metric: Literal["optimizer", "lr"] | None = None,
    ) -> Attachment:
        """Makes every `optimizer.step()` apply the penalty, once, however many micro-batches went before it.

        The loss then goes without: nothing of the penalty passes through backward.

        Args:
            optimizer: any torch.optim.Optimizer that holds all selected weights; foreach, fused and capturable ones
                and GradScaler are supported. Of a wrapper such as Accelerate's the optimizer inside is used.
            mode: "grad" adds the gradient right before the step, of step(closure) when the closure is done: after any
                clipping, which therefore does not see it.
                "prox" shrinks the weights right after the step, so that those which do not pay for themselves become
                exactly zero.
            metric: the size of that proximal step. "optimizer", the default, is the optimizer's own step per unit of
                gradient, with which training ends at the minimum of loss + penalty (the formulas are in
                fastreg.optim): of torch.optim's and fastreg.optim's SGD, Adam and AdamW. Parameters without a gradient
                make no step and are not shrunk. "lr" takes the learning rate of the param group, for any optimizer and
                all parameters: a shrinkage decoupled from the optimizer, as AdamW's weight decay is, which for
                momentum and Adam is another and mostly weaker penalty.

        Returns: a handle with `remove()`. `last` is the `Penalty` at each step from now on.

        Raises:
            ValueError: a selected weight that the optimizer does not hold, an unknown mode; maximize=True or a metric,
                in mode "grad"; in mode "prox", also later from step(), a param group without lr or with a negative one,
                an optimizer whose steps are not known, momentum from 1 on, or one that keeps copies of the weights.
            TypeError: not an optimizer; LBFGS, which needs the penalty in its loss; SparseAdam, in mode "grad".
            RuntimeError: attached already; later, from step(), a closure that is not called once, in mode "grad".

        Warns:
            UserWarning: another penalty of the same weights is attached to the optimizer; later, from backward, this
                one is part of a loss as well.
        """
        if self._attachment is not None and self._attachment.is_active:
            raise RuntimeError("this ElasticNet is attached already; call .remove() on its handle first")
        self._attachment = Attachment(optimizer, mode, metric, self._current, self._record_last)
        return self._attachment

    def summary(self) -> str:
        """A table of the weights with their strengths and exact zeros, and what is left out. Waits for the device."""
        return summary_of(self._current(), self._params, self._filters[1])

    def __getstate__(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        # Optimizers leave their hooks behind when they are copied or pickled, and so does this.
        names = [n for cls in type(self).__mro__ for n in getattr(cls, "__slots__", ()) if hasattr(self, n)]
        kept: dict[str, Any] = {name: getattr(self, name) for name in names if name != "__weakref__"}
        kept |= {"_attachment": None, "_work": None, "_strengths": [*self._strengths], "_buffers": []}
        return getattr(self, "__dict__", None), kept

    def __setstate__(self, state: tuple[dict[str, Any] | None, dict[str, Any]]) -> None:
        for name, value in {**(state[0] or {}), **state[1]}.items():
            setattr(self, name, value)
        self._store_for_compilers()  # in buffers of its own

    def __repr__(self) -> str:
        weights = self._selection.weights
        l1, l2 = ("tensor" if isinstance(s, Tensor) else s for s in self._strengths)
        return f"ElasticNet({len(weights)} tensors, {sum(w.numel() for w in weights)} weights, l1={l1}, l2={l2})"

    def _record_last(self, measured: Measure | None) -> None:
        self.last = _penalty(measured)

    def _current(self) -> Work:
        """The weights with their groups and strengths, as they are now."""
        is_traced = torch.compiler.is_compiling() or is_transformed()
        tensors = self._selection.current(self._params, is_traced)
        if tensors is None:
            self._selection, self._work = Selection(self._params, *self._filters), None
            tensors = self._selection.candidates.tensors
        # Not under torch.compile: the kept work holds floats, which would be compiled in as constants.
        work = None if is_traced else self._work
        if work is not None and work.layout is self._selection.layout:  # or both have none, as of sharded weights
            return work
        l1, l2 = self.l1, self.l2
        work = self._selection.work(tensors, l1, l2, self._impl, is_traced=is_traced)
        if not is_traced and self._selection.work_can_be_kept(l1, l2):
            self._work = work
        return work

    def _assign(self, which: int, strength: Strength) -> None:
        self._strengths[which] = strength
        self._work = None
        self._store_for_compilers()

    def _store_for_compilers(self) -> None:
        """Leaves both strengths as tensors for compiled code: for floats in buffers that are written in place."""
        if torch.compiler.is_compiling():
            self._for_compilers = None  # assigned by the very code that is compiled, which knows the value
            return
        if not self._buffers:
            device = self._selection.weights[0].device
            with torch.inference_mode(False):
                self._buffers = [torch.zeros((), dtype=accumulate_dtype(device), device=device) for _ in range(2)]
        pairs = list(zip(self._strengths, self._buffers, strict=True))
        self._for_compilers = [s if isinstance(s, Tensor) else buffer.fill_(s) for s, buffer in pairs]

    def _strength(self, which: int) -> Strength:
        """l1 or l2; for a compiler without a look at a float, which it would take for a constant."""
        if self._for_compilers is None or not torch.compiler.is_compiling():
            return self._strengths[which]
        return self._for_compilers[which].to(self._selection.weights[0].device)


def _penalty(measured: Measure | None) -> Penalty:
    assert measured is not None
    return measured.penalty
