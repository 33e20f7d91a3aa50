"""Whole steps of optimizers. All memory is checked before the first write."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.core.checks import check_overlap, check_tensors
from fastreg.core.dtensor import as_placed, is_dtensor, local_shard
from fastreg.core.layout import find_layout, find_overlap
from fastreg.core.penalty import Measure
from fastreg.core.types import Request, StepInputs, Work
from fastreg.sweep.dispatch import sweep
from fastreg.sweep.inplace import check_writable, mark_changed


def apply_steps(batches: Sequence[tuple[Work, Request]]) -> list[Measure | None]:
    """Make optimizer steps, one sweep per batch of weights with the same kind of step.

    Return the values before the steps. Raise TypeError, ValueError or RuntimeError before the first write if a gradient
    or state differs from its weight in dtype, device, shape or placement, or if a tensor cannot be changed in place.
    """
    checked = []
    for given_work, given_request in batches:
        work, request = given_work, given_request
        grads: Any = request.grads
        step: Any = request.step
        if not (work.is_traced or work.is_sharded):
            work = work._replace(layout=find_layout(work.weights, work.groups))
        notes = None if work.layout is None else work.layout.notes
        if notes is not None and notes.are_writable and notes.grads_match(request.mode, [*grads, *step.tensors()]):
            request = request._replace(are_checked=True)
        else:
            if notes is None and not (work.is_traced or work.is_sharded):
                # A sweep checks this too, but an earlier batch would be written by then.
                check_tensors(work.names, work.weights)
                check_overlap(work.names, find_overlap(work.weights))
            _check_step(work, grads, step)
            if notes is not None:
                notes.are_writable = not torch.is_inference_mode_enabled()
        if work.is_sharded:
            grads = [as_placed(g, w) if is_dtensor(w) else g for g, w in zip(grads, work.weights, strict=True)]
            request = request._replace(grads=grads)
        checked.append((work, request))
    measured = []
    for work, request in checked:
        measured.append(sweep(work, request))
        mark_changed(work, work.weights)
    return measured


def _check_step(work: Work, grads: Sequence[Tensor], step: StepInputs) -> None:
    states = list(step.states.values())
    for i, (name, w, grad) in enumerate(zip(work.names, work.weights, grads, strict=True)):
        check_writable(local_shard(w), f"parameter {name!r}")
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of parameter {name!r} is sparse; use torch.optim.SparseAdam, or to_dense()"
            )
        for what, other in [("gradient", grad), *(("optimizer state", state[i]) for state in states)]:
            if is_dtensor(other) != is_dtensor(w):
                raise TypeError(f"the {what} of parameter {name!r} is a {type(other).__name__}, unlike its weight")
            if is_dtensor(w) and what != "gradient" and other.placements != w.placements:  # type: ignore[attr-defined]
                raise TypeError(f"the {what} of parameter {name!r} has other placements than its weight")
            if other.dtype != w.dtype or other.device != w.device or other.shape != w.shape:
                raise TypeError(
                    f"the {what} of parameter {name!r} is {other.dtype} {tuple(other.shape)} on {other.device} but the "
                    f"weight is {w.dtype} {tuple(w.shape)} on {w.device}"
                )
            if what != "gradient":
                check_writable(local_shard(other), f"the {what} of parameter {name!r}")
