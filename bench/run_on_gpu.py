"""Everything that only a GPU can tell, in one command of at most twenty minutes: `python -m bench.run_on_gpu`.

    python -m bench.run_on_gpu [--minutes 20] [--results bench/results]
    python -m bench.run_on_gpu --device cpu --small        # every step on a CPU, with little in it, to see that it runs

Each step is a process of its own, stopped with its children at its time limit: its share of the time that is left, so
that what a step does not need goes to the later ones. What fails is reported last, and the rest goes on. Needs PyTorch,
Triton and the packages of the extras `test` and `bench`, and runs from the repository's root, installed or with
PYTHONPATH=. Results go to --results (without it to bench/results, with --small to outputs/gpu), those of this command
and its logs to run/ in there.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.report import results, verdict

TAIL = 40  # lines of a failed step's output
# Those of the bar first: time may run out.
COMPILED_MODELS = "gpt2,resnet50,llama3.2_1b,mnist_mlp,bert_base,vit_b16,convnext_tiny,mobilenet_v2"
UNSUPPORTED = "Device not supported"  # what the sanitizer says on some virtual machines
# Where CUDA's tools are, if not on the path.
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"))
GRACE = 5.0  # seconds between an interrupt and a kill


class Step(NamedTuple):
    name: str
    share: float  # of the time, beside those of the steps that follow
    command: list[str]  # of Python, unless it begins with another program
    environment: Mapping[str, str] = {}
    program: str | None = None  # that has to be installed
    told: float = 0.0  # the part of its limit that it is told of by --seconds


def steps(device: str, small: bool, folder: Path) -> list[Step]:
    """In the order of what is needed most."""
    on, out = ["--device", device], ["--results", str(folder)]
    run = ["--results", str(folder / "run")]
    some = [*on, "--models", "mnist_mlp"] if small else on
    sweep = ["-m", "bench.measure.small_sweep", *on]
    sanitizer = "compute-sanitizer" if device == "cuda" else None

    def checked(tool: str) -> list[str]:
        # PyTorch asks the driver for functions that it may not have, which is no error. Compilers are not watched.
        options = ["--tool", tool, "--target-processes", "application-only", "--report-api-errors", "no"]
        return [sanitizer, *options, "--error-exitcode", "9", sys.executable, *sweep] if sanitizer else sweep

    def bench(dtype: str, compiled: str) -> list[str]:
        few = ["--rounds", "2", "-k", "not size and not count and not tensors"] if small else ["--rounds", "20"]
        few += ["--models", COMPILED_MODELS] if compiled == "only" else []
        options = ["--benchmark-only", "--benchmark-quiet", "-q", "--dtype", dtype, "--compiled", compiled]
        return ["-m", "pytest", "bench", "-p", "no:cacheprovider", *options, *few, *some, *out]

    def replays(dtype: str) -> list[str]:
        return ["-m", "bench.measure.replay", "--dtype", dtype, *some, *run, *(["--rounds", "2"] if small else [])]

    def tune(model: str) -> list[str]:
        few = ["--rounds", "1", "--settings", "2"] if small else ["--rounds", "3"]
        return [
            "-m",
            "bench.measure.tune",
            "kernel",
            "--model",
            model,
            *few,
            "--out",
            str(folder / "run" / f"tune-{model}.json"),
        ]

    few_tests = ["tests/kernels/test_sums.py", "tests/kernels/test_cuda_graphs.py"] if small else []
    steps = ["--models", "mnist_mlp", "--rounds", "1"] if small else ["--rounds", "20"]
    host = ["--counts", "1,6", "--rounds", "3"] if small else ["--counts", "1,6,148,600", "--rounds", "60"]
    interpreted = {} if device == "cuda" else {"TRITON_INTERPRET": "1"}
    # Memory goes back to the device when it is freed: inside of PyTorch's own pool no access to it would be noticed.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # A compilation takes up to a minute, and none is begun that could be stopped in the middle.
    compiled = [] if small else [Step("compiled float32", 12, bench("float32", "only"), told=0.6)]
    return [
        Step("tests", 24, ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *few_tests]),
        Step("memcheck", 6, checked("memcheck"), uncached, program=sanitizer),
        Step("replays float32", 4, replays("float32")),
        Step("float32", 20, bench("float32", "none"), told=0.85),
        Step("bfloat16", 15, bench("bfloat16", "none"), told=0.85),
        Step("optimizers", 4, ["-m", "bench.measure.update", *steps, *on, *out]),
        Step("host time", 4, ["-m", "bench.measure.host", *host, *on, *out]),
        Step("replays bfloat16", 3, replays("bfloat16")),
        *(Step(f"tune {m}", 4, tune(m), interpreted) for m in (["mnist_mlp"] if small else ["resnet50", "gpt2"])),
        *compiled,
        Step("racecheck", 4, checked("racecheck"), uncached, program=sanitizer),
    ]


def run_step(step: Step, limit: float, logs: Path) -> dict[str, Any]:
    """The step's name, outcome, seconds and the end of its output, which goes to a log."""
    started = time.monotonic()
    program = shutil.which(step.program, path=PATH) if step.program else None
    if step.program is not None and program is None:
        return {"step": step.name, "outcome": f"skipped: {step.program} is not installed", "seconds": 0.0, "tail": []}
    if limit <= 0:
        return {"step": step.name, "outcome": "skipped: out of time", "seconds": 0.0, "tail": []}
    command = [program or sys.executable, *(step.command[1:] if program else step.command)]
    command += ["--seconds", f"{step.told * limit:.0f}"] if step.told else []
    path = os.pathsep.join(filter(None, [str(results.ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **step.environment}
    log = logs / f"{re.sub(r'[^a-z0-9]+', '-', step.name.lower())}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=results.ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        code: int | None = None
        try:
            code = process.wait(limit)
            outcome = "passed" if code == 0 else f"failed: exit status {code}"
        except subprocess.TimeoutExpired:
            outcome = f"failed: stopped after {limit:.0f} s"
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGINT)  # pytest still says what it found
                process.wait(GRACE)
        finally:
            # Also what a finished step left running.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").splitlines()
    if code and step.program and any(UNSUPPORTED in line for line in lines):
        outcome = f"skipped: {UNSUPPORTED}"
    found = {"step": step.name, "outcome": outcome, "seconds": round(time.monotonic() - started, 1)}
    return {**found, "tail": lines[-1:] if outcome == "passed" else lines[-TAIL:]}


def run_all(todo: Sequence[Step], minutes: float, folder: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Every step's outcome, also in run.json, which a run that is cut short leaves."""
    logs = folder / "run"
    logs.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    found: list[dict[str, Any]] = []
    for number, step in enumerate(todo):
        print(f"{step.name} ...", flush=True)
        limit = (deadline - time.monotonic()) * step.share / sum(each.share for each in todo[number:])
        found.append(run_step(step, limit, logs))
        last = found[-1]["tail"][-1:] if found[-1]["outcome"] == "passed" else []
        print(f"{step.name}: {found[-1]['outcome']}, {found[-1]['seconds']:.0f} s", *last, flush=True)
        (logs / "run.json").write_text(json.dumps({"environment": facts, "steps": found}, indent=1) + "\n")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="one small model and few rounds")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--results", type=Path, help="a folder for the results files and logs")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --small shows that every step runs")
    facts = results.environment(torch.device(options.device))
    print(results.describe(facts), flush=True)
    # What a small run measures is not to be kept.
    folder = (options.results or (results.ROOT / "outputs" / "gpu" if options.small else results.FOLDER)).resolve()
    started = time.time()
    found = run_all(steps(options.device, options.small, folder), options.minutes, folder, facts)
    summary = verdict.summary(folder, facts, since=started)
    (folder / "run" / "summary.md").write_text("\n".join(summary) + "\n")
    print("\n".join(summary))
    failed = [each for each in found if each["outcome"].startswith("failed")]
    for each in failed:
        print(f"\n=== {each['step']}: {each['outcome']}", *each["tail"], sep="\n")
    print("\n" + "\n".join(f"{each['step']}: {each['outcome']}" for each in found))
    return int(bool(failed) or not any(each["outcome"] == "passed" for each in found))


if __name__ == "__main__":
    # Whoever ends this process ends the step that runs, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
