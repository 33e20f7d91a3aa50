"""Sharded weights on 2 and 4 processes: the numbers of the unsharded model, and what crosses the wire for them."""

import copy
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastreg
from tests.cases import L1, L2
from tests.ways import Path

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform == "win32", reason="needs gloo"
)
if dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Ranks(NamedTuple):
    """What a case is told of the process it runs in."""

    rank: int
    world: int
    impl: str
    device: str

    def mesh(self, *shape: int, names: tuple[str, ...] | None = None) -> "DeviceMesh":
        return init_device_mesh(self.device, shape or (self.world,), mesh_dim_names=names)


class Wire(TorchDispatchMode):
    """Records the collectives: their names, and the bytes that a rank gives to each."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t is not Tensor and issubclass(t, DTensor) for t in types):
            return NotImplemented  # what it does to its parts comes by here again
        name = str(func)
        if name.startswith(("c10d.", "_c10d_functional.")) and not name.split(".")[1].startswith(("wait", "_wrap")):
            n_bytes = sum(t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, Tensor))
            self.collectives.append((name.split(".")[1].strip("_"), n_bytes))
        return func(*args, **(kwargs or {}))


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def close(found: Any, expected: Any) -> None:
    # Numbers around 1, some of them differences of such: a few float32 roundings.
    torch.testing.assert_close(full(found.detach()), full(expected.detach()), rtol=1e-6, atol=5e-7)


def assert_sharded_like(grad: Tensor | None, w: Tensor) -> None:
    assert isinstance(grad, DTensor) == isinstance(w, DTensor)
    if isinstance(grad, DTensor):
        assert grad.placements == w.placements
        assert grad.device_mesh == w.device_mesh
        assert grad.to_local().shape == w.to_local().shape


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """The same on every rank; some of it is zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return torch.where(values.abs() < 0.3, 0.0, values).to(dtype)


def sharded(values: list[Tensor], layout: list[tuple["DeviceMesh", list[Any]] | None], device: str) -> list[Tensor]:
    """Each tensor on its mesh with its placements, or plain."""
    weights = []
    for value, where in zip(values, layout, strict=True):
        placed = value.to(device) if where is None else distribute_tensor(value.to(device), *where)
        weights.append(nn.Parameter(placed))
    return weights


