"""The operators that compilers see: their schemas, fakes and derivatives, and the numbers of the sweep."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch.autograd import gradcheck, gradgradcheck

from fastreg.sweep import operators
from tests import oracle
from tests.support.helpers import Path
from tests.support.ways import all_kinds, grid

GROUPS = [0, 1, 0, 2, 1]


def strengths(device: str) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor([0.3, 0.0, 1.5], dtype=torch.float64, device=device),
        torch.tensor([0.7, 0.2, 0.0], dtype=torch.float64, device=device),
    )


def plain(weights: Sequence[Tensor]) -> list[Tensor]:
    return [w.detach() for w in weights]


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("name", ["group_sums", "gradients", "add_gradient_", "prox_"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck(name: str, differentiable: bool, path: Path) -> None:
    """Schema, aliasing, fake kernel, autograd registration and tracing, as PyTorch checks them."""
    impl, device = path
    weights, (l1, l2) = all_kinds(device), strengths(device)
    if differentiable:
        l1.requires_grad_()
        l2.requires_grad_()
    else:
        weights = plain(weights)
    grads = [torch.zeros_like(w) for w in plain(weights)]
    arguments: dict[str, tuple[Any, ...]] = {
        "group_sums": (weights, GROUPS, 3, impl),
        "gradients": (weights, GROUPS, l1, l2, impl),
        # Those in place are not differentiable, and are called where nothing has to be.
        "add_gradient_": (grads, plain(weights), GROUPS, l1.detach(), l2.detach(), differentiable, impl),
        "prox_": (plain(weights), GROUPS, l1.detach(), l2.detach(), differentiable, impl),
    }
    library.opcheck(getattr(torch.ops.fastreg, name).default, arguments[name])


def test_the_numbers(path: Path) -> None:
    impl, device = path
    l1, l2 = strengths(device)
    weights = plain(all_kinds(device))
    before = [w.clone() for w in weights]
    of_group = [(float(l1[g]), float(l2[g])) for g in GROUPS]

    def check_sums(found: Tensor) -> None:
        for group in range(3):
            expected = oracle.penalty([w for w, g in zip(before, GROUPS, strict=True) if g == group], 1.0, 1.0)[1:]
            assert found[group].tolist() == pytest.approx(expected, rel=1e-6)

    check_sums(operators.group_sums(weights, GROUPS, 3, impl))
    expected = [oracle.gradient(w, *pair) for w, pair in zip(weights, of_group, strict=True)]
    for grad, want in zip(operators.gradients(weights, GROUPS, l1, l2, impl), expected, strict=True):
        assert oracle.ulp_distance(grad, want) <= 1
    grads = [torch.zeros_like(w) for w in weights]
    check_sums(operators.add_gradient_(grads, weights, GROUPS, l1, l2, True, impl))
    for grad, want in zip(grads, expected, strict=True):
        assert oracle.ulp_distance(grad, want) <= 1
    assert operators.prox_(weights, GROUPS, l1, l2, False, impl).numel() == 0
    for w, old, pair in zip(weights, before, of_group, strict=True):
        assert oracle.ulp_distance(w, oracle.prox(old, *pair, 1.0)) <= 2


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives_against_differences(path: Path, check: Any) -> None:
    impl, device = path
    # Away from 0, where |w| has no derivative.
    weights = [
        torch.tensor(values, dtype=torch.float64, device=device, requires_grad=True)
        for values in ([[0.5, -1.25], [2.0, -0.75]], [1.5], [-0.5, 0.25])
    ]
    l1, l2 = (torch.rand(2, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    groups = [0, 1, 0]
    assert check(lambda *w: operators.group_sums(list(w), groups, 2, impl), weights)
    assert check(lambda a, b, *w: tuple(operators.gradients(list(w), groups, a, b, impl)), (l1, l2, *weights))


def test_changes_are_counted(path: Path) -> None:
    """Graphs that saved a tensor must notice that an operator changed it."""
    impl, device = path
    w, grad = grid(5, device=device), grid(5, device=device)
    one = torch.ones(1, dtype=torch.float64, device=device)
    versions = w._version, grad._version
    operators.add_gradient_([grad], [w], [0], one, one, False, impl)
    assert w._version == versions[0]
    assert grad._version > versions[1]
    operators.prox_([w], [0], one, one, False, impl)
    assert w._version > versions[0]


def test_operators_stay_out_of_graphs_that_the_compiler_captures() -> None:
    """Their tables outlive a call, and such graphs take their memory back."""
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this PyTorch has no such tag")
    for name in ("group_sums", "gradients", "add_gradient_", "prox_"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.fastreg, name).default.tags
