"""What is measured: each task on real models, its cost against size and number of tensors, a whole training step."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fastreg
from bench.conftest import SESSION, Session, What
from bench.models import SHAPES, Shapes, n_weights
from bench.peers import COMPILED, L1, L2, LR, PEERS, Found, check, methods, prepare, restore

TASKS = ("backward", "add_grad", "value", "prox")
STEP_LR = 1e-5  # small, so that the weights stay what they are
BATCH = 64


def cases(bench: Session) -> Iterator[tuple[What, Shapes]]:
    """What is asked of which shapes; neighbours share their weights."""
    for task in TASKS:
        for model in bench.models:
            allowed = [method for method in methods(task) if bench.allows(method, model)]
            yield from (((task, task, model, method), SHAPES[model]) for method in allowed)
    # One tensor of a thousand to a thousand million weights (on a CPU, a hundred million); tensors of a thousand each;
    # and the same weights in a few large tensors and in many small ones.
    sized = {("size", str(10**k)): [[10**k]] for k in range(3, 10 if bench.harness.on_gpu else 9)}
    sized |= {("count", str(10**k)): [[1000]] * 10**k for k in range(5)}
    sized |= {("tensors", f"{n} x {2**24 // n}"): [[2**24 // n]] * n for n in (4, 16_384)}
    for (question, label), shapes in sized.items():
        for task in TASKS:
            asked = PEERS if task in ("backward", "add_grad") else ("fastreg",) if question == "size" else ()
            yield from (((question, task, label, method), shapes) for method in methods(task) if method in asked)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "what" in metafunc.fixturenames:
        found = list(cases(metafunc.config.stash[SESSION]))
        metafunc.parametrize(("what", "shapes"), found, ids=["-".join(dict.fromkeys(what)) for what, _ in found])


def test_penalty(benchmark: Any, bench: Session, what: What, shapes: Shapes) -> None:
    """A task of a method, next to the floor."""
    _, task, _, method = what
    weights = bench.weights_like(shapes)
    if method in COMPILED:
        torch.compiler.reset()
    call = prepare(method, weights, L1, L2)[task]
    found = check(task, call, weights)
    saved = [w.detach().clone() for w in weights] if task == "prox" else []
    floor = bench.harness.floor(n_weights(shapes))
    bench.run(benchmark, what, weights, found, call, floor, before=lambda: restore(weights, saved) if saved else None)


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    """1.9 million weights in 6 tensors, and the shape of an input."""
    layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)]
    return nn.Sequential(*layers), (784,)


def convnet() -> tuple[nn.Module, tuple[int, ...]]:
    """0.6 million weights in 14 tensors, and the shape of an input."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(128 * 16, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers), (3, 32, 32)


ATTACHED, PLAIN = "fastreg attached", "none"
# The bound for L2 alone: a fused optimizer that decays the weights while it touches them anyway.
DECAY = "weight_decay (L2 only)"


def training_step(network: Callable[[], Any], method: str, like: torch.Tensor) -> tuple[Callable[[], None], Any, Any]:
    """Forward, backward and update with `method`; the weights; and a function that checks the method on them."""
    torch.manual_seed(0)
    model, shape = network()
    model.to(like.device, like.dtype)
    x = torch.randn(BATCH, *shape, device=like.device, dtype=like.dtype)
    y = torch.randint(10, (BATCH,), device=like.device)
    weights = list(model.parameters())
    decay = 2 * L2 if method == DECAY else 0.0
    optimizer = torch.optim.SGD(weights, lr=STEP_LR, weight_decay=decay, fused=True)
    penalty: Callable[[], Any] | None = None

    def update(lr: float) -> None:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.param_groups[0]["lr"] = STEP_LR

    def found() -> Found:
        if method == DECAY:
            return check("decay", lambda: update(LR), weights)
        return check("backward", (lambda: update(0.0)) if penalty is None else tasks["backward"], weights)

    if method == ATTACHED:
        fastreg.ElasticNet(weights, L1, L2).attach(optimizer)
    elif method not in (PLAIN, DECAY):
        tasks = prepare(method, weights, L1, L2)
        penalty = tasks["penalty"]

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        if penalty is not None:
            loss = loss + penalty()
        loss.backward()
        optimizer.step()

    return step, weights, found


@pytest.mark.parametrize("method", [*methods("penalty"), ATTACHED, DECAY])
@pytest.mark.parametrize("network", [mlp, convnet])
def test_step(benchmark: Any, bench: Session, network: Callable[[], Any], method: str) -> None:
    """What regularising adds to a whole training step: forward, backward, and a fused SGD update."""
    if not bench.allows(method, network.__name__):
        pytest.skip("compiled peers are left out here")
    like = torch.empty(0, device=bench.harness.device, dtype=bench.harness.dtype)
    what = ("step", "step", network.__name__, method)
    step, weights, found = training_step(network, method, like)
    plain, _, _ = training_step(network, PLAIN, like)
    bench.run(benchmark, what, weights, found(), step, plain, before=lambda: None)
