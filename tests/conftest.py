"""Skip the tests of other lanes, and give every test the same start."""

import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from tests.support.helpers import INTERPRETED, PATHS, Path
from tests.support.ranks import Teams

if "PYTEST_XDIST_WORKER" in os.environ:
    # One process runs per core.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that this one starts

# The tests compile little, so a pool of processes that all import torch would be slower.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

if INTERPRETED:
    # The interpreter computes with NumPy, which warns of overflows and NaNs. A GPU does not.
    np.seterr(all="ignore")


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
    # The other lanes run without those libraries. In these lanes a missing library is an error.
    lanes = {"integrations": ["integrations"], "engines": ["engines", "deepspeed"]}.get(collection_path.name)
    if lanes is None:
        return None
    chosen = config.option.markexpr
    return None if any(lane in chosen.split(f"not {lane}")[0] for lane in lanes) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))
        if item.get_closest_marker("interpreter") and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 (make test-interpreter)"))
        if INTERPRETED and (item.get_closest_marker("codegen") or item.get_closest_marker("jit")):
            item.add_marker(pytest.mark.skip(reason="the compiler cannot run in an interpreter process"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: in thousands of tiny operations, threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=PATHS)
def path(request: pytest.FixtureRequest) -> Path:
    """(impl, device). A test that takes this fixture runs once in each of the lanes torch, interpreter and gpu."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teams]:
    """Processes that run the cases of distributed tests. All test files share them, because starting them is slow."""
    teams = Teams(lambda: tmp_path_factory.mktemp("ranks"))
    yield teams
    teams.close()


# The torch lane covers two ranks. The kernels do not depend on ranks, and their interpreter is slow.
@pytest.fixture(params=[4] if INTERPRETED else [2, 4])
def on_every_rank(request: pytest.FixtureRequest, path: Path, teams: Teams) -> Callable[[str], None]:
    """Run a case of the test file's CASES on 2 or 4 processes."""
    return lambda name: teams.run(request.module.__name__, name, request.param, path)
