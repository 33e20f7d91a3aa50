"""How the penalty's gradient reaches .grad.

Where autograd would do nothing with the gradient but add it to .grad, the backward pass returns none and queues one
sweep that adds it in place: no model-sized buffer, no launch per tensor. Where autograd or anybody else has to see the
gradient, value and gradient are formed in one pass and returned like any other. Both form the same bits; only the order
in which .grad receives them and the data's gradient may differ.
"""

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreg import reference
from fastreg.accumulate import add_gradients
from fastreg.dtensor import any_dtensor, as_dtensors, is_dtensor, local, local_parts
from fastreg.ops import sweep
from fastreg.plan import Mode
from fastreg.strengths import Scale, Strength, Strengths, measure
from fastreg.sweep import empty_gradients


class Call(NamedTuple):
    """What `ElasticPenaltyFunction` takes besides tensors."""

    groups: Sequence[int]
    impl: str | None
    all_reduce: bool = True
    terms: bool = True


class ElasticPenaltyFunction(torch.autograd.Function):
    """The total, and if asked for the l1 and l2 terms, each 0-dim; differentiable in weights and strengths."""

    @staticmethod
    def forward(ctx: Any, call: Call, l1: Strength, l2: Strength, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.floats = [None if isinstance(s, Tensor) else s for s in (l1, l2)]
        # Leaves, which the graph keeps anyway, stay out of save_for_backward: its hooks would move a copy of the model
        # to wherever activations go.
        ctx.leaves = [w if w.is_leaf else None for w in weights]
        ctx.versions = Versions(ctx.leaves)
        ctx.gradients = None
        mode = Mode.VALUE
        if any(ctx.needs_input_grad[3:]) and is_observed(weights):
            mode = Mode.GRADIENT
            ctx.gradients = _empty_gradients(weights)
        keywords: dict[str, Any] = {"impl": call.impl, "all_reduce": call.all_reduce}
        found = sweep(weights, call.groups, mode, Strengths(l1, l2), grads=ctx.gradients, **keywords)
        assert found is not None
        # Saving something is also what makes a second backward through a freed graph fail as it should.
        saved = [s for s in (l1, l2) if isinstance(s, Tensor)] + [w for w in weights if not w.is_leaf]
        ctx.save_for_backward(found.sums, *saved)
        return (found.total, found.l1, found.l2) if call.terms else (found.total,)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        sums, *saved = ctx.saved_tensors
        l1, l2 = (saved.pop(0) if value is None else value for value in ctx.floats)
        weights = [saved.pop(0) if leaf is None else leaf for leaf in ctx.leaves]
        strengths, scale = Strengths(l1, l2), _scale(*upstream)
        ctx.versions.check(ctx.leaves)
        none = [None] * len(weights)
        if all(grad is None for grad in upstream):
            return None, None, None, *none
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, weights, sums, strengths, scale)
        strength_grads: list[Tensor | None] = [None, None]
        for i, s in enumerate(strengths):
            if ctx.needs_input_grad[1 + i] and isinstance(s, Tensor):
                derivative = scale[i] * sums[:, i]
                strength_grads[i] = (derivative if s.ndim else derivative.sum()).to(s)
        if not any(ctx.needs_input_grad[3:]):
            return None, *strength_grads, *none
        targets = _only_accumulated(ctx, weights)
        if targets is None:
            return None, *strength_grads, *_gradients(ctx, weights, strengths, scale)
        if targets:
            _queue(
                [weights[i] for i in targets], [ctx.call.groups[i] for i in targets], strengths, scale, ctx.call.impl
            )
        return None, *strength_grads, *none


class Versions:
    """How often each weight was changed in place, as far as that is counted."""

    def __init__(self, weights: Sequence[Tensor | None]) -> None:
        self._counts = _counts(weights)
        # The part of a DTensor counts by itself. FSDP2 may give a weight another part, which says nothing.
        distributed = any_dtensor(weights)
        parts = [(i, local(w)) for i, w in enumerate(weights) if distributed and w is not None and is_dtensor(w)]
        self._parts = [(i, weakref.ref(part), _counts([part])) for i, part in parts]

    def check(self, weights: Sequence[Tensor | None]) -> None:
        """Raises as saved tensors do where one of the same weights was changed in place since."""
        changed = _counts(weights) != self._counts
        for i, part, counts in self._parts:
            weight = weights[i]
            assert weight is not None
            now = local(weight)
            changed |= part() is now and _counts([now]) != counts
        if changed:
            raise RuntimeError(
                "one of the weights needed for the gradient of the elastic penalty was modified by an in-place "
                "operation between forward and backward; call backward before optimizer.step(), or compute the "
                "penalty again"
            )


