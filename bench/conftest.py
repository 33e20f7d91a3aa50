"""Options and results file of the benchmarks: `pytest bench --benchmark-only --results FOLDER`."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.measure import models
from bench.measure.harness import Call, Harness, launches, peak_extra_bytes
from bench.measure.peers import COMPILED, Found, Weights
from bench.report import results
from bench.static.ledger import FLOOR_PASSES

# Passes over the weights in fastreg's design; through backward one in the forward pass, and three after it.
PASSES = FLOOR_PASSES | {"backward": 4}
# Compiling hundreds of tensors for a CPU takes minutes per case: two models show what it comes to.
COMPILED_ON_CPU = ("mnist_mlp", "resnet50")

COMPILED_HELP = "torch.compile peers; only: nothing else, added to the results file of a run without them"

What = tuple[str, str, str, str]  # question, task, label, method


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "fastreg benchmarks")
    group.addoption("--results", type=Path, help="a folder for the results file; without it none is written")
    group.addoption("--device", dest="bench_device", help="cuda if there is one, else cpu")
    group.addoption("--dtype", dest="bench_dtype", default="float32", choices=models.DTYPES, help="of the weights")
    group.addoption("--models", dest="bench_models", help=f"comma-separated, of {', '.join(models.MODELS)}")
    group.addoption("--rounds", dest="bench_rounds", type=int, help="rounds per case, rather than as many as fit")
    group.addoption("--compiled", dest="bench_compiled", choices=("none", "some", "all", "only"), help=COMPILED_HELP)
    group.addoption("--seconds", dest="bench_seconds", type=float, help="skip what would begin after so long")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = Session(config)
    # Thousands of records per compilation, which pytest would collect.
    logging.disable(logging.DEBUG)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=config.stash[SESSION].harness.timer, disable_gc=True))
        # Compilers warn of what users cannot change; fastreg's own warnings are the tests' business.
        item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> "Session":
    session = request.config.stash[SESSION]
    if session.is_over():
        pytest.skip("out of time")
    return session


class Session:
    """A run of the benchmarks: its options, and the cases measured so far."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.option
        device = torch.device(option.bench_device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.harness = Harness(device, models.DTYPES[option.bench_dtype], option.bench_rounds)
        default = models.MODELS if self.harness.on_gpu else models.CPU_MODELS
        self.models: list[str] = option.bench_models.split(",") if option.bench_models else list(default)
        self.cases: list[results.Case] = []
        self._config, self._dtype = config, option.bench_dtype
        self._compiled = option.bench_compiled or ("all" if self.harness.on_gpu else "some")
        self._environment = results.environment(device)
        self._ends = time.monotonic() + (option.bench_seconds or math.inf)
        if option.results:
            self._file = option.results / f"{results.file_name(self._environment, self._dtype)}.json"
            if self._compiled == "only" and self._file.exists():
                stored = json.loads(self._file.read_text())
                if stored["environment"] == self._environment:
                    self.cases = [case for case in stored["cases"] if case["method"] not in COMPILED]

    def is_over(self) -> bool:
        return time.monotonic() > self._ends

    def allows(self, method: str, label: str) -> bool:
        """Whether to measure `method` on the model called `label`, or at another size."""
        if method not in COMPILED:
            return self._compiled != "only"
        return self._compiled in ("all", "only") or (self._compiled == "some" and label in COMPILED_ON_CPU)

    def run(
        self, benchmark: Any, what: What, weights: Weights, found: Found, call: Call, reference: Call, before: Call
    ) -> None:
        """Measures `call` next to `reference`, but not if it was found wrong; either way it is recorded."""
        _, task, _, method = what
        case: results.Case = dict(zip(("question", "task", "label", "method"), what, strict=True))
        case |= {"dtype": self._dtype, "n_weights": sum(w.numel() for w in weights), "n_tensors": len(weights)}
        case["errors"] = {k: v if math.isfinite(v) else str(v) for k, v in found.errors.items()}
        if found.reason is not None:
            self._record({**case, "status": "failed", "reason": found.reason}, found.reason)
            (pytest.fail if method.startswith("fastreg") else pytest.skip)(f"not timed: {found.reason}")
        case |= {"status": "measured", **self.harness.measure(benchmark, call, reference, before)}
        seconds = case["seconds"]["p50"]
        if task in PASSES:
            moved = PASSES[task] * case["n_weights"] * weights[0].element_size()
            copy = self.harness.copy_bandwidth()  # again for each case: other work on the machine changes it
            case |= {"bytes": moved, "bytes_per_second": moved / seconds, "share_of_copy": moved / seconds / copy}
            case["copy_bytes_per_second"] = copy
        countable = self.harness.on_gpu or method not in COMPILED
        case["launches"] = launches(call, self.harness.device) if countable else None
        case["peak_extra_bytes"] = peak_extra_bytes(call, self.harness.device)
        case["host_seconds"] = self.harness.host_seconds(call)
        before()
        benchmark.extra_info.update(case)
        self._record(case, f"{seconds * 1e3:10.3f} ms, {case['ratio']['p50']:8.2f} x reference")

    def _record(self, case: results.Case, outcome: str) -> None:
        self.cases.append(case)
        if self._config.option.results:  # after every case: a run that is cut short leaves what it found
            results.write(self._file, self._environment, self.cases)
        what = " ".join(dict.fromkeys((case["question"], case["task"])))
        capture: Any = self._config.pluginmanager.get_plugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"\n[{len(self.cases)}] {what:<17} {case['label']:>16} {case['method']:>22}: {outcome} ", end="")


SESSION = pytest.StashKey[Session]()
