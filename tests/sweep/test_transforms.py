"""torch.func transforms and forward-mode differentiation of the penalty."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastreg
from tests import oracle
from tests.support.cases import L1, L2
from tests.support.helpers import Path

# PyTorch's own forward-mode decompositions still use torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


Penalty = Callable[[Any], Tensor]


@pytest.fixture
def w(path: Path) -> Tensor:
    return torch.randn(6, dtype=torch.float64, device=path[1])


@pytest.fixture
def penalty(path: Path) -> Penalty:
    return lambda params: fastreg.elastic_penalty(params, L1, L2, impl=path[0])


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    # A few roundings of float64.
    torch.testing.assert_close(actual, expected.to(actual.device), rtol=1e-14, atol=1e-14)


def test_grad(w: Tensor, penalty: Penalty) -> None:
    gradient, value = torch.func.grad_and_value(penalty)(w)
    assert_equal(gradient, torch.from_numpy(oracle.gradient(w, L1, L2)))
    assert value.item() == pytest.approx(oracle.penalty([w], L1, L2)[0], rel=1e-14)


def test_hessian(w: Tensor, penalty: Penalty) -> None:
    assert_equal(torch.func.hessian(penalty)(w), 2 * L2 * torch.eye(6, dtype=torch.float64))


def test_jvp(w: Tensor, penalty: Penalty) -> None:
    tangent = torch.randn_like(w)
    expected = (torch.from_numpy(oracle.gradient(w, L1, L2)).to(w.device) * tangent).sum()
    assert_equal(torch.func.jvp(penalty, (w,), (tangent,))[1], expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(w, tangent)
        assert_equal(torch.autograd.forward_ad.unpack_dual(penalty(dual)).tangent, expected)


def test_value_and_gradient_of_an_ensemble(path: Path, penalty: Penalty) -> None:
    models = [nn.Linear(3, 2).to(path[1]) for _ in range(4)]
    stacked, _ = torch.func.stack_module_state(models)
    values = torch.func.vmap(penalty)(stacked)
    gradients, same_values = torch.func.vmap(torch.func.grad_and_value(penalty))(stacked)
    assert torch.equal(values, same_values)
    for i, model in enumerate(models):
        assert values[i].item() == pytest.approx(oracle.penalty(model.parameters(), L1, L2)[0], rel=1e-6)
        for name, p in model.named_parameters():
            # Formed by autograd from two float32 terms, one of them by way of float64: one rounding more.
            assert oracle.ulp_distance(gradients[name][i], oracle.gradient(p, L1, L2)) <= 2


def test_vmap_over_strengths(w: Tensor, path: Path) -> None:
    """A regularisation path: one model, many strengths."""
    strengths = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64, device=path[1])
    values = torch.func.vmap(lambda l1: fastreg.elastic_penalty(w, l1, L2, impl=path[0]))(strengths)
    for value, l1 in zip(values, strengths, strict=True):
        assert value.item() == pytest.approx(oracle.penalty([w], float(l1), L2)[0], rel=1e-14)


def test_functional_call_with_a_parameter_dict(path: Path, penalty: Penalty) -> None:
    model = nn.Linear(3, 2).to(path[1])
    x = torch.randn(5, 3, device=path[1])

    def loss(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, params, (x,)).sum() + penalty(params)

    gradients = torch.func.grad(loss)(dict(model.named_parameters()))
    loss(dict(model.named_parameters())).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(gradients[name], p.grad)
