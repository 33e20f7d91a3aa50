"""The benchmark of whole steps: what it checks before it measures, what it counts, what it stores."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.measure import update
from bench.report import pages as report

CPU = torch.device("cpu")
SHAPES = [[40, 30], [7], [1000]]


@pytest.mark.parametrize("method", update.METHODS)
def test_every_method_makes_the_step_that_it_says(method: str) -> None:
    assert update.error(method, SHAPES, torch.float32, CPU) < 1e-4


def test_a_step_without_its_penalty_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = update.METHODS[update.ALONE]
    for method in update.METHODS:
        if method == update.ALONE:
            continue
        monkeypatch.setitem(update.METHODS, method, alone)
        assert update.error(method, SHAPES, torch.float32, CPU) > 10 * update.TOLERANCE, method
    with pytest.raises(RuntimeError, match="not timed, as steps are wrong"):
        update.measure("mnist_mlp", "float32", CPU, rounds=1)


def test_what_a_step_launches_and_moves() -> None:
    """The optimizer's own 28 bytes a weight, and 12 more for a penalty beside it, or 16 where it says its value."""
    found = update.counted("mobilenet_v2")
    n = sum(torch.Size(shape).numel() for shape in update.SHAPES["mobilenet_v2"])
    moved = {method: sum(o.read + o.written for o in each) / n for method, each in found.items()}
    launches = {method: sum(o.launches for o in each) for method, each in found.items()}
    assert launches["fastreg.optim, prox or not"] == 1
    assert launches["fastreg.optim, tracked"] == 2
    assert moved["fastreg.optim, prox or not"] == pytest.approx(28, rel=2e-2)
    assert moved["fastreg.optim, tracked"] == pytest.approx(28, rel=2e-2)
    assert moved["torch fused, no penalty"] == pytest.approx(28, rel=1e-3)
    assert moved["torch fused, fastreg attached"] == pytest.approx(40, rel=2e-2)
    assert moved["torch fused, fastreg attached, prox"] == pytest.approx(40, rel=2e-2)
    assert moved["torch fused, foreach"] > 60
    assert launches["torch fused, loop"] > 1000


def test_it_runs_and_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    update.main(["--models", "mnist_mlp", "--rounds", "1", "--device", "cpu", "--results", str(tmp_path)])
    out = capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    stored: dict[str, Any] = json.loads(file.read_text())
    methods = [case["method"] for case in stored["cases"] if case["label"] == "mnist_mlp"]
    assert methods == list(update.METHODS)
    assert all(case["ratio"]["p50"] > 0 for case in stored["cases"])
    text = report.report([stored], tmp_path / "img")
    lines = update.tables(stored["cases"])
    for line in lines:
        assert line in text
    # What is printed has not been rounded to be stored: the last digit may differ.
    assert [line.split("|")[1] for line in out.splitlines()] == [line.split("|")[1] for line in lines]


def test_without_arithmetic_nothing_is_changed() -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for w in weights:
        w.grad = torch.ones(3)
    with update.no_arithmetic():
        update.METHODS[update.ALONE](weights)()
    assert all(bool((w == 1).all()) for w in weights)
