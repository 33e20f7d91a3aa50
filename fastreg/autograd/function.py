"""The penalty as an autograd Function, and how its gradient reaches .grad.

Where autograd would do nothing with the gradient but add it to .grad, the backward pass returns none and queues one
sweep that adds it in place: no model-sized buffer, no launch per tensor. Where autograd or anybody else has to see the
gradient, value and gradient are formed in one pass and returned like any other. Both form the same bits; only the order
in which .grad receives them and the data's gradient may differ.
"""

import itertools
import operator
import warnings
from collections.abc import Callable, Sequence
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
from fastreg.core.torch_private import HAS_VERSIONS, dispatch_keys, no_subclass
from fastreg.core.types import Mode, Penalty, Scale, Strength, Strengths, Work
from fastreg.formulas import penalty as formulas
from fastreg.sweep.dispatch import sweep_for
from fastreg.sweep.gradient import add_gradient
from fastreg.sweep.traced import traced_sweep

_TWICE = (
    "this penalty is attached to an optimizer, which applies it at every step, and is also part of a loss: it counts "
    "twice; leave it out of the loss (reg.last has its value), or remove() the attachment"
)
_FIRST_STRENGTH, _FIRST_WEIGHT = 3, 5  # where these stand among the inputs of the Function
_NOTHING = torch.empty(0, device="cpu")
_IS_LEAF = operator.attrgetter("is_leaf")


def penalty_of(work: Work, return_terms: bool) -> Tensor | Penalty:
    """The penalty, differentiable in weights and strengths where grad mode is on: the total, or all terms."""
    run = sweep_for(work)
    if torch.is_grad_enabled() and run is not traced_sweep:
        found = apply(ElasticPenaltyFunction, work, return_terms, run, *work.strengths, *work.weights)
        return Penalty(*found) if return_terms else found[0]
    measured = run(work, Mode.VALUE, with_terms=return_terms)
    assert measured is not None
    return measured.penalty if return_terms else measured.total


class ElasticPenaltyFunction(torch.autograd.Function):
    """The total, and if asked for the l1 and l2 terms, each 0-dim."""

    @staticmethod
    def forward(
        ctx: Any, work: Work, return_terms: bool, run: Callable[..., Any], l1: Strength, l2: Strength, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        # Leaves, which the graph keeps anyway, stay out of save_for_backward: its hooks would move a copy of the model
        # to wherever activations go. Other tensors go through save_for_backward alone, to be freed after backward.
        saved = [s for s in (l1, l2) if isinstance(s, Tensor)]
        ctx.is_leaf, ctx.leaves = None, weights
        if not work.are_leaves:
            is_leaf = list(map(_IS_LEAF, weights))
            work = work._replace(are_leaves=all(is_leaf))
        if not work.are_leaves:
            ctx.is_leaf, ctx.leaves = is_leaf, list(itertools.compress(weights, is_leaf))
            saved += [w for w in weights if not w.is_leaf]
        if not HAS_VERSIONS:  # autograd has to notice changes in place
            saved += ctx.leaves
        ctx.work = work._replace(weights=(), strengths=_without_tensors(l1, l2)) if saved else work
        ctx.state = WeightState(ctx.leaves, work.is_sharded, work.layout if work.are_leaves else None)
        mode, ctx.gradients, ctx.run = Mode.VALUE, None, run
        ctx.must_return = not work.are_leaves or must_return_gradients(work.is_sharded)
        if any(ctx.needs_input_grad[_FIRST_WEIGHT:]) and (ctx.must_return or _expects_hooks(work)):
            mode, ctx.gradients = Mode.GRADIENT, _empty_gradients(weights)
        found = run(work, mode, grads=ctx.gradients, with_terms=return_terms)
        assert found is not None
        needs_sums = work.is_sharded or any(ctx.needs_input_grad[_FIRST_STRENGTH:_FIRST_WEIGHT])
        # Saving something is also what makes a second backward through a freed graph fail as it should.
        ctx.save_for_backward(found.sums(work.n_groups) if needs_sums else _NOTHING, *saved)
        return found.penalty if return_terms else (found.total,)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        sums, *saved = ctx.saved_tensors
        work: Work = ctx.work
        if saved:
            strengths = Strengths(*[saved.pop(0) if value is None else value for value in work.strengths])
            weights = ctx.leaves
            if ctx.is_leaf is not None:
                leaves, others = iter(weights), iter(saved)
                weights = [next(leaves if is_leaf else others) for is_leaf in ctx.is_leaf]
            work = work._replace(weights=weights, strengths=strengths)
        grads: list[Tensor | None] = [None] * (_FIRST_WEIGHT + len(work.weights))
        scale = _scale(upstream)
        if scale is None:
            return (*grads,)
        if torch.is_grad_enabled():
            ctx.state.check(ctx.leaves)
            return (*grads[:_FIRST_STRENGTH], *_differentiable_backward(ctx, work, sums, scale))
        for i, s in enumerate(work.strengths):
            if ctx.needs_input_grad[_FIRST_STRENGTH + i] and isinstance(s, Tensor):
                derivative = scale[i] * sums[:, i]
                grads[_FIRST_STRENGTH + i] = (derivative if s.ndim else derivative.sum()).to(s)
        if not any(ctx.needs_input_grad[_FIRST_WEIGHT:]):
            ctx.state.check(ctx.leaves)
            return (*grads,)
        if work.is_attached:
            warnings.warn(_TWICE, stacklevel=1)
        must_return = ctx.must_return or are_hooked(work.weights)
        if work.layout is not None:
            work.layout.were_hooked = must_return
        if ctx.gradients is None and not must_return and only_accumulates(ctx, len(work.weights)):
            _write_after_backward(ctx, work, scale)
        else:
            work = work._replace(layout=ctx.state.check(ctx.leaves))
            grads[_FIRST_WEIGHT:] = _gradients(ctx, work, scale)
        return (*grads,)


note_hooks(ElasticPenaltyFunction)


def _expects_hooks(work: Work) -> bool:
    """Whether hooks will probably want to see the gradients, which are then formed with the value."""
    # They come and go seldom: what the last backward pass found saves asking every weight twice.
    known = None if work.layout is None else work.layout.were_hooked
    return are_hooked(work.weights) if known is None else known


def _write_after_backward(ctx: Any, work: Work, scale: Scale) -> None:
    """Adds the weights' gradients to .grad once the running backward pass has finished."""
    l1, l2 = work.strengths
    if isinstance(l1, Tensor) or isinstance(l2, Tensor):
        # By then an optimizer of the strengths may have stepped in a hook.
        l1, l2 = [s.clone() if isinstance(s, Tensor) else s for s in (l1, l2)]
        work = work._replace(strengths=Strengths(l1, l2))
    state: WeightState = ctx.state
    run = ctx.run

    def write() -> None:
        layout = state.check(work.weights)
        now = work if layout is work.layout else work._replace(layout=layout)
        if layout is None:
            now = _unfrozen(now)
        if now.weights:
            add_gradient(now, scale=scale, with_value=False, any_dtype=True, run=run)

    run_after_backward(write, work.weights[0].device, (l1, l2, *scale))


def _unfrozen(work: Work) -> Work:
    """Without the weights that were frozen since the forward pass: autograd leaves them alone, too."""
    kept = [i for i, w in enumerate(work.weights) if w.requires_grad]
    if len(kept) == len(work.weights):
        return work
    return work._replace(
        names=[work.names[i] for i in kept],
        weights=[work.weights[i] for i in kept],
        groups=[work.groups[i] for i in kept],
    )


def _gradients(ctx: Any, work: Work, scale: Scale) -> list[Tensor | None]:
    """The gradients to return: those of the forward pass, corrected if the upstream gradient is not 1, or new ones."""
    weights, strengths = work.weights, work.strengths
    # By name: torch.autograd.grad(is_grads_batched=True) uses a kind of batching whose key Python cannot name.
    if any(isinstance(factor, Tensor) and "Batched" in str(dispatch_keys(factor)) for factor in scale):
        # Many upstream gradients at once, which only expressions can follow.
        pairs = zip(local_shards(weights), work.groups, strict=True)
        grads = as_dtensors([formulas.gradient(w, *strengths.of_group(g, scale)) for w, g in pairs], weights)
    else:
        grads, mode = ctx.gradients, Mode.RESCALE
        if grads is None or not all(isinstance(factor, Tensor) for factor in scale):
            grads, mode = _empty_gradients(weights), Mode.GRADIENT
        ctx.gradients = None  # autograd may keep these as .grad and add to them: they serve one backward only
        sweep_for(work)(work, mode, scale=scale, grads=grads, with_value=False)
    return [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[_FIRST_WEIGHT:], strict=True)]


