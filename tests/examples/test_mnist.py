"""The example with the articles' script: its data, its printed parts, and four methods that train the same."""

import gzip
import importlib
import json
import re
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
mnist: Any = importlib.import_module("mnist")
mnist_data: Any = importlib.import_module("mnist_data")
sys.path.pop(0)


pytestmark = pytest.mark.usefixtures("one_thread")


def idx_file(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scikit-learn's digits, enlarged to 28x28, in files as MNIST's are: some of them zipped."""
    images, labels = load_digits(return_X_y=True)
    large = np.pad(np.kron(images.reshape(-1, 8, 8) * 15, np.ones((3, 3))), ((0, 0), (2, 2), (2, 2)))
    path = tmp_path_factory.mktemp("digits")
    for prefix, part in (("train", slice(0, 600)), ("t10k", slice(600, 700))):
        (path / f"{prefix}-images-idx3-ubyte").write_bytes(idx_file(large[part]))
        (path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_file(labels[part])))
    return path


def test_data_in_a_folder(folder: Path) -> None:
    images, labels, test_images, test_labels = mnist_data.load(str(folder), Path("unused"))
    raw, digits = load_digits(return_X_y=True)
    assert images.shape == (600, 784)
    assert test_images.shape == (100, 784)
    corner = images.view(-1, 28, 28)[:, 2:26:3, 2:26:3].double().flatten(1)
    np.testing.assert_allclose(corner.numpy(), raw[:600] * 15 / 255, rtol=1e-6)
    assert torch.equal(labels, torch.tensor(digits[:600]))
    assert torch.equal(test_labels, torch.tensor(digits[600:700]))


def test_data_that_is_none(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no train-images-idx3-ubyte and no train-images-idx3-ubyte\.gz in"):
        mnist_data.load(str(tmp_path), tmp_path)
    name = "train-images-idx3-ubyte"
    whole = (folder / name).read_bytes()
    (tmp_path / name).write_bytes(b"\x00\x00\x0d" + whole[3:])  # floats
    with pytest.raises(ValueError, match="is no IDX file of bytes in 3 dimensions"):
        mnist_data.load(str(tmp_path), tmp_path)
    (tmp_path / name).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"shape \(600, 28, 28\), and has 470399 bytes"):
        mnist_data.load(str(tmp_path), tmp_path)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_file(np.zeros(99))))
    with pytest.raises(ValueError, match="another number of images than of labels"):
        mnist_data.load(str(tmp_path), tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(SystemExit, match="pip install torchvision; or pass a folder"):
        mnist_data.load("mnist", tmp_path)


@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashion", "FashionMNIST")])
def test_data_of_torchvision(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dataset(root: Path, train: bool, download: bool) -> Any:
        assert root == tmp_path
        assert download
        n = 5 if train else 3
        return types.SimpleNamespace(data=torch.full((n, 28, 28), 51, dtype=torch.uint8), targets=torch.arange(n))

    datasets = types.SimpleNamespace(**{kind: dataset})
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(datasets=datasets))
    images, labels, test_images, test_labels = mnist_data.load(name, tmp_path)
    assert torch.equal(images, torch.full((5, 784), 0.2))
    assert (len(test_images), labels.tolist(), test_labels.tolist()) == (3, [0, 1, 2, 3, 4], [0, 1, 2])


@pytest.mark.parametrize("method", mnist.METHODS)
@pytest.mark.parametrize("penalty", mnist.WEIGHTS)
def test_the_loss_and_its_parts(penalty: str, method: str, folder: Path) -> None:
    """Against NumPy in float64, of the weights before each step."""
    x, y, *_ = mnist_data.load(str(folder), folder)
    l1, l2 = mnist.WEIGHTS[penalty]
    training = mnist.Training(method, l1, l2)
    for step, (images, labels) in zip(range(3), mnist.batches(x, y, 1), strict=False):
        weights = [p.detach().double().numpy() for p in training.model.parameters()]
        hidden = images.double().numpy()
        for i in range(0, 6, 2):
            hidden = hidden @ weights[i].T + weights[i + 1]
            hidden = np.maximum(hidden, 0) if i < 4 else hidden
        log_sums = np.log(np.exp(hidden).sum(axis=1))
        data = (log_sums - hidden[np.arange(len(labels)), labels.numpy()]).mean()
        first = l1 * sum(np.abs(w).sum() for w in weights)
        second = l2 * sum(np.square(w).sum() for w in weights)
        found = [each.item() for each in training.step(images, labels)]
        # float32; torch.cat's sum of 52,650 weights in float32 errs by some 1e-6.
        assert found == pytest.approx([data + first + second, first, second], rel=1e-5), step


def test_all_methods_train_the_same(folder: Path) -> None:
    """In float64, to the digits that are left when Adam has divided small gradients by their size."""
    x, y, *_ = mnist_data.load(str(folder), folder)
    trainings = [mnist.Training(method, 3e-3, 7e-3) for method in mnist.METHODS]
    for training in trainings:
        training.model.double()
    for images, labels in mnist.batches(x.double(), y, 1):
        losses = [training.step(images, labels)[0].item() for training in trainings]
        assert losses == pytest.approx([losses[0]] * 4, rel=1e-9)
    assert losses[0] < 5  # from 8.5: it has learnt


def test_what_is_printed(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist, "EVERY", 25)
    mnist.main(["--data", str(folder), "--epochs", "1", "--penalty", "elastic", "--weight", "1e-3", "--limit", "500"])
    lines = capsys.readouterr().out.splitlines()
    pattern = r"Loss after mini-batch +(\d+): ([\d.]+) \(of which ([\d.]+) L1 loss; ([\d.]+) L2 loss\)"
    found = [match.groups() for line in lines if (match := re.fullmatch(pattern, line))]
    assert [group[0] for group in found] == ["25", "50"]
    for _, loss, l1, l2 in found:
        assert float(loss) > float(l1) > 0
        assert float(l2) > 0
    assert re.fullmatch(r"accuracy  train 0\.\d{4}  test 0\.\d{4}", lines[-2])
    assert lines[-1] == "exact zeros 0.00%"


def test_comparison(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(mnist, "EVERY", 10)
    options = ["--data", str(folder), "--epochs", "1", "--weight", "1e-3", "--results", str(tmp_path / "found.json")]
    image = ["--image", str(tmp_path / "found.png")]
    mnist.main([*options, *image, "--compare"])
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:5]] == list(mnist.METHODS)
    stored = json.loads((tmp_path / "found.json").read_text())
    assert stored["environment"]["cpu"]
    for method, run in stored["runs"].items():
        assert len(run["logged"]) == 6
        assert run["microseconds"] > 0, method
        ours, theirs = np.array(run["logged"]), np.array(stored["runs"]["cat"]["logged"])
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    assert imread(tmp_path / "found.png").std() > 0.05
    (tmp_path / "found.png").unlink()
    mnist.main([*options, *image, "--plot"])
    assert imread(tmp_path / "found.png").std() > 0.05


def test_comparison_of_few_batches(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer than EVERY: the last batch is logged."""
    options = ["--data", str(folder), "--epochs", "1", "--limit", "75", "--weight", "1e-3", "--compare"]
    mnist.main([*options, "--results", str(tmp_path / "found.json"), "--image", str(tmp_path / "found.png")])
    table = capsys.readouterr().out.splitlines()
    stored = json.loads((tmp_path / "found.json").read_text())
    assert len(table) == 1 + len(mnist.METHODS) + 1
    for line, run in zip(table[1:], stored["runs"].values(), strict=False):
        assert len(run["logged"]) == 1
        assert f"{run['logged'][0][0]:.5f}" in line
    assert imread(tmp_path / "found.png").std() > 0.05


def test_the_page_shows_what_is_stored() -> None:
    page = (ROOT / "docs" / "mnist.md").read_text()
    for name in ("mnist-compare", "mnist-compare-small"):
        stored = json.loads((ROOT / "bench" / "results" / "training" / f"{name}.json").read_text())
        assert mnist.table(stored["runs"]) in page
        for key in ("cpu", "torch", "commit"):
            assert stored["environment"][key] in page
