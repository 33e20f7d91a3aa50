"""FSDP2 on 2 and 4 processes, alone and with tensor parallelism: training as the unsharded model trains."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastreg
from fastreg.integrations.callback import AttachedElasticNet
from tests.support.cases import L1, L2
from tests.support.check_sharded import check_everything
from tests.support.ranks import AVAILABLE, Ranks, by_name, close, full, on_processes, tensor
from tests.support.ways import Mode, spy_on_sweeps

pytestmark = on_processes
if AVAILABLE:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


def network(width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))


def train(
    net: nn.Module, impl: str, x: Tensor, *, n_micro: int = 1, mode: str | None = None, scale: float = 1.0
) -> Any:
    """Three steps; the penalty is computed ahead of the forward pass, while FSDP holds no weight gathered."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    reg = fastreg.ElasticNet(net, 1e-2, 1e-1, exclude=fastreg.bias_and_norm, impl=impl)
    if mode:
        reg.attach(optimizer, mode=mode)
    logged = []
    for _ in range(3):
        optimizer.zero_grad()
        for micro in range(n_micro):
            if hasattr(net, "set_requires_gradient_sync"):
                net.set_requires_gradient_sync(micro == n_micro - 1)
            penalty = torch.zeros(()) if mode else reg()
            loss = net(x[micro::n_micro]).square().mean()
            (scale * (loss + penalty) / n_micro).backward()
        optimizer.step()
        logged.append(reg.last.total if reg.last else penalty.detach())
    return logged


def fully_sharded(
    ranks: Ranks, mesh: "DeviceMesh | None" = None, train_keywords: dict[str, Any] | None = None, **keywords: Any
) -> None:
    keywords["mesh"] = ranks.mesh() if mesh is None else mesh
    net, reference = network().to(ranks.device), network().to(ranks.device)
    for layer in (net[0], net[2], net):
        fully_shard(layer, **keywords)
    x = tensor(8, 7, seed=9).to(ranks.device)
    logged = train(net, ranks.impl, x, **train_keywords or {})
    expected = train(reference, "torch", x, **train_keywords or {})
    # Offloaded weights, and their penalty, are on the CPU.
    for one, other in zip(logged, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=1e-5, atol=1e-6)
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        assert isinstance(p, DTensor)
        torch.testing.assert_close(full(p).cpu(), q.cpu(), rtol=1e-4, atol=1e-5)


def fsdp(ranks: Ranks) -> None:
    """The gradient is added in one sweep at the end of backward, without a buffer of the shards' size."""
    with pytest.MonkeyPatch.context() as patch:
        modes = spy_on_sweeps(patch)
        fully_sharded(ranks)
    # Three steps; the unsharded weights go the ordinary way, as plain ones do under torch.distributed.
    assert modes.count(Mode.ACCUMULATE) == modes.count(Mode.GRADIENT) == 3


def fsdp_that_always_reshards(ranks: Ranks) -> None:
    fully_sharded(ranks, reshard_after_forward=True)


