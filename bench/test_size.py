"""Cost against size: one tensor of a thousand to a thousand million weights (on a CPU, a hundred million)."""

import functools

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.models import Shapes
from bench.peers import PEERS, methods
from bench.session import Session

QUESTION = "size"
MOST_ON_CPU = 10**8
SIZES = [10**exponent for exponent in range(3, 10)]
CASES = [(task, method) for task in ("backward", "add_grad") for method in methods(task) if method in PEERS]
CASES += [("value", "fastreg"), ("prox", "fastreg")]


@functools.cache
def one_tensor(n: int) -> Shapes:
    return [[n]]


@pytest.mark.parametrize(("task", "method"), CASES)
@pytest.mark.parametrize("n", SIZES)
def test_size(benchmark: BenchmarkFixture, bench: Session, n: int, task: str, method: str) -> None:
    if n > MOST_ON_CPU and not bench.on_gpu:
        pytest.skip("takes too long on a CPU")
    bench.run(benchmark, QUESTION, task, str(n), method, one_tensor(n))
