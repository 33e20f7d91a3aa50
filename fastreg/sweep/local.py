"""A sweep over weights in this process's memory: their layout, copies where memory has gaps, and Triton or PyTorch."""

import functools
import itertools
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.blocks.sweep import block_sweep
from fastreg.core.checks import check_kinds
from fastreg.core.layout import find_layout, is_dense, store_layout
from fastreg.core.types import UNSCALED, Grads, Measure, Mode, Scale, StepInputs, Work
from fastreg.formulas.penalty import weighted_terms


def local_sweep(
    work: Work,
    mode: Mode,
    *,
    scale: Scale = UNSCALED,
    grads: Grads = None,
    with_value: bool = True,
    with_terms: bool = True,
    is_accepted: bool = False,
    update: StepInputs | None = None,
) -> Measure | None:
    """Visits every element of `work.weights`, which are plain tensors of any strides, once. To be called under no_grad.

    Args:
        mode: what to do besides reading; the gradient modes write or update `grads`.
        scale: factors on the strengths, read on the device.
        grads: one tensor of the weight's shape, dtype and device for each weight.
        is_accepted: whether `work.layout` is there and accepts `grads`, as the caller has found.
        update: what the modes of optimizers need besides; its states and counters are updated as the weights are.

    Returns the value, if asked for with or without its terms: in PROX that of the weights before the step. Raises
    TypeError for a weight that changed its kind since it was selected, and RuntimeError for impl="triton" where it
    cannot run.
    """
    dense, staged = work, grads
    layout = work.layout or find_layout(work.weights, work.groups)
    if layout is None:
        check_kinds(work.names, work.weights)
        copy = functools.partial(torch.clone, memory_format=torch.contiguous_format)
        weights = [w if is_dense(w) and not _is_lazy(w) else copy(w) for w in work.weights]
        copied = any(map(operator.is_not, weights, work.weights))
        dense = work._replace(weights=weights) if copied else work
        layout = (find_layout(weights, work.groups) if copied else None) or store_layout(weights, work.groups)
    beside = [] if is_accepted else [*(grads or ()), *(() if update is None else update.tensors())]
    staged_update = update
    if beside and not layout.accepts(beside):
        is_read = mode not in (Mode.GRADIENT, Mode.VALUE)

        def stage(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            return [_stage(t, w, is_read) for t, w in zip(tensors, dense.weights, strict=True)]

        staged = None if grads is None else stage(grads)
        staged_update = None if update is None else update.mapped(stage)
        in_order = [*(staged or ()), *(() if staged_update is None else staged_update.tensors())]
        if all(map(operator.is_, in_order, beside)):
            layout.remember(beside)
    # All decided before the first write, so that an error leaves everything as it was.
    backends = list(map(backend_for, layout.parts, itertools.repeat(work.impl)))
    dtype = layout.value_dtype if with_value else None
    measures: list[Measure | None] = []
    # Tensor subclasses that merely mark their tensors would mark the value too.
    with torch._C.DisableTorchFunctionSubclass():
        for backend, (device, parts) in zip(backends, layout.parts.items(), strict=True):
            here, scale_here = dense, scale
            if len(backends) > 1:
                here, scale_here = dense._replace(strengths=dense.strengths.on(device)), scale.on(device)
            measures.append(backend(parts, mode, here, staged, scale_here, dtype, with_terms, staged_update))
    if dense is not work and (mode is Mode.PROX or update is not None):
        _copy_back(dense.weights, work.weights)
    if update is not None and staged_update is not None and staged_update is not update:
        if mode is not Mode.ELEMENTWISE_PROX:
            _copy_back(staged_update.tensors(), update.tensors())
    elif update is None and staged is not None and grads is not None and staged is not grads:
        _copy_back(staged, grads)
    if dtype is None or len(measures) == 1:
        return measures[0]
    # From the float64 sums of all devices, so that nothing is rounded twice.
    first = next(iter(layout.parts))
    sums = torch.stack([m.sums(work.n_groups).to(first) for m in measures if m is not None]).sum(0)
    return weighted_terms(sums, work.strengths.on(first), dtype)


def backend_for(device: torch.device, impl: str | None) -> Callable[..., Measure | None]:
    """`kernel_sweep` or `block_sweep`, the one place that decides; RuntimeError where "triton" cannot be had."""
    if impl == "torch" or (impl is None and device.type != "cuda"):
        return block_sweep
    kernels: Any = sys.modules.get("fastreg.kernels")  # an import statement takes its time at every call
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
    """Whether the values are not those in memory: negated by a bit, or zeros that were never written."""
    return tensor.is_neg() or tensor._is_zerotensor()  # type: ignore[attr-defined]


def _stage(grad: Tensor, weight: Tensor, is_read: bool) -> Tensor:
    """`grad` itself where it has the memory order of the dense `weight`, else new memory that has, filled if read."""
    same_order = grad.stride() == weight.stride() or (grad.is_contiguous() and weight.is_contiguous())
    if grad.numel() == 0 or (same_order and not _is_lazy(grad)):
        return grad
    staged = torch.empty_like(weight)
    return staged.copy_(grad) if is_read else staged


def _copy_back(staged: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(staged, targets, strict=True):
        if source is not target:
            target.copy_(source)
