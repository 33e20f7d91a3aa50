"""The digits examples: they train as the textbook formulations do, and print and draw correct results."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor, nn

import fastreg

ROOT = Path(fastreg.__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
digits: Any = importlib.import_module("digits")
plots: Any = importlib.import_module("digits_plots")
pruning: Any = importlib.import_module("pruning")
sys.path.pop(0)

STRENGTHS = {"none": (0.0, 0.0), "l1": (1e-3, 0.0), "l2": (0.0, 3e-3), "elastic": (0.3 * 1e-3, 0.7 * 3e-3)}
NUMBER = r"(-?[\d.]+)"
EPOCH = rf"^epoch +\d+  loss {NUMBER} = cross-entropy {NUMBER} \+ l1 {NUMBER} \+ l2 {NUMBER}  exact zeros {NUMBER}%$"


pytestmark = pytest.mark.usefixtures("one_thread")


def flat(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()


def hundred_steps(dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...], torch.optim.SGD]:
    """A model, the same one at every call, its optimizer, and data of which 5 epochs are 100 steps."""
    x, y, *_ = digits.load_data(dtype)
    n = 20 * digits.BATCH_SIZE
    model = digits.build_model().to(dtype)
    return model, (x[:n], y[:n]), torch.optim.SGD(model.parameters(), lr=digits.LEARNING_RATE)


def trained(dtype: torch.dtype, l1: float, l2: float, method: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The weights after a hundred steps of the example, and what it yields of each step."""
    model, data, _ = hundred_steps(dtype)
    optimizer = digits.build_optimizer(model, l1, l2, method)
    optimizer.param_groups[0].update(options)
    steps = torch.cat(list(digits.train(model, data, optimizer, l1, l2, method, 5)))
    return flat(model), steps.numpy()


def by_hand(dtype: torch.dtype, l1: float, l2: float, prox: bool) -> tuple[np.ndarray, np.ndarray]:
    """The same by torch.cat, or with the formula of the proximal step after each step."""
    model, (x, y), optimizer = hundred_steps(dtype)
    lr, order, steps = digits.LEARNING_RATE, torch.Generator().manual_seed(0), []
    for batch in [b for _ in range(5) for b in torch.randperm(len(x), generator=order).split(digits.BATCH_SIZE)]:
        cross_entropy = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        if prox:
            cross_entropy.backward()
            optimizer.step()
        w = torch.cat([p.view(-1) for p in model.parameters()])
        parts = l1 * w.abs().sum(), l2 * w.square().sum()
        loss = cross_entropy + sum(parts)
        if not prox:
            loss.backward()
            optimizer.step()
        steps.append([loss.item(), cross_entropy.item(), parts[0].item(), parts[1].item()])
        if prox:
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(p.sign() * (p.abs() - lr * l1).clamp(min=0) / (1 + 2 * lr * l2))
    return flat(model), np.array(steps)


@pytest.mark.parametrize("penalty", ["l1", "l2", "elastic"])
def test_loss_curve_is_that_of_torch_cat(penalty: str) -> None:
    # float32, as people train. It stays within 1e-6 only because both gradients have the same bits.
    _, found = trained(torch.float32, *STRENGTHS[penalty], "penalty")
    _, expected = by_hand(torch.float32, *STRENGTHS[penalty], prox=False)
    assert len(found) == 100
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)


