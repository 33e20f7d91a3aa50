"""Value and gradient through autograd, added to a .grad that exists already, as in gradient accumulation."""

from pytest_benchmark.fixture import BenchmarkFixture

from bench.models import shapes_of
from bench.session import Session

TASK = "backward"


def test_backward(benchmark: BenchmarkFixture, bench: Session, model: str, method: str) -> None:
    bench.run(benchmark, TASK, TASK, model, method, shapes_of(model))
