"""The proximal step on a list of weights, each with a step size of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.accumulate import mark_changed
from fastreg.dtensor import local_parts
from fastreg.ops import sweep
from fastreg.plan import Mode
from fastreg.strengths import Measure, Scale, Strength, Strengths, combine, measure, place, same
from fastreg.sweep import check_writable, counts_changes


@torch.no_grad()
def shrink(
    names: Sequence[str],
    weights: Sequence[Tensor],
    groups: Sequence[int],
    strengths: Strengths,
    steps: Sequence[Strength],
    *,
    reduce: bool = False,
    impl: str | None = None,
) -> Measure | None:
    """One sweep that shrinks `weights[i]` by a step of `steps[i]`; the measure is of the weights before it.

    Raises:
        ValueError: a weight whose elements share memory, before anything is written.
        RuntimeError: an inference tensor outside inference mode, likewise.
    """
    for name, w in zip(names, local_parts(weights), strict=True):
        if not w.is_contiguous() or not counts_changes(w):
            check_writable(w, f"parameter {name!r}")
    device = weights[0].device
    if all(same(step, steps[0]) for step in steps):
        step = combine([steps[0]], device, "lr")
        found = sweep(weights, groups, Mode.PROX, strengths, scale=Scale(step, step), reduce=reduce, impl=impl)
    else:
        # Groups that differ in strength or step, with strengths that carry the step.
        refined: list[tuple[int, Strength]] = []
        fine_groups = [place(pair, refined) for pair in zip(groups, steps, strict=True)]
        plain = [strengths.of_group(group) for group, _ in refined]
        scaled = [strengths.of_group(group, Scale(step, step)) for group, step in refined]
        found = sweep(weights, fine_groups, Mode.PROX, _combine(scaled, device), reduce=reduce, impl=impl)
        if found is not None:
            found = measure(found.sums, _combine(plain, device), found.total.dtype)
    if not torch.compiler.is_compiling():
        mark_changed(weights)
    return found


def _combine(pairs: Sequence[tuple[Strength, Strength]], device: torch.device) -> Strengths:
    return Strengths(*(combine(column, device, "lr") for column in zip(*pairs, strict=True)))
