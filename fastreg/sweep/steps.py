"""Whole steps of optimizers, in memory that is checked before the first write."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastreg.core.dtensor import as_placed, is_dtensor, local_shard
from fastreg.core.layout import find_layout
from fastreg.core.types import Measure, Mode, StepInputs, Work
from fastreg.sweep.dispatch import sweep_for
from fastreg.sweep.inplace import check_writable, mark_changed
from fastreg.sweep.local import local_sweep


class StepWork(NamedTuple):
    """Weights that make a step of one kind, with what it takes."""

    work: Work
    mode: Mode
    grads: list[Tensor]
    update: StepInputs


def apply_steps(all_works: Sequence[StepWork], *, with_value: bool = False) -> list[Measure | None]:
    """Makes the steps, in a sweep for each kind of step; the values are those before them.

    Raises TypeError, ValueError or RuntimeError, before anything is written, for a gradient or a state that is not like
    its weight, and for weights that cannot be changed in place.
    """
    run = sweep_for(all_works[0].work)
    checked = []
    for work, mode, grads, update in all_works:
        layout = None
        if run is local_sweep:
            layout = find_layout(work.weights, work.groups)
        is_accepted = layout is not None and layout.may_be_written and layout.accepts([*grads, *update.tensors()])
        if not is_accepted:
            _check_step(work, grads, update)
            if layout is not None:
                layout.may_be_written = not torch.is_inference_mode_enabled()
        if work.is_sharded:
            grads = [as_placed(g, w) if is_dtensor(w) else g for g, w in zip(grads, work.weights, strict=True)]
        checked.append((work._replace(layout=layout), mode, grads, update, is_accepted))
    found = []
    for work, mode, grads, update, is_accepted in checked:
        if run is local_sweep:
            found.append(
                local_sweep(work, mode, grads=grads, with_value=with_value, is_accepted=is_accepted, update=update)
            )
        else:
            found.append(run(work, mode, grads=grads, with_value=with_value, update=update))
        mark_changed(work, work.weights)
    return found


def _check_step(work: Work, grads: Sequence[Tensor], update: StepInputs) -> None:
    states = list(update.states.values())
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
                raise TypeError(f"the {what} of parameter {name!r} is not placed as its weight is")
            if other.dtype != w.dtype or other.device != w.device or other.shape != w.shape:
                raise TypeError(
                    f"the {what} of parameter {name!r} is {other.dtype} {tuple(other.shape)} on {other.device} but the "
                    f"weight is {w.dtype} {tuple(w.shape)} on {w.device}"
                )
            if what != "gradient":
                check_writable(local_shard(other), f"the {what} of parameter {name!r}")