def check_everything(ranks: Ranks, weights: list[Tensor], *, n_meshes: int, by_group: bool = False) -> None:
    """All calls on `weights`, against the same calls on the unsharded tensors."""
    unsharded = [nn.Parameter(full(w.detach()).clone()) for w in weights]

    def params(ws: list[Tensor]) -> Any:
        if not by_group:
            return ws
        return [{"params": ws[::2], "l1": 0.5}, {"params": ws[1::2], "l2": torch.tensor(0.25, device=ranks.device)}]

    def of_both(call: Callable[[Any, str], Any]) -> tuple[Any, Any]:
        with Wire() as wire:
            found = call(params(weights), ranks.impl)
        allowed = 16 * (2 if by_group else 1)
        assert wire.collectives == [("allreduce", allowed)] * n_meshes, wire.collectives
        return found, call(params(unsharded), "torch")

    # The value, and that it is a plain tensor, the same on every rank.
    found, expected = of_both(lambda p, impl: fastreg.elastic_penalty(p, L1, L2, return_terms=True, impl=impl))
    for one, other in zip(found, expected, strict=True):
        assert type(one) is Tensor
        assert one.dtype == other.dtype
        close(one, other)
        everywhere = [torch.empty_like(one.detach()) for _ in range(ranks.world)]
        dist.all_gather(everywhere, one.detach())
        assert all(torch.equal(e, everywhere[0]) for e in everywhere)

    # The gradient, through autograd in both ways, onto nothing and onto what is there.
    for hooked in (False, True):
        handle = weights[0].register_hook(lambda grad: None) if hooked else None
        for _ in range(2):
            of_both(lambda p, impl: (2 * fastreg.elastic_penalty(p, L1, L2, impl=impl)).backward())
            for w, u in zip(weights, unsharded, strict=True):
                assert_sharded_like(w.grad, w)
                close(w.grad, u.grad)
        if handle is not None:
            handle.remove()
    grads = torch.autograd.grad(fastreg.elastic_penalty(weights, L1, L2, impl=ranks.impl), weights)
    expected = torch.autograd.grad(fastreg.elastic_penalty(unsharded, L1, L2, impl="torch"), unsharded)
    for w, grad, other in zip(weights, grads, expected, strict=True):
        assert_sharded_like(grad, w)
        close(grad, other)

    # Strengths that learn get the derivative of the whole, the second one too.
    def learn(p: Any, impl: str) -> list[Tensor]:
        l1, l2 = (torch.tensor(s, device=ranks.device, requires_grad=True) for s in (L1, L2))
        value = fastreg.elastic_penalty(p, l1, l2, impl=impl)
        first = torch.autograd.grad(value, [l1, l2], retain_graph=True)
        again = torch.autograd.grad(value.square(), [l1, l2], create_graph=True)
        return [*first, *again, *torch.autograd.grad(sum(again), [l1, l2])]

    for one, other in zip(*of_both(learn), strict=True):
        close(one, other)

    # In place.
    for one, other in zip(*of_both(lambda p, impl: fastreg.add_elastic_grad_(p, L1, L2, impl=impl)), strict=True):
        close(one, other)
    for w in weights + unsharded:
        w.grad = None if w.ndim == 1 else w.grad
    of_both(lambda p, impl: fastreg.add_elastic_grad_(p, L1, L2, impl=impl))
    for w, u in zip(weights, unsharded, strict=True):
        assert_sharded_like(w.grad, w)
        close(w.grad, u.grad)
    with Wire() as wire:
        found = fastreg.sparsity(weights)
        fastreg.elastic_prox_(params(weights), L1, L2, lr=0.5, impl=ranks.impl)
    assert wire.collectives == [("allreduce", 8)] * n_meshes
    close(found, fastreg.sparsity(unsharded))
    fastreg.elastic_prox_(params(unsharded), L1, L2, lr=0.5, impl="torch")
    for w, u in zip(weights, unsharded, strict=True):
        close(w, u)
    close(fastreg.sparsity(weights), fastreg.sparsity(unsharded))

    # Attached to an optimizer.
    for mode in ("grad", "prox"):
        results = []
        for ws, impl in ((weights, ranks.impl), (unsharded, "torch")):
            # An optimizer's foreach operators do not mix DTensors with plain tensors, or meshes.
            optimizer = torch.optim.SGD(ws, lr=0.1, foreach=False)
            reg = fastreg.ElasticNet(params(ws), L1, L2, impl=impl)
            handle = reg.attach(optimizer, mode=mode)
            optimizer.step()
            handle.remove()
            results.append(reg.last)
        for one, other in zip(*results, strict=True):
            close(one, other)
        for w, u in zip(weights, unsharded, strict=True):
            close(w, u)

    # Terms that the caller sums.
    with Wire() as wire:
        found = fastreg.elastic_penalty(params(weights), L1, L2, return_terms=True, reduce=False, impl=ranks.impl)
        with torch.no_grad():
            again = fastreg.ElasticNet(params(weights), L1, L2, impl=ranks.impl)(reduce=False)
        added = fastreg.add_elastic_grad_(params(weights), L1, L2, reduce=False, impl=ranks.impl)
    assert wire.collectives == []
    expected = fastreg.elastic_penalty(params(unsharded), L1, L2, return_terms=True, impl="torch")
    if n_meshes == 1:
        terms = torch.stack([t.detach().double() for t in (*found, again, *added)])
        dist.all_reduce(terms)
        for one, other in zip(terms, (*expected, expected.total, *expected), strict=True):
            close(one.to(other.dtype), other)
    for w in weights + unsharded:
        w.grad = None
    found.total.backward()
    expected.total.backward()
    for w, u in zip(weights, unsharded, strict=True):
        close(w.grad, u.grad)


VALUES = [((8, 6), 0), ((5,), 1), ((3, 7), 2), ((1,), 3), ((0, 4), 4), ((6, 4, 2), 5)]
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.float16]


def values(dtypes: list[torch.dtype] | None = None) -> list[Tensor]:
    dtypes = dtypes or [torch.float32] * len(VALUES)
    return [tensor(*shape, dtype=dtype, seed=seed) for (shape, seed), dtype in zip(VALUES, dtypes, strict=True)]


def one_dimensional(ranks: Ranks) -> None:
    """Uneven and empty shards: a weight of one element, one of none, and 5 rows for 4 ranks."""
    mesh = ranks.mesh()
    check_everything(ranks, sharded(values(), [(mesh, [Shard(0)])] * 6, ranks.device), n_meshes=1)


def half_precision(ranks: Ranks) -> None:
    mesh = ranks.mesh()
    weights = sharded(values(DTYPES), [(mesh, [Shard(0)])] * 6, ranks.device)
    with torch.no_grad():
        found = fastreg.elastic_penalty(weights, L1, L2, impl=ranks.impl)
        close(found, fastreg.elastic_penalty([full(w) for w in weights], L1, L2, impl="torch"))
    fastreg.add_elastic_grad_(weights, L1, L2, impl=ranks.impl)
    for w in weights:
        assert_sharded_like(w.grad, w)
        other = nn.Parameter(full(w.detach()))
        fastreg.add_elastic_grad_([other], L1, L2, impl="torch")
        torch.testing.assert_close(full(w.grad), other.grad)


