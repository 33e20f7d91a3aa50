"""Attaching a penalty to an optimizer: before every step its gradient, or after every step its proximal step."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam

from fastreg.formulas import Measure
from fastreg.inplace import add_gradient, apply_prox
from fastreg.kinds import warn_user
from fastreg.strengths import UNSCALED, Scale, Strength, accumulate_dtype, check_strength
from fastreg.work import Work

# By optimizer, to notice two penalties on the same weights.
_ATTACHED: "weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[Attachment]]" = weakref.WeakKeyDictionary()


class Attachment:
    """A penalty that an optimizer applies at every step, until `remove()`.

    `current()` is the work at this moment, and `publish` gets what each step measured.
    """

    def __init__(
        self,
        optimizer: Any,
        mode: str,
        current: Callable[[], Work],
        publish: Callable[[Measure | None], None],
    ) -> None:
        # Wrappers such as Accelerate's have hooks of their own, which never run.
        while "optimizer" in getattr(optimizer, "__dict__", ()) and isinstance(optimizer.optimizer, Optimizer):
            optimizer = optimizer.optimizer
        _check(optimizer, mode)
        self._optimizer = weakref.ref(optimizer)
        work = current()
        membership = _Membership()
        membership.groups(optimizer, work)
        if mode == "prox":
            _steps(optimizer)
        self._weight_ids = set(map(id, work.weights))
        others: set[int] = set().union(*(other._weight_ids for other in _ATTACHED.get(optimizer, ())))
        shared = [name for name, w in zip(work.names, work.weights, strict=True) if id(w) in others]
        if shared:
            warn_user(
                f"another penalty of parameter {shared[0]!r} is attached to this optimizer already: both will be "
                "applied at every step; remove() one of them, or let them select different parameters"
            )

        def add(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(arg is not None for arg in (*args[1:], kwargs.get("closure"))):
                raise RuntimeError(
                    "optimizer.step(closure) computes the gradients anew after the penalty's was added; add the "
                    'penalty to the loss in the closure, or attach it with mode="prox"'
                )
            work = current()
            membership.groups(optimizer, work)
            # A fused optimizer under GradScaler unscales the gradients itself: here they still carry the scale.
            scale = getattr(optimizer, "grad_scale", None)
            with torch.no_grad():
                publish(add_gradient(work, scale=UNSCALED if scale is None else Scale(scale, scale)))

        def check(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            membership.groups(optimizer, current())  # raises before the step, not half way
            _steps(optimizer)

        def shrink(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            work, steps = current(), _steps(optimizer)
            used, step_groups = membership.groups(optimizer, work)
            with torch.no_grad():
                publish(apply_prox(work, [steps[i] for i in used], step_groups, with_value=True))

        self._hooks = [optimizer.register_step_pre_hook(add if mode == "grad" else check)]
        if mode == "prox":
            self._hooks.append(optimizer.register_step_post_hook(shrink))
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


def _check(optimizer: Any, mode: str) -> None:
    if mode not in ("grad", "prox"):
        raise ValueError(f'mode must be "grad" or "prox", got {mode!r}')
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, LBFGS):
        raise TypeError("LBFGS evaluates its closure's loss several times a step: add the penalty to that loss")
    if mode == "grad" and isinstance(optimizer, SparseAdam):
        raise TypeError('SparseAdam takes sparse gradients only; attach with mode="prox", or use another optimizer')
    if mode == "grad" and any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError('maximize=True would reward the penalty; attach with mode="prox", or minimize -loss')


class _Membership:
    """In which param groups of an optimizer the weights are, found anew when either of them changed."""

    def __init__(self) -> None:
        self._weights: Sequence[Tensor] | None = None
        self._params: list[list[int]] = []
        self._found: tuple[list[int], list[int]] = [], []

    def groups(self, optimizer: Optimizer, work: Work) -> tuple[list[int], list[int]]:
        """The param groups that hold any weight, and of each weight the number of its group among these.

        Raises ValueError for a weight that the optimizer does not hold.
        """
        params = [list(map(id, group["params"])) for group in optimizer.param_groups]
        if work.weights is self._weights and params == self._params:
            return self._found
        group_of = {each: i for i, group in enumerate(params) for each in group}
        for name, w in zip(work.names, work.weights, strict=True):
            if id(w) not in group_of:
                raise ValueError(f"parameter {name!r} is not in the optimizer, which would never step it; exclude it")
        groups = [group_of[id(w)] for w in work.weights]
        used = list(dict.fromkeys(groups))
        self._found = used, [used.index(i) for i in groups]
        self._weights, self._params = work.weights, params
        return self._found


def _steps(optimizer: Optimizer) -> list[Strength]:
    """The step size of each param group: its learning rate, which has to be a valid one, or 0 where none was made."""
    # Where a fused optimizer found infinite gradients it left the weights alone, and so does a step of size 0.
    found_inf = getattr(optimizer, "found_inf", None)
    steps: list[Strength] = []
    for i, group in enumerate(optimizer.param_groups):
        lr = group.get("lr")
        if lr is None:
            raise ValueError(f"param group {i} of the optimizer has no lr, by which a proximal step would shrink")
        if isinstance(lr, Tensor):
            # In host memory there is nothing to wait for.
            lr = lr.item() if lr.device.type == "cpu" else lr.reshape(())
        step = check_strength(lr, f"lr of param group {i}")
        if found_inf is not None:
            step = (found_inf == 0).to(accumulate_dtype(found_inf.device)) * step
        steps.append(step)
    return steps
