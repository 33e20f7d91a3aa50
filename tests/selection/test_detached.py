"""Detached tensors in place of parameters: named once, where they would drop out or get no gradient."""

import collections
import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastreg
from fastreg.core import torch_private
from tests import oracle
from tests.support.cases import L1, L2, LR
from tests.support.helpers import Path


def network(device: str = "cpu") -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, device=device), nn.Linear(2, 2)).to(device)


def assert_value(found: Tensor, weights: list[Tensor]) -> None:
    np.testing.assert_allclose(float(found.detach()), oracle.penalty(weights, L1, L2)[0], rtol=1e-6)


@pytest.mark.parametrize("taken", [lambda p: p.detach(), lambda p: p.data, lambda p: p.detach().clone()])
def test_detached_tensors_beside_parameters_are_named(path: Path, taken: Callable[[Tensor], Tensor]) -> None:
    impl, device = path
    first, second, third = list(network(device).parameters())[:3]
    params = [("first", taken(first)), ("second", second), ("third", taken(third))]
    message = "'first' and 1 more requires no gradient, unlike other tensors in params, and does not count"
    groups: Any = [{"params": params[:2]}, {"params": params[2:], "l1": 3.0}]
    for given in (params, dict(params), groups):
        with pytest.warns(UserWarning, match=message) as seen:
            value = fastreg.elastic_penalty(given, L1, L2, impl=impl)
        assert [w.filename for w in seen] == [__file__]
        assert_value(value, [second])
    with pytest.warns(UserWarning, match=message):
        reg = fastreg.ElasticNet(params, L1, L2, impl=impl)
    for _ in range(2):  # once
        assert_value(reg(), [second])
    plain = [t for _, t in params]
    with pytest.warns(UserWarning, match=r"'params\[0\]' and 1 more"):
        fastreg.elastic_penalty(plain, L1, L2, impl=impl)
    fastreg.elastic_penalty(plain, L1, L2, impl=impl)  # remembered
    # A filter that leaves them out says that they are not meant.
    fastreg.elastic_penalty(params, L1, L2, exclude="first|third", impl=impl)
    fastreg.elastic_penalty(params, L1, L2, include="second", impl=impl)


def test_frozen_parameters_and_tensors_of_a_module_are_no_mistake() -> None:
    net = network()
    net[0].requires_grad_(False)
    fastreg.elastic_penalty(net, L1, L2)
    fastreg.elastic_penalty(list(net.parameters()), L1, L2)
    tensors = {name: p if name == "2.weight" else p.detach() for name, p in net.named_parameters()}

    class WithPenalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self) -> Tensor:
            return fastreg.elastic_penalty(self.net, L1, L2)

    value = torch.func.functional_call(WithPenalty(), {f"net.{name}": t for name, t in tensors.items()}, ())
    assert_value(value, [net[2].weight])


DETACHED = r"shares the memory of another tensor, as after detach.* pass the parameters .* under torch.no_grad\(\)"


def test_detached_tensors_alone_have_no_gradient(path: Path) -> None:
    impl, device = path
    net = network(device)
    weights = list(net.parameters())
    for tensors in ([p.detach() for p in weights], [p.data for p in weights], weights[0].detach()):
        given = tensors if isinstance(tensors, list) else [tensors]
        reg = fastreg.ElasticNet(tensors, L1, L2, impl=impl)  # for reg.prox_, which changes the parameters
        for call in (lambda t=tensors: fastreg.elastic_penalty(t, L1, L2, impl=impl), reg):
            with pytest.warns(UserWarning, match=DETACHED) as seen:
                assert_value(call(), given)
            assert [w.filename for w in seen] == [__file__]
            with torch.no_grad():
                assert_value(call(), given)
        with pytest.warns(UserWarning, match=r"shares the memory of another tensor, .* the model$"):
            fastreg.add_elastic_grad_(tensors, L1, L2, impl=impl)
        for t in given:
            assert t.grad is not None  # as given: a second call adds to it
        fastreg.add_elastic_grad_(tensors, L1, L2, impl=impl)
        fastreg.sparsity(tensors)
        reg.prox_(LR)
    strength = torch.tensor(L1, device=device, requires_grad=True)
    fastreg.elastic_penalty([p.detach() for p in weights], strength, impl=impl).backward()  # the strength is trained


def test_tensors_that_are_nobodys_parameters_are_taken_as_given(path: Path) -> None:
    impl, device = path
    flat = torch.randn(10, device=device)
    copies = [p.detach().clone() for p in network(device).parameters()]
    for tensors in ([torch.randn(3, device=device)], [flat[:5], flat[5:].view(5, 1)], copies):
        fastreg.elastic_penalty(tensors, L1, L2, impl=impl)
        fastreg.ElasticNet(tensors, L1, L2, impl=impl)()
        fastreg.add_elastic_grad_(tensors, L1, L2, impl=impl)


def test_state_dicts(path: Path) -> None:
    impl, device = path
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)).to(device)
    state = net.state_dict()
    message = "params is a state_dict: its tensors are detached, .* buffers count as weights; pass the model"
    for params in (state, {"params": state}, [{"params": state, "l1": L1}]):
        with torch.no_grad():
            with pytest.warns(UserWarning, match=message) as seen:
                assert_value(fastreg.elastic_penalty(params, L1, L2, impl=impl), list(net.parameters()))
            assert [w.filename for w in seen] == [__file__]
            with pytest.warns(UserWarning, match=message):
                reg = fastreg.ElasticNet(params, L1, L2, impl=impl)
            assert_value(reg(), list(net.parameters()))
    assert float(fastreg.sparsity(state)) == pytest.approx(2 / 12)  # the biases of BatchNorm
    # With its parameters it is a dict like any other, and buffers are no parameters.
    kept = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(device)
    with pytest.warns(UserWarning, match=r"'1\.running_mean' and 2 more requires no gradient"):
        value = fastreg.elastic_penalty(kept.state_dict(keep_vars=True), L1, L2, impl=impl)
    assert_value(value, list(kept.parameters()))


def test_what_a_state_dict_is(monkeypatch: pytest.MonkeyPatch) -> None:
    state = nn.Linear(2, 2).state_dict()
    for each in (state, copy.copy(state)):
        assert torch_private.is_state_dict(each)
    others: list[Any] = [dict(state), collections.OrderedDict(state), list(state.values()), nn.Linear(2, 2)]
    assert not any(map(torch_private.is_state_dict, others))
    del state._metadata  # should PyTorch call it something else
    assert not torch_private.is_state_dict(state)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        fastreg.elastic_penalty(state, L1, L2)
