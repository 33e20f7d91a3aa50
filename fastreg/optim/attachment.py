"""Attaching a penalty to an optimizer: before every step its gradient, or after every step its proximal step."""

import sys
import weakref
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam

from fastreg.core.checks import warn_user
from fastreg.core.penalty import add_results
from fastreg.core.types import Mode, Request, Work
from fastreg.optim.base import Penalized, makes_states_only
from fastreg.optim.step_size import check_metric, elementwise_inputs, is_elementwise, step_sizes
from fastreg.sweep.agreement import facts_of
from fastreg.sweep.dispatch import sweep
from fastreg.sweep.gradient import add_gradient
from fastreg.sweep.prox import apply_elementwise_prox, apply_prox_of_groups
from fastreg.sweep.sharded import Ownership, split_by_mesh

# By optimizer, to notice two penalties on the same weights.
_ATTACHED: "weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[Attachment]]" = weakref.WeakKeyDictionary()


Arguments: TypeAlias = tuple[Any, ...]
Keywords: TypeAlias = dict[str, Any]


class Attachment:
    """A penalty that an optimizer applies at every step, until `remove()`: what `ElasticNet.attach` returns."""

    def __init__(
        self,
        optimizer: Any,
        mode: str,
        metric: str | None,
        current: Callable[[], Work],  # the work at this moment
        publish: Callable[[Any], None],  # gets the value at each step
    ) -> None:
        optimizer = _unwrapped(optimizer)
        check_mode(mode, metric)
        _check_optimizer(optimizer, mode, metric)
        by = metric or "optimizer"
        self._optimizer = weakref.ref(optimizer)
        work = current()
        membership = _Membership()
        membership.groups(optimizer, work)
        self._weight_ids = set(map(id, work.weights))
        others: set[int] = set().union(*(other._weight_ids for other in _ATTACHED.get(optimizer, ())))
        shared = [name for name, w in zip(work.names, work.weights, strict=True) if id(w) in others]
        if shared:
            warn_user(
                f"another penalty of parameter {shared[0]!r} is attached to this optimizer already: both will be "
                "applied at every step; remove() one of them, or let them select different parameters"
            )

        if isinstance(optimizer, Penalized) and optimizer.has_strengths:
            warn_user(
                f"the optimizer has strengths of its own, l1 or l2 of fastreg.optim.{type(optimizer).__name__}: both "
                "penalties will be applied at every step"
            )

        def add(optimizer: Optimizer) -> None:
            if makes_states_only(optimizer):
                return
            work = current()
            membership.groups(optimizer, work)
            # A fused optimizer under GradScaler unscales the gradients itself: here they still carry the scale.
            scale = getattr(optimizer, "grad_scale", None)
            with torch.no_grad():
                factors = None if scale is None else (scale,) * len(work.penalty.strengths)
                publish(work.penalty.result(add_gradient(work, scale=factors)))

        def add_before(optimizer: Optimizer, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords] | None:
            if _is_inner_step(optimizer):
                return None
            closure = _closure_of(args, kwargs)
            if closure is None:
                add(optimizer)
                return None
            membership.groups(optimizer, current())  # raises before the closure, which may take long
            return _with_closure(args, kwargs, closure, ClosureWithGradient(closure, optimizer, add))

        def check_added(optimizer: Optimizer, args: Arguments, kwargs: Keywords) -> None:
            closure = _closure_of(args, kwargs)
            if isinstance(closure, ClosureWithGradient) and not closure.was_called:
                raise RuntimeError(
                    f"{type(optimizer).__name__}.step(closure) did not call its closure, after which the penalty's "
                    "gradient would have been added: this step was made without it; call step() without a closure"
                )

        had_grad: set[int] = set()  # ids of the weights that the step will move: others may clear .grad after the step

        def note(work: Work) -> None:
            had_grad.clear()
            had_grad.update([id(w) for w in work.weights if w.grad is not None])

        def check(optimizer: Optimizer, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords] | None:
            if _is_inner_step(optimizer):
                return None
            work = current()
            membership.groups(optimizer, work)  # raises before the step, not half way
            check_metric(optimizer, by)
            closure = _closure_of(args, kwargs)
            if closure is None:
                note(work)
                return None

            def closure_and_note() -> Any:
                result = closure()
                note(current())
                return result

            return _with_closure(args, kwargs, closure, closure_and_note)

        def shrink(optimizer: Optimizer, args: Arguments, kwargs: Keywords) -> None:
            if _is_inner_step(optimizer):
                return
            work = current()
            groups = membership.groups(optimizer, work)
            with torch.no_grad():
                publish(_shrink(optimizer, work, groups, by, had_grad))
            had_grad.clear()

        before, after = (add_before, check_added) if mode == "grad" else (check, shrink)
        self._hooks = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
        _ATTACHED.setdefault(optimizer, weakref.WeakSet()).add(self)

    @property
    def is_active(self) -> bool:
        """Whether the optimizer still exists, and this was not removed from it."""
        return bool(self._hooks) and self._optimizer() is not None

    def remove(self) -> None:
        """Detaches the penalty: the optimizer steps without it from now on. Further calls do nothing."""
        while self._hooks:
            self._hooks.pop().remove()
        self._weight_ids.clear()


