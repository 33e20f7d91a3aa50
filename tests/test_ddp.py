"""Two processes under DistributedDataParallel: the gradients of the naive formulation, averaged, on both ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

import fastreg
from tests.ranks import AVAILABLE, start
from tests.ways import L1, L2, grid, naive

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs gloo")

WORLD = 2


class Model(nn.Module):
    """Linear, so that all arithmetic is exact; one weight that the loss does not use."""

    def __init__(self, penalty: Callable[["Model"], Tensor] | None) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4, bias=False)
        self.second = nn.Linear(4, 2)
        self.unused = nn.Parameter(torch.empty(5))
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(grid(*p.shape, device="cpu", seed=i))
        self.penalty = penalty

    def forward(self, x: Tensor) -> Tensor:
        loss = self.second(self.first(x)).sum()
        return loss if self.penalty is None else loss + self.penalty(self)


class Case(NamedTuple):
    wrapper: dict[str, Any]  # keywords of DistributedDataParallel
    penalty_in_forward: bool = False
    loss_scales: tuple[float, float] = (1.0, 1.0)  # of loss and penalty, by rank
    n_unsynchronised: int = 0  # micro-batches under no_sync before each synchronised one
    after_backward: bool = False  # straight into the averaged gradients, as an attached penalty does it


CASES = {
    "default": Case({}),
    "bucket_views": Case({"gradient_as_bucket_view": True}),
    "many_buckets": Case({"bucket_cap_mb": 1e-6, "gradient_as_bucket_view": True}),
    "static_graph": Case({"static_graph": True}),
    "static_graph_bucket_views": Case({"static_graph": True, "gradient_as_bucket_view": True}),
    "find_unused_parameters": Case({"find_unused_parameters": True}, penalty_in_forward=True),
    "in_forward": Case({"gradient_as_bucket_view": True}, penalty_in_forward=True),
    "loss_scales": Case({}, loss_scales=(4.0, 1.0)),
    "loss_scales_bucket_views": Case({"gradient_as_bucket_view": True}, loss_scales=(0.25, 2.0)),
    "loss_scale_of_zero_on_one_rank": Case({"static_graph": True}, loss_scales=(0.0, 1.0)),
    "after_backward": Case({"find_unused_parameters": True, "gradient_as_bucket_view": True}, after_backward=True),
    "no_sync": Case({"gradient_as_bucket_view": True}, loss_scales=(2.0, 1.0), n_unsynchronised=2),
}
N_STEPS = 2  # static_graph and find_unused_parameters take other routes from the second step on


def batch(rank: int, step: int) -> Tensor:
    return grid(2, 3, device="cpu", seed=100 + 10 * rank + step)


def reduced(case: Case, rank: int) -> list[list[Tensor]]:
    """The gradients of a rank after each step, one added to the other as under gradient accumulation."""

    def penalty(model: nn.Module) -> Tensor:
        return fastreg.elastic_penalty(model, L1, L2)

    model = DistributedDataParallel(Model(penalty if case.penalty_in_forward else None), **case.wrapper)

    def loss(step: int) -> Tensor:
        out = model(batch(rank, step))
        if case.penalty_in_forward or case.after_backward:
            return case.loss_scales[rank] * out
        return case.loss_scales[rank] * (out + penalty(model))

    gradients = []
    for step in range(N_STEPS):
        for _ in range(case.n_unsynchronised):
            with model.no_sync():
                loss(step).backward()
        loss(step).backward()
        if case.after_backward:
            fastreg.add_elastic_grad_(model, L1, L2)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return gradients


def worker(rank: int, folder: str) -> None:
    start(rank, WORLD, folder)
    torch.save({name: reduced(case, rank) for name, case in CASES.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[list[Tensor]]]]:
    """By rank, case, step and parameter. One pair of processes serves all cases: starting it takes the time."""
    folder: Path = tmp_path_factory.mktemp("ddp")
    spawn(worker, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def mean_of_naive_gradients(case: Case) -> list[list[Tensor]]:
    model = Model(lambda model: naive(list(model.parameters()))[0])
    gradients = []
    for step in range(N_STEPS):
        for rank in range(WORLD):
            for _ in range(1 + case.n_unsynchronised):
                (case.loss_scales[rank] / WORLD * model(batch(rank, step))).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return gradients


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_mean_over_ranks(gradients: list[dict[str, list[list[Tensor]]]], name: str) -> None:
    expected = mean_of_naive_gradients(CASES[name])
    for rank in range(WORLD):
        for actual, exact in zip(gradients[rank][name], expected, strict=True):
            for a, e in zip(actual, exact, strict=True):
                assert torch.equal(a, e), (rank, a, e)
