"""What regularising adds to a whole training step: forward, backward, and a fused SGD update, gradients set to None."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import training
from bench.session import Session

QUESTION = "step"


@pytest.mark.parametrize("method", training.methods())
@pytest.mark.parametrize("network", training.NETWORKS)
def test_step(benchmark: BenchmarkFixture, bench: Session, network: str, method: str) -> None:
    if not bench.allows(method, None):
        pytest.skip("compiled peers are left out here")
    step = training.prepare(network, method, bench.dtype, bench.device)
    plain = training.prepare(network, training.PLAIN, bench.dtype, bench.device)
    bench.run_step(benchmark, QUESTION, network, method, step, plain)