def _empty_gradients(weights: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialised gradients, each a tensor of its own, with the strides that autograd would give them."""
    with no_subclass():
        parts = [
            torch.empty_like(w, memory_format=torch.preserve_format if is_dense(w) else torch.contiguous_format)
            for w in local_shards(weights)
        ]
    return as_dtensors(parts, weights)


def _differentiable_backward(ctx: Any, work: Work, of_all_ranks: Tensor, scale: Scale) -> tuple[Tensor | None, ...]:
    """The backward pass as a graph of its own, for create_graph=True."""
    weights, strengths = work.weights, work.strengths
    visible: list[Any] = [w.to_local() if is_dtensor(w) else w for w in weights]  # type: ignore[attr-defined]
    sums = formulas.sums_of_groups(visible, work.groups, work.n_groups)
    if work.is_sharded:
        # The sums of all ranks, with the derivatives of this rank's; an infinite one has none.
        sums = torch.where(
            of_all_ranks.isfinite() & sums.isfinite(), sums + (of_all_ranks - sums).detach(), of_all_ranks
        )
    terms = formulas.weighted_terms(sums, strengths, sums.dtype).penalty[1:]
    inputs: list[Any] = [*strengths, *weights]
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[_FIRST_STRENGTH:]) if needed]
    upstream = [torch.as_tensor(factor, device=term.device).to(term) for factor, term in zip(scale, terms, strict=True)]
    found = torch.autograd.grad(terms, [inputs[i] for i in wanted], upstream, create_graph=True)
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return (*grads,)


def _without_tensors(*strengths: Any) -> Strengths:
    floats: list[Any] = [None if isinstance(s, Tensor) else s for s in strengths]
    return Strengths(*floats)


def _scale(upstream: Sequence[Tensor | None]) -> Scale | None:
    """The upstream gradients of the two terms, where there are any; that of the total counts for both."""
    if len(upstream) == 1:
        return None if upstream[0] is None else Scale(upstream[0], upstream[0])
    total, l1_term, l2_term = upstream
    present = [[grad for grad in (total, term) if grad is not None] for term in (l1_term, l2_term)]
    return Scale(*[sum(grads[1:], grads[0]) if grads else 0.0 for grads in present]) if any(present) else None
