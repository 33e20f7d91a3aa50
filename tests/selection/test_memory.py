"""Weights whose memory is not what it seems: shared by two parameters, freed, or on other ranks."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastreg
from tests import oracle
from tests.support.cases import L1, L2, LR
from tests.support.helpers import Path, bits

SHARED = r"parameters 'enc\.weight' and 'dec\.weight' share memory"


class Autoencoder(nn.Module):
    """With a decoder on the transposed memory of its encoder, once `share` is called."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.enc = nn.Linear(5, 4, device=device)
        self.dec = nn.Linear(4, 5, device=device)

    def share(self) -> "Autoencoder":
        self.dec.weight.data = self.enc.weight.data.t()
        return self


def test_two_parameters_on_one_memory_warn_at_every_selection(path: Path) -> None:
    impl, device = path
    model = Autoencoder(device).share()
    weights = list(model.parameters())
    calls: dict[str, Callable[[], Tensor]] = {
        "function": lambda: fastreg.elastic_penalty(model, L1, L2, impl=impl),
        "list": lambda: fastreg.elastic_penalty(list(model.named_parameters()), L1, L2, impl=impl),
        "object": lambda: fastreg.ElasticNet(model, L1, L2, impl=impl)(),
        "add_grad_": lambda: fastreg.add_elastic_grad_(list(model.named_parameters()), L1, L2, impl=impl).total,
    }
    for name, call in calls.items():
        with pytest.warns(UserWarning, match=f"{SHARED}: their common elements count twice; exclude one of") as seen:
            value = call()
        assert [w.filename for w in seen] == [__file__], name
        np.testing.assert_allclose(float(value.detach()), oracle.penalty(weights, L1, L2)[0], rtol=1e-6)
    # The next call remembers the selection.
    fastreg.elastic_penalty(model, L1, L2, impl=impl)
    # One of them counts once, without a warning.
    one = fastreg.elastic_penalty(model, L1, L2, exclude="^dec.weight", impl=impl)
    expected = [w for w in weights if w is not model.dec.weight]
    np.testing.assert_allclose(float(one.detach()), oracle.penalty(expected, L1, L2)[0], rtol=1e-6)


def test_memory_that_is_shared_later_is_noticed(path: Path) -> None:
    impl, device = path
    model = Autoencoder(device)
    reg = fastreg.ElasticNet(model, L1, L2, impl=impl)
    for _ in range(2):
        reg()
    model.share()
    with pytest.warns(UserWarning, match=SHARED) as seen:
        reg()
    assert seen[0].filename == __file__
    for _ in range(2):  # once
        reg()
    before = bits(*model.parameters())
    for _ in range(2):
        with pytest.raises(ValueError, match=SHARED):
            reg.prox_(LR)
    assert bits(*model.parameters()) == before


def test_memory_that_another_call_has_seen_is_noticed(path: Path) -> None:
    """The layout of the shared memory is cached by then, as it may be from a model whose memory is used again."""
    impl, device = path
    model = Autoencoder(device)
    reg = fastreg.ElasticNet(model, L1, L2, impl=impl)
    reg()
    model.share()
    with pytest.warns(UserWarning, match=SHARED):
        fastreg.elastic_penalty(list(model.named_parameters()), L1, L2, impl=impl)
    with pytest.warns(UserWarning, match=SHARED):
        reg()


@pytest.mark.filterwarnings("ignore:parameters .* share memory")
def test_one_memory_is_not_written_through_two_parameters(path: Path) -> None:
    impl, device = path
    model = Autoencoder(device).share()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    reg = fastreg.ElasticNet(model, L1, L2, impl=impl)
    named = list(model.named_parameters())
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    reg.attach(sgd, mode="prox")
    # Different kinds of steps make two sweeps, the first of which could write before the second one is checked.
    groups: list[dict[str, Any]] = [{"params": named[:1]}, {"params": named[1:], "momentum": 0.9}]
    before = bits(*model.parameters())
    for name, call in {
        "prox": lambda: fastreg.elastic_prox_([named[0], named[2]], L1, L2, lr=LR, impl=impl),
        "attached": sgd.step,
        "Adam": fastreg.optim.Adam(named, lr=0.1, l1=L1, impl=impl).step,
        "SGD in two batches": fastreg.optim.SGD(groups, lr=0.1, l1=L1, impl=impl).step,
    }.items():
        for _ in range(2):
            with pytest.raises(ValueError, match=SHARED):
                call()
            assert bits(*model.parameters()) == before, name


