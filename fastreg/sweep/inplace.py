"""Check that tensors can be changed in place, and mark them as changed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.core.dtensor import is_dtensor, local_shard
from fastreg.core.types import Work


def mark_changed(work: Work, tensors: Sequence[Tensor]) -> None:
    """Increment the version counters of tensors and shards, so that graphs that saved them detect the change."""
    if torch.compiler.is_compiling():
        return
    torch.autograd.graph.increment_version(tensors)
    if work.is_sharded:
        torch.autograd.graph.increment_version([local_shard(t) for t in tensors if is_dtensor(t)])


def check_writable(tensor: Tensor, what: str) -> None:
    """Raise ValueError or RuntimeError if `tensor` cannot be changed in place. Errors call it `what`."""
    if _overlaps_itself(tensor):
        raise ValueError(f"{what} is expanded: its elements share memory; pass the tensor it views, or a clone()")
    # Compilers have no inference tensors and do not know is_inference().
    if not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"{what} was created in inference mode and can be changed only there")


def _overlaps_itself(tensor: Tensor) -> bool:
    """Return whether elements may share memory, as those of expanded tensors and of sliding windows do."""
    if tensor.numel() == 0:
        return False
    reach = 0  # from the first to the last element that the dimensions with smaller strides reach
    for stride, size in sorted((st, si) for st, si in zip(tensor.stride(), tensor.shape, strict=True) if si > 1):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False
