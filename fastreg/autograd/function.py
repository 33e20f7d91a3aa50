"""The penalty as an autograd Function, and the two ways in which its gradient reaches .grad.

If autograd would only add the gradient to .grad, backward returns None and queues one sweep that adds the gradient in
place after the backward pass. This needs no model-sized buffer and no launch per tensor. If autograd, a hook or the
caller must see the gradient, forward computes value and gradient in one pass, and backward returns the gradient. Both
ways give the same bits. Only the order in which .grad receives the gradients of the penalty and of the data may differ.
"""

import itertools
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.autograd.engine import (
    apply,
    are_hooked,
    must_return_gradients,
    note_hooks,
    only_accumulates,
    run_after_backward,
)
from fastreg.autograd.saved import WeightState
from fastreg.core.checks import warn_of_detached
from fastreg.core.dtensor import as_dtensors, is_dtensor, local_shards
from fastreg.core.layout import is_dense
from fastreg.core.penalty import Strength
from fastreg.core.torch_private import HAS_VERSIONS, dispatch_keys, no_subclass
from fastreg.core.types import Mode, Request, Want, Work
from fastreg.formulas.penalty import gradient_of_segments, sums_of_groups
from fastreg.sweep.dispatch import is_traced_now, sweep
from fastreg.sweep.gradient import add_gradient

_TWICE = (
    "this penalty is attached to an optimizer, which applies it at every step, and is also part of a loss: it counts "
    "twice; leave it out of the loss (reg.last has its value), or call remove() on the attachment"
)
_FIRST = 2  # index of the first strength among the inputs of the Function; the weights follow the strengths
with torch.inference_mode(False):  # an import may be in inference mode, and save_for_backward takes no inference tensor
    _NOTHING = torch.empty(0, device="cpu")
_IS_LEAF = operator.attrgetter("is_leaf")


def compute_penalty(work: Work, want: Want) -> Any:
    """Return the penalty, the total or all terms, differentiable in weights and strengths if grad mode is on."""
    if torch.is_grad_enabled() and not work.is_traced:
        values = apply(PenaltyFunction, work, want, *work.penalty.strengths, *work.weights)
        if not values[0].requires_grad:
            warn_of_detached(work.names, work.weights, ", or call this under torch.no_grad() for the value alone")
        return values[0] if want is Want.TOTAL else work.penalty.RESULT(*values)
    measured = sweep(work, Request(Mode.VALUE, want))
    return measured.total if want is Want.TOTAL and measured else work.penalty.result(measured)


class PenaltyFunction(torch.autograd.Function):
    """Return the total, then the weighted terms if they are wanted; all are 0-dim."""

    @staticmethod
    def forward(ctx: Any, work: Work, want: Want, *inputs: Any) -> tuple[Tensor, ...]:
        strengths, weights = work.penalty.strengths, work.weights
        first_weight = _FIRST + len(strengths)
        ctx.set_materialize_grads(False)
        # Leaves stay out of save_for_backward: the graph keeps them anyway, and saved-tensor hooks would offload a copy
        # of the model. Other tensors are kept by save_for_backward alone, so that backward frees them.
        saved = [s for s in strengths if isinstance(s, Tensor)]
        ctx.has_tensors = bool(saved)
        ctx.is_leaf, ctx.leaves = None, weights
        if not work.are_leaves:
            is_leaf = list(map(_IS_LEAF, weights))
            work = work._replace(are_leaves=all(is_leaf))
        if not work.are_leaves:
            ctx.is_leaf, ctx.leaves = is_leaf, list(itertools.compress(weights, is_leaf))
            saved += [w for w in weights if not w.is_leaf]
        if not HAS_VERSIONS:  # autograd then detects in-place changes
            saved += ctx.leaves
        ctx.work = work._replace(weights=(), penalty=_without_tensors(work.penalty)) if saved else work
        ctx.state = WeightState(ctx.leaves, work.is_sharded, work.layout if work.are_leaves else None)
        mode, ctx.gradients = Mode.VALUE, None
        ctx.must_return = not work.are_leaves or must_return_gradients(work.is_sharded)
        needed = ctx.needs_input_grad
        if any(needed[first_weight:]) and (ctx.must_return or _expects_hooks(work)):
            mode, ctx.gradients = Mode.GRADIENT, _empty_gradients(weights)
        measured: Any = sweep(work, Request(mode, want, ctx.gradients))
        needs_sums = work.is_sharded or any(needed[_FIRST:first_weight])
        # A saved tensor also makes a second backward through a freed graph raise an error.
        ctx.save_for_backward(measured.sums(work.n_groups) if needs_sums else _NOTHING, *saved)
        return (measured.total,) if want is Want.TOTAL else (measured.total, *measured.terms)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        sums, *saved = ctx.saved_tensors
        work: Work = ctx.work
        if saved:
            penalty = type(work.penalty)([saved.pop(0) if value is None else value for value in work.penalty.strengths])
            weights = ctx.leaves
            if ctx.is_leaf is not None:
                leaves, others = iter(weights), iter(saved)
                weights = [next(leaves if is_leaf else others) for is_leaf in ctx.is_leaf]
            work = work._replace(weights=weights, penalty=penalty)
        strengths = work.penalty.strengths
        first_weight = _FIRST + len(strengths)
        grads: list[Tensor | None] = [None] * (first_weight + len(work.weights))
        scale = _scale(upstream, len(strengths))
        if scale is None:
            return (*grads,)
        if torch.is_grad_enabled():
            ctx.state.check(ctx.leaves)
            return (*grads[:_FIRST], *_differentiable_backward(ctx, work, sums, scale))
        for i, s in enumerate(strengths):
            if ctx.needs_input_grad[_FIRST + i] and isinstance(s, Tensor):
                derivative = scale[i] * sums[:, i]
                grads[_FIRST + i] = (derivative if s.ndim else derivative.sum()).to(s)
        if not any(ctx.needs_input_grad[first_weight:]):
            ctx.state.check(ctx.leaves)
            return (*grads,)
        if work.is_attached:
            warnings.warn(_TWICE, stacklevel=1)
        must_return = ctx.must_return or are_hooked(work.weights)
        if work.layout is not None:
            work.layout.notes.were_hooked = must_return
        if ctx.gradients is None and not must_return and only_accumulates(ctx, len(work.weights)):
            _write_after_backward(ctx, work, scale)
        else:
            work = work._replace(layout=ctx.state.check(ctx.leaves))
            grads[first_weight:] = _gradients(ctx, work, scale)
        return (*grads,)


