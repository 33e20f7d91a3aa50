"""Triton sweeps as custom operators, opaque to compilers, with their derivatives."""

from typing import Any

import torch
from torch import Tensor, library

from fastreg.core.penalty import Measure, Strength
from fastreg.core.types import Mode, Request, Want, Work
from fastreg.formulas import penalty as formulas
from fastreg.sweep.local import local_sweep

# torch.compile(mode="reduce-overhead") would reuse the memory of tables that outlive a call.
_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


def _work(
    weights: list[Tensor], groups: list[int], n_groups: int, l1: Strength, l2: Strength, impl: str | None
) -> Work:
    names = [f"weights[{i}]" for i in range(len(weights))]
    return Work(names, weights, [*groups], n_groups, formulas.ElasticNetPenalty((l1, l2)), impl)


def _want(with_value: bool) -> Want:
    return Want.TOTAL if with_value else Want.NOTHING


def _sums(measured: Measure | None, like: Tensor, n_groups: int) -> Tensor:
    return like.new_empty((0, 2), dtype=torch.float64) if measured is None else measured.sums(n_groups)


@library.custom_op("fastreg::group_sums", mutates_args=(), tags=_TAGS)
def group_sums(weights: list[Tensor], groups: list[int], n_groups: int, impl: str | None) -> Tensor:
    """Return the sums of |w| and w² of each strength group, float64 [n_groups, 2]; twice differentiable."""
    work = _work(weights, groups, n_groups, 1.0, 1.0, impl)
    return _sums(local_sweep(work, Request(Mode.VALUE, Want.TOTAL)), weights[0], n_groups)


@library.custom_op("fastreg::gradients", mutates_args=(), tags=_TAGS)
def gradients(weights: list[Tensor], groups: list[int], l1: Tensor, l2: Tensor, impl: str | None) -> list[Tensor]:
    """Return l1 * sign(w) + 2 * l2 * w of each weight, for strengths [n_groups]; differentiable."""
    grads = [torch.empty_like(w) for w in weights]
    work = _work(weights, groups, l1.numel(), l1, l2, impl)
    local_sweep(work, Request(Mode.GRADIENT, Want.NOTHING, grads))
    return grads


@library.custom_op("fastreg::add_gradient_", mutates_args=("grads",), tags=_TAGS)
def add_gradient_(
    grads: list[Tensor],
    weights: list[Tensor],
    groups: list[int],
    l1: Tensor,
    l2: Tensor,
    with_value: bool,
    impl: str | None,
) -> Tensor:
    """Add `gradients` to `grads`. Return the sums of `group_sums` if `with_value`, else an empty tensor."""
    work = _work(weights, groups, l1.numel(), l1, l2, impl)
    return _sums(local_sweep(work, Request(Mode.ACCUMULATE, _want(with_value), grads)), l1, work.n_groups)


@library.custom_op("fastreg::prox_", mutates_args=("weights",), tags=_TAGS)
def prox_(
    weights: list[Tensor], groups: list[int], l1: Tensor, l2: Tensor, with_value: bool, impl: str | None
) -> Tensor:
    """Shrink `weights`; the strengths include the step size. Return earlier sums as `add_gradient_` does."""
    work = _work(weights, groups, l1.numel(), l1, l2, impl)
    return _sums(local_sweep(work, Request(Mode.PROX, _want(with_value))), l1, work.n_groups)


def _fake_sums(l1: Tensor, with_value: bool) -> Tensor:
    return l1.new_empty((l1.numel(), 2) if with_value else (0, 2), dtype=torch.float64)


group_sums.register_fake(lambda ws, groups, n_groups, impl: ws[0].new_empty((n_groups, 2), dtype=torch.float64))
gradients.register_fake(lambda ws, groups, l1, l2, impl: [torch.empty_like(w) for w in ws])
add_gradient_.register_fake(lambda grads, ws, groups, l1, l2, with_value, impl: _fake_sums(l1, with_value))
prox_.register_fake(lambda ws, groups, l1, l2, with_value, impl: _fake_sums(l1, with_value))


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
    l1, l2, *weights = ctx.saved_tensors
    zero = torch.zeros((), dtype=torch.float64, device=l1.device)
    sums = [[zero, zero] for _ in range(l1.numel())]
    grads: list[Tensor | None] = []
    for w, group, factor in zip(weights, ctx.groups, upstream, strict=True):
        if factor is None:
            grads.append(None)
            continue
        of_w, of_l1, of_l2 = formulas.gradient_derivatives(w, l2[group], factor)
        grads.append(of_w)
        sums[group] = [sums[group][0] + of_l1, sums[group][1] + of_l2]
    l1_grad, l2_grad = (torch.stack(column).to(l1.dtype) for column in zip(*sums, strict=True))
    return grads, None, l1_grad, l2_grad, None


gradients.register_autograd(_gradients_backward, setup_context=_save_for_gradients)
