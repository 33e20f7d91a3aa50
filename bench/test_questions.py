"""What is measured: each task on real models, its cost against size and number of tensors, a whole training step."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fastreg
from bench.conftest import SESSION, Session, What
from bench.measure.models import SHAPES, Shapes, from_shapes, n_weights
from bench.measure.peers import COMPILED, L1, L2, LR, PEERS, Found, check, methods, prepare, restore

TASKS = ("backward", "add_grad", "value", "prox")


def cases(bench: Session) -> Iterator[tuple[What, Shapes]]:
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
            allowed = [method for method in methods(task) if method in asked and bench.allows(method, label)]
            yield from (((question, task, label, method), shapes) for method in allowed)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "what" in metafunc.fixturenames:
        found = list(cases(metafunc.config.stash[SESSION]))
        metafunc.parametrize(("what", "shapes"), found, ids=["-".join(dict.fromkeys(what)) for what, _ in found])


def test_penalty(benchmark: Any, bench: Session, what: What, shapes: Shapes) -> None:
    """A task of a method, next to the floor."""
    _, task, _, method = what
    gc.collect()
    weights = from_shapes(shapes, bench.harness.dtype, bench.harness.device)
    if method in COMPILED:
        torch.compiler.reset()
    call = prepare(method, weights, L1, L2)[task]
    found = check(task, call, weights)
    saved = [w.detach().clone() for w in weights] if task == "prox" else []
    floor = bench.harness.floor(n_weights(shapes))
    bench.run(benchmark, what, weights, found, call, floor, before=lambda: restore(weights, saved) if saved else None)


# The bound for L2 alone: a fused optimizer that decays the weights while it touches them anyway.
ATTACHED, PLAIN, DECAY = "fastreg attached", "none", "weight_decay (L2 only)"
STEP_LR = 1e-5  # small, so that the weights stay what they are
BATCH = 64


def training_step(method: str, like: torch.Tensor) -> tuple[Callable[[], None], Any, Any]:
    """Forward, backward and update with `method`; the weights; and a function that checks the method on them."""
    torch.manual_seed(0)
    layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)]
    model = nn.Sequential(*layers).to(like.device, like.dtype)
    x = torch.randn(BATCH, 784, device=like.device, dtype=like.dtype)
    y = torch.randint(10, (BATCH,), device=like.device)
    weights = list(model.parameters())
    decay = 2 * L2 if method == DECAY else 0.0
    optimizer = torch.optim.SGD(weights, lr=STEP_LR, weight_decay=decay, fused=True)
    if method == ATTACHED:
        fastreg.ElasticNet(weights, L1, L2).attach(optimizer)
    tasks = {} if method in (ATTACHED, PLAIN, DECAY) else prepare(method, weights, L1, L2)

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        if tasks:
            loss = loss + tasks["penalty"]()
        loss.backward()
        optimizer.step()

    def found() -> Found:
        if tasks:
            return check("backward", tasks["backward"], weights)
        # What attached adds to the gradients is there after a step of length 0.
        optimizer.param_groups[0]["lr"] = LR if method == DECAY else 0.0
        result = check("decay" if method == DECAY else "backward", optimizer.step, weights)
        optimizer.param_groups[0]["lr"] = STEP_LR
        return result

    return step, weights, found


@pytest.mark.parametrize("method", [*methods("penalty"), ATTACHED, DECAY])
def test_step(benchmark: Any, bench: Session, method: str) -> None:
    """What regularising adds to a whole training step: forward, backward, and a fused SGD update."""
    if not bench.allows(method, "mlp"):
        pytest.skip("left out here: --compiled")
    like = torch.empty(0, device=bench.harness.device, dtype=bench.harness.dtype)
    step, weights, found = training_step(method, like)
    plain, _, _ = training_step(PLAIN, like)
    bench.run(benchmark, ("step", "step", "mlp", method), weights, found(), step, plain, before=lambda: None)
