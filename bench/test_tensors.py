"""The same 16.8 million weights in many small tensors and in a few large ones."""

import functools

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.models import Shapes
from bench.peers import PEERS, methods
from bench.session import Session

QUESTION = "tensors"
TOTAL = 1 << 24
COUNTS = [4, 16_384]
CASES = [(task, method) for task in ("backward", "add_grad") for method in methods(task) if method in PEERS]


@functools.cache
def cut_into(count: int) -> Shapes:
    return [[TOTAL // count]] * count


@pytest.mark.parametrize(("task", "method"), CASES)
@pytest.mark.parametrize("count", COUNTS)
def test_tensors(benchmark: BenchmarkFixture, bench: Session, count: int, task: str, method: str) -> None:
    bench.run(benchmark, QUESTION, task, f"{count} x {TOTAL // count}", method, cut_into(count))
