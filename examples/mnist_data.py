"""Read MNIST, or data in its format, from a folder with the four IDX files or through torchvision."""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
IN_TORCHVISION = {"mnist": "MNIST", "fashion": "FashionMNIST"}
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def load(name: str, root: Path) -> Data:
    """Return images (n, 784) in [0, 1] and labels (n,) for training, then for testing.

    `name` is "mnist" or "fashion", which torchvision downloads to `root`, or a folder with the four files.
    """
    if name not in IN_TORCHVISION:
        return load_idx(Path(name))
    try:
        from torchvision import datasets
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"--data {name} is read through torchvision: pip install torchvision; or pass a folder with the files "
            f"{', '.join(FILES)}, each as it is or as .gz, such as Debian's package dataset-fashion-mnist installs"
        ) from error
    kind = getattr(datasets, IN_TORCHVISION[name])
    parts = [kind(root, train=train, download=True) for train in (True, False)]
    train, test = ((part.data.flatten(1).float() / 255, part.targets.long()) for part in parts)
    return (*train, *test)


def load_idx(folder: Path) -> Data:
    """Return the same from a folder with the four files, zipped or not."""
    images, labels, test_images, test_labels = (torch.from_numpy(read_idx(folder / name).copy()) for name in FILES)
    if len(images) != len(labels) or len(test_images) != len(test_labels):
        raise ValueError(f"{folder} has another number of images than of labels")
    return images.flatten(1).float() / 255, labels.long(), test_images.flatten(1).float() / 255, test_labels.long()


def read_idx(path: Path) -> np.ndarray:
    """Return the array in one file of bytes. The format is that of Yann LeCun's page on MNIST."""
    zipped = path.with_name(path.name + ".gz")
    if not path.exists() and not zipped.exists():
        raise FileNotFoundError(f"there is no {path.name} and no {zipped.name} in {path.parent}")
    raw = path.read_bytes() if path.exists() else gzip.decompress(zipped.read_bytes())
    n_dims = int(path.name.split("-idx")[1][0])
    if raw[:4] != bytes([0, 0, 8, n_dims]):  # 8 stands for bytes
        raise ValueError(f"{path} is no IDX file of bytes in {n_dims} dimensions: it begins with {raw[:4]!r}")
    shape = np.frombuffer(raw, ">i4", n_dims, 4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * n_dims)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} says it has the shape {tuple(shape.tolist())}, and has {values.size} bytes")
    return values.reshape(shape)
