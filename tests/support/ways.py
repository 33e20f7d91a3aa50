"""The penalty by the naive formulation and by both of the library's ways, on numbers whose arithmetic is exact.

Weights, data and strengths are small multiples of powers of two: no sum rounds in any order, and results are compared
bit for bit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastreg
from fastreg.core.types import Mode, Request
from fastreg.sweep.local import local_sweep
from fastreg.sweep.sharded import sharded_sweep
from tests.support.helpers import Path

L1, L2 = 1 / 8, 1 / 4
WAYS = ("direct", "ordinary")

Terms = tuple[Tensor, Tensor, Tensor]


def naive(weights: Sequence[Tensor], l1: float | Tensor = L1, l2: float | Tensor = L2) -> Terms:
    """(total, l1 term, l2 term) as people write it, in float32."""
    flat = torch.cat([w.float().reshape(-1) for w in weights])
    l1_term, l2_term = l1 * flat.abs().sum(), l2 * flat.square().sum()
    return l1_term + l2_term, l1_term, l2_term


def grid(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Multiples of 1/8 between -1 and 1, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 9, shape, generator=generator) / 8).to(device, dtype)


def all_kinds(device: str) -> list[Tensor]:
    """Leaves of three dtypes, contiguous, channels_last and with gaps."""
    return [
        grid(4, 3, device=device).requires_grad_(),
        grid(2, 3, 2, 2, device=device, seed=1).to(memory_format=torch.channels_last).requires_grad_(),
        grid(5, device=device, dtype=torch.float16, seed=2).requires_grad_(),
        grid(3, 8, device=device, seed=3)[:, ::2].detach().requires_grad_(),
        grid(7, device=device, dtype=torch.bfloat16, seed=4).requires_grad_(),
    ]


class Scene:
    """Fresh weights, with the penalty formed in one of the ways."""

    def __init__(self, way: str, path: Path, weights: Callable[[str], list[Tensor]] = all_kinds) -> None:
        self.way = way
        self.impl, self.device = path
        self.weights = weights(self.device)
        self.watch(self.weights)

    def watch(self, weights: Sequence[Tensor]) -> None:
        """Sends the penalty's gradient the ordinary way: a hook that does nothing might still look at it."""
        if self.way == "ordinary":
            for w in weights:
                w.register_hook(lambda grad: None)

    def terms(self, weights: Sequence[Tensor] | None = None, l1: float | Tensor = L1, l2: float | Tensor = L2) -> Terms:
        chosen = self.weights if weights is None else weights
        if self.way == "naive":
            return naive(chosen, l1, l2)
        return fastreg.elastic_penalty(chosen, l1, l2, return_terms=True, impl=self.impl)

    def penalty(
        self, weights: Sequence[Tensor] | None = None, l1: float | Tensor = L1, l2: float | Tensor = L2
    ) -> Tensor:
        return self.terms(weights, l1, l2)[0]

    def loss(self, weights: Sequence[Tensor] | None = None) -> Tensor:
        """A data loss with other gradients than the penalty's."""
        chosen = self.weights if weights is None else weights
        losses = [(w.float() * grid(*w.shape, device=self.device, seed=9)).sum() for w in chosen]
        return torch.stack(losses).sum()


Scenario = Callable[[Scene], Any]


def outcome(way: str, path: Path, scenario: Scenario) -> tuple[Any, list[Tensor | None], list[tuple[int, ...] | None]]:
    """What a scenario returns, and every .grad after it with its strides."""
    scene = Scene(way, path)
    result = scenario(scene)
    grads = [w.grad for w in scene.weights]
    return result, grads, [None if grad is None else grad.stride() for grad in grads]


def assert_same(actual: Any, expected: Any) -> None:
    """Equality of nested results: of values, dtypes and which tensors are None."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), actual
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected), (actual, expected)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual == expected


def spy_on_sweeps(monkeypatch: pytest.MonkeyPatch) -> list[Mode]:
    """The modes of the sweeps that the library starts, as they come."""
    modes: list[Mode] = []

    def spied(run: Callable[..., Any]) -> Callable[..., Any]:
        def spy(work: Any, request: Request) -> Any:
            modes.append(request.mode)
            return run(work, request)

        return spy

    spy = spied(local_sweep)
    monkeypatch.setattr("fastreg.sweep.dispatch.local_sweep", spy)
    monkeypatch.setattr("fastreg.sweep.gradient.local_sweep", spy)
    monkeypatch.setattr("fastreg.sweep.dispatch.sharded_sweep", spied(sharded_sweep))
    return modes


def check_against_autograd(
    way: str, path: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch, is_direct: bool = True
) -> None:
    """Runs a scenario that nobody watches, whose outcome must be the naive formulation's.

    Args:
        is_direct: whether backward writes .grad itself in the direct way.
    """
    expected = outcome("naive", path, scenario)
    modes = spy_on_sweeps(monkeypatch)

    actual = outcome(way, path, scenario)

    assert_same(actual, expected)
    # Else tests of both ways would test the same one.
    assert (Mode.ACCUMULATE in modes) == (way == "direct" and is_direct)
