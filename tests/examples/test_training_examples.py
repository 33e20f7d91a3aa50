"""The examples about exact zeros and strengths: they compute what their pages say, and draw it."""

import gzip
import importlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sklearn.linear_model import lasso_path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
digits: Any = importlib.import_module("digits")
strength: Any = importlib.import_module("strength")
exact_zeros: Any = importlib.import_module("exact_zeros")
sys.path.pop(0)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_path_is_that_of_scikit_learn() -> None:
    x, y = strength.load_problem()
    strengths, found = strength.path(x, y, n=8)
    _, expected, _ = lasso_path(x.numpy(), y.numpy(), alphas=strengths, tol=1e-12, max_iter=100_000)
    assert not found[0].any()  # at the largest strength
    assert ((found == 0) == (expected.T == 0)).all()
    assert 0 < (found == 0).mean() < 1
    np.testing.assert_allclose(found, expected.T, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_a_target_share_of_zeros_is_reached(capsys: pytest.CaptureFixture[str]) -> None:
    strength.main(["target", "--zeros", "0.8"])
    *_, last, accuracy = capsys.readouterr().out.splitlines()
    assert abs(float(last.split("exact zeros ")[1].split("%")[0]) - 80) <= 1
    assert float(accuracy.split()[-1]) > 0.94


def test_the_path_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = strength.path
    monkeypatch.setattr(strength, "path", lambda x, y: short(x, y, n=3, steps=5))
    strength.main(["path", "--out", str(tmp_path)])
    assert imread(tmp_path / "strength_path.png").std() > 0.05


def idx(array: np.ndarray) -> bytes:
    return gzip.compress(struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def test_sparsity_against_accuracy_is_stored_and_drawn(tmp_path: Path) -> None:
    """On a few of scikit-learn's digits, also through files in MNIST's format."""
    x, y, x_test, y_test = digits.load_data()
    for name, images, labels in (("train", x[:128], y[:128]), ("t10k", x_test, y_test)):
        pixels = (images * 255).round().to(torch.uint8).view(-1, 8, 8).numpy()
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(idx(pixels))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(idx(labels.to(torch.uint8).numpy()))
    read = exact_zeros.mnist_data.load_idx(tmp_path)
    torch.testing.assert_close(read[0], x[:128], rtol=0, atol=1 / 255)
    assert torch.equal(read[3], y_test)
    lines: list[str] = []
    options = ["--data", str(tmp_path), "--name", "few", "--epochs", "2", "--seeds", "2", "--strengths", "1e-2"]
    exact_zeros.main([*options, "--results", str(tmp_path), "--img", str(tmp_path)], show=lines.append)
    stored = json.loads((tmp_path / "exact-zeros-few.json").read_text())
    n_ways = len(exact_zeros.OPTIMIZERS) * len(exact_zeros.WAYS)
    assert len(lines) == len(stored["runs"]) == 2 * n_ways
    by_way = {(r["optimizer"], r["way"], r["seed"]): r for r in stored["runs"]}
    for optimizer in exact_zeros.OPTIMIZERS:
        for seed in (0, 1):
            built_in, attached = (by_way[optimizer, way, seed] for way in ("built in", "attached"))
            assert built_in["zeros"] == pytest.approx(attached["zeros"], abs=5e-3)
            assert built_in["zeros"] > 0
            assert by_way[optimizer, "gradient", seed]["zeros"] == 0
    assert imread(tmp_path / "exact_zeros_few.png").std() > 0.03


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_the_page_says_what_is_stored(name: str) -> None:
    stored = json.loads((ROOT / "bench" / "results" / "training" / f"exact-zeros-{name}.json").read_text())

    def mean(optimizer: str, way: str, l1: float, what: str) -> str:
        own = [r[what] for r in stored["runs"] if (r["optimizer"], r["way"], r["l1"]) == (optimizer, way, l1)]
        assert len(own) == stored["seeds"] == 3
        return f"{np.mean(own):.1%}"

    if name == "digits":
        page = (ROOT / "docs" / "exact-zeros.md").read_text()
        by_lr = 'attached, metric="lr"'
        tenth = mean("momentum 0.9", by_lr, 1e-3, "zeros"), mean("momentum 0.9", "attached", 1e-4, "zeros")
        assert tenth == ("6.0%", "6.0%")
        adam = mean("Adam", by_lr, 1e-3, "zeros"), mean("Adam", "built in", 1e-3, "zeros")
        assert f"l1 = 0.001: {tenth[0]} zeros" in page
        assert f"{adam[0]} zeros where the others have {adam[1]}" in page
        zeros, accuracy = (mean("momentum 0.9", "built in", 2e-3, what) for what in ("zeros", "accuracy"))
        weak = mean("momentum 0.9", by_lr, 1e-4, "accuracy")
        assert f"l1 = 0.002 has {zeros} exact zeros at {accuracy} accuracy; without zeros it is {weak}" in page
