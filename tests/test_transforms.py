"""torch.func transforms and forward-mode differentiation of the penalty."""

import pytest
import torch
from torch import Tensor, nn

import fastreg
from tests import oracle
from tests.cases import L1, L2

# PyTorch's own forward-mode decompositions still use torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def w() -> Tensor:
    return torch.randn(6, dtype=torch.float64)


def penalty(w: Tensor) -> Tensor:
    return fastreg.elastic_penalty(w, L1, L2)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    # A few roundings of float64.
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)


def test_grad(w: Tensor) -> None:
    gradient, value = torch.func.grad_and_value(penalty)(w)
    assert_equal(gradient, torch.from_numpy(oracle.gradient(w, L1, L2)))
    assert value.item() == pytest.approx(oracle.penalty([w], L1, L2)[0], rel=1e-14)


def test_hessian(w: Tensor) -> None:
    assert_equal(torch.func.hessian(penalty)(w), 2 * L2 * torch.eye(6, dtype=torch.float64))


def test_jvp(w: Tensor) -> None:
    tangent = torch.randn_like(w)
    expected = (torch.from_numpy(oracle.gradient(w, L1, L2)) * tangent).sum()
    assert_equal(torch.func.jvp(penalty, (w,), (tangent,))[1], expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(w, tangent)
        assert_equal(torch.autograd.forward_ad.unpack_dual(penalty(dual)).tangent, expected)


def test_vmap_over_an_ensemble() -> None:
    models = [nn.Linear(3, 2) for _ in range(4)]
    stacked, _ = torch.func.stack_module_state(models)
    found = torch.func.vmap(lambda params: fastreg.elastic_penalty(params, L1, L2))(stacked)
    for value, model in zip(found, models, strict=True):
        assert value.item() == pytest.approx(oracle.penalty(model.parameters(), L1, L2)[0], rel=1e-6)


def test_functional_call_with_a_parameter_dict() -> None:
    model = nn.Linear(3, 2)
    x = torch.randn(5, 3)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, params, (x,)).sum() + fastreg.elastic_penalty(params, L1, L2)

    gradients = torch.func.grad(loss)(dict(model.named_parameters()))
    loss(dict(model.named_parameters())).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(gradients[name], p.grad)
