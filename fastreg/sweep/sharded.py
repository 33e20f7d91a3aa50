"""A sweep over sharded weights: each rank visits its own shards, and a few numbers are summed across ranks.

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

from fastreg.core.dtensor import is_dtensor, local_shards
from fastreg.core.dtypes import value_dtype
from fastreg.core.strengths import per_group
from fastreg.core.types import UNSCALED, Grads, Measure, Mode, Scale, StepInputs, Strengths, Work
from fastreg.formulas.penalty import weighted_terms
from fastreg.sweep.local import local_sweep

REPLICATED = -1  # counted by every rank by itself: the same number everywhere
NOT_COUNTED = -2  # counted by another rank


class Ownership:
    """Which rank counts which weight: `mesh_index[i]` is the mesh that weight i is summed over, or one of the above.

    Without `all_reduce` ranks will not sum what they count. Each weight is then counted by ranks that hold different
    parts of it and by nobody else: plain tensors where the first mesh has only coordinates 0.
    """

    def __init__(self, weights: Sequence[Tensor], all_reduce: bool) -> None:
        distributed: list[Any] = [w for w in weights if is_dtensor(w)]
        meshes = list(dict.fromkeys(w.device_mesh for w in distributed))
        sharded: list[set[int]] = [set() for _ in meshes]
        for w in distributed:
            sharded[meshes.index(w.device_mesh)] |= _sharded_dims(w)
        self._reductions = [(mesh, *_reduction(mesh, dims)) for mesh, dims in zip(meshes, sharded, strict=True)]
        self._all_reduce = all_reduce
        self.mesh_index = [self._mesh_index(w, meshes) for w in weights]

    def total(self, counts: Sequence[Tensor], mesh_index: Sequence[int]) -> Tensor:
        """The sum of `counts`, tensors of one shape, each of mesh `mesh_index[i]`: over this rank, or over all."""
        total = torch.zeros_like(counts[0])
        for index in (REPLICATED, *range(len(self._reductions))):
            own = [count for count, i in zip(counts, mesh_index, strict=True) if i == index]
            subtotal = torch.stack(own).sum(0) if own else torch.zeros_like(total)
            if index != REPLICATED and self._all_reduce:
                mesh, _, process_groups = self._reductions[index]
                if subtotal.device.type != mesh.device_type:  # of weights that are offloaded to the CPU
                    subtotal = subtotal.to(mesh.device_type)
                for group in process_groups:
                    dist.all_reduce(subtotal, group=group)
                subtotal = subtotal.to(total.device)
            total = total + subtotal
        return total

    def _mesh_index(self, w: Any, meshes: list[Any]) -> int:
        if not is_dtensor(w):
            if self._all_reduce or not meshes:
                return REPLICATED
            return NOT_COUNTED if any(meshes[0].get_coordinate()) else REPLICATED
        index = meshes.index(w.device_mesh)
        mesh, summed_dims, _ = self._reductions[index]
        own_dims = _sharded_dims(w)
        if self._all_reduce and not own_dims:
            return REPLICATED
        replicated_dims = set(summed_dims if self._all_reduce else range(mesh.ndim)) - own_dims
        coordinate = mesh.get_coordinate()
        return NOT_COUNTED if any(coordinate[dim] for dim in replicated_dims) else index


def sharded_sweep(
    work: Work,
    mode: Mode,
    *,
    scale: Scale = UNSCALED,
    grads: Grads = None,
    with_value: bool = True,
    with_terms: bool = True,
    update: StepInputs | None = None,
) -> Measure | None:
    """`local_sweep` of this rank's shards, with the value of all ranks', or its own if not `work.all_reduce`.

    Gradients are DTensors with the placements of their weights. Terms are always formed.
    """
    parts = work._replace(weights=local_shards(work.weights))
    local_grads = None if grads is None else local_shards(grads)
    local_update = None if update is None else update.mapped(local_shards)
    if not with_value:
        return local_sweep(parts, mode, scale=scale, grads=local_grads, with_value=False, update=local_update)
    ownership = Ownership(work.weights, work.all_reduce)
    # One sweep for all: strength groups are split by who counts them.
    pairs = list(zip(work.groups, ownership.mesh_index, strict=True))
    numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    coarse = [group for group, _ in numbers]
    device = work.weights[0].device
    columns = [[s[group] if isinstance(s, Tensor) and s.ndim else s for group in coarse] for s in work.strengths]
    strengths = Strengths(per_group(columns[0], device, "l1"), per_group(columns[1], device, "l2"))
    fine = parts.regrouped([numbers[pair] for pair in pairs], len(numbers), strengths)
    if local_update is not None:
        local_update = local_update._replace(settings=[local_update.settings[group] for group in coarse])
    found = local_sweep(fine, mode, scale=scale, grads=local_grads, update=local_update)
    assert found is not None
    rows = []
    for group, row in zip(coarse, found.sums(len(coarse)), strict=True):
        rows.append(torch.zeros((work.n_groups, 2), dtype=row.dtype, device=row.device))
        rows[-1][group] = row
    sums = ownership.total(rows, [index for _, index in numbers])
    return weighted_terms(sums, work.strengths, value_dtype([w.dtype for w in work.weights]))


def _sharded_dims(weight: Any) -> set[int]:
    return {dim for dim, placement in enumerate(weight.placements) if not placement.is_replicate()}


def _reduction(mesh: Any, sharded: set[int]) -> tuple[list[int], list[Any]]:
    """The mesh dimensions to sum over, and the process groups that do it one after the other."""
    # The default group sums over all dimensions of a mesh of all ranks at once; a group for some of them would have to
    # be made first, by ranks that may not all be here.
    if len(sharded) > 1 and mesh.size() == dist.get_world_size():
        return list(range(mesh.ndim)), [dist.group.WORLD]
    return sorted(sharded), [mesh.get_group(dim) for dim in sorted(sharded)]
