"""Sharded weights on 2 and 4 processes: the numbers of the unsharded ones, and what crosses the wire for them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastreg
from tests.support.cases import L1, L2
from tests.support.check_sharded import check_everything
from tests.support.ranks import (
    AVAILABLE,
    Ranks,
    Wire,
    assert_sharded_like,
    by_name,
    close,
    full,
    on_processes,
    sharded,
    tensor,
)

pytestmark = on_processes
if AVAILABLE:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

VALUES = [((8, 6), 0), ((5,), 1), ((3, 7), 2), ((1,), 3), ((0, 4), 4), ((6, 4, 2), 5)]
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.float16]


def values(dtypes: list[torch.dtype] | None = None) -> list[Tensor]:
    dtypes = dtypes or [torch.float32] * len(VALUES)
    return [tensor(*shape, dtype=dtype, seed=seed) for (shape, seed), dtype in zip(VALUES, dtypes, strict=True)]


def one_dimensional(ranks: Ranks) -> None:
    """Uneven and empty shards: a weight of one element, one of none, and 5 rows for 4 ranks."""
    mesh = ranks.mesh()
    check_everything(ranks, sharded(values(), [(mesh, [Shard(0)])] * 6, ranks.device), n_collectives=1)


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


def double_precision(ranks: Ranks) -> None:
    """All digits of float64 come through the sums of shards and ranks."""
    weights = sharded(values([torch.float64] * 6), [(ranks.mesh(), [Shard(0)])] * 6, ranks.device)
    found = fastreg.elastic_penalty(weights, L1, L2, impl=ranks.impl)
    expected = fastreg.elastic_penalty([full(w.detach()) for w in weights], L1, L2, impl="torch")
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.detach(), expected, rtol=1e-14, atol=0)


def other_dimensions_and_groups(ranks: Ranks) -> None:
    mesh = ranks.mesh()
    dims = [1, 0, 1, 0, 1, 2]
    weights = sharded(values(), [(mesh, [Shard(d)]) for d in dims], ranks.device)
    check_everything(ranks, weights, n_collectives=1, by_group=True)


def replicated_and_plain(ranks: Ranks) -> None:
    mesh = ranks.mesh()
    layout: list[Any] = [(mesh, [Shard(0)]), (mesh, [Replicate()]), None, (mesh, [Replicate()]), None, None]
    for by_group in (False, True):
        check_everything(ranks, sharded(values(), layout, ranks.device), n_collectives=1, by_group=by_group)


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
    check_everything(ranks, sharded(values(), layout, ranks.device), n_collectives=1)


def one_dimension_of_two(ranks: Ranks) -> None:
    """HSDP: what is replicated on one dimension is summed over the other one only."""
    mesh = ranks.mesh(2, ranks.world // 2)
    weights = sharded(values(), [(mesh, [Replicate(), Shard(0)])] * 6, ranks.device)
    check_everything(ranks, weights, n_collectives=1, by_group=True)


def two_dimensions_of_three(ranks: Ranks) -> None:
    """Neither one dimension nor all of them are sharded, and one collective does it."""
    mesh = ranks.mesh(ranks.world // 2, 2, 1)
    layout = [(mesh, [Replicate(), Shard(0), Shard(0)]), (mesh, [Replicate(), Shard(1), Replicate()])] * 3
    layout[1] = layout[3] = (mesh, [Replicate(), Replicate(), Shard(0)])
    check_everything(ranks, sharded(values(), layout, ranks.device), n_collectives=1)


def two_dimensions_of_a_part_of_the_ranks(ranks: Ranks) -> None:
    """Whoever made groups of his own before: none is made for this."""
    dist.new_group([0])
    mesh = ranks.mesh(ranks.world // 2, 2, 1, names=("dp", "tp", "sp"))["tp", "sp"]
    layout = [(mesh, [Shard(0), Shard(0)]), (mesh, [Shard(1), Replicate()])] * 3
    layout[1] = layout[3] = (mesh, [Replicate(), Shard(0)])
    # Where these are all ranks one collective does it, else one for each dimension.
    weights = sharded(values(), layout, ranks.device)
    check_everything(ranks, weights, n_collectives=1 if ranks.world == 2 else 2)


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
    check_everything(ranks, sharded(values(), layout, ranks.device), n_collectives=3)


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
    strength_of_all = distribute_tensor(torch.tensor(0.1, device=ranks.device), mesh, [Replicate()])
    with Wire() as wire:
        for strength in (-1.0, float("nan"), torch.ones(2)):
            with pytest.raises(ValueError, match="l1 must be"):
                fastreg.elastic_penalty(parameter, strength)
        with pytest.raises(TypeError, match="got a DTensor"):
            fastreg.elastic_penalty(parameter, strength_of_all)
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
    weights = sharded(values(), [(ranks.mesh(), [Shard(0)])] * 6, ranks.device)
    reg = fastreg.ElasticNet(weights, L1, L2, impl=ranks.impl)
    close(copy.deepcopy(reg)(), reg())


def weights_without_a_gradient_on_one_rank(ranks: Ranks) -> None:
    """Every rank makes the same all-reduces, for any number of sweeps and groups that its gradients lead to."""
    mesh = ranks.mesh()
    layout: list[Any] = [(mesh, [Shard(0)]), (mesh, [Shard(0)]), (mesh, [Replicate()]), None, (mesh, [Shard(1)])]
    shapes = [(8, 6), (5,), (3, 7), (4,), (6, 4)]
    strengths = [(L1, L2), (L1, L2), (0.5, L2), (0.5, L2), (0.5, L2)]  # of two groups

    def expected(weights: list[Tensor], counts: list[bool]) -> list[Tensor]:
        summed, own = torch.zeros(2, 2, dtype=torch.float64, device=ranks.device)
        for w, (l1, l2), where, is_counted in zip(weights, strengths, layout, counts, strict=True):
            part = (w.to_local() if isinstance(w, DTensor) else w).detach()
            terms = torch.stack([l1 * part.abs().sum(), l2 * part.square().sum()]) * is_counted
            (summed if where is not None and where[1] != [Replicate()] else own).add_(terms)
        dist.all_reduce(summed)
        return [(summed + own).sum(), *(summed + own)]

    def groups(weights: list[Tensor], **options: float) -> list[dict[str, Any]]:
        return [{"params": weights[:2]}, {"params": weights[2:], **options}]

    makers: list[Callable[..., Any]] = [
        lambda params: torch.optim.Adam(params, lr=0.01, foreach=False),
        lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, foreach=False),
        lambda params: fastreg.optim.AdamW(params, 0.01, l1=L1, l2=L2, prox=True, track=True, impl=ranks.impl),
        lambda params: fastreg.optim.SGD(params, 0.01, 0.9, l1=L1, l2=L2, track=True, impl=ranks.impl),
    ]
    # By step and rank, which weights have no gradient.
    resting = {(0, 0): [1], **{(step, rank): [4] for step in (0, 1) for rank in range(1, ranks.world)}}
    resting[2, 0] = list(range(5))
    for number, make in enumerate(makers):
        originals = [tensor(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes)]
        weights = sharded(originals, layout, ranks.device)
        optimizer = make(groups(weights, **({"lr": 0.02} if number < 2 else {"l1": 0.5})))
        stepped: list[Tensor] = []  # the weights between the optimizer's step and the proximal step
        if number < 2:
            optimizer.register_step_post_hook(lambda *_: stepped.extend(w.detach().clone() for w in weights))  # noqa: B023
            reg = fastreg.ElasticNet(groups(weights, l1=0.5), L1, L2, impl=ranks.impl)
            reg.attach(optimizer, mode="prox")
        for step in range(3):
            has_gradient = [i not in resting.get((step, ranks.rank), ()) for i in range(5)]
            for w, has in zip(weights, has_gradient, strict=True):
                w.grad = w.detach().clone() if has else None
            before = [w.detach().clone() for w in weights]
            stepped.clear()
            with Wire() as wire:
                optimizer.step()
            assert wire.collectives == [("allreduce", 24)], wire.collectives
            found = reg.last if number < 2 else optimizer.last
            wanted = expected(stepped, [True] * 5) if number < 2 else expected(before, has_gradient)
            if number >= 2 and step == 2:
                continue  # rank 0 counts no plain weight, which all ranks would count alike
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def steps_on_several_meshes(ranks: Ranks) -> None:
    """One all-reduce per mesh and step, of three numbers for any number of strength groups."""
    mesh = ranks.mesh(2, ranks.world // 2, names=("dp", "tp"))
    layout: list[Any] = [
        (mesh, [Shard(0), Shard(1)]),
        (mesh, [Replicate(), Shard(0)]),
        (ranks.mesh(), [Shard(0)]),
        None,
        (ranks.mesh(), [Replicate()]),
    ]
    for kind in ("attached", "inside"):
        results = []
        for places in (layout, [None] * 5):
            shapes = [(8, 6), (4, 3), (5,), (4,), (3,)]
            originals = [tensor(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes)]
            weights = sharded(originals, places, ranks.device)
            groups: list[dict[str, Any]] = [{"params": [w], "l1": 0.1 * (i + 1)} for i, w in enumerate(weights)]
            found = []
            if kind == "attached":
                optimizer: Any = torch.optim.Adam(weights, lr=0.01, foreach=False)
                reg = fastreg.ElasticNet(groups, 0.0, L2, impl=ranks.impl)
                reg.attach(optimizer, mode="prox")
            else:
                optimizer = fastreg.optim.AdamW(groups, 0.01, l2=L2, prox=True, track=True, impl=ranks.impl)
            for step in range(2):
                for i, w in enumerate(weights):
                    w.grad = None if step == 0 and i == 1 else w.detach().clone()
                with Wire() as wire:
                    optimizer.step()
                found.append(reg.last if kind == "attached" else optimizer.last)
            results.append((weights, found, wire.collectives))
        (weights, found, collectives), (plain, expected, none) = results
        assert (collectives, none) == ([("allreduce", 24)] * 2, [])
        for one, other in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
        for w, u in zip(weights, plain, strict=True):
            torch.testing.assert_close(full(w.detach()), u.detach(), rtol=1e-12, atol=1e-15)


def ranks_that_differ(ranks: Ranks) -> None:
    """With FASTREG_DEBUG_RANKS, every rank raises and says what differs, before the all-reduce."""
    mesh = ranks.mesh()
    weights = sharded(values()[:2], [(mesh, [Shard(0)])] * 2, ranks.device)
    named = [("first", weights[0]), ("second", weights[1])]
    is_last = ranks.rank == ranks.world - 1
    for w in weights:
        w.grad = w.detach().clone()
    own = 0.3 if is_last else 0.1
    in_groups = [{"params": named[:1], "l1": 0.1}, {"params": named[1:]}]
    tracking, other = (fastreg.optim.SGD(weights, 0.1, l1=own, track=track) for track in (True, False))
    adam = torch.optim.Adam(weights, lr=0.01)
    fastreg.ElasticNet(named, own).attach(adam, mode="prox")
    of_last = f"on rank {ranks.world - 1}"
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: fastreg.elastic_penalty(named, own), rf"l1 of strength group 0 is 0\.1 on rank 0 and 0\.3 {of_last}"),
        (lambda: fastreg.elastic_penalty(in_groups if is_last else named, 0.1), "number of strength groups is 1"),
        (lambda: fastreg.ElasticNet(named, own).add_grad_(), "l1 of strength group 0"),
        (lambda: fastreg.elastic_prox_(named, own, lr=1.0), "l1 of strength group 0"),
        (
            lambda: fastreg.sparsity(named, exclude="first" if is_last else None),
            f"'first' is .* and not there {of_last}",
        ),
        (lambda: fastreg.ElasticNet(named, own).summary(), "l1 of strength group 0"),
        (tracking.step, "l1 of strength group 0"),
        (other.step, "l1 of strength group 0"),
        (adam.step, "l1 of strength group 0"),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastreg.sweep.agreement.IS_ON", True)
        for call, message in calls:
            with pytest.raises(RuntimeError, match=f"ranks make different calls: .*{message}"):
                call()
        close(
            fastreg.elastic_penalty(named, L1, L2), fastreg.elastic_penalty([full(w.detach()) for w in weights], L1, L2)
        )
        assert fastreg.elastic_penalty(named, own, reduce=False) >= 0, "nothing is exchanged"


CASES = by_name(
    one_dimensional,
    half_precision,
    double_precision,
    other_dimensions_and_groups,
    replicated_and_plain,
    only_replicated,
    two_dimensional,
    one_dimension_of_two,
    two_dimensions_of_three,
    two_dimensions_of_a_part_of_the_ranks,
    several_meshes,
    partial_weights_are_refused,
    wrong_arguments_raise_on_every_rank,
    gradients_of_other_placements,
    changes_between_forward_and_backward,
    a_copy_of_the_model,
    weights_without_a_gradient_on_one_rank,
    steps_on_several_meshes,
    ranks_that_differ,
)


@pytest.mark.parametrize("name", CASES)
def test_on_every_rank(on_every_rank: Callable[[str], None], name: str) -> None:
    on_every_rank(name)