_FOR_DEEPSPEED = (
    "DeepSpeed steps copies of the weights, which an attached penalty does not reach: give deepspeed.initialize an "
    "optimizer of fastreg.optim with l1 and l2 instead"
)


def _unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside wrappers such as Accelerate's and Lightning's, whose own hooks never run.

    Raise TypeError for DeepSpeed's optimizers, which are no torch.optim.Optimizer.
    """
    while True:
        inner = getattr(optimizer, "optimizer", None)
        for each in (optimizer, inner):
            if not isinstance(each, Optimizer) and type(each).__module__.split(".")[0] == "deepspeed":
                raise TypeError(_FOR_DEEPSPEED)
        if not isinstance(inner, Optimizer):
            return optimizer
        optimizer = inner


class ClosureWithGradient:
    """A closure of `step`, and the penalty's gradient added to those that it computes."""

    def __init__(self, closure: Callable[[], Any], optimizer: Optimizer, add: Callable[[Optimizer], None]) -> None:
        self._closure, self._optimizer, self._add = closure, optimizer, add
        self.was_called = False

    def __call__(self) -> Any:
        """Calls the closure; raises RuntimeError when called again."""
        if self.was_called:
            raise RuntimeError(
                f"{type(self._optimizer).__name__} calls its closure several times a step, and may compare the losses, "
                "which lack the penalty: add the penalty to the loss in the closure"
            )
        self.was_called = True
        result = self._closure()
        self._add(self._optimizer)
        return result


def _closure_of(args: Arguments, kwargs: Keywords) -> Any:
    """The closure among the arguments of `step`, or None."""
    return next(filter(callable, (*args[1:], *kwargs.values())), None)


def _with_closure(args: Arguments, kwargs: Keywords, closure: Any, other: Any) -> tuple[Arguments, Keywords]:
    """Return the arguments of `step` with `other` in place of `closure`."""
    replaced = tuple(other if arg is closure else arg for arg in args)
    return replaced, {key: other if arg is closure else arg for key, arg in kwargs.items()}


def _is_inner_step(optimizer: Optimizer) -> bool:
    """Whether a hook runs for a `super().step()`: PyTorch calls the hooks for it as well as for the whole step."""
    if torch.compiler.is_compiling():
        return False
    caller = sys._getframe(2)
    outer = caller.f_back
    while outer is not None:
        if outer.f_code is caller.f_code and outer.f_locals.get("self") is optimizer:
            return True
        outer = outer.f_back
    return False


