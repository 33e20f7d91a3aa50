"""The penalty's gradient under everything that autograd's engine can be asked to do, where nobody watches .grad."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from tests.support.helpers import Path
from tests.support.ways import L1, L2, WAYS, Scenario, Scene, check_against_autograd, grid


def no_upstream_gradient(scene: Scene) -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> None:
            return None

    Stop.apply(scene.penalty()).backward()


def one_value_used_twice(scene: Scene) -> None:
    penalty = scene.penalty()
    (penalty + scene.loss() + 2 * penalty).backward()


def overlapping_penalties(scene: Scene) -> None:
    (
        scene.penalty() + scene.penalty(scene.weights[1:4], l1=1 / 2, l2=1 / 2) + scene.penalty(scene.weights[2:])
    ).backward()


def the_graph_twice(scene: Scene) -> None:
    penalty = scene.penalty()
    penalty.backward(retain_graph=True)
    (4 * penalty).backward(retain_graph=True)
    penalty.backward()


def the_graph_again_after_it_was_freed(scene: Scene) -> str:
    penalty = scene.penalty()
    penalty.backward()
    with pytest.raises(RuntimeError) as error:
        penalty.backward()
    return str(error.value)


def some_inputs(scene: Scene) -> None:
    (scene.loss() + scene.penalty()).backward(inputs=scene.weights[1:3])


def inputs_that_are_no_weights(scene: Scene) -> list[Tensor | None]:
    x = grid(3, device=scene.device, seed=7).requires_grad_()
    (x.sum() + scene.penalty()).backward(inputs=[x])
    return [x.grad]


def frozen_between_forward_and_backward(scene: Scene) -> None:
    penalty = scene.penalty()
    scene.weights[1].requires_grad_(False)
    penalty.backward()


def strengths_stepped_in_their_own_hooks(scene: Scene) -> list[Tensor | None]:
    def step(strength: Tensor) -> None:
        with torch.no_grad():
            strength.zero_()

    l1, l2 = (torch.tensor(s, device=scene.device, requires_grad=True) for s in (L1, L2))
    for strength in (l1, l2):
        strength.register_post_accumulate_grad_hook(step)
    scene.penalty(l1=l1, l2=l2).backward()
    return [l1, l2, l1.grad, l2.grad]


def under_saved_tensor_hooks(scene: Scene) -> None:
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        total = scene.loss() + scene.penalty()
    total.backward()


def with_saved_tensors_on_the_cpu(scene: Scene) -> None:
    with save_on_cpu():
        total = scene.loss() + scene.penalty()
    total.backward()


def without_grad_mode_in_backward(scene: Scene) -> None:
    total = scene.loss() + scene.penalty()
    with torch.no_grad():
        total.backward()


def inside_another_backward(scene: Scene) -> None:
    x = grid(3, device=scene.device, seed=7).requires_grad_()
    y = x * 2
    inner = scene.penalty()
    y.register_hook(lambda grad: inner.backward())
    (y.sum() + 2 * scene.penalty()).backward()


def in_another_thread(scene: Scene) -> None:
    total = scene.loss() + scene.penalty()
    thread = threading.Thread(target=total.backward)
    thread.start()
    thread.join()


def after_a_backward_that_failed(scene: Scene) -> None:
    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> Tensor:
            raise ArithmeticError

    total = Fail.apply(scene.loss()) + scene.penalty()
    with pytest.raises(ArithmeticError):
        total.backward()
    # What a failed pass left behind is nobody's promise; that nothing of it turns up later is.
    for w in scene.weights:
        w.grad = None
    (scene.loss() + scene.penalty()).backward()


def inside_a_checkpoint(scene: Scene) -> list[Tensor | None]:
    x = grid(3, device=scene.device, seed=7).requires_grad_()
    for use_reentrant in (True, False):
        total = checkpoint(lambda x: x.sum() + scene.loss() + scene.penalty(), x, use_reentrant=use_reentrant)
        (2 * total).backward()
    return [x.grad]


def beside_a_checkpoint(scene: Scene) -> list[Tensor | None]:
    x = grid(3, device=scene.device, seed=7).requires_grad_()
    for use_reentrant in (True, False):
        loss = checkpoint(lambda x: x.sum() + scene.loss(), x, use_reentrant=use_reentrant)
        (loss + 2 * scene.penalty()).backward()
    return [x.grad]


def a_value_changed_in_place(scene: Scene) -> None:
    total = scene.penalty()
    total += scene.loss()
    total *= 2
    total.backward()


def a_hook_on_the_value(scene: Scene) -> None:
    penalty = scene.penalty()
    penalty.register_hook(lambda upstream: 2 * upstream)
    penalty.backward()


def hooks_that_were_removed(scene: Scene) -> None:
    penalty = scene.penalty()
    for handle in [w.register_hook(lambda grad: 2 * grad) for w in scene.weights]:
        handle.remove()
    penalty.backward()


def values_without_a_graph(scene: Scene) -> list[str]:
    with torch.no_grad():
        one = scene.penalty()
    with torch.inference_mode():
        other = scene.penalty()
    messages = []
    for penalty in (one, other):
        with pytest.raises(RuntimeError) as error:
            penalty.backward()
        messages.append(str(error.value))
    return messages


SCENARIOS: list[Scenario] = [
    no_upstream_gradient,
    one_value_used_twice,
    overlapping_penalties,
    the_graph_twice,
    the_graph_again_after_it_was_freed,
    some_inputs,
    inputs_that_are_no_weights,
    frozen_between_forward_and_backward,
    strengths_stepped_in_their_own_hooks,
    under_saved_tensor_hooks,
    with_saved_tensors_on_the_cpu,
    without_grad_mode_in_backward,
    inside_another_backward,
    in_another_thread,
    after_a_backward_that_failed,
    inside_a_checkpoint,
    beside_a_checkpoint,
    a_value_changed_in_place,
    a_hook_on_the_value,
    hooks_that_were_removed,
    values_without_a_graph,
]
# There is nothing to add, or not to all of the weights: then autograd adds what there is.
NOT_DIRECT = {
    no_upstream_gradient,
    inputs_that_are_no_weights,
    values_without_a_graph,
    some_inputs,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_cannot_be_told_from_autograd(
    path: Path, scenario: Scenario, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_against_autograd(way, path, scenario, monkeypatch, is_direct=scenario not in NOT_DIRECT)
