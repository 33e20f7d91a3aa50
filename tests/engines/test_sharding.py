"""PyTorch's engines on two processes, each against the same training in one process, in float64.

In every case rank r trains on its own batches, so that gradients have to be averaged.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastreg
from fastreg.core.dtensor import is_dtensor
from tests.integrations.by_hand import step_by_hand, terms_by_hand
from tests.support.ranks import AVAILABLE, Ranks, Teams, by_name, full, on_processes

pytestmark = [*on_processes, pytest.mark.engines]
if AVAILABLE:
    from torch.distributed._composable.replicate import replicate
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
    from torch.distributed.tensor import Partial, Shard, distribute_tensor

WORLD, STEPS = 2, 3
L1, L2, LR = 1e-2, 3e-2, 0.05
MODES = ("grad", "prox")


class Network(nn.Module):
    """Two layers, and two experts of which each sees half of the batch; the last layer starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.experts = nn.Parameter(torch.randn(2, 8, 8))
        nn.init.zeros_(self.last.weight)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden, experts = torch.tanh(self.first(x)), self.experts
        if is_dtensor(experts):
            experts = experts.full_tensor(grad_placements=[Partial()])  # type: ignore[attr-defined]
        return self.last(hidden + torch.tanh(torch.einsum("bi,eij->bj", hidden, experts)))


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank)).unbind()
    return x, y[:, :3]


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    x, y = batch(rank, step)
    return (model(x) - y).square().mean()


def matrices(model: nn.Module) -> list[Any]:
    return [p for p in model.parameters() if p.ndim > 1]


def reference(
    mode: str, kind: Any = torch.optim.AdamW, penalized: Any = matrices
) -> tuple[nn.Module, list[tuple[float, float, float]]]:
    """The training in one process; what it notes of each step: both terms, and the share of zeros afterwards."""
    model = Network()
    optimizer = kind(model.parameters(), lr=LR)
    noted = []
    for step in range(STEPS):
        optimizer.zero_grad()
        sum(loss_of(model, rank, step) / WORLD for rank in range(WORLD)).backward()  # type: ignore[union-attr]
        noted.append(step_by_hand(penalized(model), optimizer, mode, L1, L2))
    return model, noted


def train(model: nn.Module, optimizer: Any, rank: int, after_backward: Callable[[], object] = lambda: None) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        after_backward()
        optimizer.step()


def divide_gradient(p: Tensor) -> None:
    assert p.grad is not None
    p.grad.div_(WORLD)


def assert_same(found: Iterable[Tensor], expected: nn.Module) -> None:
    for p, q in zip(found, expected.parameters(), strict=True):
        torch.testing.assert_close(full(p.detach()), q.detach(), rtol=0, atol=1e-12)
        assert torch.equal(full(p.detach()) == 0, q == 0)


def assert_terms(found: Any, expected: Any) -> None:
    assert [found.l1.item(), found.l2.item()] == pytest.approx([*expected[:2]], rel=1e-12)


def over_ranks(value: Any, group: Any = None) -> Any:
    """The recipe of docs/devices.md."""
    summed = torch.stack(list(value)).detach()
    dist.all_reduce(summed, group=group)
    return type(value)(*summed)