def _shrink(optimizer: Optimizer, work: Work, groups: list[int], metric: str, had_grad: set[int]) -> Any:
    """Shrink the weights, which are in the param groups `groups`, and return the value before it.

    The ids in `had_grad` are those of weights with a gradient before the step.
    """
    ownership = Ownership(work.weights, True, facts_of(work)) if work.is_sharded else None
    if ownership is not None:
        work, _ = split_by_mesh(work, ownership)
    is_by_element = is_elementwise(optimizer, metric)
    stepped = [True] * len(groups)
    if metric != "lr":
        # The optimizer made no step of weights without a gradient, or without a state yet. They count in the value.
        has_grad = [w.grad is not None or id(w) in had_grad for w in work.weights]
        stepped = [
            has and (not is_by_element or bool(optimizer.state.get(w)))
            for w, has in zip(work.weights, has_grad, strict=True)
        ]
    results = []
    if not all(stepped):
        results.append(_value(work.subset([not s for s in stepped])))
    if any(stepped):
        moving, own_groups = work.subset(stepped), list(compress(groups, stepped))
        if is_by_element:
            finer, step = elementwise_inputs(optimizer, moving, own_groups)
            results.append(work.penalty.result(apply_elementwise_prox(finer, step)))
        else:
            measured = apply_prox_of_groups(moving, step_sizes(optimizer, metric), own_groups)
            results.append(work.penalty.result(measured))
    return add_results(results) if ownership is None else ownership.result(type(work.penalty), results)


def _value(work: Work) -> Any:
    return work.penalty.result(sweep(work, Request(Mode.VALUE)))


def check_mode(mode: str, metric: str | None) -> None:
    """Raises ValueError for what `mode` and `metric` cannot be, whatever the optimizer."""
    if mode not in ("grad", "prox"):
        raise ValueError(f'mode must be "grad" or "prox", got {mode!r}')
    if metric not in (None, "optimizer", "lr"):
        raise ValueError(f'metric must be "optimizer" or "lr", got {metric!r}')
    if mode == "grad" and metric is not None:
        raise ValueError('metric is for mode="prox": a gradient goes through the optimizer, whatever its steps are')


def _check_optimizer(optimizer: Any, mode: str, metric: str | None) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not hasattr(optimizer, "defaults"):  # as every optimizer that has called Optimizer.__init__
        names = [name for name, value in vars(optimizer).items() if isinstance(value, Optimizer)]
        raise TypeError(
            f"{type(optimizer).__name__} wraps an optimizer and has no hooks of its own; attach to the one inside"
            + (f", .{names[0]}" if names else "")
        )
    if isinstance(optimizer, LBFGS):
        raise TypeError("LBFGS evaluates its closure's loss several times a step: add the penalty to that loss")
    if mode == "grad" and isinstance(optimizer, SparseAdam):
        raise TypeError('SparseAdam takes sparse gradients only; attach with mode="prox", or use another optimizer')
    if mode == "prox":
        check_metric(optimizer, "optimizer" if metric is None else metric)
    if mode == "grad" and any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError('maximize=True would reward the penalty; attach with mode="prox", or minimize -loss')


class _Membership:
    """In which param groups of an optimizer the weights are, found anew when either of them changed."""

    def __init__(self) -> None:
        self._weights: Sequence[Tensor] | None = None
        self._params: list[list[int]] = []
        self._found: list[int] = []

    def groups(self, optimizer: Optimizer, work: Work) -> list[int]:
        """Of each weight the number of its param group.

        Raises ValueError for a weight that the optimizer does not hold.
        """
        params = [list(map(id, group["params"])) for group in optimizer.param_groups]
        if work.weights is self._weights and params == self._params:
            return self._found
        group_of = {each: i for i, group in enumerate(params) for each in group}
        for name, w in zip(work.names, work.weights, strict=True):
            if id(w) not in group_of:
                raise ValueError(
                    f"parameter {name!r} is not in the optimizer, which would never step it; exclude it, or make the "
                    "optimizer of the parameters of this model"
                    + (f". {_FOR_DEEPSPEED}" if "deepspeed" in sys.modules else "")
                )
        self._found = [group_of[id(w)] for w in work.weights]
        self._weights, self._params = work.weights, params
        return self._found
