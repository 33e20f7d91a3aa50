"""The dispatch: every sweep of the library goes one of three ways."""

import torch

from fastreg.core.penalty import Measure
from fastreg.core.torch_private import is_transformed
from fastreg.core.types import Request, Work
from fastreg.sweep.local import local_sweep
from fastreg.sweep.sharded import sharded_sweep
from fastreg.sweep.traced import traced_sweep


def is_traced_now() -> bool:
    """Whether a compiler or a torch.func transform has to see what is computed. Ask once per call: `Work.is_traced`."""
    return torch.compiler.is_compiling() or is_transformed()


def sweep(work: Work, request: Request) -> Measure | None:
    """Visit every element of `work.weights` once and do what `request` says. Return the value if it is wanted.

    traced_sweep: a compiler or a torch.func transform has to see what is computed.
    sharded_sweep: some weights are DTensors, and each rank visits its own shards.
    local_sweep: everything else. The other two call it in the end, unless they are traced as plain expressions.
    """
    if work.is_traced:
        return traced_sweep(work, request)
    return sharded_sweep(work, request) if work.is_sharded else local_sweep(work, request)