def zero_redundancy(ranks: Ranks) -> None:
    """A rank's optimizer holds some of the parameters; the penalty inside it, its `last` summed, and attached."""
    for mode in MODES:
        model = DistributedDataParallel(Network())
        groups = [{"params": matrices(model), "l1": L1, "l2": L2}]
        groups.append({"params": [p for p in model.parameters() if p.ndim == 1], "l1": 0.0, "l2": 0.0})
        prox = mode == "prox"
        zero: Any = ZeroRedundancyOptimizer(groups, optimizer_class=fastreg.optim.AdamW, lr=LR, prox=prox, track=True)
        train(model, zero, ranks.rank)
        expected, noted = reference(mode)
        assert_same(model.parameters(), expected)
        if not prox:  # of an optimizer with prox=True, it is the value before the step
            assert_terms(over_ranks(zero.optim.last), noted[-1])
    model = DistributedDataParallel(Network())
    zero = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, lr=LR)
    reg = fastreg.ElasticNet(model, L1, L2, exclude=fastreg.bias_and_norm)
    reg.attach(zero)
    train(model, zero, ranks.rank)
    expected, noted = reference("grad")
    assert_same(model.parameters(), expected)
    assert_terms(reg.last, noted[-1])
    assert fastreg.sparsity(model, exclude=fastreg.bias_and_norm).item() == noted[-1][2]
    model = DistributedDataParallel(Network())
    zero = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, lr=LR)
    reg = fastreg.ElasticNet(model, L1, L2, exclude=fastreg.bias_and_norm)
    with pytest.raises(ValueError, match=r'step size of ZeroRedundancyOptimizer is not known.*metric="lr"'):
        reg.attach(zero, mode="prox")
    reg.attach(zero, mode="prox", metric="lr")
    other = Network()
    optimizer = torch.optim.AdamW(other.parameters(), lr=LR)
    fastreg.ElasticNet(other, L1, L2, exclude=fastreg.bias_and_norm).attach(optimizer, "prox", metric="lr")
    train(model, zero, ranks.rank)
    for step in range(STEPS):
        optimizer.zero_grad()
        sum(loss_of(other, rank, step) / WORLD for rank in range(WORLD)).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert_same(model.parameters(), other)


def post_local_sgd(ranks: Ranks) -> None:
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    model = DistributedDataParallel(Network())
    optimizer = PostLocalSGDOptimizer(torch.optim.AdamW(model.parameters(), lr=LR), PeriodicModelAverager(period=1))
    reg = fastreg.ElasticNet(model, L1, L2, exclude=fastreg.bias_and_norm)
    with pytest.raises(TypeError, match=r"PostLocalSGDOptimizer wraps an optimizer.*, \.optim"):
        reg.attach(optimizer)
    reg.attach(optimizer.optim, mode="prox")
    train(model, optimizer, ranks.rank)
    assert_same(model.parameters(), reference("prox")[0])


def replicated(ranks: Ranks) -> None:
    for mode in MODES:
        model = Network()
        replicate(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        reg = fastreg.ElasticNet(model, L1, L2, exclude=fastreg.bias_and_norm)
        reg.attach(optimizer, mode=mode)
        train(model, optimizer, ranks.rank)
        expected, noted = reference(mode)
        assert_same(model.parameters(), expected)
        if mode == "grad":
            assert_terms(reg.last, noted[-1])


def experts_and_fsdp2(ranks: Ranks) -> None:
    """Experts are shared among ranks on a mesh of their own, the rest by FSDP2."""
    for mode in MODES:
        model = Network()
        model.experts = nn.Parameter(distribute_tensor(model.experts.detach(), ranks.mesh(), [Shard(0)]))
        fully_shard(model, mesh=ranks.mesh(), ignored_params={model.experts})
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, foreach=False)
        reg = fastreg.ElasticNet(model, L1, L2, exclude=fastreg.bias_and_norm)
        reg.attach(optimizer, mode=mode)
        # FSDP2 averages gradients over ranks, redistribution adds them up.
        train(model, optimizer, ranks.rank, after_backward=partial(divide_gradient, model.experts))
        expected, noted = reference(mode)
        assert_same(model.parameters(), expected)
        if mode == "grad":
            assert_terms(reg.last, noted[-1])
        assert fastreg.sparsity(model, exclude=fastreg.bias_and_norm).item() == pytest.approx(noted[-1][2], rel=1e-6)


def plain_experts(ranks: Ranks) -> None:
    """Each rank has an expert of its own, a plain tensor, and all have the rest: the recipe of docs/devices.md."""
    model = Network()
    whole = fastreg.elastic_penalty(model, L1, L2).detach()
    model.experts = nn.Parameter(model.experts.detach()[ranks.rank : ranks.rank + 1].clone())
    own = fastreg.elastic_penalty(model, L1, L2, include=r"experts").detach()
    dist.all_reduce(own)
    shared = fastreg.elastic_penalty(model, L1, L2, exclude=r"experts").detach()
    torch.testing.assert_close(own + shared, whole, rtol=1e-14, atol=0)


