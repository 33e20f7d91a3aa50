"""The dispatch: every sweep of the library goes one of three ways."""

from collections.abc import Callable

import torch

from fastreg.core.torch_private import is_transformed
from fastreg.core.types import Measure, Mode, Work
from fastreg.sweep.local import local_sweep
from fastreg.sweep.sharded import sharded_sweep
from fastreg.sweep.traced import traced_sweep


def sweep_for(work: Work) -> Callable[..., Measure | None]:
    """The function that sweeps over `work.weights` here and now; `local_sweep` documents its arguments.

    traced_sweep: a compiler or a torch.func transform has to see what is computed.
    sharded_sweep: there are DTensors, of which each rank visits its own shards.
    local_sweep: everything else. The other two call it in the end, unless they are traced as plain expressions.
    """
    if torch.compiler.is_compiling() or is_transformed():
        return traced_sweep
    return sharded_sweep if work.is_sharded else local_sweep


def measure(work: Work) -> Measure | None:
    """The value alone."""
    return sweep_for(work)(work, Mode.VALUE)
