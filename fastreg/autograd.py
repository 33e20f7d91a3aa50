"""The penalty as an autograd Function, and how its gradient reaches .grad.

Where autograd would do nothing with the gradient but add it to .grad, the backward pass returns none and queues one
sweep that adds it in place: no model-sized buffer, no launch per tensor. Where autograd or anybody else has to see the
gradient, value and gradient are formed in one pass and returned like any other. Both form the same bits; only the order
in which .grad receives them and the data's gradient may differ.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg import formulas
from fastreg.changes import WeightState
from fastreg.direct import must_return_gradient, positions_to_write, run_after_backward
from fastreg.dtensor import any_dtensor, as_dtensors, is_dtensor, local_parts
from fastreg.formulas import Mode, Penalty
from fastreg.inplace import add_gradient
from fastreg.local import is_dense
from fastreg.strengths import Scale, Strength, Strengths
from fastreg.sweep import sweep
from fastreg.traced import is_traced
from fastreg.work import Work


def penalty_of(work: Work, return_terms: bool) -> Tensor | Penalty:
    """The penalty, differentiable in weights and strengths where grad mode is on: the total, or all terms."""
    if torch.is_grad_enabled() and not is_traced():
        found = ElasticPenaltyFunction.apply(work, return_terms, *work.strengths, *work.weights)
        return Penalty(*found) if return_terms else found[0]
    measured = sweep(work, Mode.VALUE)
    assert measured is not None
    return measured.penalty if return_terms else measured.penalty.total


class ElasticPenaltyFunction(torch.autograd.Function):
    """The total, and if asked for the l1 and l2 terms, each 0-dim."""

    @staticmethod
    def forward(
        ctx: Any, work: Work, return_terms: bool, l1: Strength, l2: Strength, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.floats = [None if isinstance(s, Tensor) else s for s in (l1, l2)]
        # Leaves, which the graph keeps anyway, stay out of save_for_backward: its hooks would move a copy of the model
        # to wherever activations go. Nothing else may keep weights that were computed for one step.
        ctx.leaves = [w if w.is_leaf else None for w in weights]
        ctx.work = work._replace(weights=(), strengths=Strengths(1.0, 1.0))
        ctx.state = WeightState(ctx.leaves)
        ctx.gradients = None
        mode = Mode.VALUE
        if any(ctx.needs_input_grad[4:]) and must_return_gradient(weights):
            mode = Mode.GRADIENT
            ctx.gradients = _empty_gradients(weights)
        found = sweep(work, mode, grads=ctx.gradients)
        assert found is not None
        # Saving something is also what makes a second backward through a freed graph fail as it should.
        saved = [s for s in (l1, l2) if isinstance(s, Tensor)] + [w for w in weights if not w.is_leaf]
        ctx.save_for_backward(found.sums, *saved)
        return found.penalty if return_terms else (found.penalty.total,)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        sums, *saved = ctx.saved_tensors
        strengths = Strengths(*(saved.pop(0) if value is None else value for value in ctx.floats))
        weights = [saved.pop(0) if leaf is None else leaf for leaf in ctx.leaves]
        work: Work = ctx.work._replace(weights=weights, strengths=strengths)
        scale = _scale(*upstream)
        ctx.state.check(ctx.leaves)
        none = [None] * len(weights)
        if all(grad is None for grad in upstream):
            return None, None, None, None, *none
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, work, sums, scale)
        strength_grads: list[Tensor | None] = [None, None]
        for i, s in enumerate(strengths):
            if ctx.needs_input_grad[2 + i] and isinstance(s, Tensor):
                derivative = scale[i] * sums[:, i]
                strength_grads[i] = (derivative if s.ndim else derivative.sum()).to(s)
        if not any(ctx.needs_input_grad[4:]):
            return None, None, *strength_grads, *none
        if work.is_attached:
            _warn_of_two_penalties()
        targets = None if ctx.gradients is not None else positions_to_write(ctx, weights)
        if targets is None:
            return None, None, *strength_grads, *_gradients(ctx, work, scale)
        if targets:
            _write_after_backward(_subset(work, targets), scale)
        return None, None, *strength_grads, *none


def _warn_of_two_penalties() -> None:
    warnings.warn(
        "this penalty is attached to an optimizer, which applies it at every step, and is also part of a loss: it "
        "counts twice; leave it out of the loss (reg.last has its value), or remove() the attachment",
        stacklevel=2,
    )


def _write_after_backward(work: Work, scale: Scale) -> None:
    """Adds the weights' gradients to .grad once the running backward pass has finished."""
    state = WeightState(work.weights)
    # By then an optimizer of the strengths may have stepped in a hook.
    strengths = Strengths(*(s.clone() if isinstance(s, Tensor) else s for s in work.strengths))

    def write() -> None:
        state.check(work.weights)
        alive = [i for i, w in enumerate(work.weights) if w.requires_grad]  # autograd leaves out what was frozen since
        if alive:
            add_gradient(_subset(work._replace(strengths=strengths), alive), scale=scale, with_value=False)

    run_after_backward(write, work.weights[0].device, [*strengths, *scale])


