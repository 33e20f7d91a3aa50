"""`Regularizer`, the base class of `ElasticNet`: the penalty of a model, for use at every step."""

import functools
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
    """The penalty of a model, for use at every step. Names, filters and pointer tables are kept between calls.

    A subclass sets `_PENALTY` and has an argument and a property for each strength. A strength can be assigned at any
    time; nothing is recompiled.
    """

    # With slots, a misspelled `reg.lambda1 = 0.1` is an error.
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
        """Return the penalty of the current weights. See `fastreg.elastic_penalty`."""
        work = self._current()
        if reduce is not True:
            check_reduce(reduce)
            work = work._replace(all_reduce=False)
        if self._attachment is not None and self._attachment.is_active:
            work = work._replace(is_attached=True)
        return compute_penalty(work, Want.TERMS if return_terms else Want.TOTAL)  # type: ignore[no-any-return]

    def add_grad_(self, *, reduce: bool = True) -> R:
        """Add the penalty's gradient to .grad and return the penalty. See `fastreg.add_elastic_grad_`.

        Under GradScaler, call it after `scaler.unscale_(optimizer)`.
        """
        work = self._current()
        if reduce is not True:
            check_reduce(reduce)
            work = work._replace(all_reduce=False)
        with torch.no_grad():
            return work.penalty.result(add_gradient(work))  # type: ignore[no-any-return]

    def prox_(self, lr: Strength) -> None:
        """Shrink the weights by a proximal step of size `lr`. See `fastreg.elastic_prox_`."""
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
        """Apply the penalty at every `optimizer.step()`, once, after any number of micro-batches.

        Do not add the penalty to the loss as well. It does not take part in backward.

        Args:
            optimizer: Any torch.optim.Optimizer that holds all selected weights. foreach, fused and capturable
                optimizers and GradScaler are supported. Wrappers such as Accelerate's are unwrapped.
            mode: "grad" adds the penalty's gradient right before the step, or after the closure in step(closure).
                Gradient clipping does not see it. "prox" shrinks the weights right after the step, which leaves exact
                zeros.
            metric: The size of the proximal step in mode "prox". "optimizer", the default, is the optimizer's own step
                size per unit of gradient (the formulas are in fastreg.optim). Training then ends at the minimum of
                loss + penalty. This step size is known for torch.optim's SGD, RMSprop, Adagrad, Adam, AdamW, NAdam and
                Adamax, and for fastreg.optim's optimizers. Parameters without a gradient make no step and are not
                shrunk. "lr" is the learning rate of the param group, for any optimizer and all parameters. This
                decouples the shrinkage from the optimizer, as AdamW does with weight decay. With momentum or Adam it is
                another, mostly weaker penalty.

        Returns:
            A handle with `remove()`. From now on, `last` is the `Penalty` at the last step.

        Raises:
            ValueError: `mode` or `metric` is unknown, or the optimizer does not hold a selected weight. In mode "grad":
                a metric, or maximize=True. In mode "prox", also later in step(): a param group has no lr or a negative
                one, momentum is 1 or more, the optimizer's step size is not known, or the optimizer keeps copies of the
                weights.
            TypeError: `optimizer` is not an optimizer, or is LBFGS, which needs the penalty in its loss. In mode
                "grad": it is SparseAdam.
            RuntimeError: This penalty is attached already. In mode "grad", later in step(): the closure is not called
                exactly once.

        Warns:
            UserWarning: Another penalty of the same weights is attached, or the optimizer has strengths of its own.
                Later, in backward: this penalty is part of a loss as well.
        """
        if self._attachment is not None and self._attachment.is_active:
            raise RuntimeError(f"this {type(self).__name__} is attached already; call .remove() on its handle first")
        # At an optimizer's step no backward pass needs gathered weights.
        current = functools.partial(self._current, reshard=True)
        self._attachment = Attachment(optimizer, mode, metric, current, self._record_last)
        return self._attachment

    def summary(self) -> str:
        """Return a table of the weights with their strengths and exact zeros, and of the tensors that are left out.

        The call waits for the device. For sharded weights, all ranks must call it.
        """
        return summary_of(self._current(), self._params, self._filters[1])

    def __getstate__(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        # Copied and pickled optimizers lose their hooks, so a copy is not attached.
        names = [n for cls in type(self).__mro__ for n in getattr(cls, "__slots__", ()) if hasattr(self, n)]
        kept: dict[str, Any] = {name: getattr(self, name) for name in names if name != "__weakref__"}
        kept |= {"_attachment": None, "_work": None, "_strengths": [*self._strengths], "_buffers": []}
        return getattr(self, "__dict__", None), kept

    def __setstate__(self, state: tuple[dict[str, Any] | None, dict[str, Any]]) -> None:
        for name, value in {**(state[0] or {}), **state[1]}.items():
            setattr(self, name, value)
        self._store_for_compilers()  # in new buffers

    def __repr__(self) -> str:
        weights = self._selection.weights
        values = ["tensor" if isinstance(s, Tensor) else s for s in self._strengths]
        strengths = ", ".join(f"{name}={value}" for name, value in zip(self._PENALTY.NAMES, values, strict=True))
        n_weights = sum(w.numel() for w in weights)
        return f"{type(self).__name__}({len(weights)} tensors, {n_weights} weights, {strengths})"

    def _record_last(self, result: Any) -> None:
        self.last = result

    def _current(self, *, reshard: bool = False) -> Work:
        """Return the current weights with their groups and strengths. With `reshard`, FSDP2 may have gathered them."""
        is_traced = is_traced_now()
        tensors = self._selection.current(self._params, is_traced)
        if tensors is None and reshard:
            self._selection.reshard()
            tensors = self._selection.current(self._params, is_traced)
        if tensors is None:
            self._selection, self._work = Selection(self._params, self._PENALTY, *self._filters), None
            tensors = self._selection.candidates.tensors
        # Not under torch.compile, which would take the floats in the cached work for constants.
        work = None if is_traced else self._work
        if work is not None and work.layout is self._selection.layout:  # both None for sharded weights
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
        """Store the strengths as tensors for compiled code. Floats are written to buffers in place."""
        if torch.compiler.is_compiling():
            self._for_compilers = None  # assigned inside the compiled code, which knows the value
            return
        if not self._buffers:
            device = self._selection.weights[0].device
            with torch.inference_mode(False):
                zero = torch.zeros((), dtype=accumulate_dtype(device), device=device)
                self._buffers = [zero.clone() for _ in self._strengths]
        pairs = list(zip(self._strengths, self._buffers, strict=True))
        self._for_compilers = [s if isinstance(s, Tensor) else buffer.fill_(s) for s, buffer in pairs]

    def _strength(self, which: int) -> Strength:
        """Return a strength by index. torch.compile gets a tensor, because it would take a float for a constant."""
        if self._for_compilers is None or not torch.compiler.is_compiling():
            return self._strengths[which]
        return self._for_compilers[which].to(self._selection.weights[0].device)
