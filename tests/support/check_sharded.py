"""Every call of the library on sharded weights, against the same calls on the unsharded ones."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastreg
from tests.support.cases import L1, L2
from tests.support.ranks import Ranks, Wire, assert_sharded_like, close, full


def check_everything(ranks: Ranks, weights: list[Tensor], *, n_collectives: int, by_group: bool = False) -> None:
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
        assert wire.collectives == [("allreduce", allowed)] * n_collectives, wire.collectives
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

    # In place, into the very gradients that are there.
    present = [w.grad for w in weights]
    for one, other in zip(*of_both(lambda p, impl: fastreg.add_elastic_grad_(p, L1, L2, impl=impl)), strict=True):
        close(one, other)
    assert all(w.grad is grad for w, grad in zip(weights, present, strict=True))
    for w in weights + unsharded:
        w.grad = None if w.ndim == 1 else w.grad
    of_both(lambda p, impl: fastreg.add_elastic_grad_(p, L1, L2, impl=impl))
    for w, u in zip(weights, unsharded, strict=True):
        assert_sharded_like(w.grad, w)
        close(w.grad, u.grad)
    with Wire() as wire:
        found = fastreg.sparsity(weights)
        fastreg.elastic_prox_(params(weights), L1, L2, lr=0.5, impl=ranks.impl)
    assert wire.collectives == [("allreduce", 8)] * n_collectives
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

    tables = [fastreg.ElasticNet(params(ws), L1, L2).summary().splitlines() for ws in (weights, unsharded)]
    assert tables[0] == tables[1]

    # Proximal steps by Adam's step sizes, and steps with the penalty inside.
    for kind, prox in (("attached", True), ("SGD", False), ("AdamW", False), ("AdamW", True)):
        results = []
        for ws, impl in ((weights, ranks.impl), (unsharded, "torch")):
            if kind == "attached":
                adam = torch.optim.Adam(ws, lr=0.01, foreach=False)
                reg = fastreg.ElasticNet(params(ws), L1, L2, impl=impl)
                reg.attach(adam, mode="prox")
                adam.step()
                results.append(reg.last)
            else:
                options: Any = {"momentum": 0.9} if kind == "SGD" else {}
                inside: Any = getattr(fastreg.optim, kind)
                optimizer = inside(ws, lr=0.01, l1=L1, l2=L2, prox=prox, track=True, impl=impl, **options)
                optimizer.step()
                optimizer.step()
                results.append(optimizer.last)
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
        by_object = fastreg.ElasticNet(params(weights), L1, L2, impl=ranks.impl).add_grad_(reduce=False)
    assert wire.collectives == []
    expected = fastreg.elastic_penalty(params(unsharded), L1, L2, return_terms=True, impl="torch")
    if n_collectives == 1:
        terms = torch.stack([t.detach().double() for t in (*found, again, *added, *by_object)])
        dist.all_reduce(terms)
        for one, other in zip(terms, (*expected, expected.total, *expected, *expected), strict=True):
            close(one.to(other.dtype), other)
    for w in weights + unsharded:
        w.grad = None
    found.total.backward()
    expected.total.backward()
    for w, u in zip(weights, unsharded, strict=True):
        close(w.grad, u.grad)
