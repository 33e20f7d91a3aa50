"""Proximal steps on the weights. All memory is checked before the first write."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.core.dtensor import local_shards
from fastreg.core.penalty import Measure, Strength
from fastreg.core.strengths import penalty_of_groups, per_group
from fastreg.core.types import Mode, Request, StepInputs, Want, Work
from fastreg.sweep.dispatch import sweep
from fastreg.sweep.inplace import check_writable, mark_changed
from fastreg.sweep.sharded import weighted_by_mesh


def apply_prox(work: Work, lr: Strength) -> None:
    """Shrink the weights by a proximal step of size `lr`.

    Before the first write, raise ValueError for a weight whose elements share memory, and RuntimeError for an
    inference tensor outside inference mode.
    """
    step = per_group([lr], work.weights[0].device, "lr")
    _prox_sweep(work, Request(Mode.PROX, Want.NOTHING, scale=(step,) * len(work.penalty.strengths)))


def apply_prox_of_groups(work: Work, steps: Sequence[Strength], param_groups: Sequence[int]) -> Measure | None:
    """Shrink weight i by a proximal step of size `steps[param_groups[i]]`. Return the value before the step."""
    device, penalty = work.weights[0].device, work.penalty
    if len(set(param_groups)) == 1:
        step = per_group([steps[param_groups[0]]], device, "lr")
        return _prox_sweep(work, Request(Mode.PROX, scale=(step,) * len(penalty.strengths)))
    # The proximal step takes strengths times the step size of the param group. The value takes plain strengths.
    regrouped, pairs = work.regrouped(param_groups)
    scaled = [penalty.of_group(group, (steps[i],) * len(penalty.strengths)).strengths for group, i in pairs]
    measured = _prox_sweep(
        regrouped._replace(penalty=penalty_of_groups(type(penalty), scaled, device)), Request(Mode.PROX, Want.TOTAL)
    )
    if measured is None:
        return None
    plain = penalty_of_groups(type(penalty), [penalty.of_group(group).strengths for group, _ in pairs], device)
    sums = measured.sums(len(pairs))
    if work.meshes is not None:
        return weighted_by_mesh(regrouped._replace(penalty=plain), sums)
    return plain.weighted(sums, measured.total.dtype)


def apply_elementwise_prox(work: Work, step: StepInputs) -> Measure | None:
    """Shrink each element by its own step size, computed from `step`. Return the value before the step."""
    return _prox_sweep(work, Request(Mode.ELEMENTWISE_PROX, step=step))


def _prox_sweep(work: Work, request: Request) -> Measure | None:
    parts = local_shards(work.weights) if work.is_sharded else work.weights
    if work.layout is None or not work.layout.notes.are_writable:
        is_compiling = torch.compiler.is_compiling()  # compilers do not know is_inference()
        if not all(map(Tensor.is_contiguous, parts)) or (not is_compiling and any(map(Tensor.is_inference, parts))):
            for name, w in zip(work.names, parts, strict=True):
                check_writable(w, f"parameter {name!r}")
        if work.layout is not None:
            work.layout.notes.are_writable = not torch.is_inference_mode_enabled()
    measured = sweep(work, request)
    mark_changed(work, work.weights)
    return measured
