"""The digits example: it trains as the textbook formulations do, and prints and draws what is true."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

import fastreg

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits.py"
PENALTIES = ["none", "l1", "l2", "elastic"]
NUMBER = r"(-?[\d.]+)"
LOSS = rf"loss {NUMBER} = cross-entropy {NUMBER} \+ l1 {NUMBER} \+ l2 {NUMBER}$"


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


digits = _example()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the script runs itself: on layers this small, threads that wait for each other cost seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def hundred_steps(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """A model, the same one at every call, and data of which 5 epochs are 100 steps."""
    data = digits.load_data(dtype)
    n = 20 * digits.BATCH_SIZE
    torch.manual_seed(1)
    return digits.MLP().to(dtype), data._replace(x_train=data.x_train[:n], y_train=data.y_train[:n])


@pytest.mark.parametrize("penalty", ["l1", "l2", "elastic"])
def test_loss_curve_is_that_of_torch_cat(penalty: str) -> None:
    # float32, as people train. It stays within 1e-6 only because both gradients have the same bits: one ulp of noise in
    # each gradient grows to 2e-6 in these 100 steps. The values differ by how float32 sums round, about 2e-7.
    l1, l2 = digits.strengths(penalty, None, None)
    model, data = hundred_steps(torch.float32)
    found = digits.train(model, data, l1, l2, epochs=5, seed=3)

    model, data = hundred_steps(torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=digits.LEARNING_RATE)
    generator = torch.Generator().manual_seed(3)
    expected = []
    for _ in range(5):
        for x, y in digits.minibatches(data.x_train, data.y_train, generator):
            w = torch.cat([p.view(-1) for p in model.parameters()])
            l1_part, l2_part = l1 * w.abs().sum(), l2 * w.square().sum()
            cross_entropy = nn.functional.cross_entropy(model(x), y)
            loss = cross_entropy + l1_part + l2_part
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append([loss.item(), cross_entropy.item(), l1_part.item(), l2_part.item()])

    assert len(found) == 100
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_l2_trains_as_weight_decay_does_in_sgd(momentum: float) -> None:
    l2 = 0.01
    trained = []
    for penalty, weight_decay in ((l2, 0.0), (0.0, 2 * l2), (0.0, 0.0)):
        model, data = hundred_steps(torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum, weight_decay=weight_decay)
        digits.train(model, data, 0.0, penalty, epochs=5, seed=0, optimizer=optimizer)
        trained.append(digits.all_weights(model))
    penalised, decayed, plain = trained
    # float64, where roundings of 1e-16 in each of a hundred steps, a little amplified by training, hide nothing.
    np.testing.assert_allclose(penalised, decayed, rtol=0, atol=1e-13)
    assert np.abs(plain - decayed).max() > 0.01  # the decay mattered


@pytest.mark.parametrize("penalty", PENALTIES)
def test_what_it_prints_and_draws(penalty: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = digits.main(["--penalty", penalty, "--epochs", "2", "--seed", "5", "--out", str(tmp_path / "new")])

    out = capsys.readouterr().out
    l1, l2 = {"none": (0, 0), "l1": (1e-3, 0), "l2": (0, 3e-3), "elastic": (3e-4, 2.1e-3)}[penalty]
    assert re.match(rf"penalty {penalty}: l1={l1:g} l2={l2:g}, 6570 weights, seed 5\n", out)

    assert re.findall(r"^epoch (\d)/2", out, re.M) == ["1", "2"]
    losses = np.array(re.findall(LOSS, out, re.M), dtype=float)
    assert losses.shape == (3, 4)  # two epochs, and the final weights
    # Four numbers, each printed to 5 decimals.
    np.testing.assert_allclose(losses[:, 0], losses[:, 1:].sum(axis=1), rtol=0, atol=2.1e-5)

    # The final figures again, in NumPy float64 from the weights alone.
    layers = [p.detach().numpy().astype(np.float64) for p in model.parameters()]
    w = np.concatenate([p.ravel() for p in layers])
    data = digits.load_data()
    scores = forward(layers, data.x_train.numpy())
    cross_entropy = np.mean(np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(scores)), data.y_train.numpy()])
    l1_part, l2_part = l1 * np.abs(w).sum(), l2 * np.square(w).sum()
    expected = [cross_entropy + l1_part + l2_part, cross_entropy, l1_part, l2_part]
    np.testing.assert_allclose(losses[-1], expected, rtol=1e-6, atol=0.6e-5)

    def accuracy(x: torch.Tensor, y: torch.Tensor) -> float:
        return float(np.mean(forward(layers, x.numpy()).argmax(axis=1) == y.numpy()))

    train_accuracy, test_accuracy = numbers(rf"accuracy  train {NUMBER}  test {NUMBER}", out)
    assert train_accuracy == pytest.approx(accuracy(data.x_train, data.y_train), abs=0.6e-4)
    assert test_accuracy == pytest.approx(accuracy(data.x_test, data.y_test), abs=0.6e-4)
    assert test_accuracy > 0.7

    torch.manual_seed(5)
    initial = np.concatenate([p.detach().numpy().ravel() for p in digits.MLP().parameters()]).astype(np.float64)
    for name, measure in (
        (r"sum\|w\|", lambda w: np.abs(w).sum()),
        (r"sum w\^2", lambda w: np.square(w).sum()),
        (r"near-zero share \(\|w\| < 0.001\)", lambda w: np.mean(np.abs(w) < 1e-3)),
    ):
        before, after = numbers(rf"{name}  before {NUMBER}  after {NUMBER}", out)
        assert before == pytest.approx(measure(initial), rel=1e-6, abs=0.6e-4)
        assert after == pytest.approx(measure(w), rel=1e-6, abs=0.6e-4)

    path = tmp_path / "new" / f"digits_{penalty}.png"
    assert out.splitlines()[-1] == f"plot  {path}"
    assert list(path.parent.iterdir()) == [path]
    picture = imread(path)
    assert picture.ndim == 3
    assert picture.std() > 0.05  # not a blank canvas


def forward(layers: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """Scores of the MLP with these (weight, bias, weight, bias, ...)."""
    for weight, bias in zip(layers[:-2:2], layers[1:-2:2], strict=True):
        x = np.maximum(x @ weight.T + bias, 0)
    return x @ layers[-2].T + layers[-1]


def numbers(pattern: str, out: str) -> list[float]:
    """The numbers in the one line of `out` that is `pattern`."""
    (found,) = re.findall(f"^{pattern}$", out, re.M)
    return [float(number) for number in found]


def test_a_seed_repeats_a_run_and_another_does_not() -> None:
    def curve(seed: int) -> list[tuple[float, ...]]:
        model, data = hundred_steps(torch.float32)
        return digits.train(model, data, 1e-3, 1e-3, epochs=1, seed=seed)

    assert curve(0) == curve(0)
    assert curve(0) != curve(1)


def test_l1_brings_weights_near_zero() -> None:
    shares = []
    for l1 in (0.0, digits.BASE_L1):
        torch.manual_seed(0)
        model = digits.MLP()
        digits.train(model, digits.load_data(), l1, 0.0, epochs=3, seed=0)
        shares.append(digits.near_zero_share(digits.all_weights(model)))
    # Initial weights are uniform up to 1/8, so about 1 % start out below 0.001; L1 empties whole pixels that are always
    # blank, and more.
    assert shares[0] < 0.02
    assert shares[1] > 0.2


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_attached_trains_bitwise_as_the_loss_term_does(optimizer: str) -> None:
    # Both add the same float32 gradient to the finished .grad of the cross-entropy, with one rounding.
    trained, curves = [], []
    for method in ("penalty", "attach"):
        model, data = hundred_steps(torch.float32)
        step = digits.OPTIMIZERS[optimizer](model.parameters())
        curves.append(digits.train(model, data, 3e-4, 2e-3, epochs=5, seed=3, optimizer=step, method=method))
        trained.append(digits.all_weights(model))
    assert trained[0].tobytes() == trained[1].tobytes()
    # What is logged is of the same weights, too; only the order of the additions in the sums may differ.
    np.testing.assert_allclose(np.array(curves[0]), np.array(curves[1]), rtol=1e-6, atol=0)


def test_the_attached_proximal_step_is_the_formula() -> None:
    l1, l2, lr = 3e-4, 2e-3, digits.SGD_LEARNING_RATE
    model, data = hundred_steps(torch.float64)
    step = digits.OPTIMIZERS["sgd"](model.parameters())
    zeros: list[float] = []
    options = {"epochs": 5, "seed": 3}
    found = digits.train(model, data, l1, l2, **options, optimizer=step, method="prox", log_zeros=zeros.append)

    expected, _ = hundred_steps(torch.float64)
    step = digits.OPTIMIZERS["sgd"](expected.parameters())
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(5):
        for x, y in digits.minibatches(data.x_train, data.y_train, generator):
            cross_entropy = nn.functional.cross_entropy(expected(x), y)
            step.zero_grad()
            cross_entropy.backward()
            step.step()
            with torch.no_grad():
                w = torch.cat([p.view(-1) for p in expected.parameters()])
                l1_part, l2_part = l1 * w.abs().sum().item(), l2 * w.square().sum().item()
                losses.append([cross_entropy.item() + l1_part + l2_part, cross_entropy.item(), l1_part, l2_part])
                for p in expected.parameters():
                    p.copy_(p.sign() * (p.abs() - lr * l1).clamp(min=0) / (1 + 2 * lr * l2))
    np.testing.assert_allclose(digits.all_weights(model), digits.all_weights(expected), rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.array(found), np.array(losses), rtol=1e-6, atol=0)
    assert len(zeros) == 5
    assert zeros[-1] == pytest.approx(np.mean(digits.all_weights(model) == 0), abs=1e-7)


@pytest.mark.parametrize("method", ["penalty", "attach", "prox"])
def test_printed_zeros_are_those_of_the_weights(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = digits.main(["--penalty", "l1", "--method", method, "--epochs", "4", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    zeros = np.mean(digits.all_weights(model) == 0)
    assert numbers(rf"exact-zero share \(w = 0\)  before {NUMBER}  after {NUMBER}", out) == [
        0,
        pytest.approx(zeros, abs=0.6e-4),
    ]
    per_epoch = [float(share) for share in re.findall(rf"^epoch \d/4  exact zeros {NUMBER}  loss", out, re.M)]
    assert len(per_epoch) == 4
    assert per_epoch[-1] == pytest.approx(zeros, abs=0.6e-4)
    assert zeros > 0.1 if method == "prox" else zeros < 0.001
    name = "digits_l1.png" if method == "penalty" else f"digits_l1_{method}.png"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_compare_trains_all_methods_from_one_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = digits.main(["--penalty", "l1", "--compare", "--epochs", "4", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert list(models) == ["penalty", "attach", "prox"]
    data = digits.load_data()
    for method, model in models.items():
        zeros, accuracy = numbers(rf"{method} +exact zeros {NUMBER}  test accuracy {NUMBER}", out)
        assert zeros == pytest.approx(np.mean(digits.all_weights(model) == 0), abs=0.6e-4)
        assert accuracy == pytest.approx(digits.accuracy(model, data.x_test, data.y_test), abs=0.6e-4)
        assert zeros > 0.1 if method == "prox" else zeros < 0.001
    assert digits.all_weights(models["penalty"]).tobytes() == digits.all_weights(models["attach"]).tobytes()
    path = tmp_path / "digits_l1_methods.png"
    assert list(tmp_path.iterdir()) == [path]
    assert out.splitlines()[-1] == f"plot  {path}"
    assert imread(path).std() > 0.05


@pytest.mark.parametrize("penalty", ["l1", "elastic"])
def test_prox_by_default_is_sparse_and_accurate(penalty: str, tmp_path: Path) -> None:
    model = digits.main(["--penalty", penalty, "--method", "prox", "--out", str(tmp_path)])
    data = digits.load_data()
    assert fastreg.sparsity(model) > 0.1
    assert digits.accuracy(model, data.x_test, data.y_test) > 0.9


def test_given_strengths_replace_mixed_ones() -> None:
    assert digits.strengths("elastic", None, None) == pytest.approx((0.3 * 1e-3, 0.7 * 3e-3))
    assert digits.strengths("elastic", 0.5, None) == pytest.approx((0.5, 0.7 * 3e-3))
    assert digits.strengths("elastic", 0.0, 0.25) == (0.0, 0.25)
    assert digits.strengths("l1", 0.5, None) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--l1", "-1"], "argument --l1: must be a finite number, 0 or more, got '-1'"),
        (["--l1", "nan"], "argument --l1: must be a finite number, 0 or more, got 'nan'"),
        (["--l2", "inf"], "argument --l2: must be a finite number, 0 or more, got 'inf'"),
        (["--l2", "much"], "argument --l2: must be a finite number, 0 or more, got 'much'"),
        (
            ["--penalty", "l1", "--l2", "1"],
            "argument --l2: --penalty l1 has no l2 part; use --penalty elastic for both",
        ),
        (["--penalty", "none", "--l1", "0"], "argument --l1: --penalty none has no l1 part; use --penalty elastic"),
        (["--epochs", "0"], "argument --epochs: must be a whole number from 1 to 1000000, got '0'"),
        (["--epochs", "1.5"], "argument --epochs: must be a whole number from 1 to 1000000, got '1.5'"),
        (["--seed", "-1"], "argument --seed: must be a whole number from 0 to 4294967295, got '-1'"),
        (["--penalty", "l3"], "argument --penalty: invalid choice: 'l3'"),
        (["--penalty", "none", "--method", "prox"], "argument --method: --penalty none leaves nothing to apply; use"),
        (["--penalty", "none", "--method", "attach"], "argument --method: --penalty none leaves nothing to apply; use"),
        (["--penalty", "none", "--compare"], "argument --compare: --penalty none leaves nothing to apply; use"),
        (["--compare", "--method", "prox"], "argument --method: not allowed with argument --compare"),
        (["--out", "{file}"], "argument --out: cannot write to '{file}': "),
        (["--out", "{file}/below"], "argument --out: cannot write to '{file}/below': "),
        pytest.param(
            ["--out", "/proc/self"],  # exists, and not even root can write there
            "argument --out: cannot write to '/proc/self': ",
            marks=pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux's /proc"),
        ),
    ],
)
def test_bad_arguments(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as caught:
        digits.main([argument.format(file=file) for argument in argv])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"error: {message.format(file=file)}" in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [file]


def test_help_explains_the_mix(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        digits.main(["--help"])
    assert "elastic: l1=0.3*0.001, l2=0.7*0.003" in " ".join(capsys.readouterr().out.split())


def test_a_diverged_run_says_so(tmp_path: Path) -> None:
    # Beyond float32: the loss is infinite.
    with pytest.raises(SystemExit, match=r"training diverged: the loss is (inf|nan); try smaller --l1 and --l2"):
        digits.main(["--penalty", "l1", "--l1", "1e39", "--epochs", "1", "--out", str(tmp_path)])
