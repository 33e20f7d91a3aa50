"""Sweep under a compiler or a transform: plain expressions, or one custom operator per sweep.

The PyTorch path and torch.func use the expressions of `fastreg.formulas.penalty`. The custom operators of operators.py
launch the Triton kernels. The weighted terms are expressions of the operators' sums, so that the strengths get
gradients.
"""

import torch
from torch import Tensor

from fastreg.blocks.sweep import block_sweep
from fastreg.core.checks import check_tensors
from fastreg.core.dtensor import hides_dtensor
from fastreg.core.dtypes import value_dtype
from fastreg.core.penalty import Measure, Scale, Strength
from fastreg.core.torch_private import is_transformed
from fastreg.core.types import Mode, Request, Want, Work
from fastreg.formulas import penalty as formulas
from fastreg.formulas.steps import take_steps
from fastreg.sweep.local import backend_for
from fastreg.sweep.operators import add_gradient_, group_sums, prox_


def traced_sweep(work: Work, request: Request) -> Measure | None:
    """Do what `local_sweep` does, in traceable operators. Raise RuntimeError for DTensors."""
    weights, groups, n_groups = list(work.weights), list(work.groups), work.n_groups
    mode, grads, with_value = request.mode, request.grads, request.want is not Want.NOTHING
    if work.is_sharded or (not torch.compiler.is_compiling() and any(map(hides_dtensor, weights))):
        raise RuntimeError(
            "a penalty of DTensor weights cannot be traced; call it outside of the compiled or transformed function"
        )
    check_tensors(work.names, weights)
    sums: Tensor | None = None
    if (
        request.step is not None
        or is_transformed()
        or all(backend_for(w.device, work.impl) is block_sweep for w in weights)
    ):
        if with_value:
            sums = formulas.sums_of_groups(weights, groups, n_groups, work.penalty)
        if request.step is not None:
            # The compiler fuses these expressions into kernels of its own.
            take_steps(mode, weights, grads, groups, request.step)
        else:
            formulas.apply_penalty(mode, weights, grads, groups, work.penalty, request.scale)
    elif type(work.penalty) is not formulas.ElasticNetPenalty:
        raise formulas.no_formulas(work.penalty, "fastreg/sweep/operators.py")
    elif mode is Mode.VALUE:
        sums = group_sums(weights, groups, n_groups, work.impl)
    else:
        l1, l2 = _scaled(work, request.scale)
        if mode is Mode.PROX:
            sums = prox_(weights, groups, l1, l2, with_value, work.impl)
        else:
            sums = add_gradient_(list(grads or ()), weights, groups, l1, l2, with_value, work.impl)
    if sums is None or not with_value:
        return None
    return work.penalty.weighted(sums, value_dtype([w.dtype for w in weights]))


def _scaled(work: Work, scale: Scale) -> tuple[Tensor, Tensor]:
    """Return both strengths times their scale, float64 [n_groups]."""
    device = work.weights[0].device
    pairs = [work.penalty.of_group(group, scale).strengths for group in range(work.n_groups)]
    l1, l2 = (torch.stack([_float64(s, device) for s in column]) for column in zip(*pairs, strict=True))
    return l1, l2


def _float64(strength: Strength, device: torch.device) -> Tensor:
    if isinstance(strength, Tensor):
        return strength.to(device, torch.float64)
    # full() also takes a symbolic float of a compiler.
    return torch.full((), strength, dtype=torch.float64, device=device)
