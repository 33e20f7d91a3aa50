"""Proximal steps into the weights, in memory that is checked before the first write."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.core.dtensor import local_shard, local_shards
from fastreg.core.strengths import per_group
from fastreg.core.types import Measure, Mode, Scale, StepInputs, Strength, Strengths, Work
from fastreg.formulas.penalty import weighted_terms
from fastreg.sweep.dispatch import sweep_for
from fastreg.sweep.inplace import check_writable, mark_changed


def apply_prox(
    work: Work, steps: Sequence[Strength], step_groups: Sequence[int] | None = None, *, with_value: bool = False
) -> Measure | None:
    """Shrinks weight i by a proximal step of size `steps[step_groups[i]]`; the value is that before it.

    Raises ValueError, before anything is written, for a weight whose elements share memory, and RuntimeError for an
    inference tensor outside inference mode.
    """
    weights = work.weights
    parts = local_shards(weights) if work.is_sharded else weights
    if work.layout is None or not work.layout.may_be_written:
        is_compiling = torch.compiler.is_compiling()  # which has no inference tensors, and cannot ask for them
        if not all(map(Tensor.is_contiguous, parts)) or (not is_compiling and any(map(Tensor.is_inference, parts))):
            for name, w in zip(work.names, parts, strict=True):
                check_writable(w, f"parameter {name!r}")
        if work.layout is not None:
            work.layout.may_be_written = not torch.is_inference_mode_enabled()
    run = sweep_for(work)
    device = weights[0].device
    used = [0] if step_groups is None else list(dict.fromkeys(step_groups))
    if len(used) == 1 or step_groups is None:
        step = per_group([steps[used[0]]], device, "lr")
        found = run(work, Mode.PROX, scale=Scale(step, step), with_value=with_value)
    else:
        # One group for each pair of strength group and step, with strengths multiplied by the step.
        pairs = list(zip(work.groups, step_groups, strict=True))
        numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
        plain = [work.strengths.of_group(group) for group, _ in numbers]
        scaled = [work.strengths.of_group(group, Scale(steps[i], steps[i])) for group, i in numbers]
        fine = [numbers[pair] for pair in pairs]
        refined = work.regrouped(fine, len(numbers), _columns(scaled, device))
        found = run(refined, Mode.PROX, with_value=with_value)
        if found is not None:
            found = weighted_terms(found.sums(len(numbers)), _columns(plain, device), found.total.dtype)
    mark_changed(work, weights)
    return found


def _columns(pairs: Sequence[tuple[Strength, Strength]], device: torch.device) -> Strengths:
    return Strengths(*(per_group(column, device, "lr") for column in zip(*pairs, strict=True)))


def apply_elementwise_prox(work: Work, update: StepInputs) -> Measure | None:
    """Shrink each element by a step size of its own; return the value of the penalty before that."""
    if work.layout is None or not work.layout.may_be_written:
        for name, w in zip(work.names, work.weights, strict=True):
            check_writable(local_shard(w), f"parameter {name!r}")
    found = sweep_for(work)(work, Mode.ELEMENTWISE_PROX, update=update)
    mark_changed(work, work.weights)
    return found
