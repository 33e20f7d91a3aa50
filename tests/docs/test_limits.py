"""What docs/threads.md says of reparametrised weights, callbacks of the autograd engine, and copies of optimizers."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastreg

L1 = 0.1


class Squared(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.square()


def squared(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Squared())


def normed(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.5)


TRAINED = [
    (squared, ["parametrizations.weight.original"]),
    (normed, ["parametrizations.weight.original0", "parametrizations.weight.original1"]),
    (pruned, ["weight_orig"]),
]


@pytest.mark.parametrize(("reparametrise", "names"), TRAINED)
def test_what_is_trained_is_penalised(reparametrise: Callable[[nn.Module], None], names: list[str]) -> None:
    layer = nn.Linear(4, 3, bias=False)
    reparametrise(layer)
    trained = dict(layer.named_parameters())
    assert list(trained) == names
    expected = sum(L1 * p.detach().double().abs().sum().item() for p in trained.values())
    assert fastreg.elastic_penalty(layer, L1).item() == pytest.approx(expected, rel=1e-6)
    of_weight = L1 * layer.weight.detach().double().abs().sum().item()
    assert of_weight != pytest.approx(expected, rel=1e-2)
    only_first = fastreg.ElasticNet(layer, L1, include=rf"^{names[0]}$")
    assert only_first().item() == pytest.approx(L1 * trained[names[0]].detach().abs().sum().item(), rel=1e-6)


@pytest.mark.parametrize("reparametrise", [each for each, _ in TRAINED])
def test_the_weight_that_is_computed_can_be_passed(reparametrise: Callable[[nn.Module], None]) -> None:
    layer, other = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    other.load_state_dict(layer.state_dict())
    for each in (layer, other):
        reparametrise(each)
    fastreg.elastic_penalty([layer.weight], L1).backward()
    (L1 * other.weight.abs().sum()).backward()
    for p, q in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    layer(torch.ones(4))  # computes a pruned weight anew
    before = [p.detach().clone() for p in layer.parameters()]
    fastreg.elastic_prox_([layer.weight], L1, lr=0.1)
    for p, q in zip(layer.parameters(), before, strict=True):
        assert torch.equal(p, q), "what is computed is thrown away, and the parameters are as they were"


def test_length_of_a_normalised_direction_changes_no_weight() -> None:
    layer = nn.Linear(4, 3, bias=False)
    normed(layer)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original1.mul_(0.5)
    torch.testing.assert_close(layer.weight.detach(), before)


def test_callbacks_of_the_engine_run_before_the_penalty_is_added() -> None:
    w = nn.Parameter(torch.ones(3))
    seen: list[Tensor] = []
    data = (2 * w).sum()

    def look() -> None:
        assert w.grad is not None
        seen.append(w.grad.clone())

    def queue(grad: Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(look)  # type: ignore[attr-defined]

    data.register_hook(queue)
    (data + fastreg.elastic_penalty([w], L1)).backward()
    assert w.grad is not None
    assert torch.equal(seen[0], torch.full((3,), 2.0))
    assert torch.equal(w.grad, torch.full((3,), 2.0 + L1))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_of_an_optimizer_are_not_attached(
    copied: Callable[[torch.optim.Optimizer], torch.optim.Optimizer],
) -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([w], lr=1.0)
    fastreg.ElasticNet([w], L1).attach(optimizer)
    other = copied(optimizer)
    (twin,) = other.param_groups[0]["params"]
    twin.grad = torch.zeros(3)
    other.step()
    assert torch.equal(twin, torch.ones(3)), "without the penalty"
    w.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(w, torch.full((3,), 1 - L1))
