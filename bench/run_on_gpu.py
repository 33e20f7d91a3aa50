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
from shlex import quote, split
from typing import Any, NamedTuple

import torch

from bench.report import results, verdict

TAIL = 40  # lines of a failed step's output
# Those of the bar first: time may run out.
COMPILED_MODELS = "gpt2,resnet50,llama3.2_1b,mnist_mlp,bert_base,vit_b16,convnext_tiny,mobilenet_v2"
SANITIZER = "compute-sanitizer"
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
    on, out, run = (f"--device {device}", *(f"--results {quote(str(path))}" for path in (folder, folder / "run")))
    models = "--models mnist_mlp" if small else ""
    tests = "tests/kernels/test_sums.py tests/kernels/test_cuda_graphs.py" if small else ""
    bench = f"pytest bench -p no:cacheprovider --benchmark-only --benchmark-quiet -q --rounds {2 if small else 20}"
    bench += f" {on} {out}" + (" -k 'not size and not count and not tensors'" if small else "")
    replay = f"bench.measure.replay {models} --rounds {2 if small else 15} {on} {run}"
    update = f"bench.measure.update {models} --rounds {1 if small else 20} {on} {out}"
    host = f"bench.measure.host {'--counts 1,6 --rounds 3' if small else '--counts 1,6,148,600 --rounds 60'} {on} {out}"
    tune = f"bench.measure.tune kernel {'--rounds 1 --settings 2' if small else '--rounds 3'}"
    interpreted = {} if device == "cuda" else {"TRITON_INTERPRET": "1"}

    def checked(name: str, share: float) -> Step:
        sweep = f"-m tests.support.small_sweep {on}"
        # Memory goes back to the device when it is freed: in PyTorch's own pool no access to it would be noticed.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        if device == "cpu":
            return Step(name, share, split(sweep), uncached)
        # PyTorch asks the driver for functions that it may not have, which is no error. Compilers are not watched.
        options = f"--tool {name} --target-processes application-only --report-api-errors no --error-exitcode 9"
        command = f"{SANITIZER} {options} {quote(sys.executable)} {sweep}"
        return Step(name, share, split(command), uncached, program=SANITIZER)

    def module(name: str, share: float, command: str, **more: Any) -> Step:
        return Step(name, share, split(f"-m {command}"), **more)

    found = [
        module("tests", 24, f"pytest -q -p no:cacheprovider -m gpu {tests}"),
        checked("memcheck", 6),
        module("replays float32", 4, f"{replay} --dtype float32"),
        module("float32", 20, f"{bench} {models} --dtype float32 --compiled none", told=0.85),
        module("bfloat16", 15, f"{bench} {models} --dtype bfloat16 --compiled none", told=0.85),
        module("optimizers", 4, update),
        module("host time", 4, host),
        module("replays bfloat16", 3, f"{replay} --dtype bfloat16"),
    ]
    for model in ["mnist_mlp"] if small else ["resnet50", "gpt2"]:
        command = f"{tune} --model {model} --out {quote(str(folder / 'run' / f'tune-{model}.json'))}"
        found.append(module(f"tune {model}", 4, command, environment=interpreted))
    if not small:  # a compilation takes up to a minute, and none is begun that could be stopped in the middle
        command = f"{bench} --models {COMPILED_MODELS} --dtype float32 --compiled only"
        found.append(module("compiled float32", 12, command, told=0.6))
    return [*found, checked("racecheck", 4)]


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
