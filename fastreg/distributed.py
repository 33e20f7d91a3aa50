"""A sweep over weights that are sharded: each rank visits its own shards, and a few numbers are summed across ranks.

No weight and no gradient leaves its rank. Each mesh costs one all-reduce of two float64 numbers per strength group,
over the mesh dimensions on which any of its weights is sharded. A weight that is replicated on one of those dimensions
is counted by the ranks with coordinate 0 there. Only where several dimensions are sharded of a mesh that some ranks are
not part of, it takes one all-reduce per dimension.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastreg import sweep as eager
from fastreg.dtensor import is_dtensor, local_parts
from fastreg.plan import Mode
from fastreg.strengths import Measure, Strength, Strengths, measure, value_dtype

HERE = -1  # counted by every rank by itself: the same number everywhere
ELSEWHERE = -2  # counted by another rank


class Census:
    """Which rank counts which weight.

    Args:
        weights: DTensors and plain tensors.
        reduce: whether ranks will sum what they count. If not, each weight is counted by ranks that hold different
            parts of it and by nobody else: plain tensors where the first mesh has only coordinates 0.
    """

    def __init__(self, weights: Sequence[Tensor], reduce: bool) -> None:
        distributed: list[Any] = [w for w in weights if is_dtensor(w)]
        meshes = list(dict.fromkeys(w.device_mesh for w in distributed))
        sharded: list[set[int]] = [set() for _ in meshes]
        for w in distributed:
            sharded[meshes.index(w.device_mesh)] |= _sharded_dims(w)
        self._reductions = [(mesh, *_reduction(mesh, dims)) for mesh, dims in zip(meshes, sharded, strict=True)]
        self._reduce = reduce
        self.domains = [self._domain(w, meshes) for w in weights]

    def total(self, counts: Sequence[Tensor], domains: Sequence[int]) -> Tensor:
        """The sum of `counts`, tensors of one shape, each of `domains[i]`: over this rank, or over all of them."""
        total = torch.zeros_like(counts[0])
        for domain in (HERE, *range(len(self._reductions))):
            own = [count for count, d in zip(counts, domains, strict=True) if d == domain]
            subtotal = torch.stack(own).sum(0) if own else torch.zeros_like(total)
            if domain != HERE and self._reduce:
                mesh, _, process_groups = self._reductions[domain]
                if process_groups:
                    subtotal = _all_reduce(subtotal, mesh, process_groups)
            total = total + subtotal
        return total

    def _domain(self, w: Any, meshes: list[Any]) -> int:
        if not is_dtensor(w):
            if self._reduce or not meshes:
                return HERE
            return ELSEWHERE if any(meshes[0].get_coordinate()) else HERE
        number = meshes.index(w.device_mesh)
        mesh, summed, _ = self._reductions[number]
        own = _sharded_dims(w)
        if self._reduce and not own:
            return HERE
        once = set(summed if self._reduce else range(mesh.ndim)) - own
        coordinate = mesh.get_coordinate()
        return ELSEWHERE if any(coordinate[dim] for dim in once) else number


def sweep(
    weights: Sequence[Tensor],
    groups: Sequence[int],
    mode: Mode,
    strengths: Strengths,
    *,
    grads: Sequence[Tensor] | None = None,
    reduce: bool = True,
    all_reduce: bool = True,
    **keywords: Any,
) -> Measure | None:
    """`fastreg.sweep.sweep` of this rank's shards, with the measure of all ranks', or its own if not `all_reduce`.

    Gradients are DTensors with the placements of their weights.
    """
    parts = local_parts(weights)
    keywords["grads"] = None if grads is None else local_parts(grads)
    if not reduce:
        return eager.sweep(parts, groups, mode, strengths, reduce=False, **keywords)
    census = Census(weights, all_reduce)
    # One sweep for all: strength groups are split by who counts them.
    pairs = list(zip(groups, census.domains, strict=True))
    numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    fine = Strengths(*(_of_each(s, [group for group, _ in numbers]) for s in strengths))
    found = eager.sweep(parts, [numbers[pair] for pair in pairs], mode, fine, **keywords)
    assert found is not None
    n_groups = max(groups) + 1
    rows = []
    for (group, _), row in zip(numbers, found.sums, strict=True):
        rows.append(torch.zeros((n_groups, 2), dtype=row.dtype, device=row.device))
        rows[-1][group] = row
    sums = census.total(rows, [domain for _, domain in numbers])
    return measure(sums, strengths, value_dtype([w.dtype for w in weights]))


def _of_each(strength: Strength, groups: list[int]) -> Strength:
    """The strengths of a finer division, of whose groups `groups` names the coarser ones."""
    if not isinstance(strength, Tensor) or strength.ndim == 0:
        return strength
    return torch.stack([strength[group] for group in groups])


def _sharded_dims(weight: Any) -> set[int]:
    return {dim for dim, placement in enumerate(weight.placements) if not placement.is_replicate()}


def _reduction(mesh: Any, sharded: set[int]) -> tuple[list[int], list[Any]]:
    """The mesh dimensions to sum over, and the process groups that do it one after the other.

    Where several dimensions are sharded of a mesh of all ranks, the default group sums over all of them at once. A
    group just for those dimensions would have to be made, by ranks that may not all be here.
    """
    if len(sharded) > 1 and mesh.size() == dist.get_world_size():
        return list(range(mesh.ndim)), [dist.group.WORLD]
    return sorted(sharded), [mesh.get_group(dim) for dim in sorted(sharded)]


def _all_reduce(numbers: Tensor, mesh: Any, groups: list[Any]) -> Tensor:
    # Weights that are offloaded to the CPU are on the mesh of another device.
    moved = numbers.clone() if numbers.device.type == mesh.device_type else numbers.to(mesh.device_type)
    for group in groups:
        dist.all_reduce(moved, group=group)
    return moved.to(numbers.device)
