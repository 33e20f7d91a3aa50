"""The gradient into .grad and the proximal step into the weights, in memory that is checked before the first write."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.dtensor import as_dtensors, as_placed, is_dtensor, local_shard, local_shards
from fastreg.formulas import Measure, Mode, weighted_terms
from fastreg.local import is_dense, local_sweep
from fastreg.strengths import UNSCALED, Scale, Strength, Strengths, per_group
from fastreg.sweep import sweep_for
from fastreg.work import Work


def add_gradient(
    work: Work,
    *,
    scale: Scale = UNSCALED,
    with_value: bool = True,
    any_dtype: bool = False,
    run: Callable[..., Measure | None] | None = None,
) -> Measure | None:
    """Adds the penalty's gradient to .grad, which is created where it is None, in one sweep.

    Raises TypeError, ValueError or RuntimeError, before anything is written, for a .grad of another dtype, device or
    shape than its weight, or that cannot be changed in place. With `any_dtype` a .grad may have another dtype, as
    `Tensor.grad_dtype` allows. `run` is the function that sweeps, where the caller has chosen it.
    """
    run = run or sweep_for(work)
    grads: list[Any] = [w.grad for w in work.weights]
    if run is local_sweep and work.layout is not None and work.layout.accepts(grads):
        found = local_sweep(work, Mode.ACCUMULATE, scale=scale, grads=grads, with_value=with_value, is_accepted=True)
        torch.autograd.graph.increment_version(grads)
        return found
    if any_dtype:
        grads = [None if _has_own_dtype(w) else grad for w, grad in zip(work.weights, grads, strict=True)]
    elif not torch.compiler.is_compiling():  # compilers cannot be asked for a weight's grad_dtype
        _check_first_gradients(work)
    grads = list(map(_usable_gradient, work.weights, grads, work.names))
    found = run(work, Mode.ACCUMULATE, scale=scale, grads=grads, with_value=with_value)
    for w, grad in zip(work.weights, grads, strict=True):
        if any_dtype and w.grad is not grad:
            _store_gradient(w, grad)
        elif w.grad is not grad:
            w.grad = grad
    mark_changed(work, grads)
    return found


def apply_prox(
    work: Work, steps: Sequence[Strength], step_groups: Sequence[int] | None = None, *, with_value: bool = False
) -> Measure | None:
    """Shrinks weight i by a proximal step of size `steps[step_groups[i]]`; the value is that before it.

    Raises ValueError, before anything is written, for a weight whose elements share memory, and RuntimeError for an
    inference tensor outside inference mode.
    """
    weights = work.weights
    parts = local_shards(weights) if work.is_sharded else weights
    if work.layout is None or not work.layout.may_be_written:
        is_compiling = torch.compiler.is_compiling()  # which has no inference tensors, and cannot ask for them
        if not all(map(Tensor.is_contiguous, parts)) or (not is_compiling and any(map(Tensor.is_inference, parts))):
            for name, w in zip(work.names, parts, strict=True):
                check_writable(w, f"parameter {name!r}")
        if work.layout is not None:
            work.layout.may_be_written = not torch.is_inference_mode_enabled()
    run = sweep_for(work)
    device = weights[0].device
    used = [0] if step_groups is None else list(dict.fromkeys(step_groups))
    if len(used) == 1 or step_groups is None:
        step = per_group([steps[used[0]]], device, "lr")
        found = run(work, Mode.PROX, scale=Scale(step, step), with_value=with_value)
    else:
        # One group for each pair of strength group and step, with strengths multiplied by the step.
        pairs = list(zip(work.groups, step_groups, strict=True))
        numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
        plain = [work.strengths.of_group(group) for group, _ in numbers]
        scaled = [work.strengths.of_group(group, Scale(steps[i], steps[i])) for group, i in numbers]
        fine = [numbers[pair] for pair in pairs]
        refined = work.regrouped(fine, len(numbers), _columns(scaled, device))
        found = run(refined, Mode.PROX, with_value=with_value)
        if found is not None:
            found = weighted_terms(found.sums(len(numbers)), _columns(plain, device), found.total.dtype)
    mark_changed(work, weights)
    return found


def measure(work: Work) -> Measure | None:
    """The value alone."""
    return sweep_for(work)(work, Mode.VALUE)


def _columns(pairs: Sequence[tuple[Strength, Strength]], device: torch.device) -> Strengths:
    return Strengths(*(per_group(column, device, "lr") for column in zip(*pairs, strict=True)))


def mark_changed(work: Work, tensors: Sequence[Tensor]) -> None:
    """Lets graphs that saved one of them notice that it was changed; of a DTensor, also those that saved its part."""
    if torch.compiler.is_compiling():
        return
    torch.autograd.graph.increment_version(tensors)
    if work.is_sharded:
        torch.autograd.graph.increment_version([local_shard(t) for t in tensors if is_dtensor(t)])


def _usable_gradient(weight: Tensor, grad: Tensor | None, name: str) -> Tensor:
    """`grad` as a dense tensor of the weight's dtype to add to: zeros where there is none yet."""
    if not is_dtensor(weight):
        return _usable_part(grad, weight, name)
    grad = None if grad is None else as_placed(grad, weight)
    part = None if grad is None else local_shard(grad)
    usable = _usable_part(part, local_shard(weight), name)
    return grad if grad is not None and usable is part else as_dtensors([usable], [weight])[0]


def _has_own_dtype(weight: Any) -> bool:
    """Whether the gradient of `weight` has another dtype, or is to have one."""
    dtype = getattr(weight, "grad_dtype", None) if weight.grad is None else weight.grad.dtype
    return dtype is not None and dtype != weight.dtype


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
        # The strides that autograd would give it (its layout contract, in accumulate_grad.h).
        layout = torch.preserve_format if is_dense(weight) else torch.contiguous_format
        # -0.0 + x is exactly x, also for x = -0.0. Backward passes outside of inference mode will add to it, too.
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
        return grad.to_dense()  # as autograd leaves it, when a dense gradient follows a sparse one
    check_writable(grad, what)
    return grad


def check_writable(tensor: Tensor, what: str) -> None:
    """Raises where `tensor`, called `what`, cannot be changed in place."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(f"{what} is expanded: its elements share memory; pass the tensor it views, or a clone()")
    # A compiler that traces this has no such tensors, and cannot ask.
    if not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"{what} was made in inference mode, and can be changed only there")
