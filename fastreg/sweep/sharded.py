"""Sweep over sharded weights: each rank visits its own shards, and ranks sum a few numbers.

No weight and no gradient leaves its rank. Each mesh costs one all-reduce of two float64 numbers per strength group,
over the mesh dimensions on which any of its weights is sharded. If a weight is replicated on one of those dimensions,
only the ranks with coordinate 0 in it count the weight. If several dimensions are sharded and the mesh does not contain
all ranks, each dimension takes its own all-reduce.

Every rank must make the same all-reduces, but ranks may differ in which weights have gradients. Steps and proximal
steps visit weights in several sweeps, by their gradients. Their values are therefore summed over ranks once, after the
last sweep, by `split_by_mesh` and `Ownership.result`: the total and its terms per mesh, for any number of groups.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastreg.core.dtensor import is_dtensor, local_shard, local_shards
from fastreg.core.dtypes import accumulate_dtype, value_dtype
from fastreg.core.penalty import BasePenalty, Measure
from fastreg.core.strengths import penalty_of_groups
from fastreg.core.types import Mode, Request, Want, Work
from fastreg.sweep import agreement
from fastreg.sweep.agreement import Facts, check_agreement, facts_of
from fastreg.sweep.local import local_sweep

REPLICATED = -1  # every rank counts the weight and gets the same number
NOT_COUNTED = -2  # another rank counts the weight


class Ownership:
    """Which rank counts which weight: `mesh_index[i]` is the mesh over which weight i is summed, or a constant above.

    If `all_reduce` is False, ranks do not sum their counts. Exactly one rank then counts each shard of a weight. The
    rank whose coordinates in the first mesh are all 0 counts plain tensors.

    `facts` must be the same on all ranks. They are compared if FASTREG_DEBUG_RANKS is set.
    """

    def __init__(self, weights: Sequence[Tensor], all_reduce: bool, facts: Facts = ()) -> None:
        distributed: list[Any] = [w for w in weights if is_dtensor(w)]
        meshes = list(dict.fromkeys(w.device_mesh for w in distributed))
        sharded: list[set[int]] = [set() for _ in meshes]
        for w in distributed:
            sharded[meshes.index(w.device_mesh)] |= _sharded_dims(w)
        self._reductions = [(mesh, *_reduction(mesh, dims)) for mesh, dims in zip(meshes, sharded, strict=True)]
        self._all_reduce = all_reduce
        self.weights, self.n_meshes = weights, len(meshes) + 1  # plain tensors count as a mesh
        if agreement.IS_ON and all_reduce:
            check_agreement(facts, [group for _, _, groups in self._reductions for group in groups])
        self.mesh_index = [self._mesh_index(w, meshes) for w in weights]

    def total(self, counts: Sequence[Tensor], mesh_index: Sequence[int]) -> Tensor:
        """Return the sum of equally shaped `counts` over this rank or all. Count i belongs to mesh `mesh_index[i]`."""
        total = torch.zeros_like(counts[0])
        for index in (REPLICATED, *range(len(self._reductions))):
            own = [count for count, i in zip(counts, mesh_index, strict=True) if i == index]
            subtotal = torch.stack(own).sum(0) if own else torch.zeros_like(total)
            if index != REPLICATED and self._all_reduce:
                mesh, _, process_groups = self._reductions[index]
                if subtotal.device.type != mesh.device_type:  # weights are offloaded to the CPU
                    subtotal = subtotal.to(mesh.device_type)
                for group in process_groups:
                    dist.all_reduce(subtotal, group=group)
                subtotal = subtotal.to(total.device)
            total = total + subtotal
        return total

    def result(self, penalty: type[BasePenalty], shares: Sequence[Any]) -> Any:
        """Return the value of all ranks: the sum of `shares`, results of `split_by_mesh`. A rank may have no share."""
        device = local_shard(self.weights[0]).device
        shape = self.n_meshes, 1 + len(penalty.NAMES)
        total = torch.zeros(shape, dtype=accumulate_dtype(device), device=device)
        for share in shares:
            total = total + torch.stack(list(share), 1).to(total)
        summed = self.total(list(total), [*range(self.n_meshes - 1), REPLICATED])
        return penalty.RESULT(*summed.to(value_dtype([w.dtype for w in self.weights])))

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


def sharded_sweep(work: Work, request: Request) -> Measure | None:
    """Call `local_sweep` on this rank's shards. Return the value of all ranks, or of this one if not `work.all_reduce`.

    Gradients are DTensors with the placements of their weights. If any value is wanted, the result has all terms.
    """
    parts = work._replace(weights=local_shards(work.weights))
    grads = None if request.grads is None else local_shards(request.grads)
    step = None if request.step is None else request.step.mapped(local_shards)
    local = request._replace(grads=grads, step=step)
    if request.want is Want.NOTHING:
        if agreement.IS_ON and request.mode is Mode.PROX:
            Ownership(work.weights, True, facts_of(work))
        return local_sweep(parts, local)
    if work.meshes is not None:
        measured = local_sweep(parts, local)
        assert measured is not None
        return weighted_by_mesh(work, measured.sums(work.n_groups))
    ownership = Ownership(work.weights, work.all_reduce, facts_of(work))
    split, pairs = _regrouped_by_mesh(parts, ownership.mesh_index)
    if step is not None:
        step = step._replace(settings=[step.settings[group] for group, _ in pairs])
    measured = local_sweep(split, local._replace(step=step))
    assert measured is not None
    counts = []
    for (group, _), row in zip(pairs, measured.sums(len(pairs)), strict=True):
        counts.append(row.new_zeros(work.n_groups, len(row)))
        counts[-1][group] = row
    sums = ownership.total(counts, [index for _, index in pairs])
    return work.penalty.weighted(sums, value_dtype([w.dtype for w in work.weights]))


def split_by_mesh(work: Work, ownership: Ownership, request: Request | None = None) -> tuple[Work, Any]:
    """Return the work and the request with one strength group per group and mesh.

    The values of sweeps over the work, or over parts of it, then are this rank's shares, one number per mesh. The
    caller passes them to `ownership.result`. The ownership may be that of more weights.
    """
    mesh_of = dict(zip(map(id, ownership.weights), ownership.mesh_index, strict=True))
    split, pairs = _regrouped_by_mesh(work, [mesh_of[id(w)] for w in work.weights])
    if request is not None and request.step is not None:
        settings = [request.step.settings[group] for group, _ in pairs]
        request = request._replace(step=request.step._replace(settings=settings))
    return split._replace(meshes=[index for _, index in pairs], n_meshes=ownership.n_meshes), request


def weighted_by_mesh(work: Work, sums: Tensor) -> Measure:
    """Return the terms of `sums` [n_groups, n_sums] and their total as vectors of one number per mesh."""
    places: Sequence[int] = work.meshes or ()
    columns = []
    # REPLICATED, -1, is the last place. NOT_COUNTED has none.
    for place in (*range(work.n_meshes - 1), REPLICATED):
        own = torch.zeros_like(sums)
        for group in [group for group, other in enumerate(places) if other == place]:
            own[group] = sums[group]
        measured = work.penalty.weighted(own, sums.dtype)
        columns.append((measured.total, *(measured.terms or ())))
    total, *terms = map(torch.stack, zip(*columns, strict=True))
    return Measure(total, tuple(terms), sums)


def _regrouped_by_mesh(work: Work, mesh_index: Sequence[int]) -> tuple[Work, list[tuple[int, Any]]]:
    """Split the strength groups by `mesh_index`, so that one sweep serves all meshes. Return the pairs of both, too."""
    split, pairs = work.regrouped(mesh_index)
    rows = [[s[group] if isinstance(s, Tensor) and s.ndim else s for s in work.penalty.strengths] for group, _ in pairs]
    return split._replace(penalty=penalty_of_groups(type(work.penalty), rows, work.weights[0].device)), pairs


def _sharded_dims(weight: Any) -> set[int]:
    return {dim for dim, placement in enumerate(weight.placements) if not placement.is_replicate()}


def _reduction(mesh: Any, sharded: set[int]) -> tuple[list[int], list[Any]]:
    """Return the mesh dimensions to sum over, and the process groups to all-reduce in turn."""
    # For a mesh of all ranks, the default group sums over all dimensions at once. A new group for some dimensions would
    # need a call from every rank, and not every rank may be here.
    if len(sharded) > 1 and mesh.size() == dist.get_world_size():
        return list(range(mesh.ndim)), [dist.group.WORLD]
    return sorted(sharded), [mesh.get_group(dim) for dim in sorted(sharded)]
