"""Attaching a penalty to an optimizer: before every step its gradient, or after every step its proximal step."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam

from fastreg.strengths import UNSCALED, Scale, Strength, accumulate_dtype


class Attachment:
    """A penalty that an optimizer applies at every step, until `remove()`.

    Args:
        optimizer: whose steps to hook.
        mode: "grad" calls `add_grad(rates, scale)` before a step, "prox" calls `prox(rates)` after it, where `rates`
            maps the id of every parameter that the optimizer holds to its learning rate.
        on_remove: called with this by `remove()`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        mode: str,
        *,
        add_grad: Callable[[dict[int, Strength], Scale], None],
        prox: Callable[[dict[int, Strength]], None],
        on_remove: Callable[["Attachment"], None],
    ) -> None:
        if mode not in ("grad", "prox"):
            raise ValueError(f'mode must be "grad" or "prox", got {mode!r}')
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, LBFGS):
            raise TypeError("LBFGS evaluates its closure's loss several times a step: add the penalty to that loss")
        if mode == "grad" and isinstance(optimizer, SparseAdam):
            raise TypeError('SparseAdam takes sparse gradients only; attach with mode="prox", or use another optimizer')
        if mode == "grad" and any(group.get("maximize") for group in optimizer.param_groups):
            raise ValueError(
                'an optimizer with maximize=True would reward the penalty; attach with mode="prox", or minimize -loss'
            )
        self._on_remove = on_remove

        def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(arg is not None for arg in (*args[1:], kwargs.get("closure"))):
                raise RuntimeError(
                    "optimizer.step(closure) computes the gradients anew after the penalty's was added; add the "
                    'penalty to the loss in the closure, or attach it with mode="prox"'
                )
            # A fused optimizer under GradScaler unscales the gradients itself: here they still carry the scale.
            scale = getattr(optimizer, "grad_scale", None)
            add_grad(_learning_rates(optimizer), UNSCALED if scale is None else Scale(scale, scale))

        def after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            prox(_learning_rates(optimizer))

        if mode == "grad":
            self._hook = optimizer.register_step_pre_hook(before)
        else:
            self._hook = optimizer.register_step_post_hook(after)

    def remove(self) -> None:
        """Detaches the penalty: the optimizer steps without it from now on. Further calls do nothing."""
        self._hook.remove()
        self._on_remove(self)


def _learning_rates(optimizer: Optimizer) -> dict[int, Strength]:
    # Where a fused optimizer found infinite gradients it left the weights alone, and so does a step of size 0.
    found_inf = getattr(optimizer, "found_inf", None)
    rates: dict[int, Strength] = {}
    for group in optimizer.param_groups:
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.device.type == "cpu":
            lr = lr.item()  # host memory: nothing to wait for
        if found_inf is not None:
            lr = (found_inf == 0).to(accumulate_dtype(found_inf.device)) * lr
        rates.update((id(parameter), lr) for parameter in group["params"])
    return rates