def fsdp_with_replicas(ranks: Ranks) -> None:
    fully_sharded(ranks, ranks.mesh(2, ranks.world // 2, names=("replicate", "shard")))


def fsdp_with_accumulation(ranks: Ranks) -> None:
    fully_sharded(ranks, train_keywords={"n_micro": 2})


def fsdp_with_a_loss_scale(ranks: Ranks) -> None:
    fully_sharded(ranks, train_keywords={"n_micro": 2, "scale": 4.0})


def fsdp_attached(ranks: Ranks) -> None:
    for mode in ("grad", "prox"):
        fully_sharded(ranks, train_keywords={"mode": mode, "n_micro": 2})


def fsdp_offloaded(ranks: Ranks) -> None:
    fully_sharded(ranks, offload_policy=CPUOffloadPolicy(pin_memory=ranks.device != "cpu"))


def fsdp_in_mixed_precision(ranks: Ranks) -> None:
    """The penalty is that of the float32 shards, not of the bfloat16 weights that compute."""
    net = network().to(ranks.device)
    unsharded = [p.detach().clone() for p in net.parameters()]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in (net[0], net[2], net):
        fully_shard(layer, mesh=ranks.mesh(), mp_policy=policy)
    reg = fastreg.ElasticNet(net, L1, L2, impl=ranks.impl)
    penalty = reg()
    expected = fastreg.elastic_penalty(unsharded, L1, L2, impl="torch")
    close(penalty, expected)
    x = tensor(8, 7, seed=9).to(ranks.device)
    loss = net(x).square().mean()
    loss.backward()
    data = [full(p.grad).clone() for p in net.parameters()]
    net.zero_grad()
    (net(x).square().mean() + penalty).backward()
    for p, u, grad in zip(net.parameters(), unsharded, data, strict=True):
        assert p.dtype == p.grad.dtype == torch.float32
        (own,) = torch.autograd.grad(fastreg.elastic_penalty(u.requires_grad_(), L1, L2, impl="torch"), u)
        close(p.grad, grad + own)


def fsdp_and_tensor_parallel(ranks: Ranks) -> None:
    mesh = ranks.mesh(2, ranks.world // 2, names=("dp", "tp"))
    for width in (6, 8):
        net, reference = network(width).to(ranks.device), network(width).to(ranks.device)
        parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        for layer in (net[0], net[2], net):
            fully_shard(layer, mesh=mesh["dp"])
        close(
            fastreg.elastic_penalty(net, L1, L2, impl=ranks.impl),
            fastreg.elastic_penalty(reference, L1, L2, impl="torch"),
        )
    # PyTorch 2.9 gathers strided shards wrongly where they are uneven, so the rest is with 8 rows.
    check_everything(ranks, list(net[:3].parameters()), n_collectives=1)
    with torch.no_grad():
        for p, q in zip(net.parameters(), reference.parameters(), strict=True):
            q.copy_(full(p))
    x = tensor(8, 7, seed=9).to(ranks.device)
    net.zero_grad()
    (fastreg.elastic_penalty(net, L1, L2, impl=ranks.impl) + net(x).square().mean()).backward()
    (fastreg.elastic_penalty(reference, L1, L2, impl="torch") + reference(x).square().mean()).backward()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(full(p.grad), q.grad, rtol=1e-5, atol=1e-6)


def gathered_weights_are_refused(ranks: Ranks) -> None:
    for reshard in (None, 1):
        net = network().to(ranks.device)
        keywords = {} if reshard is None else {"reshard_after_forward": reshard}
        fully_shard(net[0], mesh=ranks.mesh(), **keywords)
        fully_shard(net, mesh=ranks.mesh())
        reg = fastreg.ElasticNet(net, L1, L2, impl=ranks.impl)
        penalty = reg()
        loss = net(tensor(8, 7, seed=9).to(ranks.device)).square().mean()
        for call in (reg, reg.add_grad_, lambda reg=reg: reg.prox_(0.1), lambda net=net: fastreg.sparsity(net)):
            with pytest.raises(RuntimeError, match=r"'(0|2|4)\.weight' is gathered by FSDP"):
                call()
        (loss + penalty).backward()
        reg()


def attached_after_an_evaluation(ranks: Ranks) -> None:
    """A forward pass without backward leaves the root gathered, whose weights the hooks look for before the closure."""
    x = tensor(8, 7, seed=9).to(ranks.device)
    for mode in ("grad", "prox"):
        net, reference = network().to(ranks.device), network().to(ranks.device)
        for layer in (net[0], net):
            fully_shard(layer, mesh=ranks.mesh())
        for model, impl in ((net, ranks.impl), (reference, "torch")):
            optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
            reg = fastreg.ElasticNet(model, L1, L2, impl=impl)
            reg.attach(optimizer, mode=mode)

            def compute(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            def evaluate(model: nn.Module = model) -> None:
                with torch.no_grad():
                    model(x)

            evaluate()
            optimizer.step(compute)
            compute()
            evaluate()
            optimizer.step()
            optimizer.step(evaluate)  # with the gradients of the step before
        for p, q in zip(net.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(full(p), q, rtol=1e-4, atol=1e-5)


def callbacks_after_an_evaluation(ranks: Ranks) -> None:
    """Trainers evaluate before a callback attaches its penalty, and may before it measures what it logs."""
    x = tensor(8, 7, seed=9).to(ranks.device)
    net = network().to(ranks.device)
    fully_shard(net, mesh=ranks.mesh())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    penalty = AttachedElasticNet(L1, L2, mode="prox")

    def evaluate() -> None:
        with torch.no_grad():
            net(x)

    evaluate()
    penalty._attach(net, [optimizer])
    net(x).square().mean().backward()
    optimizer.step()
    evaluate()
    metrics = penalty._metrics(1)
    assert penalty.last is not None
    assert torch.equal(metrics["regularization/l1"], penalty.last.l1)
    net.reshard()
    assert torch.equal(metrics["regularization/sparsity"], fastreg.sparsity(net))


CASES = by_name(
    fsdp,
    fsdp_that_always_reshards,
    fsdp_with_replicas,
    fsdp_with_accumulation,
    fsdp_with_a_loss_scale,
    fsdp_attached,
    fsdp_offloaded,
    fsdp_in_mixed_precision,
    fsdp_and_tensor_parallel,
    gathered_weights_are_refused,
    attached_after_an_evaluation,
    callbacks_after_an_evaluation,
)


@pytest.mark.parametrize("name", CASES)
def test_on_every_rank(on_every_rank: Callable[[str], None], name: str) -> None:
    on_every_rank(name)
