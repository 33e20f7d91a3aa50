"""The formulas behind bench/results/scaling.md against what 1, 2 and 4 processes move and send."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import spawn

import fastreg
from bench.static import ledger, scaling
from bench.static.ledger import Count
from tests.support.ranks import AVAILABLE, Wire, start

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs gloo")
if AVAILABLE:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor


# One weight that 4 processes share unevenly.
SHAPES = [[64, 200], [4099, 3], [1024]]
L1, L2 = 0.1, 0.2


class LocalCount(Count):
    """The operations on the parts of DTensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t is not Tensor and issubclass(t, DTensor) for t in types):
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)


def gathered(weights: list[Tensor]) -> None:
    flat = torch.cat([w.full_tensor().flatten() for w in weights])  # type: ignore[attr-defined]
    (L1 * flat.abs().sum() + L2 * flat.square().sum()).backward()


CALLS: dict[str, tuple[Callable[[list[Tensor]], Any], Callable[..., scaling.Cost]]] = {
    "backward": (lambda weights: fastreg.elastic_penalty(weights, L1, L2).backward(), scaling.penalty),
    "add_grad": (lambda weights: fastreg.add_elastic_grad_(weights, L1, L2), scaling.add_grad),
    "gathered": (gathered, scaling.gathered),
}


def moved(task: str, call: Callable[[list[Tensor]], Any], weights: list[Tensor]) -> int:
    """fastreg's from its plan for a GPU, on this rank's parts; the rival's as it runs."""
    if task != "gathered":
        parts = [nn.Parameter(w.to_local().detach()) for w in weights]  # type: ignore[attr-defined]
        operations = ledger.fastreg_operations(task, parts)
    else:
        with LocalCount() as count:
            call(weights)
        operations = [o for o in count.operations if not o.name.endswith(("wait_tensor", "_wrap_tensor_autograd"))]
    return sum(o.read + o.written for o in operations)


def worker(rank: int, world: int, folder: str) -> None:
    start(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    weights: list[Tensor] = [nn.Parameter(distribute_tensor(torch.ones(s), mesh, [Shard(0)])) for s in SHAPES]
    for w in weights:
        w.grad = torch.zeros_like(w)
    found = {}
    for task, (call, _) in CALLS.items():
        with Wire() as wire:
            call(weights)
        found[task] = moved(task, call, weights), wire.collectives
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_formulas(world: int, tmp_path: Path) -> None:
    spawn(worker, args=(world, str(tmp_path)), nprocs=world)
    found = torch.load(tmp_path / "0.pt")
    for task, (_, formula) in CALLS.items():
        cost = formula(SHAPES, world)
        n_bytes, collectives = found[task]
        # What the formulas leave out: tables, partial sums, scalars.
        assert cost.moved <= n_bytes <= 1.05 * cost.moved, (task, n_bytes, cost)
        assert len(collectives) == cost.collectives, (task, collectives)
        assert sum(given for _, given in collectives) == cost.given, (task, collectives)


def test_what_a_ring_sends() -> None:
    """An all-reduce sends all but a P-th of the numbers, twice; an all-gather all that the others gave."""
    shapes = [[8, 10]]
    assert [scaling.add_grad(shapes, p).sent for p in (1, 2, 4)] == [0, 16, 24]
    assert [scaling.gathered(shapes, p).sent for p in (1, 2, 4)] == [0, 160, 240]


def test_the_document_is_up_to_date() -> None:
    assert scaling.TARGET.read_text() == scaling.report()
