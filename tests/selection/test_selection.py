"""Which weights count, and with which strengths."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastreg
from tests import oracle
from tests.support.cases import L1, L2
from tests.support.helpers import Path


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))


@pytest.fixture
def net() -> Net:
    net = Net()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    return net


def assert_counts(found: torch.Tensor, weights: list[torch.Tensor], l1: float = L1, l2: float = L2) -> None:
    np.testing.assert_allclose(float(found.detach()), oracle.penalty(weights, l1, l2)[0], rtol=1e-6)


def test_every_form_of_params_is_the_same(net: Net) -> None:
    weights = list(net.parameters())
    for params in (
        net,
        net.parameters(),
        weights,
        tuple(weights),
        net.named_parameters(),
        list(net.named_parameters()),
        dict(net.named_parameters()),
        [{"params": net}],
        [{"params": net.body.parameters()}, {"params": [net.head.weight, net.head.bias, net.scale]}],
        {"params": net},
        torch.optim.SGD(net.parameters(), lr=0.1).param_groups,
        (p for p in weights),
        ({"params": p} for p in weights),
    ):
        assert_counts(fastreg.elastic_penalty(params, L1, L2), weights)
    assert_counts(fastreg.elastic_penalty(net.scale, L1, L2), [net.scale])


def test_a_kept_iterator_is_walked_once(net: Net) -> None:
    for params in (net.parameters(), [{"params": net.parameters()}], ({"params": p} for p in net.parameters())):
        reg = fastreg.ElasticNet(params, L1, L2)
        net.scale.requires_grad_(False)
        assert_counts(reg(), [p for p in net.parameters() if p.requires_grad])
        net.scale.requires_grad_(True)
        assert_counts(reg(), list(net.parameters()))


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("weight$", None, ["body.0.weight", "body.1.weight", "head.weight"]),
        ("head", None, ["head.weight", "head.bias"]),
        (None, "bias|scale", ["body.0.weight", "body.1.weight", "head.weight"]),
        ("body", "bias", ["body.0.weight", "body.1.weight"]),
        (None, fastreg.bias_and_norm, ["body.0.weight", "head.weight"]),
        (lambda name, p: p.ndim == 2, "^head", ["body.0.weight"]),
        ("", lambda name, p: p.ndim > 0, ["scale"]),
    ],
)
def test_include_and_exclude(net: Net, include: object, exclude: object, expected: list[str]) -> None:
    named = dict(net.named_parameters())
    found = fastreg.elastic_penalty(net, L1, L2, include=include, exclude=exclude)
    assert_counts(found, [named[name] for name in expected])
    found.backward()
    assert {name for name, p in named.items() if p.grad is not None} == set(expected)


def test_tied_and_frozen_weights(net: Net) -> None:
    net.twin = net.head
    net.alias = net.head.weight
    net.body[0].weight.requires_grad_(False)
    expected = [net.body[0].bias, net.body[1].weight, net.body[1].bias, net.head.weight, net.head.bias, net.scale]
    assert_counts(fastreg.elastic_penalty(net, L1, L2), expected)
    assert_counts(fastreg.elastic_penalty([*net.parameters(), net.head.weight], L1, L2), expected)


def test_plain_tensors_are_taken_as_given() -> None:
    data = [torch.randn(3), torch.randn(4)]
    found = fastreg.elastic_penalty(data, L1, L2)
    assert_counts(found, data)
    assert not found.requires_grad
    # Among tensors with gradients, those without do not count.
    trained = torch.randn(5, requires_grad=True)
    with pytest.warns(UserWarning, match=r"'params\[0\]' and 1 more requires no gradient"):
        assert_counts(fastreg.elastic_penalty([*data, trained], L1, L2), [trained])


def test_groups_bring_their_strengths(path: Path) -> None:
    impl, device = path
    net = Net().to(device)
    groups = [
        {"params": net.body, "l1": 0.1},
        {"params": net.head.parameters(), "l2": torch.tensor(0.25, device=device)},
        {"params": [net.scale], "l1": 0.0, "l2": 0.0, "lr": 3.0},
    ]
    strengths = [(0.1, L2), (L1, 0.25), (0.0, 0.0)]
    members = [list(net.body.parameters()), list(net.head.parameters()), [net.scale]]

    found = fastreg.elastic_penalty(groups, L1, L2, return_terms=True, impl=impl)

    expected = np.sum([oracle.penalty(w, *s) for w, s in zip(members, strengths, strict=True)], axis=0)
    np.testing.assert_allclose([float(term.detach()) for term in found], expected, rtol=1e-6)
    found.total.backward()
    for weights, (l1, l2) in zip(members, strengths, strict=True):
        for w in weights:
            assert w.grad is not None
            assert oracle.ulp_distance(w.grad, oracle.gradient(w, l1, l2)) <= oracle.GRADIENT_ULPS[w.dtype]


def test_a_tensor_strength_may_serve_several_groups(path: Path) -> None:
    impl, device = path
    # Its neighbour in memory must not become the second group's strength.
    shared = torch.tensor([0.5, 1000.0], device=device)[0].requires_grad_()
    weights = [torch.ones(10, device=device), torch.full((7,), 2.0, device=device)]
    for second in (0.25, 0.0):
        groups = [{"params": weights[0], "l2": 0.0}, {"params": weights[1], "l2": second}]
        found = fastreg.elastic_penalty(groups, l1=shared, return_terms=True, impl=impl)
        assert [term.item() for term in found] == [12 + 28 * second, 12.0, 28 * second]
        (gradient,) = torch.autograd.grad(found.total, shared)
        assert gradient.item() == 24.0


def test_excluded_groups_may_vanish(net: Net) -> None:
    groups = [{"params": net.body, "l1": 9.0}, {"params": net.head, "l1": 0.5}]
    found = fastreg.elastic_penalty(groups, L1, L2, exclude=lambda name, p: any(p is q for q in net.body.parameters()))
    assert_counts(found, list(net.head.parameters()), l1=0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_strengths_as_tensors(path: Path, dtype: torch.dtype) -> None:
    impl, device = path
    w = torch.randn(300, device=device, requires_grad=True)
    l1, l2 = (torch.tensor(s, dtype=dtype, device=device, requires_grad=True) for s in (L1, L2))

    found = fastreg.elastic_penalty(w, l1, l2, impl=impl)
    (2 * found).backward()

    rounded = l1.item(), l2.item()
    assert_counts(found, [w], *rounded)
    assert w.grad is not None
    assert oracle.ulp_distance(w.grad, oracle.gradient(w, 2 * rounded[0], 2 * rounded[1])) <= 1
    sums = oracle.penalty([w], 1.0, 1.0)[1:]
    for strength, total in zip((l1, l2), sums, strict=True):
        assert strength.grad is not None
        assert strength.grad.dtype == dtype
        np.testing.assert_allclose(float(strength.grad), 2 * total, rtol=max(1e-6, torch.finfo(dtype).eps))


def test_strengths_of_groups_get_their_gradients(path: Path) -> None:
    impl, device = path
    weights = [torch.randn(n, device=device, requires_grad=True) for n in (30, 5000, 7)]
    own = [torch.tensor(s, device=device, requires_grad=True) for s in (0.1, 0.2)]
    groups = [
        {"params": weights[0], "l1": own[0]},
        {"params": weights[1], "l1": 0.5, "l2": own[1]},
        {"params": weights[2], "l1": own[0]},
    ]
    fastreg.elastic_penalty(groups, L1, L2, impl=impl).backward()
    abs_sums = [oracle.penalty([w], 1.0, 0.0)[0] for w in weights]
    assert own[0].grad is not None
    assert own[1].grad is not None
    np.testing.assert_allclose(float(own[0].grad), abs_sums[0] + abs_sums[2], rtol=1e-6)
    np.testing.assert_allclose(float(own[1].grad), oracle.penalty([weights[1]], 0.0, 1.0)[0], rtol=1e-6)


def test_a_schedule_assigns_strengths(path: Path) -> None:
    impl, device = path
    w = torch.randn(10, device=device, requires_grad=True)
    reg = fastreg.ElasticNet(w, L1, L2, impl=impl)
    pending = reg()
    reg.l1 = 0.0
    reg.l2 = torch.tensor(2.0, device=device)
    assert_counts(reg(), [w], 0.0, 2.0)
    assert (reg.l1, float(reg.l2)) == (0.0, 2.0)
    # What was computed before keeps the strengths it was computed with.
    pending.backward()
    assert w.grad is not None
    assert oracle.ulp_distance(w.grad, oracle.gradient(w, L1, L2)) <= 1


def test_from_alpha_is_scikit_learns() -> None:
    w = torch.randn(10)
    reg = fastreg.ElasticNet.from_alpha(w, alpha=0.4, l1_ratio=0.25, impl="torch")
    assert (reg.l1, reg.l2) == (0.4 * 0.25, 0.4 * 0.75 / 2)
    assert_counts(reg(), [w], 0.1, 0.15)


def test_reg_is_elastic_penalty(net: Net) -> None:
    reg = fastreg.ElasticNet(net, L1, L2, exclude="bias")
    expected = fastreg.elastic_penalty(net, L1, L2, exclude="bias", return_terms=True)
    assert reg(return_terms=True) == expected
    assert reg() == expected.total
    assert "4 tensors" in repr(reg)


def test_modules_that_come_and_go_are_noticed() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    reg = fastreg.ElasticNet(model, L1, L2)
    for change in (
        lambda: model.__setitem__(2, nn.Linear(2, 4)),
        lambda: model.append(nn.Linear(4, 1)),
        lambda: model[0].register_parameter("extra", nn.Parameter(torch.ones(3))),
        lambda: model[1].add_module("inner", nn.Linear(1, 1)),
        lambda: setattr(model[2], "weight", model[0].weight),
        lambda: model.__delitem__(3),
    ):
        change()
        assert_counts(reg(), list(model.parameters()))


def test_the_default_device_is_left_out_of_it(path: Path) -> None:
    impl, device = path
    weights = [torch.randn(3, device=device, requires_grad=True), torch.randn(5000, device=device, requires_grad=True)]
    groups = [{"params": weights[0], "l1": 0.1}, {"params": weights[1], "l1": 0.2}]
    with torch.device("meta"):
        found = fastreg.elastic_penalty(groups, L1, L2, impl=impl)
        found.backward()
        fastreg.add_elastic_grad_(groups, L1, L2, impl=impl)
        fastreg.elastic_prox_(groups, L1, L2, lr=0.1, impl=impl)
    assert found.device == weights[0].device


def test_a_marked_tensor_marks_nothing(path: Path) -> None:
    class Marked(torch.Tensor):
        pass

    impl, device = path
    w = torch.randn(7, device=device).as_subclass(Marked)
    assert type(fastreg.elastic_penalty(w, L1, L2, impl=impl)) is torch.Tensor
    assert type(fastreg.sparsity(w)) is torch.Tensor


def test_compiled_patterns_are_patterns(net: Net) -> None:
    found = fastreg.elastic_penalty(net, L1, L2, include=re.compile("HEAD", re.IGNORECASE))
    assert_counts(found, list(net.head.parameters()))


def test_a_copied_attachment_can_be_attached_again() -> None:
    model = nn.Linear(3, 2)
    model.reg = fastreg.ElasticNet(model.weight, L1, L2)
    model.reg.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.reg.attach(torch.optim.SGD(other.parameters(), lr=0.1))


def test_groups_of_strengths_stay_apart_when_these_are_equal(path: Path) -> None:
    """What a sweep takes depends on which groups bring strengths, not on their values: no kernel is compiled again."""
    impl, device = path
    weights = [torch.ones(n, device=device) for n in (2, 3, 4, 5)]
    for l1 in ((0.5, 0.25), (0.25, 0.25), (0.0, 0.0)):
        groups = [{"params": weights[0], "l1": l1[0]}, {"params": weights[1], "l1": l1[1]}]
        reg = fastreg.ElasticNet([*groups, {"params": weights[2]}, {"params": weights[3], "lr": 1.0}], 0.125, impl=impl)
        work = reg._current()
        assert (list(work.groups), work.n_groups) == ([0, 1, 2, 2], 3)
        assert all(isinstance(s, torch.Tensor) and s.shape == (3,) for s in work.penalty.strengths)
        assert float(reg().detach()) == 2 * l1[0] + 3 * l1[1] + 9 * 0.125
    plain = fastreg.ElasticNet([{"params": w} for w in weights], 0.125, impl=impl)._current()
    assert (plain.n_groups, plain.penalty.strengths[0]) == (1, 0.125)


@pytest.mark.parametrize("kept", [True, False], ids=["ElasticNet", "single calls"])
def test_a_leaf_that_becomes_a_computed_tensor(path: Path, kept: bool) -> None:
    """An operation in place makes it one: it then belongs to the graph, goes through its hooks, and may be freed."""
    impl, device = path
    source, w = (torch.tensor([1.0, -2.0, 3.0], device=device, requires_grad=True) for _ in range(2))
    reg = fastreg.ElasticNet([w], 0.0, 0.5, impl=impl)

    def penalty() -> Tensor:
        return reg() if kept else fastreg.elastic_penalty([w], 0.0, 0.5, impl=impl)

    for _ in range(3):
        penalty()
    w.requires_grad_(False).copy_(2 * source)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        found = penalty()
    found.backward()
    assert source.grad is not None
    assert torch.equal(source.grad, 4 * source)
    assert kept or w.shape in saved  # an ElasticNet does not ask again which of its weights are leaves
