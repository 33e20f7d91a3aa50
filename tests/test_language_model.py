"""The example for many processes, as a user starts it: it logs all parts, saves, and goes on to the same numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform == "win32", reason="needs gloo"
)
ROOT = Path(__file__).parents[1]
LINE = re.compile(r"step +(\d+): loss ([\d.]+) = cross-entropy ([\d.]+) \+ l1 ([\d.]+) \+ l2 ([\d.]+), ([\d.]+)% zeros")


def run(folder: Path, *options: str, processes: int = 2) -> dict[int, tuple[float, ...]]:
    """The logged numbers by step."""
    loopback = "lo" if sys.platform == "linux" else "lo0"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    finished = subprocess.run(
        [*torchrun, str(ROOT / "examples" / "language_model.py"), "--log-every=1", f"--checkpoint={folder}", *options],
        env={"GLOO_SOCKET_IFNAME": loopback, **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return {int(step): tuple(map(float, numbers)) for step, *numbers in LINE.findall(finished.stdout)}


def test_resuming_gives_the_numbers_of_a_run_that_never_stopped(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "--steps=4")
    first = run(tmp_path / "parts", "--steps=2")
    second = run(tmp_path / "parts", "--steps=4", "--resume")
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
    run(tmp_path / "parts", "--steps=2", "--mode=grad", processes=1)
    (last,) = run(tmp_path / "parts", "--steps=3", "--mode=grad", "--resume").values()
    assert last == pytest.approx(whole[3], rel=1e-4)
