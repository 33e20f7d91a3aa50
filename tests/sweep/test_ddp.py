"""Two processes under DistributedDataParallel: the gradients of the naive formulation, averaged, on both ranks."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastreg
from tests.support.ranks import Ranks, Teams, on_processes
from tests.support.ways import L1, L2, grid, naive

pytestmark = on_processes

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


class Setting(NamedTuple):
    wrapper: dict[str, Any]  # keywords of DistributedDataParallel
    penalty_in_forward: bool = False
    loss_scales: tuple[float, float] = (1.0, 1.0)  # of loss and penalty, by rank
    n_unsynchronised: int = 0  # micro-batches under no_sync before each synchronised one
    after_backward: bool = False  # straight into the averaged gradients, as an attached penalty does it


SETTINGS = {
    "default": Setting({}),
    "bucket_views": Setting({"gradient_as_bucket_view": True}),
    "many_buckets": Setting({"bucket_cap_mb": 1e-6, "gradient_as_bucket_view": True}),
    "static_graph": Setting({"static_graph": True}),
    "static_graph_bucket_views": Setting({"static_graph": True, "gradient_as_bucket_view": True}),
    "find_unused_parameters": Setting({"find_unused_parameters": True}, penalty_in_forward=True),
    "in_forward": Setting({"gradient_as_bucket_view": True}, penalty_in_forward=True),
    "loss_scales": Setting({}, loss_scales=(4.0, 1.0)),
    "loss_scales_bucket_views": Setting({"gradient_as_bucket_view": True}, loss_scales=(0.25, 2.0)),
    "loss_scale_of_zero_on_one_rank": Setting({"static_graph": True}, loss_scales=(0.0, 1.0)),
    "after_backward": Setting({"find_unused_parameters": True, "gradient_as_bucket_view": True}, after_backward=True),
    "no_sync": Setting({"gradient_as_bucket_view": True}, loss_scales=(2.0, 1.0), n_unsynchronised=2),
}
N_STEPS = 2  # static_graph and find_unused_parameters take other routes from the second step on


def batch(rank: int, step: int) -> Tensor:
    return grid(2, 3, device="cpu", seed=100 + 10 * rank + step)


def reduced(setting: Setting, rank: int) -> list[list[Tensor]]:
    """The gradients of a rank after each step, one added to the other as under gradient accumulation."""

    def penalty(model: nn.Module) -> Tensor:
        return fastreg.elastic_penalty(model, L1, L2)

    model = DistributedDataParallel(Model(penalty if setting.penalty_in_forward else None), **setting.wrapper)

    def loss(step: int) -> Tensor:
        out = model(batch(rank, step))
        if setting.penalty_in_forward or setting.after_backward:
            return setting.loss_scales[rank] * out
        return setting.loss_scales[rank] * (out + penalty(model))

    gradients = []
    for step in range(N_STEPS):
        for _ in range(setting.n_unsynchronised):
            with model.no_sync():
                loss(step).backward()
        loss(step).backward()
        if setting.after_backward:
            fastreg.add_elastic_grad_(model, L1, L2)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return gradients


def mean_of_naive_gradients(setting: Setting) -> list[list[Tensor]]:
    model = Model(lambda model: naive(list(model.parameters()))[0])
    gradients = []
    for step in range(N_STEPS):
        for rank in range(WORLD):
            for _ in range(1 + setting.n_unsynchronised):
                (setting.loss_scales[rank] / WORLD * model(batch(rank, step))).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return gradients


def gradients_are_the_mean(setting: Setting, ranks: Ranks) -> None:
    expected = mean_of_naive_gradients(setting)
    for actual, exact in zip(reduced(setting, ranks.rank), expected, strict=True):
        for a, e in zip(actual, exact, strict=True):
            assert torch.equal(a, e), (a, e)


CASES = {name: partial(gradients_are_the_mean, setting) for name, setting in SETTINGS.items()}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_mean_over_ranks(teams: Teams, name: str) -> None:
    teams.run(__name__, name, WORLD, ("torch", "cpu"))
