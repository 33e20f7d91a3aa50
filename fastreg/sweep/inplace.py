"""Whether a tensor can be changed in place, and telling graphs that it was."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.core.dtensor import is_dtensor, local_shard
from fastreg.core.types import Work


def mark_changed(work: Work, tensors: Sequence[Tensor]) -> None:
    """Lets graphs that saved one of them notice that it was changed; of a DTensor, also those that saved its part."""
    if torch.compiler.is_compiling():
        return
    torch.autograd.graph.increment_version(tensors)
    if work.is_sharded:
        torch.autograd.graph.increment_version([local_shard(t) for t in tensors if is_dtensor(t)])


def check_writable(tensor: Tensor, what: str) -> None:
    """Raises where `tensor`, called `what`, cannot be changed in place."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(f"{what} is expanded: its elements share memory; pass the tensor it views, or a clone()")
    # A compiler that traces this has no such tensors, and cannot ask.
    if not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"{what} was made in inference mode, and can be changed only there")
