"""A run of the benchmarks: its options, the weights in use, and the cases measured so far."""

import gc
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from bench import environment, models, results
from bench.check import Found, Truth, check, restore, zero_grads
from bench.harness import Harness, bandwidth
from bench.peers import COMPILED, prepare
from bench.strengths import L1, L2
from bench.training import Step

# Compiling hundreds of tensors for a CPU takes minutes per case: two models show what it comes to.
COMPILED_ON_CPU = ("mnist_mlp", "resnet50")


class Session:
    """Made once per run; `run` is what every benchmark calls."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.option
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(option.bench_device or default)
        self.dtype_name: str = option.bench_dtype
        self.dtype = models.DTYPES[self.dtype_name]
        self.on_gpu = self.device.type == "cuda"
        self.models: list[str] = (
            option.bench_models.split(",")
            if option.bench_models
            else list(models.MODELS if self.on_gpu else models.CPU_MODELS)
        )
        self.compiled: str = option.bench_compiled or ("all" if self.on_gpu else "some")
        self.harness = Harness(self.device, self.dtype, option.bench_budget, option.bench_rounds)
        self.environment = environment.facts(self.device)
        self.cases: list[results.Case] = []
        self._weights: tuple[Any, list[nn.Parameter], Truth] | None = None
        self._copy: tuple[float, float] | None = None
        self._config = config
        self._target: Path | None = option.results
        self._earlier: dict[str, Any] | None = None
        if option.bench_append:
            self._earlier = json.loads(self.path.read_text()) if self.path.exists() else None
            self._all_cases()  # fails now rather than after the first measurement

    def allows(self, method: str, model: str | None) -> bool:
        """Whether to measure `method` on `model`, or at a size if None."""
        if method not in COMPILED or self.compiled == "all":
            return True
        return self.compiled == "some" and model in COMPILED_ON_CPU and "max-autotune" not in method

    def run(
        self, benchmark: BenchmarkFixture, question: str, task: str, label: str, method: str, shapes: models.Shapes
    ) -> None:
        """Checks `method` and, if it is right, measures it next to the floor; either way it is recorded."""
        weights, truth = self._prepare(shapes)
        if method in COMPILED:
            torch.compiler.reset()
        call = prepare(method, weights, L1, L2)[task]
        case = self._checked(question, task, label, method, weights, check(task, call, truth))
        saved = [w.detach().clone() for w in weights] if task == "prox" else None
        before: Callable[[], object] = (lambda: restore(weights, saved)) if saved is not None else lambda: None
        measured = self.harness.measure(benchmark, call, self.harness.floor(case["n_weights"]), before)
        costs = self.harness.costs(call, count_launches=self.on_gpu or method not in COMPILED)
        before()
        copy = self.copy_bandwidth()
        n_bytes = case["n_weights"] * weights[0].element_size()
        moved = bandwidth(task, n_bytes, measured["seconds"]["p50"], copy)
        self.record({**case, **measured, **moved, "copy_bytes_per_second": copy, **costs}, benchmark)

    def run_step(
        self, benchmark: BenchmarkFixture, question: str, label: str, method: str, step: Step, plain: Step
    ) -> None:
        """The same for a whole training step, next to `plain`, which is the same step without a penalty."""
        found = check(step.check, step.checked, Truth(step.weights))
        case = self._checked(question, "step", label, method, step.weights, found)
        measured = self.harness.measure(benchmark, step.run, plain.run)
        costs = self.harness.costs(step.run, count_launches=self.on_gpu or method not in COMPILED)
        self.record({**case, **measured, **costs}, benchmark)

    def _checked(
        self, question: str, task: str, label: str, method: str, weights: list[nn.Parameter], found: Found
    ) -> results.Case:
        """What is known of a case before it is timed. A method that is wrong is recorded, and goes no further."""
        case: results.Case = {
            "question": question,
            "task": task,
            "label": label,
            "method": method,
            "dtype": self.dtype_name,
            "n_weights": sum(w.numel() for w in weights),
            "n_tensors": len(weights),
            "errors": {k: v if math.isfinite(v) else str(v) for k, v in found.errors.items()},
        }
        if found.reason is None:
            return {**case, "status": "measured"}
        self.record({**case, "status": "failed", "reason": found.reason})
        if method.startswith("fastreg"):
            pytest.fail(found.reason)
        pytest.skip(f"not timed: {found.reason}")

    def record(self, case: results.Case, benchmark: BenchmarkFixture | None = None) -> None:
        """Keeps a case, in pytest-benchmark's own file too, and says what came of it."""
        self.cases.append(case)
        # Written after every case: a run that is cut short leaves what it found.
        if self._target is not None:
            results.write(self.path, self.environment, self._all_cases())
        if benchmark is not None:
            benchmark.extra_info.update(case)
        what = dict.fromkeys((case["question"], case["task"]))
        self._say(f"{' '.join(what):<17} {case['label']:>16} {case['method']:>22}: {_outcome(case)}")

    def copy_bandwidth(self) -> float:
        """Measured in this run, again and again: other work on the machine changes it."""
        if self._copy is None or time.monotonic() - self._copy[0] > 60:
            self._copy = time.monotonic(), self.harness.copy_bandwidth()
        return self._copy[1]

    @property
    def path(self) -> Path:
        """The results file."""
        return results.path_for(self._target or results.FOLDER, self.environment, self.dtype_name)

    def _all_cases(self) -> list[results.Case]:
        if self._earlier is None:
            return self.cases
        try:
            return results.merge(self._earlier, self.environment, self.cases)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error

    def _prepare(self, shapes: models.Shapes) -> tuple[list[nn.Parameter], Truth]:
        """The same weights for neighbouring cases, with gradients of zeros."""
        if self._weights is None or self._weights[0] is not shapes:
            self._weights = None
            gc.collect()
            weights = models.from_shapes(shapes, self.dtype, self.device)
            self._weights = shapes, weights, Truth(weights)
        zero_grads(self._weights[1])
        return self._weights[1:]

    def _say(self, line: str) -> None:
        reporter: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        capture: Any = self._config.pluginmanager.get_plugin("capturemanager")
        if reporter is None or capture is None:
            return
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(f"[{len(self.cases)}] {line}")


def _outcome(case: results.Case) -> str:
    if case["status"] != "measured":
        return f"{case['status']}: {case['reason']}"
    return f"{case['seconds']['p50'] * 1e3:10.3f} ms, {case['ratio']['p50']:8.2f} x reference, {case['rounds']} rounds"