def other_dimensions_and_groups(ranks: Ranks) -> None:
    mesh = ranks.mesh()
    dims = [1, 0, 1, 0, 1, 2]
    weights = sharded(values(), [(mesh, [Shard(d)]) for d in dims], ranks.device)
    check_everything(ranks, weights, n_meshes=1, by_group=True)


def replicated_and_plain(ranks: Ranks) -> None:
    mesh = ranks.mesh()
    layout: list[Any] = [(mesh, [Shard(0)]), (mesh, [Replicate()]), None, (mesh, [Replicate()]), None, None]
    check_everything(ranks, sharded(values(), layout, ranks.device), n_meshes=1)


def only_replicated(ranks: Ranks) -> None:
    mesh = ranks.mesh()
    weights = sharded(values(), [(mesh, [Replicate()])] * 6, ranks.device)
    with Wire() as wire:
        found = fastreg.elastic_penalty(weights, L1, L2, impl=ranks.impl)
    assert wire.collectives == []
    close(found, fastreg.elastic_penalty([full(w.detach()) for w in weights], L1, L2, impl="torch"))
    local = fastreg.elastic_penalty(weights, L1, L2, reduce=False, impl=ranks.impl).detach()
    dist.all_reduce(local)
    close(local, found)


def two_dimensional(ranks: Ranks) -> None:
    """Every pair of placements in one model: one all-reduce, of everybody's part exactly once."""
    mesh = ranks.mesh(2, ranks.world // 2, names=("dp", "tp"))
    layout = [
        (mesh, [Shard(0), Shard(1)]),
        (mesh, [Shard(0), Replicate()]),
        (mesh, [Replicate(), Shard(0)]),
        (mesh, [Replicate(), Replicate()]),
        (mesh, [Shard(0), Shard(0)]),
        (mesh, [Shard(2), Shard(1)]),
    ]
    check_everything(ranks, sharded(values(), layout, ranks.device), n_meshes=1)


def one_dimension_of_two(ranks: Ranks) -> None:
    """HSDP: what is replicated on one dimension is summed over the other one only."""
    mesh = ranks.mesh(2, ranks.world // 2)
    weights = sharded(values(), [(mesh, [Replicate(), Shard(0)])] * 6, ranks.device)
    check_everything(ranks, weights, n_meshes=1, by_group=True)


def two_dimensions_of_three(ranks: Ranks) -> None:
    """Neither one dimension's group nor everybody's: it is made, by those alone who are in it."""
    mesh = ranks.mesh(ranks.world // 2, 2, 1)
    layout = [(mesh, [Replicate(), Shard(0), Shard(0)]), (mesh, [Replicate(), Shard(1), Replicate()])] * 3
    layout[1] = layout[3] = (mesh, [Replicate(), Replicate(), Shard(0)])
    check_everything(ranks, sharded(values(), layout, ranks.device), n_meshes=1)


def several_meshes(ranks: Ranks) -> None:
    mesh = ranks.mesh(2, ranks.world // 2, names=("dp", "tp"))
    other = ranks.mesh()
    layout = [
        (mesh["dp"], [Shard(0)]),
        (other, [Shard(0)]),
        (mesh, [Shard(0), Shard(1)]),
        None,
        (mesh["dp"], [Shard(1)]),
        (mesh["dp"], [Replicate()]),
    ]
    check_everything(ranks, sharded(values(), layout, ranks.device), n_meshes=3)


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
    for one, other in zip(logged, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        assert isinstance(p, DTensor)
        torch.testing.assert_close(full(p), q, rtol=1e-4, atol=1e-5)


def fsdp(ranks: Ranks) -> None:
    fully_sharded(ranks)


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
    check_everything(ranks, list(net[:3].parameters()), n_meshes=1)
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


def partial_weights_are_refused(ranks: Ranks) -> None:
    weight = DTensor.from_local(torch.ones(3, 3, device=ranks.device), ranks.mesh(), [Partial()])
    with pytest.raises(TypeError, match=r"'params' is a DTensor with a Partial placement.*redistribute"):
        fastreg.elastic_penalty(weight, L1, L2)


def wrong_arguments_raise_on_every_rank(ranks: Ranks) -> None:
    """Before anything is sent: otherwise this would not come to an end."""
    mesh = ranks.mesh()
    weight, integers = (
        distribute_tensor(tensor(5, 3).to(d).to(ranks.device), mesh, [Shard(0)]) for d in (torch.float32, torch.int32)
    )
    parameter = nn.Parameter(weight)
    with Wire() as wire:
        for strength in (-1.0, float("nan"), torch.ones(2)):
            with pytest.raises(ValueError, match="l1 must be"):
                fastreg.elastic_penalty(parameter, strength)
        with pytest.raises(TypeError, match="int32"):
            fastreg.elastic_penalty(integers, L1)
        with pytest.raises(ValueError, match="lr must be"):
            fastreg.elastic_prox_(parameter, L1, lr=-1.0)
        with pytest.raises(RuntimeError, match="cannot be traced"):
            torch.func.grad(lambda w: fastreg.elastic_penalty(w, L1))(parameter)
        parameter.grad = DTensor.from_local(torch.ones(5, 3, device=ranks.device), mesh, [Replicate()])
    assert wire.collectives == []


def gradients_of_other_placements(ranks: Ranks) -> None:
    """As tensor parallelism leaves those of normalisation layers: a sum that nobody has formed yet."""
    mesh = ranks.mesh()
    weight = nn.Parameter(distribute_tensor(tensor(5, 3).to(ranks.device), mesh, [Replicate()]))
    ones = torch.ones(5, 3, device=ranks.device)
    weight.grad = DTensor.from_local(ones, mesh, [Partial()])
    fastreg.add_elastic_grad_(weight, L1, L2, impl=ranks.impl)
    assert_sharded_like(weight.grad, weight)
    other = nn.Parameter(full(weight.detach()))
    other.grad = ranks.world * ones
    fastreg.add_elastic_grad_(other, L1, L2, impl="torch")
    close(weight.grad, other.grad)


def changes_between_forward_and_backward(ranks: Ranks) -> None:
    mesh = ranks.mesh()
    for change in (lambda w: w.mul_(2), lambda w: w.to_local().mul_(2)):
        weight = nn.Parameter(distribute_tensor(tensor(5, 3).to(ranks.device), mesh, [Shard(0)]))
        penalty = fastreg.elastic_penalty(weight, L1, L2, impl=ranks.impl)
        with torch.no_grad():
            change(weight)
        with pytest.raises(RuntimeError, match="modified by an in-place operation"):
            penalty.backward()
        # The library's own changes are noticed by others.
        loss = weight.square().sum()
        fastreg.elastic_prox_(weight, L1, L2, lr=0.1, impl=ranks.impl)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def a_copy_of_the_model(ranks: Ranks) -> None:
    net = network().to(ranks.device)
    weights = [nn.Parameter(distribute_tensor(p.detach(), ranks.mesh(), [Shard(0)])) for p in net.parameters()]
    reg = fastreg.ElasticNet(weights, L1, L2, impl=ranks.impl)
    close(copy.deepcopy(reg)(), reg())


CASES: dict[str, Callable[[Ranks], None]] = {
    case.__name__: case
    for case in (
        one_dimensional,
        half_precision,
        other_dimensions_and_groups,
        replicated_and_plain,
        only_replicated,
        two_dimensional,
        one_dimension_of_two,
        two_dimensions_of_three,
        several_meshes,
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
        partial_weights_are_refused,
        wrong_arguments_raise_on_every_rank,
        gradients_of_other_placements,
        changes_between_forward_and_backward,
        a_copy_of_the_model,
    )
}


def worker(rank: int, world: int, path: Path, folder: str) -> None:
    torch.set_num_threads(1)
    # The loopback device: a machine's own name does not resolve everywhere.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    impl, device = path
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    outcomes = {}
    for name, case in CASES.items():
        try:
            case(Ranks(rank, world, impl, device))
            outcomes[name] = ""
        except BaseException:
            outcomes[name] = traceback.format_exc()
            break  # the others may be waiting in a collective that will not come
        finally:
            torch.save(outcomes, f"{folder}/{rank}.pt")
    if all(not outcome for outcome in outcomes.values()):
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def outcomes(
    request: pytest.FixtureRequest, path: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    """By rank and case, what went wrong. One set of processes serves all cases: starting it takes the time."""
    world = request.param
    if path[1] == "cuda" and torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    if path == ("triton", "cpu") and world > 2:
        pytest.skip("minutes of interpretation, which two processes show as well")
    folder: FilePath = tmp_path_factory.mktemp("distributed")
    failure = ""
    try:
        spawn(worker, args=(world, path, str(folder)), nprocs=world)
    except Exception as error:
        failure = str(error)
    files = [folder / f"{rank}.pt" for rank in range(world)]
    assert all(file.exists() for file in files), failure
    return [torch.load(file) for file in files]


@pytest.mark.parametrize("name", CASES)
def test_on_every_rank(outcomes: list[dict[str, str]], name: str) -> None:
    for rank, of_rank in enumerate(outcomes):
        assert name in of_rank, f"rank {rank} did not come this far"
        assert not of_rank[name], f"rank {rank}: {of_rank[name]}"
