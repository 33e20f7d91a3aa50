"""The sweep where a compiler or a transform has to see through it: expressions, or one opaque operator per sweep.

On the PyTorch path and under torch.func it is the expressions of `formulas.py`. The Triton kernels are hidden in custom
operators; weighted terms are expressions of the operators' sums, through which the strengths get their gradients.
"""

from typing import Any

import torch
from torch import Tensor, library

from fastreg import formulas
from fastreg.blocks import block_sweep
from fastreg.dtensor import hides_dtensor
from fastreg.formulas import Measure, Mode, value_dtype
from fastreg.kinds import check_kinds
from fastreg.local import backend_for, local_sweep
from fastreg.rules import Update, take_steps
from fastreg.strengths import UNSCALED, Scale, Strength, Strengths
from fastreg.work import Grads, Work

# mode="reduce-overhead" would have tables that outlive a call allocated in memory that it takes back.
_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


_PROXY = torch._C._TorchDispatchModeKey.PROXY


def is_transformed() -> bool:
    """Whether a torch.func transform, forward-mode differentiation or make_fx is active."""
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch._C._get_dispatch_mode(_PROXY) is not None and not torch.compiler.is_compiling()


# Asked once, while tracing; torch.compiler.assume_constant_result would say so too, but imports the compiler.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def traced_sweep(
    work: Work,
    mode: Mode,
    *,
    scale: Scale = UNSCALED,
    grads: Grads = None,
    with_value: bool = True,
    with_terms: bool = True,
    update: Update | None = None,
) -> Measure | None:
    """`local_sweep` in terms of operators that compilers and transforms see through; RuntimeError for DTensors."""
    weights, groups, n_groups = list(work.weights), list(work.groups), work.n_groups
    if work.is_sharded or (not torch.compiler.is_compiling() and any(map(hides_dtensor, weights))):
        raise RuntimeError(
            "a penalty of DTensor weights cannot be traced; call it outside of the compiled or transformed function"
        )
    check_kinds(work.names, weights)
    if update is not None:
        # Before the step; a compiler makes kernels of these expressions that are as good.
        sums = formulas.sums_of_groups(weights, groups, n_groups) if with_value else None
        take_steps(mode, weights, grads, groups, update)
    elif is_transformed() or all(backend_for(w.device, work.impl) is block_sweep for w in weights):
        sums = formulas.sums_of_groups(weights, groups, n_groups) if with_value else None
        formulas.update(mode, weights, grads, groups, work.strengths, scale)
    elif mode is Mode.VALUE:
        sums = group_sums(weights, groups, n_groups, work.impl)
    else:
        l1, l2 = _scaled(work, scale)
        if mode is Mode.PROX:
            sums = prox_(weights, groups, l1, l2, with_value, work.impl)
        else:
            sums = add_gradient_(list(grads or ()), weights, groups, l1, l2, with_value, work.impl)
    if sums is None or not with_value:
        return None
    return formulas.weighted_terms(sums, work.strengths, value_dtype([w.dtype for w in weights]))


def _scaled(work: Work, scale: Scale) -> tuple[Tensor, Tensor]:
    """Both strengths with their scale, as float64 [n_groups]."""
    device = work.weights[0].device
    pairs = [work.strengths.of_group(group, scale) for group in range(work.n_groups)]
    l1, l2 = (torch.stack([_float64(s, device) for s in column]) for column in zip(*pairs, strict=True))
    return l1, l2


def _float64(strength: Strength, device: torch.device) -> Tensor:
    if isinstance(strength, Tensor):
        return strength.to(device, torch.float64)
    # full() also takes a float that a compiler holds as a symbol.
    return torch.full((), strength, dtype=torch.float64, device=device)


def _work(
    weights: list[Tensor], groups: list[int], n_groups: int, l1: Strength, l2: Strength, impl: str | None
) -> Work:
    names = [f"weights[{i}]" for i in range(len(weights))]
    return Work(names, weights, groups, n_groups, Strengths(l1, l2), impl)


def _sums(found: Measure | None, like: Tensor, n_groups: int) -> Tensor:
    return like.new_empty((0, 2), dtype=torch.float64) if found is None else found.sums(n_groups)


@library.custom_op("fastreg::group_sums", mutates_args=(), tags=_TAGS)
def group_sums(weights: list[Tensor], groups: list[int], n_groups: int, impl: str | None) -> Tensor:
    """Sums of |w| and w² of each strength group, float64 [n_groups, 2]; differentiable, twice."""
    return _sums(local_sweep(_work(weights, groups, n_groups, 1.0, 1.0, impl), Mode.VALUE), weights[0], n_groups)


@library.custom_op("fastreg::gradients", mutates_args=(), tags=_TAGS)
def gradients(weights: list[Tensor], groups: list[int], l1: Tensor, l2: Tensor, impl: str | None) -> list[Tensor]:
    """l1 * sign(w) + 2 * l2 * w of each weight, for strengths [n_groups]; differentiable."""
    grads = [torch.empty_like(w) for w in weights]
    local_sweep(_work(weights, groups, l1.numel(), l1, l2, impl), Mode.GRADIENT, grads=grads, with_value=False)
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
    """Adds `gradients` to `grads`; returns the sums of `group_sums`, or an empty tensor where not `with_value`."""
    work = _work(weights, groups, l1.numel(), l1, l2, impl)
    return _sums(local_sweep(work, Mode.ACCUMULATE, grads=grads, with_value=with_value), l1, work.n_groups)


@library.custom_op("fastreg::prox_", mutates_args=("weights",), tags=_TAGS)
def prox_(
    weights: list[Tensor], groups: list[int], l1: Tensor, l2: Tensor, with_value: bool, impl: str | None
) -> Tensor:
    """Shrinks `weights` by strengths that carry the step; returns the sums before it, as `add_gradient_` does."""
    work = _work(weights, groups, l1.numel(), l1, l2, impl)
    return _sums(local_sweep(work, Mode.PROX, with_value=with_value), l1, work.n_groups)


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
