"""Weights and strengths that change between forward and .grad: an error, never the gradient of other weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.helpers import Path
from tests.support.ways import WAYS, Scene, assert_same, grid

MODIFIED = "was modified by an in-place operation"


def nudge(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.add_(1)


def by_hand(weights: list[Tensor]) -> None:
    nudge(weights[3])


def by_an_optimizer(weights: list[Tensor]) -> None:
    weights[0].grad = torch.ones_like(weights[0])
    torch.optim.SGD(weights[:1], lr=0.5).step()
    weights[0].grad = None


def through_a_view(weights: list[Tensor]) -> None:
    nudge(weights[1].detach()[0])


def backward(penalty: Tensor, weights: list[Tensor]) -> None:
    penalty.backward()


def grad(penalty: Tensor, weights: list[Tensor]) -> None:
    torch.autograd.grad(penalty, weights)


def grad_with_a_graph(penalty: Tensor, weights: list[Tensor]) -> None:
    torch.autograd.grad(penalty, weights, create_graph=True)


@pytest.mark.parametrize("run", [backward, grad, grad_with_a_graph])
@pytest.mark.parametrize("change", [by_hand, by_an_optimizer, through_a_view])
@pytest.mark.parametrize("way", WAYS)
def test_weights_changed_before_backward(
    path: Path, way: str, change: Callable[[list[Tensor]], None], run: Callable[[Tensor, list[Tensor]], None]
) -> None:
    scene = Scene(way, path)
    penalty = scene.penalty()
    change(scene.weights)

    with pytest.raises(RuntimeError, match=MODIFIED):
        run(penalty, scene.weights)

    assert all(w.grad is None for w in scene.weights)
    scene.penalty().backward()
    fresh = Scene("naive", path, lambda device: [w.detach().clone().requires_grad_() for w in scene.weights])
    fresh.penalty().backward()
    assert_same([w.grad for w in scene.weights], [w.grad for w in fresh.weights])


def test_computed_weights_changed_before_backward(path: Path) -> None:
    scene = Scene("direct", path)
    doubled = [2 * w for w in scene.weights]
    penalty = scene.penalty(doubled)
    nudge(doubled[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()
    assert all(w.grad is None for w in scene.weights)


@pytest.mark.parametrize("way", WAYS)
def test_weights_changed_between_two_passes_over_one_graph(path: Path, way: str) -> None:
    scene = Scene(way, path)
    penalty = scene.penalty()
    penalty.backward(retain_graph=True)
    nudge(scene.weights[0])
    before = [w.grad.clone() for w in scene.weights if w.grad is not None]

    with pytest.raises(RuntimeError, match=MODIFIED):
        penalty.backward()

    assert_same([w.grad for w in scene.weights], before)


@pytest.mark.parametrize("penalty_first", [True, False])
def test_weights_changed_during_backward(path: Path, penalty_first: bool) -> None:
    """By a hook that runs before or after the penalty's node, while its gradient is on the way."""
    scene = Scene("direct", path)
    x = grid(3, device=scene.device).requires_grad_()
    x.register_post_accumulate_grad_hook(lambda _: nudge(scene.weights[0]))
    for w in scene.weights:
        w.grad = torch.ones_like(w)
    # Nodes run from the last created to the first.
    terms = [scene.penalty(), x.sum()] if penalty_first else [x.sum(), scene.penalty()]

    with pytest.raises(RuntimeError, match=MODIFIED):
        (terms[0] + terms[1]).backward()

    assert x.grad is not None  # the hook did run
    assert_same([w.grad for w in scene.weights], [torch.ones_like(w) for w in scene.weights])


@pytest.mark.parametrize("way", WAYS)
def test_weights_outside_the_penalty_may_change(path: Path, way: str) -> None:
    scene = Scene(way, path)
    penalty = scene.penalty(scene.weights[:2])
    nudge(scene.weights[2])
    penalty.backward()
    expected = Scene("naive", path)
    expected.penalty(expected.weights[:2]).backward()
    assert_same([w.grad for w in scene.weights], [w.grad for w in expected.weights])


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_strengths_changed_before_backward(path: Path, way: str, requires_grad: bool) -> None:
    scene = Scene(way, path)
    l1 = torch.tensor(0.5, device=scene.device, requires_grad=requires_grad)
    penalty = scene.penalty(l1=l1)
    nudge(l1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()
    assert all(w.grad is None for w in [*scene.weights, l1])


def test_a_leaf_changed_beside_weights_that_are_no_leaves(path: Path) -> None:
    """Those have saved tensors to watch them, and leave no count to compare."""
    scene = Scene("direct", path, lambda device: [grid(5, device=device).requires_grad_() for _ in range(2)])
    penalty = scene.penalty([2 * scene.weights[0], scene.weights[1]])
    nudge(scene.weights[1])
    with pytest.raises(RuntimeError, match=MODIFIED):
        penalty.backward()


def known_weights(device: str) -> list[Tensor]:
    return [grid(n, device=device).requires_grad_() for n in (3, 5, 7, 9)]


def test_known_weights_changed_before_backward(path: Path) -> None:
    """From the second call on only versions are noted of weights whose layout is known."""
    scene = Scene("direct", path, known_weights)
    for _ in range(3):
        penalty = scene.penalty()
    by_hand(scene.weights)
    with pytest.raises(RuntimeError, match=MODIFIED):
        penalty.backward()
    assert all(w.grad is None for w in scene.weights)


def test_known_weights_frozen_before_backward(path: Path) -> None:
    scene = Scene("direct", path, known_weights)
    for _ in range(3):
        penalty = scene.penalty()
    scene.weights[0].requires_grad_(False)
    penalty.backward()
    assert scene.weights[0].grad is None
    assert scene.weights[1].grad is not None