note_hooks(PenaltyFunction)


def _expects_hooks(work: Work) -> bool:
    """Return whether hooks will probably see the gradients. Forward then computes them with the value."""
    # Hooks seldom change. The answer of the last backward pass saves asking every weight twice.
    were_hooked = None if work.layout is None else work.layout.notes.were_hooked
    return are_hooked(work.weights) if were_hooked is None else were_hooked


def _write_after_backward(ctx: Any, work: Work, scale: tuple[Strength, ...]) -> None:
    """Add the weights' gradients to .grad when the running backward pass has finished."""
    if ctx.has_tensors:
        # Before the write, a hook may step an optimizer that changes the strengths in place.
        clones = [s.clone() if isinstance(s, Tensor) else s for s in work.penalty.strengths]
        work = work._replace(penalty=type(work.penalty)(clones))
    state: WeightState = ctx.state

    def write() -> None:
        layout = state.check(work.weights)
        now = work if layout is work.layout else work._replace(layout=layout)
        if layout is None:
            # Like autograd, skip weights that were frozen after the forward pass.
            now = now.subset([w.requires_grad for w in now.weights])
        if now.weights:
            add_gradient(now, Want.NOTHING, scale, any_dtype=True)

    run_after_backward(write, work.weights[0].device, (*work.penalty.strengths, *scale))


def _gradients(ctx: Any, work: Work, scale: tuple[Strength, ...]) -> list[Tensor | None]:
    """Return the gradients of the forward pass, rescaled if the upstream gradient is not 1, or new gradients."""
    weights, penalty = work.weights, work.penalty
    # Compare the name: Python has no object for the batching key of torch.autograd.grad(is_grads_batched=True).
    if any(isinstance(factor, Tensor) and "Batched" in str(dispatch_keys(factor)) for factor in scale):
        # Only expressions can be batched over upstream gradients.
        pairs = zip(local_shards(weights), work.groups, strict=True)
        grads = as_dtensors([gradient_of_segments(w, g, penalty, scale) for w, g in pairs], weights)
    else:
        grads, mode = ctx.gradients, Mode.RESCALE
        if grads is None or not all(isinstance(factor, Tensor) for factor in scale):
            grads, mode = _empty_gradients(weights), Mode.GRADIENT
        ctx.gradients = None  # use them in one backward only: autograd may keep them as .grad and add to them
        # Check again: a transform may be active in backward but not in forward.
        now = work._replace(is_traced=is_traced_now())
        sweep(now, Request(mode, Want.NOTHING, grads, scale))
    needed = ctx.needs_input_grad[_FIRST + len(scale) :]
    return [g if is_needed else None for g, is_needed in zip(grads, needed, strict=True)]


def _empty_gradients(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return uninitialized gradients, separate tensors with the strides that autograd would give them."""
    with no_subclass():
        parts = [
            torch.empty_like(w, memory_format=torch.preserve_format if is_dense(w) else torch.contiguous_format)
            for w in local_shards(weights)
        ]
    return as_dtensors(parts, weights)


def _differentiable_backward(
    ctx: Any, work: Work, global_sums: Tensor, scale: tuple[Strength, ...]
) -> tuple[Tensor | None, ...]:
    """Compute the gradients as a differentiable graph, for create_graph=True."""
    weights, penalty = work.weights, work.penalty
    visible: list[Any] = [w.to_local() if is_dtensor(w) else w for w in weights]  # type: ignore[attr-defined]
    sums = sums_of_groups(visible, work.groups, work.n_groups, penalty)
    if work.is_sharded:
        # The values of all ranks' sums with the derivatives of this rank's sums. An infinite sum has no derivative.
        sums = torch.where(global_sums.isfinite() & sums.isfinite(), sums + (global_sums - sums).detach(), global_sums)
    terms: Any = penalty.weighted(sums, sums.dtype).terms
    inputs: list[Any] = [*penalty.strengths, *weights]
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[_FIRST:]) if needed]
    upstream = [torch.as_tensor(factor, device=term.device).to(term) for factor, term in zip(scale, terms, strict=True)]
    derivatives = torch.autograd.grad(terms, [inputs[i] for i in wanted], upstream, create_graph=True)
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(wanted, derivatives, strict=True):
        grads[i] = grad
    return (*grads,)


def _without_tensors(penalty: Any) -> Any:
    return type(penalty)([None if isinstance(s, Tensor) else s for s in penalty.strengths])


def _scale(upstream: Sequence[Tensor | None], n_terms: int) -> tuple[Strength, ...] | None:
    """Return the upstream gradient of each term, or None if there is none. Add the total's gradient to every term."""
    if len(upstream) == 1:
        return None if upstream[0] is None else (upstream[0],) * n_terms
    total, *terms = upstream
    present = [[grad for grad in (total, term) if grad is not None] for term in terms]
    return tuple(sum(grads[1:], grads[0]) if grads else 0.0 for grads in present) if any(present) else None
