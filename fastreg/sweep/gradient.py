"""Add the gradient to .grad. All memory is checked before the first write."""

from typing import Any

import torch
from torch import Tensor

from fastreg.core.checks import warn_of_detached
from fastreg.core.dtensor import as_dtensors, as_placed, is_dtensor, local_shard
from fastreg.core.layout import is_dense
from fastreg.core.penalty import Measure, Scale
from fastreg.core.types import Mode, Request, Want, Work
from fastreg.sweep.dispatch import sweep
from fastreg.sweep.inplace import check_writable, mark_changed
from fastreg.sweep.local import local_sweep


def add_gradient(
    work: Work, want: Want = Want.TERMS, scale: Scale = None, *, any_dtype: bool = False
) -> Measure | None:
    """Add the penalty's gradient to .grad in one sweep. Create .grad where it is None.

    Raise TypeError, ValueError or RuntimeError before the first write if a .grad differs from its weight in dtype,
    device or shape, or cannot be changed in place. With `any_dtype`, accept a .grad of another dtype, as
    `Tensor.grad_dtype` allows.
    """
    if not (work.are_leaves or work.is_traced):
        _check_leaves(work)
    grads: list[Any] = [w.grad for w in work.weights]
    if work.layout is not None and work.layout.notes.grads_match(Mode.ACCUMULATE, grads):
        measured = local_sweep(work, Request(Mode.ACCUMULATE, want, grads, scale, None, True))
        torch.autograd.graph.increment_version(grads)
        return measured
    if not work.weights[0].requires_grad and any(grad is None for grad in grads):
        warn_of_detached(work.names, work.weights)
    if any_dtype:
        grads = [None if _has_own_dtype(w) else grad for w, grad in zip(work.weights, grads, strict=True)]
    elif not torch.compiler.is_compiling():  # compilers do not know grad_dtype
        _check_first_gradients(work)
    grads = list(map(_usable_gradient, work.weights, grads, work.names))
    measured = sweep(work, Request(Mode.ACCUMULATE, want, grads, scale))
    for w, grad in zip(work.weights, grads, strict=True):
        if any_dtype and w.grad is not grad:
            _store_gradient(w, grad)
        elif w.grad is not grad:
            w.grad = grad
    mark_changed(work, grads)
    return measured


def _usable_gradient(weight: Tensor, grad: Tensor | None, name: str) -> Tensor:
    """Return `grad` as a dense tensor of the weight's dtype, or zeros if it is None."""
    if not is_dtensor(weight):
        return _usable_part(grad, weight, name)
    grad = None if grad is None else as_placed(grad, weight)
    part = None if grad is None else local_shard(grad)
    usable = _usable_part(part, local_shard(weight), name)
    return grad if grad is not None and usable is part else as_dtensors([usable], [weight])[0]


def _has_own_dtype(weight: Any) -> bool:
    """Return whether the gradient of `weight` has, or will have, another dtype than the weight."""
    dtype = getattr(weight, "grad_dtype", None) if weight.grad is None else weight.grad.dtype
    return dtype is not None and dtype != weight.dtype


def _check_leaves(work: Work) -> None:
    for name, w in zip(work.names, work.weights, strict=True):
        if not w.is_leaf:
            raise ValueError(
                f"parameter {name!r} is computed from other tensors, so its .grad is not used: pass the parameters "
                "that it is computed from, or add the penalty to the loss"
            )


def _check_first_gradients(work: Work) -> None:
    for name, w in zip(work.names, work.weights, strict=True):
        if w.grad is None and _has_own_dtype(w):
            dtype = w.grad_dtype  # type: ignore[attr-defined]
            raise TypeError(
                f"the .grad of parameter {name!r} is to be {dtype}, not {w.dtype}: add the penalty to the loss instead"
            )


def _store_gradient(weight: Any, grad: Tensor) -> None:
    if not _has_own_dtype(weight):
        weight.grad = grad
    elif weight.grad is None:
        weight.grad = grad.to(weight.grad_dtype)
    else:
        weight.grad.add_(grad)


def _usable_part(grad: Tensor | None, weight: Tensor, name: str) -> Tensor:
    if grad is None:
        # Use the strides that autograd would choose (layout contract in accumulate_grad.h).
        layout = torch.preserve_format if is_dense(weight) else torch.contiguous_format
        # -0.0 + x is exactly x, also for x = -0.0. Backward passes outside of inference mode may add to it later.
        with torch.inference_mode(False):
            return torch.full_like(weight, -0.0, memory_format=layout, requires_grad=False)
    what = f"the .grad of parameter {name!r}"
    if grad.dtype != weight.dtype or grad.device != weight.device:
        raise TypeError(
            f"{what} is {grad.dtype} on {grad.device} but the weight is {weight.dtype} on {weight.device}; add the "
            "penalty to the loss instead, or convert the gradient"
        )
    if grad.shape != weight.shape:
        raise ValueError(
            f"{what} has shape {tuple(grad.shape)} but the weight has {tuple(weight.shape)}; set it to None"
        )
    if grad.layout != torch.strided:
        return grad.to_dense()  # as autograd does when it adds a dense gradient to a sparse one
    check_writable(grad, what)
    return grad