def test_an_optimizer_notices_memory_that_is_shared_later(path: Path) -> None:
    impl, device = path
    model = Autoencoder(device)
    groups: list[dict[str, Any]] = [
        {"params": [("enc.weight", model.enc.weight)]},
        {"params": [("dec.weight", model.dec.weight), ("dec.bias", model.dec.bias)], "momentum": 0.9},
    ]
    optimizers = [
        fastreg.optim.AdamW(model.named_parameters(), lr=0.1, l1=L1, impl=impl),
        fastreg.optim.SGD(groups, lr=0.1, l1=L1, impl=impl),
    ]
    for optimizer in optimizers[:1]:
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
    model.share()
    for optimizer in optimizers:
        before = bits(*model.parameters())
        for _ in range(2):
            with pytest.raises(ValueError, match=SHARED):
                optimizer.step()
            assert bits(*model.parameters()) == before


def overlapping() -> dict[str, list[Tensor]]:
    flat = torch.randn(24)
    return {
        "the same": [flat, flat.view(4, 6)],
        "slices": [flat[:10], flat[9:]],
        "inside": [flat, flat[3:4]],
        "far apart in the list": [flat[:4], torch.randn(3), flat[8:], torch.randn(2), flat[2:5]],
        "a row and a column": [flat.view(4, 6)[2], flat.view(4, 6)[:, 1]],
        "columns and a column": [flat.view(4, 6)[:, ::2], flat.view(4, 6)[:, 1], flat.view(4, 6)[:, 2]],
        "expanded": [flat[:1].expand(3), flat],
        "two dtypes": [flat, flat.view(torch.float16)[3:5]],
    }


def separate() -> dict[str, list[Tensor]]:
    flat = torch.randn(24)
    return {
        "slices": [flat[:10], flat[10:20], flat[20:]],
        "columns": list(flat.view(4, 6).unbind(1)),
        "halves of elements": [flat.view(torch.float16)[::2], flat.view(torch.float16)[1::2]],
        "empty": [flat, flat[3:3], flat[3:3]],
        "a scalar beside": [flat[5], flat[6:], flat[:5]],
    }


@pytest.mark.parametrize("case", overlapping())
def test_what_shares_memory(case: str) -> None:
    tensors = overlapping()[case]
    with pytest.warns(UserWarning, match=r"parameters 'params\[\d\]' and 'params\[\d\]' share memory"):
        torch.no_grad()(fastreg.elastic_penalty)(tensors, L1, L2)
    leaves = [t.detach().requires_grad_() for t in tensors]
    before = bits(*leaves)
    with pytest.warns(UserWarning, match="share"), pytest.raises(ValueError, match="share"):
        fastreg.elastic_prox_(leaves, L1, L2, lr=LR)
    assert bits(*leaves) == before


@pytest.mark.parametrize("case", separate())
def test_what_does_not(case: str) -> None:
    tensors = separate()[case]
    expected = [oracle.prox(t, L1, L2, LR) for t in tensors]
    torch.no_grad()(fastreg.elastic_penalty)(tensors, L1, L2)
    fastreg.elastic_prox_(tensors, L1, L2, lr=LR)
    for t, e in zip(tensors, expected, strict=True):
        assert oracle.ulp_distance(t, e) <= 4


def test_a_weight_whose_own_elements_overlap_is_not_written() -> None:
    for strides in ((1, 1), (2, 3), (0, 1)):
        windows = torch.randn(40).as_strided((5, 4), strides)
        before = bits(windows)
        with pytest.raises(ValueError, match=r"'params' is expanded: its elements share memory"):
            fastreg.elastic_prox_(windows, L1, L2, lr=LR)
        assert bits(windows) == before


