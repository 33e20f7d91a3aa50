"""Sweep over weights in this process's memory: find a layout, copy tensors with gaps, call Triton or PyTorch."""

import functools
import itertools
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.blocks.sweep import block_sweep
from fastreg.core.checks import check_overlap, check_tensors
from fastreg.core.layout import find_layout, find_overlap, is_dense, store_layout
from fastreg.core.penalty import Measure, moved
from fastreg.core.torch_private import is_zerotensor, no_subclass
from fastreg.core.types import Mode, Request, Want, Work


def local_sweep(work: Work, request: Request) -> Measure | None:
    """Sweep over `work.weights`, plain tensors of any strides. Call it under no_grad.

    Raise TypeError or RuntimeError for a weight that is no longer supported, ValueError for weights that are to be
    written and share memory, and RuntimeError for impl="triton" where it cannot run.
    """
    dense, staged = work, request
    if work.layout is None:
        dense = _with_layout(work)
    layout: Any = dense.layout
    writes_weights = request.mode is Mode.PROX or request.step is not None
    if writes_weights:
        overlap = layout.overlap if dense.weights is work.weights else find_overlap(work.weights)
        if overlap is not None:
            check_overlap(work.names, overlap)
    if not request.are_checked:
        staged = _staged(dense, request)
    # Choose all backends before the first write, so that an error changes nothing.
    backends = list(map(backend_for, layout.parts, itertools.repeat(work.impl)))
    measures: list[Measure | None] = []
    # Otherwise the value would take the tensor subclass of a weight.
    with no_subclass():
        for backend, (device, parts) in zip(backends, layout.parts.items(), strict=True):
            if len(backends) == 1:
                measures.append(backend(parts, dense, staged))
            else:
                here = dense._replace(penalty=work.penalty.on(device))
                measures.append(backend(parts, here, staged._replace(scale=moved(request.scale, device))))
    if dense.weights is not work.weights and writes_weights:
        _copy_back(dense.weights, work.weights)
    if staged is not request:
        _copy_back(_written(staged), _written(request))
    if request.want is Want.NOTHING or len(measures) == 1:
        return measures[0]
    # Add the float64 sums of all devices, so that the value is rounded once.
    first = next(iter(layout.parts))
    sums = torch.stack([m.sums(work.n_groups).to(first) for m in measures if m is not None]).sum(0)
    return work.penalty.on(first).weighted(sums, layout.value_dtype)


def _with_layout(work: Work) -> Work:
    """Return the work with a layout. Replace weights that are not dense by copies."""
    layout = find_layout(work.weights, work.groups)
    if layout is not None:
        return work._replace(layout=layout)
    check_tensors(work.names, work.weights)
    copy = functools.partial(torch.clone, memory_format=torch.contiguous_format)
    weights = [
        w if (is_dense(w) if isinstance(g, int) else w.is_contiguous()) and not _is_lazy(w) else copy(w)
        for w, g in zip(work.weights, work.groups, strict=True)
    ]
    if all(map(operator.is_, weights, work.weights)):
        return work._replace(layout=store_layout(weights, work.groups))
    return work._replace(
        weights=weights, layout=find_layout(weights, work.groups) or store_layout(weights, work.groups)
    )


def _staged(dense: Work, request: Request) -> Request:
    """Return the request with gradients and states in the memory order of the dense weights. Copy where needed."""
    given = [*(request.grads or ()), *(() if request.step is None else request.step.tensors())]
    notes: Any = dense.layout.notes  # type: ignore[union-attr]
    if not given or notes.grads_match(request.mode, given):
        return request
    is_read = request.mode not in (Mode.GRADIENT, Mode.VALUE)

    def stage(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [_stage(t, w, is_read) for t, w in zip(tensors, dense.weights, strict=True)]

    grads = None if request.grads is None else stage(request.grads)
    step = None if request.step is None else request.step.mapped(stage)
    staged = [*(grads or ()), *(() if step is None else step.tensors())]
    if all(map(operator.is_, staged, given)):
        notes.store_grads(request.mode, given)
        return request
    return request._replace(grads=grads, step=step)


def _written(request: Request) -> Sequence[Tensor]:
    """Return the gradients or states that a sweep writes."""
    if request.step is None:
        return request.grads or ()
    return request.step.tensors() if request.mode is not Mode.ELEMENTWISE_PROX else ()


def backend_for(device: torch.device, impl: str | None) -> Callable[..., Measure | None]:
    """Return `kernel_sweep` or `block_sweep`. Raise RuntimeError if impl="triton" cannot run."""
    if impl == "torch" or (impl is None and device.type != "cuda"):
        return block_sweep
    kernels: Any = sys.modules.get("fastreg.kernels")  # faster than an import statement at every call
    if kernels is None:
        try:
            import fastreg.kernels as kernels
        except ImportError as error:
            if impl is None:
                return block_sweep
            raise RuntimeError(
                'impl="triton" needs Triton, which is not installed; install it, or leave impl out'
            ) from error
    if device.type != "cuda" and not (device.type == "cpu" and kernels.INTERPRETED):
        raise RuntimeError(
            f'impl="triton" cannot run on {device.type} tensors; leave impl out, move the weights to a GPU, or set '
            "TRITON_INTERPRET=1 before fastreg is first used"
        )
    return kernels.kernel_sweep  # type: ignore[no-any-return]


def _is_lazy(tensor: Tensor) -> bool:
    """Return whether memory does not hold the values: the negative bit is set, or zeros have no memory."""
    return tensor.is_neg() or is_zerotensor(tensor)


def _stage(grad: Tensor, weight: Tensor, is_read: bool) -> Tensor:
    """Return `grad` if it has the memory order of the dense `weight`, else a new tensor, a copy if `is_read`."""
    same_order = grad.stride() == weight.stride() or (grad.is_contiguous() and weight.is_contiguous())
    if grad.numel() == 0 or (same_order and not _is_lazy(grad)):
        return grad
    staged = torch.empty_like(weight)
    return staged.copy_(grad) if is_read else staged


def _copy_back(staged: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(staged, targets, strict=True):
        if source is not target:
            target.copy_(source)
