"""The proximal step by the step size of each optimizer, in NumPy float64, without a look at the library."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RMSprop

from fastreg import ElasticNet
from tests import oracle
from tests.oracle.step_size import reach, step_size
from tests.support.helpers import Path, assert_value, bits, naming, slack

Maker = Callable[..., Optimizer]
SGDS: dict[str, Maker] = {
    "SGD": partial(SGD, lr=0.25),
    "momentum": partial(SGD, lr=0.25, momentum=0.9),
    "dampening": partial(SGD, lr=0.25, momentum=0.5, dampening=0.3),
    "nesterov": partial(SGD, lr=0.25, momentum=0.9, nesterov=True),
}
ADAMS: dict[str, Maker] = {
    "Adam": partial(Adam, lr=0.125),
    "Adam, large eps": partial(Adam, lr=0.125, betas=(0.8, 0.95), eps=0.3),
    "AdamW": partial(AdamW, lr=0.125, weight_decay=0.1),
    "amsgrad": partial(Adam, lr=0.125, betas=(0.5, 0.5), amsgrad=True),
}
# The optimizers that fastreg.optim does not have.
OTHERS: dict[str, Maker] = {
    "RMSprop": partial(RMSprop, lr=0.125),
    "RMSprop, momentum": partial(RMSprop, lr=0.125, momentum=0.5, alpha=0.9, eps=0.3),
    "RMSprop, centered": partial(RMSprop, lr=0.125, centered=True, alpha=0.9, eps=0.01),
    "Adagrad": partial(Adagrad, lr=0.125, lr_decay=0.5),
    "Adagrad, initial value": partial(Adagrad, lr=0.125, initial_accumulator_value=0.5, eps=0.1),
    "NAdam": partial(NAdam, lr=0.125),
    "NAdam, decay": partial(NAdam, lr=0.125, betas=(0.8, 0.95), momentum_decay=0.5, weight_decay=0.1, eps=0.3),
    "NAdam, decoupled": partial(NAdam, lr=0.125, betas=(0.0, 0.5), weight_decay=0.1, decoupled_weight_decay=True),
    "Adamax": partial(Adamax, lr=0.125, betas=(0.8, 0.9)),
}
MAKERS = {**SGDS, **ADAMS}


def forms(path: Path, make: Maker | None = None) -> dict[str, dict[str, Any]]:
    """How torch.optim can make the same step; with `make`, of those the ones that it takes."""
    found: dict[str, dict[str, Any]] = {
        "loop": {"foreach": False},
        "foreach": {"foreach": True},
        "fused": {"fused": True},
    }
    if path == ("triton", "cpu"):
        del found["foreach"], found["fused"]  # to the slow interpreter it is all the same
    found |= {"capturable": {"capturable": True}} if path[1] == "cuda" else {}
    taken = inspect.signature(make).parameters if make else {}
    return {form: options for form, options in found.items() if not make or set(options) <= set(taken)}


def prox(
    values: np.ndarray, t: float | np.ndarray, l1: float, l2: float, most: float | np.ndarray = np.inf
) -> np.ndarray:
    shrunk = np.sign(values) * np.maximum(np.abs(values) - t * l1, 0) / (1 + 2 * t * l2)
    return np.clip(shrunk, values - most, values + most)  # type: ignore[no-any-return]


def assert_shrunk(
    w: Tensor,
    start: Tensor,
    t: float | np.ndarray,
    l1: float,
    l2: float,
    path: Path,
    most: float | np.ndarray = np.inf,
) -> None:
    """`w` is `start` after a proximal step of size t, and no further away than `most`."""
    values = oracle.array(start)
    exact, threshold = prox(values, t, l1, l2, most), np.broadcast_to(np.minimum(t * l1, most), values.shape)
    # In float32: v / correction, a root, + eps, lr / it, * l1, a difference, 1 + 2 * t * l2 and a quotient, each with
    # half a unit of its own and of its factor; a GPU's root and divisions have up to two. The difference may cancel.
    units = 12 if path == ("triton", "cuda") else 8
    rounding = 1e-12 if w.dtype == torch.float64 else units * oracle.FLOAT32_ULP
    allowed = rounding * np.maximum(np.abs(values), threshold)
    if w.dtype in (torch.bfloat16, torch.float16):
        info = torch.finfo(w.dtype)
        unit = np.exp2(np.floor(np.log2(np.maximum(np.abs(exact), info.tiny)))) * info.eps
        allowed = allowed + (1 + slack(path, w.dtype)) * unit
    found = oracle.array(w)
    assert found.shape == exact.shape
    assert (np.abs(found - exact) <= allowed).all(), (
        f"off by {(np.abs(found - exact) / allowed).max():.3g} of the limit"
    )
    assert (found[np.abs(values) < threshold * (1 - 2 * rounding)] == 0).all()


def state_bits(optimizer: Optimizer, weights: Sequence[Tensor]) -> list[Any]:
    """All that the optimizer keeps of the weights, bit for bit."""
    return [
        {key: bits(value) if isinstance(value, Tensor) else value for key, value in optimizer.state.get(w, {}).items()}
        for w in weights
    ]


def gradients(weights: Sequence[Tensor]) -> None:
    """Made-up ones, laid out as the weights; away from zero, but for an exact zero where eps is a number."""
    for w in weights:
        grad = torch.randn(w.shape).sign() * (0.5 + torch.rand(w.shape))
        if w.dtype in (torch.float64, torch.float32) and w.numel() > 8:
            grad.view(-1)[3] = 0.0
        w.grad = torch.empty_like(w).copy_(grad)


class Attached:
    """A penalty that is attached to an optimizer, and what that leaves right before the proximal step.

    `strengths` are those of each weight, (l1, l2).
    """

    def __init__(
        self,
        reg: ElasticNet,
        optimizer: Optimizer,
        weights: Sequence[Tensor],
        strengths: Sequence[tuple[float, float]],
        path: Path,
        metric: Any = "optimizer",
    ) -> None:
        self.reg, self.optimizer, self.weights, self.metric = reg, optimizer, weights, metric
        self.strengths, self.path = strengths, path
        optimizer.register_step_post_hook(self._look)  # hooks run in the order of their registration
        reg.attach(optimizer, mode="prox", metric=metric)

    def _look(self, *_: Any) -> None:
        self.starts = [w.detach().clone() for w in self.weights]
        self.kept = self._kept()

    def _kept(self) -> list[Any]:
        return [*state_bits(self.optimizer, self.weights), *(bits(w.grad) for w in self.weights)]

    def step(self) -> None:
        """One step, and all that it should have done.

        The state and the gradients are left alone bit for bit, and unless the metric is "lr" weights without gradient.
        """
        self.optimizer.step()
        assert self._kept() == self.kept
        group_of = {id(w): group for group in self.optimizer.param_groups for w in group["params"]}
        for i, (w, start, pair) in enumerate(zip(self.weights, self.starts, self.strengths, strict=True)):
            with naming(f"weight {i}, {tuple(w.shape)}"):
                group = group_of[id(w)]
                if self.metric == "lr":
                    assert_shrunk(w, start, float(group["lr"]), *pair, self.path)
                elif w.grad is None:
                    assert bits(w) == bits(start)
                else:
                    state = self.optimizer.state[w]
                    t, most = step_size(self.optimizer, group, state), reach(self.optimizer, group, state)
                    assert_shrunk(w, start, t, *pair, self.path, most)
        terms = [oracle.penalty([start], *pair) for start, pair in zip(self.starts, self.strengths, strict=True)]
        dtype = torch.float64 if any(w.dtype == torch.float64 for w in self.weights) else torch.float32
        assert self.reg.last is not None
        for actual, exact in zip(self.reg.last, map(sum, zip(*terms, strict=True)), strict=True):
            assert_value(actual, exact, self.path, dtype)