def calls_with(model: nn.Module, reg: fastreg.ElasticNet, impl: str) -> dict[str, Callable[[], object]]:
    named = list(model.named_parameters())
    optimizer = fastreg.optim.SGD(named, lr=0.1, l1=L1, impl=impl)  # type: ignore[arg-type]
    return {
        "elastic_penalty": lambda: fastreg.elastic_penalty(model, L1, L2, impl=impl),  # type: ignore[call-overload]
        "a list": lambda: fastreg.elastic_penalty(named, L1, L2, impl=impl),  # type: ignore[call-overload]
        "add_elastic_grad_": lambda: fastreg.add_elastic_grad_(model, L1, L2, impl=impl),  # type: ignore[arg-type]
        "elastic_prox_": lambda: fastreg.elastic_prox_(model, L1, L2, lr=LR, impl=impl),  # type: ignore[arg-type]
        "sparsity": lambda: fastreg.sparsity(model),
        "ElasticNet": lambda: fastreg.ElasticNet(model, L1, L2),
        "reg": reg,
        "reg.add_grad_": reg.add_grad_,
        "reg.prox_": lambda: reg.prox_(LR),
        "reg.summary": reg.summary,
        "fastreg.optim": optimizer.step,
    }


def all_raise(model: nn.Module, reg: fastreg.ElasticNet, impl: str, message: str) -> None:
    for call in calls_with(model, reg, impl).values():
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.untyped_storage().nbytes() or not p.numel() else torch.zeros(p.shape)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message):
                call()


@pytest.mark.parametrize("n_bytes", [0, 8])
def test_freed_storage_is_not_read(path: Path, n_bytes: int) -> None:
    impl, device = path
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).to(device)
    reg = fastreg.ElasticNet(model, L1, L2, impl=impl)
    for _ in range(2):
        before = reg().detach()
        fastreg.elastic_penalty(model, L1, L2, impl=impl)
    weight = model[1].weight
    copy = weight.detach().clone()
    weight.untyped_storage().resize_(n_bytes)
    message = rf"parameter '1\.weight' has no memory for its values: its storage has {n_bytes} of 16 bytes"
    all_raise(model, reg, impl, message)
    weight.untyped_storage().resize_(16)
    with torch.no_grad():
        weight.copy_(copy)
    assert torch.equal(reg().detach(), before)
    assert torch.equal(fastreg.elastic_penalty(model, L1, L2, impl=impl).detach(), before)


def partition(p: Any) -> None:
    """What DeepSpeed's ZeRO-3 leaves of a parameter whose values are on other ranks."""
    p.full = p.data
    p.ds_id, p.ds_numel, p.ds_shape = id(p), p.numel(), p.shape
    p.data = torch.empty(0, dtype=p.dtype, device=p.device)


def gather(p: Any) -> None:
    p.data = p.full


@pytest.mark.parametrize("which", ["all", "biases", "one"])
def test_placeholders_of_zero_3_are_refused(path: Path, which: str) -> None:
    impl, device = path
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).to(device)
    parameters = {"all": list(model.parameters()), "biases": [model[0].bias, model[1].bias], "one": [model[1].weight]}
    if which == "biases":  # which keep their number of dimensions
        del model[0].weight, model[1].weight
    fastreg.elastic_penalty([torch.empty(0, device=device), torch.empty(0, device=device)], L1, L2, impl=impl)
    reg = fastreg.ElasticNet(model, L1, L2, impl=impl)
    for _ in range(2):
        before = reg().detach()
        fastreg.elastic_penalty(model, L1, L2, impl=impl)
        fastreg.sparsity(model)
    for p in parameters[which]:
        partition(p)
    name = {"all": "0.weight", "biases": "0.bias", "one": "1.weight"}[which]
    message = rf"parameter '{re.escape(name)}' is a placeholder of DeepSpeed's ZeRO-3.* \d elements.*GatheredParameters"
    all_raise(model, reg, impl, message)
    with pytest.raises(RuntimeError, match=r"fastreg\.optim"):
        reg()
    for p in parameters[which]:
        gather(p)
    assert torch.equal(reg().detach(), before)
    assert torch.equal(fastreg.elastic_penalty(model, L1, L2, impl=impl).detach(), before)


def test_frozen_and_excluded_placeholders_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    for p in (*model[0].parameters(), model[1].bias):
        partition(p)
    value = fastreg.elastic_penalty(model, L1, L2, exclude="bias")
    np.testing.assert_allclose(float(value.detach()), oracle.penalty([model[1].weight], L1, L2)[0], rtol=1e-6)
