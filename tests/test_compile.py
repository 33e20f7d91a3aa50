"""Inside torch.compile the same numbers come out, from one graph."""

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import fastreg
from tests import oracle
from tests.cases import L1, L2

BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
    ),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 5, dtype=torch.bfloat16), nn.Linear(3, 2).half())
    net[1].frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    net[1].twin = net[0].weight
    return net


def weights_of(net: nn.Module) -> list[torch.Tensor]:
    return [p for p in net.parameters() if p.requires_grad]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["function", "object"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_penalty(backend: str, kind: str) -> None:
    net = model()
    reg = fastreg.ElasticNet(net, L1, L2, exclude="bias")
    weights = [p for name, p in net.named_parameters() if p.requires_grad and "bias" not in name]

    def step() -> torch.Tensor:
        if kind == "object":
            return 2 * reg()
        return 2 * fastreg.elastic_penalty(net, L1, L2, exclude="bias")

    found = torch.compile(step, backend=backend, fullgraph=True)()
    found.backward()

    assert found.item() == pytest.approx(2 * oracle.penalty(weights, L1, L2)[0], rel=1e-6)
    for w in weights:
        assert w.grad is not None
        # Formed by autograd from two float32 terms, one of them by way of float64: one rounding more than the sweep.
        assert oracle.ulp_distance(w.grad, oracle.gradient(w, 2 * L1, 2 * L2)) <= 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_add_grad(backend: str, existing: bool) -> None:
    net = model()
    reg = fastreg.ElasticNet(net, L1, L2)

    def run(call: Callable[[], fastreg.Penalty]) -> tuple[fastreg.Penalty, list[torch.Tensor]]:
        for w in weights_of(net):
            w.grad = torch.full_like(w, 0.25) if existing else None
        return call(), [w.grad for w in weights_of(net) if w.grad is not None]

    expected, expected_grads = run(reg.add_grad_)
    found, grads = run(torch.compile(reg.add_grad_, backend=backend, fullgraph=True))

    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for grad, want in zip(grads, expected_grads, strict=True):
        # Inductor fuses multiply and add, and keeps float32 between gradient and sum where eager rounds.
        assert oracle.ulp_distance(grad, oracle.array(want)) <= 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_prox(backend: str) -> None:
    net = model()
    reg = fastreg.ElasticNet(net, L1, L2)
    before = [w.detach().clone() for w in weights_of(net)]

    torch.compile(reg.prox_, backend=backend, fullgraph=True)(0.5)

    for w, old in zip(weights_of(net), before, strict=True):
        expected = oracle.prox(old, L1, L2, 0.5)
        assert ((oracle.array(w) == 0) == (expected == 0)).all()
        # The subtraction, the division and the store each round once.
        assert oracle.ulp_distance(w.detach(), expected) <= 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_training_step(backend: str) -> None:
    x, y = torch.randn(16, 12), torch.randint(0, 3, (16,))

    def train(compiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
        reg = fastreg.ElasticNet(net, 1e-3, 1e-2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

        def loss() -> torch.Tensor:
            return nn.functional.cross_entropy(net(x), y) + reg()

        step = torch.compile(loss, backend=backend, fullgraph=True) if compiled else loss
        for _ in range(5):
            optimizer.zero_grad()
            step().backward()
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    for compiled, eager in zip(train(True), train(False), strict=True):
        # Float32 rounding of five steps, in which matrix products are ordered differently.
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
