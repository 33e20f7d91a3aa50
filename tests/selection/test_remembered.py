"""A single call remembers what it selected: the next one must see every change, and nothing may be kept alive."""

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastreg
from fastreg.selection import selection
from tests import oracle
from tests.support.cases import L1, L2
from tests.support.helpers import Path


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.head = nn.Linear(width, 2)
        self.shift = nn.Parameter(torch.ones(width))


def assert_counts(params: Any, weights: list[Tensor], **keywords: Any) -> None:
    """A fresh call finds just these weights; said twice, as the second call is the one that remembers."""
    for _ in range(2):
        found = fastreg.elastic_penalty(params, L1, L2, **keywords)
        np.testing.assert_allclose(float(found.detach()), oracle.penalty(weights, L1, L2)[0], rtol=1e-6)


def freeze(net: Net) -> None:
    net.body[0].requires_grad_(False)


def thaw(net: Net) -> None:
    net.requires_grad_(True)


def replace_parameter(net: Net) -> None:
    net.shift = nn.Parameter(torch.full((3,), 2.0))


def replace_data(net: Net) -> None:
    net.shift.data = torch.full((5,), 3.0)


def replace_module(net: Net) -> None:
    net.body[2] = nn.Linear(3, 3)


def add_module(net: Net) -> None:
    net.body.append(nn.Linear(3, 1))


def fill_an_empty_module(net: Net) -> None:
    net.body[1].register_parameter("slope", nn.Parameter(torch.full((2,), 0.5)))


def remove_module(net: Net) -> None:
    del net.head


def remove_parameter(net: Net) -> None:
    net.head.bias = None


def tie(net: Net) -> None:
    net.body[2].weight = net.body[0].weight


def convert(net: Net) -> None:
    net.half()