def test_the_attached_proximal_step_is_the_formula() -> None:
    weights, found = trained(torch.float64, 3e-4, 2e-3, "prox")
    expected_weights, expected = by_hand(torch.float64, 3e-4, 2e-3, prox=True)
    np.testing.assert_allclose(weights, expected_weights, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_l2_trains_as_weight_decay_does_in_sgd(momentum: float) -> None:
    l2, options = 0.01, {"momentum": momentum, "lr": 0.05}
    penalised, _ = trained(torch.float64, 0.0, l2, "penalty", **options)
    decayed, _ = trained(torch.float64, 0.0, 0.0, "penalty", **options, weight_decay=2 * l2)
    plain, _ = trained(torch.float64, 0.0, 0.0, "penalty", **options)
    # float64, where roundings of 1e-16 in each of a hundred steps, a little amplified by training, hide nothing.
    np.testing.assert_allclose(penalised, decayed, rtol=0, atol=1e-13)
    assert np.abs(plain - decayed).max() > 0.01  # the decay mattered


def test_attached_trains_bitwise_as_the_loss_term_does() -> None:
    # Both add the same float32 gradient to the finished .grad of the cross-entropy, with one rounding.
    weights, steps = trained(torch.float32, 3e-4, 2e-3, "penalty")
    attached, attached_steps = trained(torch.float32, 3e-4, 2e-3, "attach")
    assert weights.tobytes() == attached.tobytes()
    # What is logged is of the same weights, too; only the order of the additions in the sums may differ.
    np.testing.assert_allclose(steps, attached_steps, rtol=1e-6, atol=0)


@pytest.mark.parametrize("penalty", STRENGTHS)
@pytest.mark.parametrize("method", ["penalty", "prox", "optimizer"])
def test_what_it_prints(penalty: str, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = digits.main(["--penalty", penalty, "--method", method, "--epochs", "3"])
    out = capsys.readouterr().out
    l1, l2 = STRENGTHS[penalty]
    assert out.startswith(f"penalty {penalty}: l1={l1:g} l2={l2:g}, method {method}\n")
    epochs = np.array(re.findall(EPOCH, out, re.MULTILINE), dtype=float)
    assert epochs.shape == (3, 5)
    # Four numbers, each printed to 5 decimals.
    np.testing.assert_allclose(epochs[:, 0], epochs[:, 1:4].sum(axis=1), rtol=0, atol=2.1e-5)
    assert [(part > 0).all() for part in epochs.T[2:4]] == [l1 > 0, l2 > 0]
    assert epochs[-1, 4] == pytest.approx(100 * np.mean(flat(model) == 0), abs=0.6e-2)
    x_train, y_train, x_test, y_test = digits.load_data()
    accuracies = [(model(x).argmax(1) == y).double().mean() for x, y in ((x_train, y_train), (x_test, y_test))]
    assert out.splitlines()[-1] == "accuracy  train {:.4f}  test {:.4f}".format(*accuracies)


@pytest.mark.parametrize("penalty", ["l1", "elastic"])
def test_prox_is_sparse_and_accurate(penalty: str) -> None:
    model = digits.main(["--penalty", penalty, "--method", "prox"])
    assert fastreg.sparsity(model) > 0.1
    assert digits.accuracy(model, *digits.load_data()[2:]) > 0.9


def test_l1_by_gradient_brings_weights_near_zero_but_not_to_it() -> None:
    plain, shrunk = (flat(digits.main(["--penalty", penalty])) for penalty in ("none", "l1"))
    assert np.mean(np.abs(plain) < 1e-3) < 0.02
    assert np.mean(np.abs(shrunk) < 1e-3) > 0.2
    assert np.mean(shrunk == 0) < 1e-3


def test_given_strengths_are_mixed_as_the_default_ones() -> None:
    args = digits.options().parse_args(["--l1", "2", "--l2", "10"])
    assert digits.strengths(args) == pytest.approx((0.6, 7.0))
    with pytest.raises(ValueError, match="l1 must be finite and at least 0"):
        digits.main(["--l1", "-1"])


def test_compare_trains_and_draws_all_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = plots.main(["--penalty", "l1", "--compare", "--epochs", "4", "--out", str(tmp_path / "new")])
    out = capsys.readouterr().out
    assert list(models) == ["penalty", "attach", "prox", "optimizer"]
    for method, model in models.items():
        (zeros,) = re.findall(rf"^{method} .*exact zeros {NUMBER}%", out, re.MULTILINE)
        assert float(zeros) == pytest.approx(100 * np.mean(flat(model) == 0), abs=0.6e-2)
        assert float(zeros) > 10 if method in ("prox", "optimizer") else float(zeros) < 0.1
    assert flat(models["penalty"]).tobytes() == flat(models["attach"]).tobytes()
    np.testing.assert_allclose(flat(models["prox"]), flat(models["optimizer"]), rtol=0, atol=1e-5)
    (path,) = (tmp_path / "new").iterdir()
    assert out.splitlines()[-1] == f"plot  {path}"
    assert imread(path).std() > 0.05  # not a blank canvas


@pytest.mark.parametrize("penalty", STRENGTHS)
def test_a_single_run_is_drawn(penalty: str, tmp_path: Path) -> None:
    model = plots.main(["--penalty", penalty, "--epochs", "2", "--out", str(tmp_path)])["penalty"]
    same = digits.main(["--penalty", penalty, "--epochs", "2"])
    assert flat(model).tobytes() == flat(same).tobytes()
    assert imread(tmp_path / f"digits_{penalty}_penalty.png").std() > 0.05


def test_demo_shows_exact_zeros() -> None:
    (recipe,) = re.findall(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    *_, last = re.findall(r"examples/digits\.py (.*)", recipe)
    model = digits.main([*last.split(), "--epochs", "3"])
    assert fastreg.sparsity(model) > 0.05


def test_pruning_removes_the_smallest_weights() -> None:
    model = pruning.new_model(0)
    before = [w.detach().clone() for w in pruning.matrices(model)]
    masks = pruning.prune(model, 0.7)
    assert fastreg.sparsity(pruning.matrices(model)).item() == pytest.approx(0.7, abs=1e-4)
    removed = torch.cat([w[~mask].abs() for w, mask in zip(before, masks, strict=True)])
    kept = torch.cat([w[mask].abs() for w, mask in zip(before, masks, strict=True)])
    assert removed.max() < kept.min()
    optimizer = pruning.optimizer_for(model, "Adam", 0.0, prox=False)
    pruning.train(model, digits.load_data(), optimizer, 1, masks)
    for w, old, mask in zip(pruning.matrices(model), before, masks, strict=True):
        assert not w[~mask].any()
        assert (w != old)[mask].any()


def test_pruning_stores_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "STRENGTHS", (2e-2,))
    monkeypatch.setattr(pruning, "SHARES", (0.5,))
    options = ["--epochs", "2", "--seeds", "2"]
    options += ["--results", str(tmp_path / "r.json"), "--image", str(tmp_path / "i.png")]
    pruning.main(options)
    stored = json.loads((tmp_path / "r.json").read_text())
    assert stored["environment"]["cpu"]
    assert len(stored["runs"]) == 2 * 2 * 4
    for name in pruning.OPTIMIZERS:
        assert [zeros for zeros, _ in pruning.means(stored, name, pruning.PRUNED)] == [0.0, 0.5]
        ((zeros, _),) = pruning.means(stored, name, pruning.TUNED)
        assert zeros == 0.5
        ((zeros, _),) = pruning.means(stored, name, pruning.PROX)
        assert zeros > 0.05
    counts = stored["histogram"]["counts"]
    assert counts[pruning.GRADIENT]["exact zeros"] == 0
    assert counts[pruning.PROX]["exact zeros"] > 0
    assert max(counts[pruning.PROX]["bins"]) >= counts[pruning.PROX]["exact zeros"]
    (tmp_path / "i.png").unlink()
    pruning.main([*options, "--plot"])
    assert imread(tmp_path / "i.png").std() > 0.05


def test_readme_and_page_show_the_stored_pruning_results() -> None:
    stored = json.loads(pruning.STORED.read_text())
    assert all(stored["environment"][key] for key in ("cpu", "torch", "commit"))

    def near_80_percent(way: str) -> tuple[str, str]:
        zeros, accuracy = min(pruning.means(stored, "momentum 0.9", way), key=lambda point: abs(point[0] - 0.8))
        return f"{zeros:.0%}", f"{accuracy:.1%}"

    share, prox = near_80_percent(pruning.PROX)
    pruned, tuned = (near_80_percent(way) for way in (pruning.PRUNED, pruning.TUNED))
    assert pruned[0] == tuned[0]
    counts = stored["histogram"]["counts"]
    near = f"{counts[pruning.PROX]['exact zeros'] / stored['histogram']['weights']:.0%}"
    for page in ("README.md", "docs/when-not.md"):
        text = " ".join((ROOT / page).read_text().split())
        for figure in (f"{share} zeros", prox, f"{pruned[0]} zeros", pruned[1], tuned[1]):
            assert figure in text, f"{page} lacks {figure}"
    assert f"{near} of its weights are exactly zero" in " ".join((ROOT / "docs" / "l1-no-zeros.md").read_text().split())
