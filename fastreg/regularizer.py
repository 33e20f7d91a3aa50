"""What `ElasticNet` and its kin share: a penalty that knows its parameters, for use at every step."""

from typing import Any, ClassVar, Generic, Literal, TypeVar, overload

import torch
from torch import Tensor

from fastreg.autograd.function import compute_penalty
from fastreg.core.checks import Impl, check_impl, check_reduce
from fastreg.core.dtypes import accumulate_dtype
from fastreg.core.penalty import BasePenalty, Strength
from fastreg.core.strengths import check_strength, checked
from fastreg.core.types import Want, Work
from fastreg.optim.attachment import Attachment
from fastreg.selection.filters import Filter
from fastreg.selection.params import Params, copied
from fastreg.selection.selection import Selection
from fastreg.sparsity import summary_of
from fastreg.sweep.dispatch import is_traced_now
from fastreg.sweep.gradient import add_gradient
from fastreg.sweep.prox import apply_prox

R = TypeVar("R")  # the NamedTuple of the total and its terms


class Regularizer(Generic[R]):
    """A penalty of the same parameters at every step: names, filters and pointer tables are kept.

    A subclass names its penalty and has an argument and a property for each strength. A strength can be assigned at any
    time; nothing is recompiled.
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

    _PENALTY: ClassVar[type[BasePenalty]]

    def __init__(
        self, params: Params, strengths: tuple[Strength, ...], include: Filter, exclude: Filter, impl: Impl
    ) -> None:
        check_impl(impl)
        self._strengths: list[Strength] = [*checked(self._PENALTY, *strengths).strengths]
        self._impl = impl
        self._params = copied(params)
        self._filters = (include, exclude)
        self._selection = Selection(self._params, self._PENALTY, include, exclude)
        # Check the strengths' devices.
        self._selection.work(self._selection.candidates.tensors, self._PENALTY(self._strengths), impl)
        self._work: Work | None = None
        self._attachment: Attachment | None = None
        self.last: R | None = None
        self._buffers: list[Tensor] = []
        self._for_compilers: list[Tensor] | None = None
        self._store_for_compilers()

    @overload
    def __call__(self, *, return_terms: Literal[False] = False, reduce: bool = True) -> Tensor: ...
    @overload
    def __call__(self, *, return_terms: Literal[True], reduce: bool = True) -> R: ...
    @overload
    def __call__(self, *, return_terms: bool, reduce: bool = True) -> Tensor | R: ...
    def __call__(self, *, return_terms: bool = False, reduce: bool = True) -> Tensor | R:
        """The penalty of the weights as they are now; see `fastreg.elastic_penalty`."""
        work = self._current()
        if reduce is not True:
            check_reduce(reduce)
            work = work._replace(all_reduce=False)
        if self._attachment is not None and self._attachment.is_active:
            work = work._replace(is_attached=True)
        return compute_penalty(work, Want.TERMS if return_terms else Want.TOTAL)  # type: ignore[no-any-return]

    def add_grad_(self, *, reduce: bool = True) -> R:
        """Add the penalty's gradient to .grad and return the penalty; see `fastreg.add_elastic_grad_`."""
        work = self._current()
        if reduce is not True:
            check_reduce(reduce)
            work = work._replace(all_reduce=False)
        with torch.no_grad():
            return work.penalty.result(add_gradient(work))  # type: ignore[no-any-return]

    def prox_(self, lr: Strength) -> None:
        """Shrinks the weights by the proximal step of size `lr`; see `elastic_prox_`."""
        step = check_strength(lr, "lr")
        with torch.no_grad():
            apply_prox(self._current(), step)

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
            raise RuntimeError(f"this {type(self).__name__} is attached already; call .remove() on its handle first")
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
        values = ["tensor" if isinstance(s, Tensor) else s for s in self._strengths]
        strengths = ", ".join(f"{name}={value}" for name, value in zip(self._PENALTY.NAMES, values, strict=True))
        n_weights = sum(w.numel() for w in weights)
        return f"{type(self).__name__}({len(weights)} tensors, {n_weights} weights, {strengths})"

    def _record_last(self, result: Any) -> None:
        self.last = result

    def _current(self) -> Work:
        """The weights with their groups and strengths, as they are now."""
        is_traced = is_traced_now()
        tensors = self._selection.current(self._params, is_traced)
        if tensors is None:
            self._selection, self._work = Selection(self._params, self._PENALTY, *self._filters), None
            tensors = self._selection.candidates.tensors
        # Not under torch.compile: the kept work holds floats, which would be compiled in as constants.
        work = None if is_traced else self._work
        if work is not None and work.layout is self._selection.layout:  # or both have none, as of sharded weights
            return work
        penalty = self._PENALTY([*map(self._strength, range(len(self._strengths)))])
        work = self._selection.work(tensors, penalty, self._impl, is_traced=is_traced)
        if not is_traced and self._selection.work_can_be_kept(penalty):
            self._work = work
        return work

    def _assign(self, which: int, strength: Strength) -> None:
        self._strengths[which] = check_strength(strength, self._PENALTY.NAMES[which])
        self._work = None
        self._store_for_compilers()

    def _store_for_compilers(self) -> None:
        """Keep the strengths as tensors for compiled code: floats in buffers that are written in place."""
        if torch.compiler.is_compiling():
            self._for_compilers = None  # assigned by the very code that is compiled, which knows the value
            return
        if not self._buffers:
            device = self._selection.weights[0].device
            with torch.inference_mode(False):
                zero = torch.zeros((), dtype=accumulate_dtype(device), device=device)
                self._buffers = [zero.clone() for _ in self._strengths]
        pairs = list(zip(self._strengths, self._buffers, strict=True))
        self._for_compilers = [s if isinstance(s, Tensor) else buffer.fill_(s) for s, buffer in pairs]

    def _strength(self, which: int) -> Strength:
        """A strength by its place. A compiler gets a tensor in place of a float, which it would take for a constant."""
        if self._for_compilers is None or not torch.compiler.is_compiling():
            return self._strengths[which]
        return self._for_compilers[which].to(self._selection.weights[0].device)