CHANGES = [
    *(freeze, thaw, replace_parameter, replace_data, replace_module, add_module, fill_an_empty_module),
    *(remove_module, remove_parameter, tie, convert),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_of_a_module_are_seen(change: Callable[[Net], None]) -> None:
    net = Net()
    if change is thaw:
        freeze(net)
    assert_counts(net, [p for p in net.parameters() if p.requires_grad])
    change(net)
    assert_counts(net, [p for p in net.parameters() if p.requires_grad])


def test_changes_of_a_list_are_seen() -> None:
    first, second, third = (nn.Parameter(torch.full((n,), float(n))) for n in (1, 2, 3))
    params = [first, second]
    assert_counts(params, [first, second])
    params.append(third)
    assert_counts(params, [first, second, third])
    second.requires_grad_(False)
    assert_counts(params, [first, third])
    params[0] = nn.Parameter(torch.full((4,), 4.0))
    assert_counts(params, [params[0], third])
    assert_counts([third, third], [third])
    third.data = third.data.bfloat16()
    assert_counts([first, third], [first, third])


def test_iterators_are_walked_once() -> None:
    net = Net()
    for _ in range(2):
        found = fastreg.elastic_penalty(net.parameters(), L1, L2)
        np.testing.assert_allclose(float(found.detach()), oracle.penalty(list(net.parameters()), L1, L2)[0], rtol=1e-6)


@torch.no_grad()
def test_groups_may_change_their_strengths() -> None:
    w = nn.Parameter(torch.ones(4))
    groups = [{"params": [w], "l1": 1.0}]
    assert float(fastreg.elastic_penalty(groups)) == 4
    groups[0]["l1"] = 2.0
    assert float(fastreg.elastic_penalty(groups)) == 8


def test_every_argument_counts() -> None:
    net = Net()
    biases, others = ([p for n, p in net.named_parameters() if n.endswith("bias") == is_bias] for is_bias in (1, 0))
    for _ in range(2):
        assert_counts(net, biases, include="bias$")
        assert_counts(net, others, include="weight|shift")
        assert_counts(net, list(net.head.parameters()), include=nn.Linear, exclude="^body")
        assert_counts(net, [p for p in net.parameters() if p.ndim > 1], exclude=fastreg.bias_and_norm)
        assert fastreg.elastic_penalty(net, 0.0, 0.0).item() == 0
        with pytest.raises(ValueError, match="impl"):
            fastreg.elastic_penalty(net, L1, L2, impl="cuda")  # type: ignore[call-overload]
        with pytest.raises(TypeError, match="reduce"):
            fastreg.elastic_penalty(net, L1, L2, reduce="sum")  # type: ignore[call-overload]
        with pytest.raises(ValueError, match="l1"):
            fastreg.elastic_penalty(net, -1.0, L2)
        with pytest.raises(TypeError, match="include"):
            fastreg.elastic_penalty(net, L1, L2, include=["bias"])  # type: ignore[call-overload]


def test_a_call_without_a_filter_follows_one_with_it() -> None:
    net = Net()
    everything = list(net.parameters())
    for params in (net, everything, tuple(everything)):
        assert_counts(params, [p for p in everything if p.ndim > 1], exclude=fastreg.bias_and_norm)
        assert_counts(params, everything)
        assert_counts(params, [p for p in everything if p.ndim > 1], exclude=fastreg.bias_and_norm)


def test_a_callable_may_change_its_mind() -> None:
    net = Net()
    wanted = ["head"]
    for name in ("head", "body", "shift"):
        wanted[0] = name
        expected = [p for n, p in net.named_parameters() if n.startswith(name)]
        assert_counts(net, expected, include=lambda n, p: n.startswith(wanted[0]))


def test_an_exclude_that_matches_nothing_warns_each_time() -> None:
    net = Net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            fastreg.elastic_penalty(net, L1, L2, exclude="no such name")
            fastreg.elastic_penalty(net, L1, L2, include="head", exclude="no such name")
    assert len(caught) == 6


def test_a_module_is_not_kept_alive() -> None:
    """Not even one that its own parts refer to, as hooks that are methods do."""

    def spent(through_backward: bool) -> list[weakref.ref[Any]]:
        net = Net()
        net.head.register_forward_hook(lambda *args: net.shift)
        penalty = fastreg.elastic_penalty(net, L1, L2)
        if through_backward:
            penalty.backward()
        weights = list(net.parameters())
        fastreg.elastic_penalty(weights, L1, L2)
        fastreg.add_elastic_grad_(net, L1, L2)
        return [weakref.ref(net), weakref.ref(net.head), *map(weakref.ref, weights)]

    for through_backward in (False, True):
        references = spent(through_backward)
        gc.collect()
        assert [reference() for reference in references] == [None] * len(references)


def test_addresses_that_are_used_again_belong_to_nobody() -> None:
    """Models come and go: Python and the allocator give the places of dead ones to new ones."""
    generator = torch.Generator().manual_seed(0)
    for round_number in range(60):
        net = Net(width=3 + round_number % 2)
        if round_number % 3 == 0:
            net.head.requires_grad_(False)
        if round_number % 5 == 0:
            net = net.half()
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        assert_counts(net, [p for p in net.parameters() if p.requires_grad])
        plain = [torch.randn(3, generator=generator) for _ in range(3)]
        assert_counts(plain, plain)


def test_what_is_remembered_is_bounded() -> None:
    nets = [nn.Linear(1, 1) for _ in range(2 * selection.MOST_REMEMBERED)]
    for net in nets:
        assert_counts(net, list(net.parameters()))
    assert len(selection._REMEMBERED) <= selection.MOST_REMEMBERED
    assert_counts(nets[0], list(nets[0].parameters()))
    first = fastreg.elastic_penalty([nets[0].weight, nets[0].bias], L1, L2)
    assert torch.equal(first, fastreg.elastic_penalty(nets[0], L1, L2))


def test_a_second_call_selects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or all of the above would hold without anything remembered."""
    net = Net()
    for params in (net, list(net.parameters())):
        fastreg.elastic_penalty(params, L1, L2)
        with monkeypatch.context() as patch:
            patch.setattr(selection, "collect", lambda params: pytest.fail("selected again"))
            fastreg.elastic_penalty(params, 2 * L1, 0.0).backward()
            fastreg.add_elastic_grad_(params, L1, L2)
            fastreg.elastic_prox_(params, L1, lr=0.0)


def test_a_list_is_its_owners(path: Path) -> None:
    """It may be changed between forward and backward, and grow from call to call."""
    impl, device = path
    first, second = (nn.Parameter(torch.full((n,), float(n), device=device)) for n in (2, 3))
    params = [first, second]
    for _ in range(2):
        penalty = fastreg.elastic_penalty(params, L1, L2, impl=impl)
    params.reverse()
    params.append(nn.Parameter(torch.ones(1, device=device)))
    grads = torch.autograd.grad(penalty, [first, second], retain_graph=True)
    penalty.backward()
    for w, grad in zip((first, second), grads, strict=True):
        assert torch.equal(grad, L1 * w.detach().sign() + 2 * L2 * w.detach())
        assert w.grad is not None
        assert torch.equal(w.grad, grad)


def test_transforms_of_several_penalties(path: Path) -> None:
    """They show tensors without memory, whose ids are used again."""
    impl, device = path
    w = torch.randn(5, device=device)
    expected = torch.func.grad(lambda w: 2 * (L1 * w.abs().sum() + L2 * w.square().sum()))(w)

    def twice(w: Tensor) -> Tensor:
        return fastreg.elastic_penalty([w], L1, L2, impl=impl) + fastreg.elastic_penalty([w], L1, L2, impl=impl)

    for _ in range(3):
        torch.testing.assert_close(torch.func.grad(twice)(w), expected)
    torch.testing.assert_close(torch.vmap(torch.func.grad(twice))(w.repeat(3, 1)), expected.repeat(3, 1))
    net = nn.Linear(2, 2, device=device)
    reg = fastreg.ElasticNet(net, L1, L2, impl=impl)
    reg()
    reg()

    def of_net(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(_Called(net, reg), {f"net.{k}": v for k, v in parameters.items()}, ())

    found = torch.func.grad(of_net)({k: v.detach() for k, v in net.named_parameters()})
    torch.testing.assert_close(found["weight"], 2 * (L1 * net.weight.sign() + 2 * L2 * net.weight).detach())


class _Called(nn.Module):
    def __init__(self, net: nn.Module, reg: fastreg.ElasticNet) -> None:
        super().__init__()
        self.net, self.reg = net, reg

    def forward(self) -> Tensor:
        return self.reg() + self.reg()


def test_recorded_by_make_fx(path: Path) -> None:
    impl, device = path
    w = torch.randn(5, device=device)

    def twice(w: Tensor) -> Tensor:
        return fastreg.elastic_penalty([w], L1, L2, impl=impl) + fastreg.elastic_penalty([w], L1, L2, impl=impl)

    graph = make_fx(twice)(w)
    for x in (w, w + 1):
        torch.testing.assert_close(graph(x), twice(x))


class _Equal(nn.Linear):
    def __eq__(self, other: object) -> bool:
        return self.name == other.name  # type: ignore[attr-defined]

    __hash__ = nn.Module.__hash__
    name = "linear"


class _Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.__dict__["w"] = nn.Parameter(torch.ones(3))

    def named_parameters(self, *args: Any, **keywords: Any) -> Any:
        yield "w", self.__dict__["w"]


def test_unusual_modules() -> None:
    net = nn.Sequential(_Equal(2, 2), _Equal(2, 2))
    assert_counts(net, list(net.parameters()))
    hidden = _Hidden()
    assert_counts(hidden, [hidden.__dict__["w"]])
    script = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))  # type: ignore[no-untyped-call]
    assert_counts(script, list(script.parameters()))


def test_biases_that_get_another_shape() -> None:
    for _ in range(5):
        net = nn.Linear(4, 4)
        assert_counts(net, [net.weight], exclude=fastreg.bias_and_norm)
        net.bias.data = torch.ones(4, 1)
        assert_counts(net, [net.weight, net.bias], exclude=fastreg.bias_and_norm)
        net.bias = nn.Parameter(torch.ones(4))
        assert_counts(net, [net.weight], exclude=fastreg.bias_and_norm)
        reg = fastreg.ElasticNet(net, L1, L2, exclude=fastreg.bias_and_norm)
        reg()
        net.bias.data = torch.ones(4, 1)
        np.testing.assert_allclose(reg().item(), oracle.penalty([net.weight, net.bias], L1, L2)[0], rtol=1e-6)


def test_names_that_move() -> None:
    net = nn.ModuleDict({"old": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    assert_counts(net, list(net["old"].parameters()), include="old")
    net["new"] = net.pop("old")
    with pytest.raises(ValueError, match="matches none"):
        fastreg.elastic_penalty(net, L1, L2, include="old")


def test_a_used_penalty_can_be_pickled() -> None:
    net = nn.Linear(2, 2)
    reg = fastreg.ElasticNet(net, L1, L2)
    for _ in range(3):
        reg()
    again = pickle.loads(pickle.dumps(reg))
    assert torch.equal(again(), reg())
    assert torch.equal(copy.deepcopy(reg)(), reg())


@pytest.mark.parametrize("shape", [(3,), (5,)], ids=["same shape", "another shape"])
def test_data_assigned_after_a_remembered_forward(path: Path, shape: tuple[int, ...]) -> None:
    impl, device = path
    w = nn.Parameter(torch.ones(3, device=device))
    for _ in range(3):
        penalty = fastreg.elastic_penalty([w], L1, L2, impl=impl)
    w.data = torch.full(shape, 2.0, device=device)
    with pytest.raises(RuntimeError, match="modified"):
        penalty.backward()
    assert w.grad is None
    fastreg.elastic_penalty([w], L1, L2, impl=impl).backward()
    assert w.grad is not None
    assert w.grad.shape == shape
