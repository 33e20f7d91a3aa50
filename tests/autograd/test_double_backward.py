"""Derivatives of the gradient: Hessians, gradient penalties, learnt strengths."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

import fastreg
from tests.support.helpers import Path
from tests.support.ways import WAYS, Scene, assert_same, grid, outcome

L1, L2 = 1 / 8, 1 / 4


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_against_differences(path: Path, check: Any) -> None:
    """In the weights, of two groups, in both strengths, and in the upstream gradients of all three terms."""
    impl, device = path
    # Away from 0, where |w| has no derivative for differences to find.
    weights = [
        torch.tensor(values, dtype=torch.float64, device=device, requires_grad=True)
        for values in ([[0.5, -1.25], [2.0, -0.75]], [1.5])
    ]
    strengths = [torch.tensor(s, dtype=torch.float64, device=device, requires_grad=True) for s in (0.3, 0.7)]

    def terms(l1: Tensor, l2: Tensor, one: Tensor, other: Tensor) -> Any:
        groups = [{"params": [one]}, {"params": [other], "l2": 3 * l2}]
        return tuple(fastreg.elastic_penalty(groups, l1, l2, return_terms=True, impl=impl))

    assert check(terms, (*strengths, *weights))


def test_the_hessian(path: Path) -> None:
    impl, device = path
    w = grid(5, device=device)
    hessian = torch.autograd.functional.hessian(lambda w: fastreg.elastic_penalty(w, L1, L2, impl=impl), w)
    assert torch.equal(hessian, 2 * L2 * torch.eye(5, device=device))


def gradient_penalty(scene: Scene) -> None:
    gradients = torch.autograd.grad(scene.loss() + scene.penalty(), scene.weights, create_graph=True)
    sum(gradient.float().square().sum() for gradient in gradients).backward()


def through_strengths_and_upstream(scene: Scene) -> list[Tensor | None]:
    leaves = [torch.tensor(s, device=scene.device, requires_grad=True) for s in (L1, L2, 2.0)]
    l1, l2, factor = leaves
    gradients = torch.autograd.grad(factor * scene.penalty(l1=l1, l2=l2), scene.weights, create_graph=True)
    sum(gradient.float().square().sum() for gradient in gradients).backward()
    return [leaf.grad for leaf in leaves]


def of_one_term(scene: Scene) -> None:
    gradients = torch.autograd.grad(scene.terms()[2], scene.weights, create_graph=True)
    sum(gradient.float().sum() for gradient in gradients).backward()


def of_computed_weights_saved_elsewhere(scene: Scene) -> None:
    doubled = [2 * w for w in scene.weights]
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        penalty = scene.penalty(doubled)
    gradients = torch.autograd.grad(penalty, scene.weights, create_graph=True)
    sum(gradient.float().square().sum() for gradient in gradients).backward()


def with_a_plain_pass_between(scene: Scene) -> None:
    penalty = scene.penalty()
    for create_graph in (True, False, True):
        gradients = torch.autograd.grad(penalty, scene.weights, create_graph=create_graph, retain_graph=True)
        if create_graph:
            sum(gradient.float().square().sum() for gradient in gradients).backward()
        penalty.backward(retain_graph=True)


def accumulated_with_a_graph(scene: Scene) -> list[bool]:
    (scene.loss() + scene.penalty()).backward(create_graph=True)
    first = [w.grad for w in scene.weights]
    requires_grad = [grad.requires_grad for grad in first if grad is not None]
    sum(grad.float().square().sum() for grad in first if grad is not None).backward()
    for w in scene.weights:
        assert w.grad is not None
        w.grad = w.grad.detach()  # breaks the reference cycle
    return requires_grad


# PyTorch says once that such graphs hold themselves alive.
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True will create a reference cycle")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "scenario",
    [
        gradient_penalty,
        through_strengths_and_upstream,
        of_one_term,
        of_computed_weights_saved_elsewhere,
        with_a_plain_pass_between,
        accumulated_with_a_graph,
    ],
    ids=lambda scenario: scenario.__name__,
)
def test_cannot_be_told_from_autograd(path: Path, scenario: Any, way: str) -> None:
    assert_same(outcome(way, path, scenario), outcome("naive", path, scenario))


def test_a_strength_learnt_by_gradient_descent(path: Path) -> None:
    """Through unrolled steps of ridge regression, the validation loss chooses l2 as a grid search does."""
    impl, device = path
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device)

    truth, x, held_out = draw(8), draw(12, 8), draw(200, 8)
    y, target = x @ truth + 2 * draw(12), held_out @ truth

    def validation_loss(l2: Tensor) -> Tensor:
        w = torch.zeros(8, dtype=torch.float64, device=device, requires_grad=True)
        for _ in range(10):
            loss = (x @ w - y).square().mean() + fastreg.elastic_penalty(w, 0.0, l2, impl=impl)
            (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
            w = w - 0.1 * gradient
        return (held_out @ w - target).square().mean()

    log_l2 = torch.tensor(-4.0, dtype=torch.float64, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([log_l2], lr=0.4)
    for _ in range(25):
        optimizer.zero_grad()
        validation_loss(log_l2.exp()).backward()
        optimizer.step()

    candidates = torch.linspace(-4, 2, 13, dtype=torch.float64, device=device)
    losses = torch.stack([validation_loss(c.exp()).detach() for c in candidates])
    learnt = validation_loss(log_l2.exp()).item()
    assert learnt <= losses.min().item() * 1.01
    assert learnt < 0.9 * losses[0].item()  # there was something to learn


@pytest.mark.parametrize("way", WAYS)
def test_strengths_together_with_the_weights(path: Path, way: str) -> None:
    """The usual backward pass, without a second derivative: weights and both strengths get theirs."""
    scene = Scene(way, path)
    reference = Scene("naive", path)
    for s in (scene, reference):
        s.strengths = [torch.tensor(v, device=s.device, requires_grad=True) for v in (1 / 8, 1 / 4)]
        (2 * s.penalty(l1=s.strengths[0], l2=s.strengths[1])).backward()
    assert_same([s.grad for s in scene.strengths], [s.grad for s in reference.strengths])
    assert_same([w.grad for w in scene.weights], [w.grad for w in reference.weights])
