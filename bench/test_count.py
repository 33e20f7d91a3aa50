"""Cost against the number of tensors, of a thousand weights each: what a tensor costs besides its weights."""

import functools

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.models import Shapes
from bench.peers import PEERS, methods
from bench.session import Session

QUESTION = "count"
COUNTS = [1, 10, 100, 1_000, 10_000]
CASES = [(task, method) for task in ("backward", "add_grad") for method in methods(task) if method in PEERS]


@functools.cache
def tensors(count: int) -> Shapes:
    return [[1000]] * count


@pytest.mark.parametrize(("task", "method"), CASES)
@pytest.mark.parametrize("count", COUNTS)
def test_count(benchmark: BenchmarkFixture, bench: Session, count: int, task: str, method: str) -> None:
    bench.run(benchmark, QUESTION, task, str(count), method, tensors(count))
