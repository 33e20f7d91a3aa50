"""Dispatch every sweep to one of three functions: traced, sharded or local."""

import torch

from fastreg.core.penalty import Measure
from fastreg.core.torch_private import is_transformed
from fastreg.core.types import Request, Work
from fastreg.sweep.local import local_sweep
from fastreg.sweep.sharded import sharded_sweep
from fastreg.sweep.traced import traced_sweep


def is_traced_now() -> bool:
    """Return whether a compiler or a torch.func transform must see the computation.

    Ask once per call and keep the answer in `Work.is_traced`.
    """
    return torch.compiler.is_compiling() or is_transformed()


def sweep(work: Work, request: Request) -> Measure | None:
    """Visit every element of `work.weights` once and do what `request` says. Return the value if it is wanted.

    traced_sweep: a compiler or a torch.func transform must see the computation.
    sharded_sweep: some weights are DTensors, and each rank visits its own shards.
    local_sweep: all other cases. The other two functions call it, except where plain expressions are traced.
    """
    if work.is_traced:
        return traced_sweep(work, request)
    return sharded_sweep(work, request) if work.is_sharded else local_sweep(work, request)
