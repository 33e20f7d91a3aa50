"""Value and gradient without autograd, straight into .grad."""

from pytest_benchmark.fixture import BenchmarkFixture

from bench.models import shapes_of
from bench.session import Session

TASK = "add_grad"


def test_add_grad(benchmark: BenchmarkFixture, bench: Session, model: str, method: str) -> None:
    bench.run(benchmark, TASK, TASK, model, method, shapes_of(model))
