"""The gradient added to .grad and the proximal step of the weights, in memory that is checked before the first write."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.dtensor import any_dtensor, as_dtensors, as_placed, is_dtensor, local, local_parts
from fastreg.formulas import Measure, Mode, measure
from fastreg.kinds import check_kinds
from fastreg.layout import find_layout
from fastreg.local import is_dense
from fastreg.strengths import UNSCALED, Scale, Strength, Strengths, per_group
from fastreg.sweep import sweep
from fastreg.work import Work


def add_gradient(work: Work, *, scale: Scale = UNSCALED, with_value: bool = True) -> Measure | None:
    """Adds the penalty's gradient to .grad, which is created where it is None, in one sweep.

    Raises:
        TypeError: a .grad of another dtype or device than its weight, before anything is written.
        ValueError, RuntimeError: a .grad of another shape, or that cannot be changed in place, likewise.
    """
    weights = work.weights
    is_plain = not (torch.compiler.is_compiling() or any_dtensor(weights))
    layout = find_layout(weights, work.groups) if is_plain else None
    grads: list[Any] = [w.grad for w in weights]
    if layout is not None and layout.accepts(grads):
        found = sweep(work, Mode.ACCUMULATE, scale=scale, grads=grads, with_value=with_value, layout=layout)
    else:
        if layout is None:
            check_kinds(work.names, weights)
        grads = _usable_gradients(work, grads)
        found = sweep(work, Mode.ACCUMULATE, scale=scale, grads=grads, with_value=with_value)
        for w, grad in zip(weights, grads, strict=True):
            if w.grad is not grad:
                w.grad = grad
    _mark_changed(grads)
    return found


def apply_prox(
    work: Work, steps: Sequence[Strength], step_groups: Sequence[int] | None = None, *, with_value: bool = False
) -> Measure | None:
    """Shrinks weight i by a proximal step of size `steps[step_groups[i]]`; the value is that before it.

    Raises:
        ValueError: a weight whose elements share memory, before anything is written.
        RuntimeError: an inference tensor outside inference mode, likewise.
    """
    weights = work.weights
    for name, w in zip(work.names, local_parts(weights), strict=True):
        if not w.is_contiguous() or not _counts_changes(w):
            _check_writable(w, f"parameter {name!r}")
    device = weights[0].device
    if step_groups is None or len(steps) == 1:
        step = per_group(steps[:1], device, "lr")
        found = sweep(work, Mode.PROX, scale=Scale(step, step), with_value=with_value)
    else:
        # Groups that differ in strength or step, with strengths that carry the step.
        pairs = list(zip(work.groups, step_groups, strict=True))
        numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
        plain = [work.strengths.of_group(group) for group, _ in numbers]
        scaled = [work.strengths.of_group(group, Scale(steps[i], steps[i])) for group, i in numbers]
        fine = work._replace(groups=[numbers[pair] for pair in pairs], n_groups=len(numbers))
        found = sweep(fine._replace(strengths=_columns(scaled, device)), Mode.PROX, with_value=with_value)
        if found is not None:
            found = measure(found.sums, _columns(plain, device), found.penalty.total.dtype)
    _mark_changed(weights)
    return found


def _columns(pairs: Sequence[tuple[Strength, Strength]], device: torch.device) -> Strengths:
    return Strengths(*(per_group(column, device, "lr") for column in zip(*pairs, strict=True)))


def _mark_changed(tensors: Sequence[Tensor]) -> None:
    """Lets graphs that saved one of them notice that it was changed; of a DTensor, also those that saved its part."""
    if torch.compiler.is_compiling():
        return
    torch.autograd.graph.increment_version(tensors)
    if any_dtensor(tensors):
        torch.autograd.graph.increment_version([local(t) for t in tensors if is_dtensor(t)])


def _usable_gradients(work: Work, grads: Sequence[Tensor | None]) -> list[Any]:
    """`grads`, with others in place of those that cannot be added to as they are."""
    usable = list(grads)
    distributed = any_dtensor(work.weights)
    for i, (name, w, grad) in enumerate(zip(work.names, work.weights, grads, strict=True)):
        if (
            distributed
            or grad is None
            or grad.layout is not torch.strided
            or grad.dtype is not w.dtype
            or grad.shape != w.shape
            or grad.get_device() != w.get_device()
            or not grad.is_contiguous()
            or not _counts_changes(grad)
        ):
            usable[i] = _usable_gradient(w, name)
    return usable


def _usable_gradient(weight: Tensor, name: str) -> Tensor:
    """`weight.grad` as a dense tensor of the weight's dtype to add to: zeros where there is none yet."""
    if not is_dtensor(weight):
        return _usable_part(weight.grad, weight, name)
    grad = None if weight.grad is None else as_placed(weight.grad, weight)
    part = None if grad is None else local(grad)
    usable = _usable_part(part, local(weight), name)
    return grad if grad is not None and usable is part else as_dtensors([usable], [weight])[0]


def _usable_part(grad: Tensor | None, weight: Tensor, name: str) -> Tensor:
    if grad is None:
        # The strides that autograd would give it (its layout contract, in accumulate_grad.h).
        layout = torch.preserve_format if is_dense(weight) else torch.contiguous_format
        # -0.0, to which anything added is itself, its sign of zero included.
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
        return grad.to_dense()  # as autograd leaves it, when a dense gradient follows a sparse one
    _check_writable(grad, what)
    return grad


def _check_writable(tensor: Tensor, what: str) -> None:
    """Raises where `tensor`, called `what`, cannot be changed in place."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(f"{what} is expanded: its elements share memory; pass the tensor it views, or a clone()")
    if not _counts_changes(tensor) and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"{what} was made in inference mode, and can be changed only there")


def _counts_changes(tensor: Tensor) -> bool:
    """Whether `tensor` has a version counter: inference tensors have none, and a compiler that traces this has none."""
    return torch.compiler.is_compiling() or not tensor.is_inference()
