"""The dispatch: every sweep of the library starts here, and goes one of three ways."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.dtensor import any_dtensor
from fastreg.formulas import Measure, Mode
from fastreg.layout import Layout
from fastreg.local import local_sweep
from fastreg.sharded import sharded_sweep
from fastreg.strengths import UNSCALED, Scale
from fastreg.traced import is_traced, traced_sweep
from fastreg.work import Work


def sweep(
    work: Work,
    mode: Mode,
    *,
    scale: Scale = UNSCALED,
    grads: Sequence[Tensor] | None = None,
    with_value: bool = True,
    layout: Layout | None = None,
) -> Measure | None:
    """`local_sweep`, or what takes its place for DTensors, compilers and transforms."""
    if is_traced():
        return traced_sweep(work, mode, scale=scale, grads=grads, with_value=with_value)
    if any_dtensor(work.weights):
        return sharded_sweep(work, mode, scale=scale, grads=grads, with_value=with_value)
    return local_sweep(work, mode, scale=scale, grads=grads, with_value=with_value, layout=layout)