def pipeline(ranks: Ranks) -> None:
    """Each rank has a stage with its own optimizer; the penalty of the model is the sum over stages."""
    for mode in MODES:
        torch.manual_seed(1)
        layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        whole = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        whole.load_state_dict(layers.state_dict())
        module = layers[:2] if ranks.rank == 0 else layers[2:]
        stage = PipelineStage(module, ranks.rank, ranks.world, torch.device("cpu"))
        schedule = ScheduleGPipe(stage, 2, loss_fn=nn.functional.mse_loss)
        optimizer = torch.optim.AdamW(module.parameters(), lr=LR)
        reg = fastreg.ElasticNet(module, L1, L2, exclude=fastreg.bias_and_norm)
        reg.attach(optimizer, mode=mode)
        other = torch.optim.AdamW(whole.parameters(), lr=LR)
        for step in range(STEPS):
            x, y = batch(0, step)
            optimizer.zero_grad()
            schedule.step(x) if ranks.rank == 0 else schedule.step(target=y)
            optimizer.step()
            other.zero_grad()
            nn.functional.mse_loss(whole(x), y).backward()
            if mode == "grad":
                terms = terms_by_hand(matrices(whole), L1, L2)
                assert_terms(over_ranks(reg.last), terms)
            step_by_hand(matrices(whole), other, mode, L1, L2)
        own = whole[:2] if ranks.rank == 0 else whole[2:]
        assert_same(module.parameters(), own)


def fsdp1(ranks: Ranks) -> None:
    """The optimizer holds flattened shards, whose weights cannot be told apart; `last` is the rank's share."""
    for use_orig_params in (False, True):
        for prox in (False, True):
            model = FullyShardedDataParallel(Network(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
            optimizer = fastreg.optim.AdamW(model.parameters(), LR, l1=L1, l2=L2, prox=prox, track=True)
            with pytest.raises(TypeError, match="wrapped by FullyShardedDataParallel"):
                fastreg.sparsity(model)
            train(model, optimizer, ranks.rank)
            expected, noted = reference("prox" if prox else "grad", penalized=lambda m: list(m.parameters()))
            if not prox:
                assert_terms(over_ranks(optimizer.last), noted[-1])
            with FullyShardedDataParallel.summon_full_params(model):
                assert_same(model.parameters(), expected) if use_orig_params else None
                flat = torch.cat([p.detach().flatten() for p in model.parameters()])
                wanted = torch.cat([p.detach().flatten() for p in expected.parameters()])
                torch.testing.assert_close(flat[: len(wanted)], wanted, rtol=0, atol=1e-12)


def zero_gradients_at_first(ranks: Ranks) -> None:
    """As engines that make a dummy step when they start: no weight is gone before the training begins."""
    for inside in (False, True):
        model = Network()
        fully_shard(model, mesh=ranks.mesh())
        before = [full(p.detach()).clone() for p in model.parameters()]
        if inside:
            optimizer: Any = fastreg.optim.AdamW(model.parameters(), LR, weight_decay=0.0, l1=0.1, l2=0.1, prox=True)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.0)
            fastreg.ElasticNet(model, 0.1, 0.1).attach(optimizer, mode="prox")
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p, q in zip(model.parameters(), before, strict=True):
            assert torch.equal(full(p.detach()), q)


def placeholders(ranks: Ranks) -> None:
    """As DeepSpeed's ZeRO-3 leaves them in the model: without elements, and with the number that they had."""
    model = Network()
    for p in model.parameters():
        placeholder: Any = p
        placeholder.ds_id, placeholder.ds_numel, placeholder.ds_shape = id(p), p.numel(), p.shape
        p.data = torch.empty(0, dtype=p.dtype)
        p.grad = torch.empty(0, dtype=p.dtype)
    calls: list[Callable[[], object]] = [
        lambda: fastreg.elastic_penalty(model, L1), lambda: fastreg.add_elastic_grad_(model, L1),
        lambda: fastreg.elastic_prox_(model, L1, lr=LR), lambda: fastreg.sparsity(model),
        lambda: fastreg.ElasticNet(model, L1), fastreg.optim.AdamW(model.parameters(), l1=L1).step,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(RuntimeError, match="GatheredParameters"):
            call()


CASES = by_name(
    zero_redundancy,
    post_local_sgd,
    replicated,
    experts_and_fsdp2,
    plain_experts,
    pipeline,
    fsdp1,
    zero_gradients_at_first,
    placeholders,
)


@pytest.mark.parametrize("name", CASES)
def test_on_two_processes(teams: Teams, name: str) -> None:
    teams.run(__name__, name, WORLD, ("torch", "cpu"))
