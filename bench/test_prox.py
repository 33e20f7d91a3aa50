"""The proximal step, in place."""

from pytest_benchmark.fixture import BenchmarkFixture

from bench.models import shapes_of
from bench.session import Session

TASK = "prox"


def test_prox(benchmark: BenchmarkFixture, bench: Session, model: str, method: str) -> None:
    bench.run(benchmark, TASK, TASK, model, method, shapes_of(model))
