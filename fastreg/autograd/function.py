"""The penalty as an autograd Function, and how its gradient reaches .grad.

Where autograd would do nothing with the gradient but add it to .grad, the backward pass returns none and queues one
sweep that adds it in place: no model-sized buffer, no launch per tensor. Where autograd or anybody else has to see the
gradient, value and gradient are formed in one pass and returned like any other. Both form the same bits; only the order
in which .grad receives them and the data's gradient may differ.
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
    "twice; leave it out of the loss (reg.last has its value), or remove() the attachment"
)
_FIRST = 2  # the place of the first strength among the inputs of the Function; weights follow the strengths
with torch.inference_mode(False):  # fastreg may be imported in inference mode, and is used outside of it
    _NOTHING = torch.empty(0, device="cpu")
_IS_LEAF = operator.attrgetter("is_leaf")


def compute_penalty(work: Work, want: Want) -> Any:
    """The penalty, differentiable in weights and strengths where grad mode is on: the total, or all terms."""
    if torch.is_grad_enabled() and not work.is_traced:
        values = apply(PenaltyFunction, work, want, *work.penalty.strengths, *work.weights)
        return values[0] if want is Want.TOTAL else work.penalty.RESULT(*values)
    measured = sweep(work, Request(Mode.VALUE, want))
    return measured.total if want is Want.TOTAL and measured else work.penalty.result(measured)


class PenaltyFunction(torch.autograd.Function):
    """The total, then the weighted terms if they are wanted, each 0-dim."""

    @staticmethod
    def forward(ctx: Any, work: Work, want: Want, *inputs: Any) -> tuple[Tensor, ...]:
        strengths, weights = work.penalty.strengths, work.weights
        first_weight = _FIRST + len(strengths)
        ctx.set_materialize_grads(False)
        # Leaves, which the graph keeps anyway, stay out of save_for_backward: its hooks would move a copy of the model
        # to wherever activations go. Other tensors go through save_for_backward alone, to be freed after backward.
        saved = [s for s in strengths if isinstance(s, Tensor)]
        ctx.has_tensors = bool(saved)
        ctx.is_leaf, ctx.leaves = None, weights
        if not work.are_leaves:
            is_leaf = list(map(_IS_LEAF, weights))
            work = work._replace(are_leaves=all(is_leaf))
        if not work.are_leaves:
            ctx.is_leaf, ctx.leaves = is_leaf, list(itertools.compress(weights, is_leaf))
            saved += [w for w in weights if not w.is_leaf]
        if not HAS_VERSIONS:  # autograd has to notice changes in place
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
        # Saving something is also what makes a second backward through a freed graph fail as it should.
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
    """Whether hooks will probably want to see the gradients, which are then formed with the value."""
    # They come and go seldom: what the last backward pass found saves asking every weight twice.
    known = None if work.layout is None else work.layout.notes.were_hooked
    return are_hooked(work.weights) if known is None else known


def _write_after_backward(ctx: Any, work: Work, scale: tuple[Strength, ...]) -> None:
    """Add the weights' gradients to .grad once the running backward pass has finished."""
    if ctx.has_tensors:
        # By then an optimizer of the strengths may have stepped in a hook.
        clones = [s.clone() if isinstance(s, Tensor) else s for s in work.penalty.strengths]
        work = work._replace(penalty=type(work.penalty)(clones))
    state: WeightState = ctx.state

    def write() -> None:
        layout = state.check(work.weights)
        now = work if layout is work.layout else work._replace(layout=layout)
        if layout is None:
            # Autograd, too, leaves weights alone that were frozen since the forward pass.
            now = now.subset([w.requires_grad for w in now.weights])
        if now.weights:
            add_gradient(now, Want.NOTHING, scale, any_dtype=True)

    run_after_backward(write, work.weights[0].device, (*work.penalty.strengths, *scale))


def _gradients(ctx: Any, work: Work, scale: tuple[Strength, ...]) -> list[Tensor | None]:
    """The gradients to return: those of the forward pass, corrected if the upstream gradient is not 1, or new ones."""
    weights, penalty = work.weights, work.penalty
    # By name: torch.autograd.grad(is_grads_batched=True) uses a kind of batching whose key Python cannot name.
    if any(isinstance(factor, Tensor) and "Batched" in str(dispatch_keys(factor)) for factor in scale):
        # Many upstream gradients at once, which only expressions can follow.
        pairs = zip(local_shards(weights), work.groups, strict=True)
        grads = as_dtensors([gradient_of_segments(w, g, penalty, scale) for w, g in pairs], weights)
    else:
        grads, mode = ctx.gradients, Mode.RESCALE
        if grads is None or not all(isinstance(factor, Tensor) for factor in scale):
            grads, mode = _empty_gradients(weights), Mode.GRADIENT
        ctx.gradients = None  # autograd may keep these as .grad and add to them: they serve one backward only
        # Asked anew: a transform may look on in backward that did not in forward.
        now = work._replace(is_traced=is_traced_now())
        sweep(now, Request(mode, Want.NOTHING, grads, scale))
    needed = ctx.needs_input_grad[_FIRST + len(scale) :]
    return [g if is_needed else None for g, is_needed in zip(grads, needed, strict=True)]


def _empty_gradients(weights: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialized gradients, each a tensor of its own, with the strides that autograd would give them."""
    with no_subclass():
        parts = [
            torch.empty_like(w, memory_format=torch.preserve_format if is_dense(w) else torch.contiguous_format)
            for w in local_shards(weights)
        ]
    return as_dtensors(parts, weights)


def _differentiable_backward(
    ctx: Any, work: Work, of_all_ranks: Tensor, scale: tuple[Strength, ...]
) -> tuple[Tensor | None, ...]:
    """The backward pass as a graph of its own, for create_graph=True."""
    weights, penalty = work.weights, work.penalty
    visible: list[Any] = [w.to_local() if is_dtensor(w) else w for w in weights]  # type: ignore[attr-defined]
    sums = sums_of_groups(visible, work.groups, work.n_groups, penalty)
    if work.is_sharded:
        # The sums of all ranks, with the derivatives of this rank's; an infinite one has none.
        sums = torch.where(
            of_all_ranks.isfinite() & sums.isfinite(), sums + (of_all_ranks - sums).detach(), of_all_ranks
        )
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
    """The upstream gradient of each term, if there is any; that of the total counts for all of them."""
    if len(upstream) == 1:
        return None if upstream[0] is None else (upstream[0],) * n_terms
    total, *terms = upstream
    present = [[grad for grad in (total, term) if grad is not None] for term in terms]
    return tuple(sum(grads[1:], grads[0]) if grads else 0.0 for grads in present) if any(present) else None