def _subset(work: Work, positions: Sequence[int]) -> Work:
    if len(positions) == len(work.weights):
        return work
    names, weights, groups = ([column[i] for i in positions] for column in (work.names, work.weights, work.groups))
    return work._replace(names=names, weights=weights, groups=groups)


def _gradients(ctx: Any, work: Work, scale: Scale) -> list[Tensor | None]:
    """The gradients to return: those of the forward pass, corrected if the upstream gradient is not 1, or new ones."""
    weights, strengths = work.weights, work.strengths
    if any(_is_batched(factor) for factor in scale):
        # Many upstream gradients at once, by torch.autograd.grad(is_grads_batched=True): only expressions can follow.
        pairs = zip(local_parts(weights), work.groups, strict=True)
        grads = as_dtensors([formulas.gradient(w, *strengths.of_group(g, scale)) for w, g in pairs], weights)
    else:
        grads, mode = ctx.gradients, Mode.RESCALE
        if grads is None or not all(isinstance(factor, Tensor) for factor in scale):
            grads, mode = _empty_gradients(weights), Mode.GRADIENT
        ctx.gradients = None  # autograd may keep these as .grad and add to them: they serve one backward only
        sweep(work, mode, scale=scale, grads=grads, with_value=False)
    return [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[4:], strict=True)]


def _empty_gradients(weights: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialised gradients, each a tensor of its own, with the strides that autograd would give them."""
    with torch._C.DisableTorchFunctionSubclass():
        parts = [
            torch.empty_like(w, memory_format=torch.preserve_format if is_dense(w) else torch.contiguous_format)
            for w in local_parts(weights)
        ]
    return as_dtensors(parts, weights)


def _is_batched(factor: Strength) -> bool:
    # By name: torch.autograd.grad still uses the older of two kinds of batching, whose key Python cannot name.
    return isinstance(factor, Tensor) and "Batched" in str(torch._C._dispatch_keys(factor))


def _differentiable_backward(ctx: Any, work: Work, of_all_ranks: Tensor, scale: Scale) -> tuple[Tensor | None, ...]:
    """The backward pass as a graph of its own, for create_graph=True."""
    weights, strengths = work.weights, work.strengths
    visible: list[Any] = [w.to_local() if is_dtensor(w) else w for w in weights]  # type: ignore[attr-defined]
    sums = formulas.group_sums(visible, work.groups, work.n_groups)
    if any_dtensor(weights):
        # The sums of all ranks, with the derivatives of this rank's; an infinite one has none.
        sums = torch.where(
            of_all_ranks.isfinite() & sums.isfinite(), sums + (of_all_ranks - sums).detach(), of_all_ranks
        )
    terms = formulas.measure(sums, strengths, sums.dtype).penalty[1:]
    inputs: list[Any] = [*strengths, *weights]
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
    upstream = [torch.as_tensor(factor, device=term.device).to(term) for factor, term in zip(scale, terms, strict=True)]
    found = torch.autograd.grad(terms, [inputs[i] for i in wanted], upstream, create_graph=True)
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return None, None, *grads


def _scale(total: Tensor | None, l1_term: Tensor | None = None, l2_term: Tensor | None = None) -> Scale:
    """The upstream gradients of the two terms; that of the total counts for both."""
    return Scale(_sum(total, l1_term), _sum(total, l2_term))


def _sum(total: Tensor | None, term: Tensor | None) -> Strength:
    if total is None:
        return 0.0 if term is None else term
    return total if term is None else total + term
