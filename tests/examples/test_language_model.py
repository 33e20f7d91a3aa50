"""The example for many processes: it logs all parts, saves, and goes on to the same numbers, under torchrun too."""

import contextlib
import io
import os
import re
import runpy
import socket
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from tests.support.ranks import on_processes, processes

pytestmark = on_processes
ROOT = Path(__file__).parents[2]
EXAMPLE = str(ROOT / "examples" / "language_model.py")
LINE = re.compile(r"step +(\d+): loss ([\d.]+) = cross-entropy ([\d.]+) \+ l1 ([\d.]+) \+ l2 ([\d.]+), ([\d.]+)% zeros")

Numbers = dict[int, tuple[float, ...]]


def environment() -> dict[str, str]:
    """One thread, the loopback device, and no GPUs, of which there may be fewer than processes."""
    loopback = "lo" if sys.platform == "linux" else "lo0"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {"GLOO_SOCKET_IFNAME": loopback, **os.environ, **fixed}


def arguments(folder: Path, *options: str) -> list[str]:
    return [EXAMPLE, "--log-every=1", f"--checkpoint={folder}", *options]


def numbers(output: str) -> Numbers:
    """The logged numbers by step."""
    return {int(step): tuple(map(float, found)) for step, *found in LINE.findall(output)}


def run_by_torchrun(folder: Path, *options: str) -> Numbers:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [*torchrun, *arguments(folder, *options)], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    return numbers(finished.stdout)


def run(folder: Path, *options: str, n_processes: int = 2) -> Numbers:
    """As by torchrun, in processes that need not import torch again."""
    context = processes()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pipes, running = [], []
    for rank in range(n_processes):
        ours, theirs = context.Pipe()
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_processes}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = context.Process(target=_run, args=(arguments(folder, *options), world, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        running.append(process)
    try:
        results = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(300), f"rank {rank} was still running"
            results.append(pipe.recv())
        assert not any(error for _, error in results), results
    finally:
        for process in running:
            process.kill()
            process.join()
    return numbers(results[0][0])


def _run(argv: list[str], world: dict[str, int | str], pipe: Connection) -> None:
    os.environ.update(environment() | {name: str(value) for name, value in world.items()})
    torch.set_num_threads(1)
    sys.argv = argv
    output, error = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(output):
            runpy.run_path(EXAMPLE, run_name="__main__")
    except BaseException:
        error = traceback.format_exc()
    pipe.send((output.getvalue(), error))


def test_resuming_gives_the_numbers_of_a_run_that_never_stopped(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "--steps=4")
    first = run(tmp_path / "parts", "--steps=2")
    second = run_by_torchrun(tmp_path / "parts", "--steps=4", "--resume")
    assert list(first) == [1, 2]
    assert list(second) == [3, 4]
    assert {**first, **second} == whole
    for loss, cross_entropy, l1, l2, _ in whole.values():
        assert loss == pytest.approx(cross_entropy + l1 + l2, abs=2e-6)
        assert min(cross_entropy, l1, l2) > 0
    assert whole[4][0] < whole[1][0]
    assert whole[4][-1] > whole[1][-1]  # exact zeros


def test_as_many_processes_as_one_likes(tmp_path: Path) -> None:
    """The gradient mode, saved by one process and continued by two."""
    whole = run(tmp_path / "whole", "--steps=3", "--mode=grad")
    run(tmp_path / "parts", "--steps=2", "--mode=grad", n_processes=1)
    (last,) = run(tmp_path / "parts", "--steps=3", "--mode=grad", "--resume").values()
    assert last == pytest.approx(whole[3], rel=1e-4)
