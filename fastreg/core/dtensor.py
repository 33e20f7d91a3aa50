"""Helpers for DTensors. A sweep reads only the shard of a weight that is in this rank's memory."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.core.torch_private import local_tensor


def is_dtensor(tensor: Tensor | None) -> bool:
    """Return whether `tensor` is a torch.distributed.tensor.DTensor."""
    return any_dtensor((tensor,))


def any_dtensor(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether any of `tensors` is a DTensor. If the class was never imported, none is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any([issubclass(kind, module.DTensor) for kind in set(map(type, tensors))])


def hides_dtensor(tensor: Tensor) -> bool:
    """Return whether a torch.func transform wraps a DTensor, which hides the class."""
    return is_dtensor(torch.func.debug_unwrap(tensor))


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, without a copy, or a plain tensor unchanged."""
    if not is_dtensor(tensor):
        return tensor
    try:
        part: Any = local_tensor(tensor)
    except AttributeError:
        part = None
    if not isinstance(part, Tensor):
        part = tensor.to_local()  # type: ignore[attr-defined]
    return part.wait() if hasattr(part, "wait") else part  # type: ignore[no-any-return]


def local_shards(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return `local_shard` of each tensor."""
    return [local_shard(t) for t in tensors] if any_dtensor(tensors) else tensors


def as_dtensors(parts: Sequence[Tensor], weights: Sequence[Any]) -> list[Tensor]:
    """Return each part as a DTensor with its weight's placements, or unchanged if the weight is plain.

    Nothing is communicated.
    """
    if not any_dtensor(weights):
        return list(parts)
    return [
        type(w).from_local(p, w.device_mesh, w.placements, run_check=False, shape=w.shape, stride=w.stride())
        if is_dtensor(w)
        else p
        for p, w in zip(parts, weights, strict=True)
    ]


def as_placed(tensor: Any, weight: Any) -> Any:
    """Return `tensor` with the placements of the DTensor `weight`. Most gradients have them already."""
    if not is_dtensor(tensor) or tensor.device_mesh != weight.device_mesh:
        raise TypeError(
            f"a .grad of shape {tuple(tensor.shape)} is not a DTensor on the mesh of its weight; "
            "distribute it as the weight is, or set it to None"
        )
    same = tensor.placements == weight.placements
    return tensor if same else tensor.redistribute(weight.device_mesh, weight.placements)


def dtensor_problem(tensor: Tensor) -> str | None:
    """Return why a DTensor cannot be penalized, as the end of a sentence, or None."""
    weight: Any = tensor
    if any(placement.is_partial() for placement in weight.placements):
        return (
            "is a DTensor with a Partial placement, whose sum is pending; redistribute() it to Shard or Replicate first"
        )
    if weight.device_mesh.get_coordinate() is None:
        return "is on a mesh that this rank is not part of; exclude it on this rank"
    return None
