"""The sweep where a compiler has to see through it: PyTorch's own operators, or one opaque operator per sweep.

On the PyTorch path a traced sweep is a handful of expressions, which the compiler fuses. The Triton kernels are hidden
in custom operators, whose schemas declare what they change. They know nothing of weighted terms: those are
expressions of the operators' sums, through which the strengths get their gradients.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from fastreg import distributed, reference
from fastreg import sweep as eager
from fastreg.dtensor import any_dtensor, hides_dtensor
from fastreg.plan import Mode
from fastreg.strengths import UNSCALED, Measure, Scale, Strength, Strengths, measure, value_dtype

_UNIT = Strengths(1.0, 1.0)
# mode="reduce-overhead" would let tables that outlive a call be allocated in memory that it takes back. Graphs that are
# captured by hand do not.
_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


@torch.no_grad()
def sweep(
    weights: Sequence[Tensor],
    groups: Sequence[int],
    mode: Mode,
    strengths: Strengths,
    *,
    all_reduce: bool = True,
    **keywords: Any,
) -> Measure | None:
    """`fastreg.sweep.sweep`, for DTensors too, and inside a compiler its equivalent for VALUE, ACCUMULATE and PROX.

    Args:
        all_reduce: of DTensors, whether the measure is to be that of all ranks.
        keywords: as `fastreg.sweep.sweep` takes them.
    """
    if torch.compiler.is_compiling():
        return traced_sweep(weights, groups, mode, strengths, **keywords)
    if any_dtensor(weights):
        return distributed.sweep(weights, groups, mode, strengths, all_reduce=all_reduce, **keywords)
    return eager.sweep(weights, groups, mode, strengths, **keywords)


def traced_sweep(
    weights: Sequence[Tensor],
    groups: Sequence[int],
    mode: Mode,
    strengths: Strengths,
    *,
    scale: Scale = UNSCALED,
    grads: Sequence[Tensor] | None = None,
    reduce: bool = True,
    impl: str | None = None,
) -> Measure | None:
    """The same in terms of operators that autograd, compilers and transforms see through.

    Raises:
        RuntimeError: DTensor weights, whose sums over ranks are not among them.
    """
    if any_dtensor(weights) or (not torch.compiler.is_compiling() and any(map(hides_dtensor, weights))):
        raise RuntimeError(
            "a penalty of DTensor weights cannot be traced; call it outside of the compiled or transformed function"
        )
    if not any(eager.uses_triton(w.device, impl) for w in weights):
        sums = reference.group_sums(weights, groups) if reduce else None
        reference.traced_update(weights, groups, mode, strengths, scale, grads)
    elif mode == Mode.VALUE:
        sums = group_sums(list(weights), list(groups), max(groups) + 1, impl)
    else:
        l1, l2 = _per_group(strengths, scale, max(groups) + 1, weights[0].device)
        if grads is not None:
            sums = add_gradient_(list(grads), list(weights), list(groups), l1, l2, reduce, impl)
        else:
            sums = prox_(list(weights), list(groups), l1, l2, reduce, impl)
    return measure(sums, strengths, value_dtype([w.dtype for w in weights])) if reduce and sums is not None else None


@library.custom_op(
    "fastreg::group_sums",
    mutates_args=(),
    tags=_TAGS,
    schema="(Tensor[] weights, int[] groups, int n_groups, str? impl) -> Tensor",
)
def group_sums(weights: list[Tensor], groups: list[int], n_groups: int, impl: str | None) -> Tensor:
    """Sums of |w| and w² of each strength group, float64 [n_groups, 2]; differentiable, twice."""
    return _sums(eager.sweep(weights, groups, Mode.VALUE, _UNIT, impl=impl), weights[0])


@library.custom_op(
    "fastreg::gradients",
    mutates_args=(),
    tags=_TAGS,
    schema="(Tensor[] weights, int[] groups, Tensor l1, Tensor l2, str? impl) -> Tensor[]",
)
def gradients(weights: list[Tensor], groups: list[int], l1: Tensor, l2: Tensor, impl: str | None) -> list[Tensor]:
    """l1 * sign(w) + 2 * l2 * w of each weight, for strengths [n_groups]; differentiable."""
    grads = [torch.empty_like(w) for w in weights]
    eager.sweep(weights, groups, Mode.GRADIENT, Strengths(l1, l2), grads=grads, reduce=False, impl=impl)
    return grads


@library.custom_op(
    "fastreg::add_gradient_",
    mutates_args=("grads",),
    tags=_TAGS,
    schema="(Tensor(a!)[] grads, Tensor[] weights, int[] groups, Tensor l1, Tensor l2, bool reduce, str? impl)"
    " -> Tensor",
)
def add_gradient_(
    grads: list[Tensor],
    weights: list[Tensor],
    groups: list[int],
    l1: Tensor,
    l2: Tensor,
    reduce: bool,
    impl: str | None,
) -> Tensor:
    """Adds `gradients` to `grads`; returns the sums of `group_sums`, or an empty tensor without `reduce`."""
    strengths = Strengths(l1, l2)
    return _sums(eager.sweep(weights, groups, Mode.ACCUMULATE, strengths, grads=grads, reduce=reduce, impl=impl), l1)


@library.custom_op(
    "fastreg::prox_",
    mutates_args=("weights",),
    tags=_TAGS,
    schema="(Tensor(a!)[] weights, int[] groups, Tensor l1, Tensor l2, bool reduce, str? impl) -> Tensor",
)
def prox_(weights: list[Tensor], groups: list[int], l1: Tensor, l2: Tensor, reduce: bool, impl: str | None) -> Tensor:
    """Shrinks `weights` by strengths that carry the step; returns the sums before it, as `add_gradient_` does."""
    return _sums(eager.sweep(weights, groups, Mode.PROX, Strengths(l1, l2), reduce=reduce, impl=impl), l1)


@group_sums.register_fake
def _(weights: list[Tensor], groups: list[int], n_groups: int, impl: str | None) -> Tensor:
    return weights[0].new_empty((n_groups, 2), dtype=torch.float64)


@gradients.register_fake
def _(weights: list[Tensor], groups: list[int], l1: Tensor, l2: Tensor, impl: str | None) -> list[Tensor]:
    return [torch.empty_like(w) for w in weights]


@add_gradient_.register_fake
def _(
    grads: list[Tensor], weights: list[Tensor], groups: list[int], l1: Tensor, l2: Tensor, reduce: bool, impl: Any
) -> Tensor:
    return l1.new_empty((l1.numel(), 2) if reduce else (0, 2), dtype=torch.float64)


@prox_.register_fake
def _(weights: list[Tensor], groups: list[int], l1: Tensor, l2: Tensor, reduce: bool, impl: str | None) -> Tensor:
    return l1.new_empty((l1.numel(), 2) if reduce else (0, 2), dtype=torch.float64)


def _save_for_sums(ctx: Any, inputs: Any, output: Tensor) -> None:
    weights, ctx.groups, _, ctx.impl = inputs
    ctx.save_for_backward(*weights)


def _sums_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    l1, l2 = upstream.unbind(1)
    return gradients(list(ctx.saved_tensors), ctx.groups, l1.contiguous(), l2.contiguous(), ctx.impl), None, None, None


group_sums.register_autograd(_sums_backward, setup_context=_save_for_sums)


def _save_for_gradients(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    weights, ctx.groups, l1, l2, _ = inputs
    ctx.save_for_backward(l1, l2, *weights)


def _gradients_backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    """d/dw = 2 * l2, d/dl1 = sign(w), d/dl2 = 2 * w, each times the upstream gradient."""
    l1, l2, *weights = ctx.saved_tensors
    zero = torch.zeros((), dtype=torch.float64, device=l1.device)
    sums = [[zero, zero] for _ in range(l1.numel())]
    grads: list[Tensor | None] = []
    for w, group, factor in zip(weights, ctx.groups, upstream, strict=True):
        if factor is None:
            grads.append(None)
            continue
        grads.append((factor * (2 * l2[group])).to(w.dtype))
        wide = factor.double()
        sums[group][0] = sums[group][0] + (wide * w.sign()).sum()
        sums[group][1] = sums[group][1] + (wide * (2 * w)).sum()
    of_l1, of_l2 = (torch.stack(column).to(l1.dtype) for column in zip(*sums, strict=True))
    return grads, None, of_l1, of_l2, None


gradients.register_autograd(_gradients_backward, setup_context=_save_for_gradients)


def _sums(found: Measure | None, like: Tensor) -> Tensor:
    return like.new_empty((0, 2), dtype=torch.float64) if found is None else found.sums


def _per_group(strengths: Strengths, scale: Scale, n_groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both strengths with their scale, as float64 [n_groups]."""
    pairs = [strengths.of_group(group, scale) for group in range(n_groups)]
    l1, l2 = (torch.stack([_float64(s, device) for s in column]) for column in zip(*pairs, strict=True))
    return l1, l2


def _float64(strength: Strength, device: torch.device) -> Tensor:
    if isinstance(strength, Tensor):
        return strength.to(device, torch.float64)
    # full, which takes a float that a compiler holds as a symbol.
    return torch.full((), strength, dtype=torch.float64, device=device)