def _counts(weights: Sequence[Tensor | None]) -> list[int]:
    try:
        return [w._version for w in weights]  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):  # a None, an inference tensor
        return [0 if w is None or w.is_inference() else w._version for w in weights]


def is_observed(weights: Sequence[Tensor]) -> bool:
    """Whether anybody but .grad would see these weights' gradients, as far as that is known before backward runs."""
    # DDP and its kin reduce gradients in hooks of C++ that nothing in Python shows; if ranks scale their losses
    # differently, only what passes through those hooks is averaged. Not so of DTensors: FSDP2 sets their .grad by
    # itself, on a stream that is safe to follow only when the backward pass is over.
    if torch.distributed.is_available() and torch.distributed.is_initialized() and not any_dtensor(weights):
        return True
    if torch.is_anomaly_enabled() or not _HAS_ENGINE_ENTRY_POINTS or _compiled_autograd():
        return True
    # A pass for each question takes half the time of asking each weight all of them.
    return (
        not all([w.is_leaf for w in weights])
        or any([w._backward_hooks for w in weights])  # type: ignore[attr-defined]
        or any([w._post_accumulate_grad_hooks for w in weights])  # type: ignore[attr-defined]
        or (_HAS_GRAD_DTYPE and [w.grad_dtype for w in weights] != [w.dtype for w in weights])  # type: ignore[attr-defined]
    )


_HAS_GRAD_DTYPE = hasattr(Tensor, "grad_dtype")
_HAS_ENGINE_ENTRY_POINTS = hasattr(torch._C, "_will_engine_execute_node") and hasattr(
    torch.autograd.Variable._execution_engine, "queue_callback"
)


@torch.inference_mode(False)
@torch.enable_grad()
def _references_of_an_unshared_node() -> int:
    graph: Any = torch.zeros((), device="cpu", requires_grad=True).clone()
    return max(_references(graph.grad_fn.next_functions))


def _references(edges: Any) -> list[int]:
    """How often the node of each edge is referenced, as seen from here."""
    return [sys.getrefcount(node) for node, _ in edges]


# PyTorch versions differ in how many references are their own.
_UNSHARED = _references_of_an_unshared_node()


def _compiled_autograd() -> bool:
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(module, "compiled_autograd_enabled", False))


def _only_accumulated(ctx: Any, weights: Sequence[Tensor]) -> list[int] | None:
    """The positions of the weights whose gradient this backward pass would add to .grad, seen by nobody.

    None where that is not so, or not known: the gradients must then be returned.
    """
    if ctx.gradients is not None or is_observed(weights) or _is_hooked(ctx):
        return None
    nodes = ctx.next_functions[-len(weights) :]
    # Whoever holds an AccumulateGrad node does so to hook it, and asking all of them for their hooks takes too long.
    if max(_references(nodes)) > _UNSHARED:
        return None
    try:
        return [i for i, (node, _) in enumerate(nodes) if node and torch._C._will_engine_execute_node(node)]
    except RuntimeError:  # torch.autograd.grad, which wants the gradients themselves
        return None


def _is_hooked(node: Any) -> bool:
    """Whether hooks registered on `node` will see the gradients that it returns."""
    handle = node.register_hook(lambda inputs, outputs: None)
    hooks = handle.hooks_dict_ref()
    handle.remove()
    return bool(hooks)


