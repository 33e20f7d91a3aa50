"""Small real models, and a whole training step of them with each way to regularise."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import fastreg
from bench import peers
from bench.peers import weight_decay
from bench.strengths import L1, L2, LR

STEP_LR = 1e-5  # small, so that the weights stay what they are
BATCH = 64
ATTACHED = "fastreg attached"
PLAIN = "none"


class Step(NamedTuple):
    """`run` is forward, backward and update; `check` names what `checked` has to do to the model's weights."""

    run: Callable[[], object]
    weights: list[nn.Parameter]
    check: str
    checked: Callable[[], Any]


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


NETWORKS = {"mlp": mlp, "convnet": convnet}


def methods() -> list[str]:
    """Everything that can be part of a training step."""
    return [*peers.methods("penalty"), ATTACHED, weight_decay.NAME]


def prepare(network: str, method: str, dtype: torch.dtype, device: torch.device) -> Step:
    """A step of `network` with `method`, or without any."""
    torch.manual_seed(0)
    model, shape = NETWORKS[network]()
    model.to(device, dtype)
    x = torch.randn(BATCH, *shape, device=device, dtype=dtype)
    y = torch.randint(10, (BATCH,), device=device)
    weights = list(model.parameters())
    decay = L2 if method == weight_decay.NAME else 0.0
    optimizer = weight_decay.optimizer(weights, STEP_LR, decay)
    penalty: Callable[[], Any] | None = None
    check, checked = "decay", lambda: _update(optimizer, LR)
    if method == ATTACHED:
        fastreg.ElasticNet(weights, L1, L2).attach(optimizer)
        check, checked = "backward", lambda: _update(optimizer, 0.0)
    elif method not in (PLAIN, weight_decay.NAME):
        tasks = peers.prepare(method, weights, L1, L2)
        penalty, check, checked = tasks["penalty"], "backward", tasks["backward"]

    def run() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        if penalty is not None:
            loss = loss + penalty()
        loss.backward()
        optimizer.step()

    return Step(run, weights, check, checked)


def _update(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The optimizer's part of a step alone, with another learning rate."""
    (group,) = optimizer.param_groups
    usual, group["lr"] = group["lr"], lr
    optimizer.step()
    group["lr"] = usual
