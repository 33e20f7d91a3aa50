"""Options, parameters and the results file of the benchmarks: `pytest bench --benchmark-only --results FOLDER`."""

import logging
from pathlib import Path

import pytest

from bench.clock import timer_for
from bench.models import DTYPES, SHAPES
from bench.peers import methods
from bench.session import Session

SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "fastreg benchmarks")
    group.addoption("--results", type=Path, help="where to write results: a .json file, or a folder; else nothing is")
    group.addoption(
        "--append",
        dest="bench_append",
        action="store_true",
        help="keep what the results file has and this run has not",
    )
    group.addoption("--device", dest="bench_device", help="cuda if there is one, else cpu")
    group.addoption("--dtype", dest="bench_dtype", default="float32", choices=DTYPES, help="of the weights")
    group.addoption("--models", dest="bench_models", help=f"comma-separated, of {', '.join(SHAPES)}")
    group.addoption("--rounds", dest="bench_rounds", type=int, help="rounds per case, rather than as many as fit")
    group.addoption("--budget", dest="bench_budget", type=float, default=1.5, help="seconds of rounds per case")
    group.addoption("--compiled", dest="bench_compiled", choices=("none", "some", "all"), help="torch.compile peers")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = Session(config)
    # Thousands of records per compilation, which pytest would collect.
    logging.disable(logging.DEBUG)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every model with every method that can do a file's TASK; neighbours share their weights."""
    session = metafunc.config.stash[SESSION]
    if {"model", "method"} <= set(metafunc.fixturenames):
        names = methods(metafunc.module.TASK)
        pairs = [(model, name) for model in session.models for name in names if session.allows(name, model)]
        metafunc.parametrize(("model", "method"), pairs)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    timer = timer_for(config.stash[SESSION].device)
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=timer, disable_gc=True))
        # Compilers warn of what users cannot change; fastreg's own warnings are the tests' business.
        item.add_marker(pytest.mark.filterwarnings("ignore"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    bench = session.config.stash[SESSION]
    if session.config.option.results is not None and bench.cases:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"\nresults: {bench.path}")


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Session:
    return request.config.stash[SESSION]