def _queue(
    weights: Sequence[Tensor], groups: Sequence[int], strengths: Strengths, scale: Scale, impl: str | None
) -> None:
    """Adds the weights' gradients to .grad once the running backward pass has finished."""
    expected = Versions(weights)
    # By then an optimizer of the strengths may have stepped in a hook.
    strengths = Strengths(*(s.clone() if isinstance(s, Tensor) else s for s in strengths))
    follow = _stream_follower(weights[0].device)

    def accumulate() -> None:
        follow(scale)
        expected.check(weights)
        alive = [i for i, w in enumerate(weights) if w.requires_grad]  # autograd leaves out what was frozen since
        if alive:
            targets, of_groups = [weights[i] for i in alive], [groups[i] for i in alive]
            add_gradients(targets, of_groups, strengths, scale=scale, reduce=False, impl=impl)

    queue = torch.autograd.Variable._execution_engine.queue_callback
    # Queued from a callback, it comes after those that this backward pass still queues, such as FSDP2's last one.
    queue(lambda: queue(accumulate))


def _stream_follower(device: torch.device) -> Callable[[Scale], None]:
    """For the callback, which may run on another stream than this node: makes it wait for the upstream gradient."""
    if device.type != "cuda":
        return lambda scale: None
    producer = torch.cuda.current_stream(device)

    def follow(scale: Scale) -> None:
        consumer = torch.cuda.current_stream(device)
        if consumer != producer:
            consumer.wait_stream(producer)
            for factor in scale:
                if isinstance(factor, Tensor):
                    factor.record_stream(consumer)

    return follow


def _gradients(ctx: Any, weights: Sequence[Tensor], strengths: Strengths, scale: Scale) -> list[Tensor | None]:
    """The gradients to return: those of the forward pass, corrected if the upstream gradient is not 1, or new ones."""
    groups = ctx.call.groups
    if any(_is_batched(factor) for factor in scale):
        # Many upstream gradients at once, by torch.autograd.grad(is_grads_batched=True): only expressions can follow.
        pairs = zip(local_parts(weights), groups, strict=True)
        grads = as_dtensors([reference.gradient(w, *strengths.of_group(g, scale)) for w, g in pairs], weights)
    else:
        grads, mode = ctx.gradients, Mode.RESCALE
        if grads is None or not all(isinstance(factor, Tensor) for factor in scale):
            grads, mode = _empty_gradients(weights), Mode.GRADIENT
        ctx.gradients = None  # autograd may keep these as .grad and add to them: they serve one backward only
        sweep(weights, groups, mode, strengths, scale=scale, grads=grads, reduce=False, impl=ctx.call.impl)
    return [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[3:], strict=True)]


def _empty_gradients(weights: Sequence[Tensor]) -> list[Tensor]:
    return as_dtensors(empty_gradients(local_parts(weights)), weights)


def _is_batched(factor: Strength) -> bool:
    # By name: torch.autograd.grad still uses the older of two kinds of batching, whose key Python cannot name.
    return isinstance(factor, Tensor) and "Batched" in str(torch._C._dispatch_keys(factor))


def _differentiable_backward(
    ctx: Any, weights: Sequence[Tensor], of_all_ranks: Tensor, strengths: Strengths, scale: Scale
) -> tuple[Tensor | None, ...]:
    """The backward pass as a graph of its own, for create_graph=True."""
    visible: list[Any] = [w.to_local() if is_dtensor(w) else w for w in weights]  # type: ignore[attr-defined]
    sums = reference.group_sums(visible, ctx.call.groups)
    if any_dtensor(weights):
        # The sums of all ranks, with the derivatives of this rank's; an infinite one has none.
        sums = torch.where(
            of_all_ranks.isfinite() & sums.isfinite(), sums + (of_all_ranks - sums).detach(), of_all_ranks
        )
    terms = measure(sums, strengths, sums.dtype)[1:3]
    inputs: list[Any] = [*strengths, *weights]
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
    upstream = [torch.as_tensor(factor, device=term.device).to(term) for factor, term in zip(scale, terms, strict=True)]
    found = torch.autograd.grad(terms, [inputs[i] for i in wanted], upstream, create_graph=True)
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return None, *grads


def _scale(total: Tensor | None, l1_term: Tensor | None = None, l2_term: Tensor | None = None) -> Scale:
    """The upstream gradients of the two terms; that of the total counts for both."""
    return Scale(_sum(total, l1_term), _sum(total, l2_term))


def _sum(total: Tensor | None, term: Tensor | None) -> Strength:
    if total is None:
        return 0.0 if term is None else term
    return total if term is None else total + term
