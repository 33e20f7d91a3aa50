"""Adding the penalty's gradient to .grad in place: the gradients to add to, and one sweep over them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.dtensor import any_dtensor, as_dtensors, as_placed, is_dtensor, local
from fastreg.ops import sweep
from fastreg.plan import Mode
from fastreg.recall import recall
from fastreg.strengths import UNSCALED, Measure, Scale, Strengths
from fastreg.sweep import check_writable, counts_changes, is_dense


def add_gradients(
    weights: Sequence[Tensor],
    groups: Sequence[int],
    strengths: Strengths,
    *,
    scale: Scale = UNSCALED,
    reduce: bool,
    impl: str | None,
    all_reduce: bool = True,
    names: Sequence[str] | None = None,
) -> Measure | None:
    """Adds the gradient of the penalty to .grad, which is created where it is None, in one sweep.

    Raises:
        TypeError: a .grad of another dtype or device than its weight, before anything is written.
        ValueError, RuntimeError: a .grad of another shape, or that cannot be changed in place, likewise.
    """
    compiling = torch.compiler.is_compiling()
    grads: list[Any] = [w.grad for w in weights]
    keywords: dict[str, Any] = {"scale": scale, "reduce": reduce, "impl": impl, "all_reduce": all_reduce}
    known = None if compiling or any_dtensor(weights) else recall(weights, groups)
    usual = known is not None and known.accepts(grads)
    if usual:
        keywords["known"] = known
    else:
        grads = _present_grads(weights, grads, names)
    found = sweep(weights, groups, Mode.ACCUMULATE, strengths, grads=grads, **keywords)
    if not usual:
        for w, grad in zip(weights, grads, strict=True):
            if w.grad is not grad:
                w.grad = grad
    if not compiling:
        mark_changed(grads)
    return found


def mark_changed(tensors: Sequence[Tensor]) -> None:
    """Lets graphs that saved one of them notice that it was changed; of a DTensor, also those that saved its part."""
    torch.autograd.graph.increment_version(tensors)
    if any_dtensor(tensors):
        torch.autograd.graph.increment_version([local(t) for t in tensors if is_dtensor(t)])


def _present_grads(weights: Sequence[Tensor], grads: Sequence[Tensor | None], names: Sequence[str] | None) -> list[Any]:
    """`grads`, with `_present_grad` in place of those that cannot be added to as they are."""
    present = list(grads)
    distributed = any_dtensor(weights)
    for i, (w, grad) in enumerate(zip(weights, grads, strict=True)):
        if (
            distributed
            or grad is None
            or grad.layout is not torch.strided
            or grad.dtype is not w.dtype
            or grad.shape != w.shape
            or grad.get_device() != w.get_device()
            or not grad.is_contiguous()
            or not counts_changes(grad)
        ):
            present[i] = _present_grad(w, names[i] if names else "")
    return present


def _present_grad(weight: Tensor, name: str) -> Tensor:
    """`weight.grad` as a dense tensor of the weight's dtype to add to: zeros where there is none yet."""
    if not is_dtensor(weight):
        return _usable(weight.grad, weight, name)
    grad = None if weight.grad is None else as_placed(weight.grad, weight)
    part = None if grad is None else local(grad)
    usable = _usable(part, local(weight), name)
    return grad if grad is not None and usable is part else as_dtensors([usable], [weight])[0]


def _usable(grad: Tensor | None, weight: Tensor, name: str) -> Tensor:
    if grad is None:
        # The strides that autograd would give it (its layout contract, in accumulate_grad.h).
        layout = torch.preserve_format if is_dense(weight) else torch.contiguous_format
        # -0.0, to which anything added is itself, its sign of zero included.
        return torch.full_like(weight, -0.0, memory_format=layout, requires_grad=False)
    what = f"the .grad of parameter {name!r}" if name else f"a .grad of shape {tuple(grad.shape)}"
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
        return grad.to_dense()  # as autograd leaves it, when a dense gradient follows a sparse one
    check_writable(grad, what)
    return grad
