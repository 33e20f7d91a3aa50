"""Trains a small MLP on handwritten digits with an L1, L2 or elastic-net penalty, or none.

    python examples/digits.py --penalty l1

The penalty covers all parameters. While training it prints, per epoch, the mean loss and what it is made of; at the end
the accuracies, the parts of the loss, the share of near-zero weights, and the path of a picture of all this.

`--penalty l1` takes l1 = 0.001, `--penalty l2` takes l2 = 0.003, and `--penalty elastic` mixes the two 0.3 to 0.7:
l1 = 0.3 * 0.001 and l2 = 0.7 * 0.003. `--l1` and `--l2` replace the strength as it stands after mixing.

The data are the 8x8 images that come with scikit-learn. Needs: pip install "fastreg[examples]"
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fastreg

BASE_L1, BASE_L2 = 1e-3, 3e-3
# What each penalty takes of the two base strengths.
SHARES = {"none": (0.0, 0.0), "l1": (1.0, 0.0), "l2": (0.0, 1.0), "elastic": (0.3, 0.7)}
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
NEAR_ZERO = 1e-3


class Data(NamedTuple):
    """Images as rows of 64 pixels in [0, 1], and their digits."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


class Terms(NamedTuple):
    """A loss and its parts: loss = cross_entropy + l1 + l2."""

    loss: float
    cross_entropy: float
    l1: float
    l2: float

    def __str__(self) -> str:
        return f"loss {self.loss:.5f} = cross-entropy {self.cross_entropy:.5f} + l1 {self.l1:.5f} + l2 {self.l2:.5f}"


class MLP(nn.Module):
    """64 pixels -> 64 -> 32 -> 10 scores."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores (n, 10) of images (n, 64)."""
        return self.layers(x)


def load_data(dtype: torch.dtype = torch.float32) -> Data:
    """The 1797 digits, a fifth of them for testing; the split is the same for every seed."""
    images, digits = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        images / 16, digits, test_size=0.2, random_state=0, stratify=digits
    )
    return Data(
        torch.tensor(x_train, dtype=dtype),
        torch.tensor(y_train),
        torch.tensor(x_test, dtype=dtype),
        torch.tensor(y_test),
    )


def minibatches(x: Tensor, y: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch, in an order drawn from `generator`."""
    for index in torch.randperm(len(x), generator=generator).split(BATCH_SIZE):
        yield x[index], y[index]


def train(
    model: nn.Module,
    data: Data,
    l1: float,
    l2: float,
    *,
    epochs: int,
    seed: int,
    optimizer: torch.optim.Optimizer | None = None,
    log: Callable[[str], object] = lambda line: None,
) -> list[Terms]:
    """Trains `model` in place and returns the loss and its parts at every step.

    Args:
        seed: of the order of the data, so that the same model and seed train the same way.
        optimizer: Adam if None.
        log: takes one line per epoch, with the means over its steps.
    """
    criterion = nn.CrossEntropyLoss()
    if optimizer is None:
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    reg = fastreg.ElasticNet(model, l1=l1, l2=l2)
    generator = torch.Generator().manual_seed(seed)
    history: list[Terms] = []
    for epoch in range(1, epochs + 1):
        start = len(history)
        for x, y in minibatches(data.x_train, data.y_train, generator):
            cross_entropy = criterion(model(x), y)
            penalty = reg(return_terms=True)
            loss = cross_entropy + penalty.total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(Terms(loss.item(), cross_entropy.item(), penalty.l1.item(), penalty.l2.item()))
        log(f"epoch {epoch:{len(str(epochs))}}/{epochs}  {Terms(*np.mean(history[start:], axis=0))}")
    return history


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, l1: float, l2: float) -> Terms:
    """The loss on all training images with the weights as they are, and its parts."""
    cross_entropy = nn.functional.cross_entropy(model(data.x_train), data.y_train)
    penalty = fastreg.elastic_penalty(model, l1=l1, l2=l2, return_terms=True)
    return Terms(*(t.item() for t in (cross_entropy + penalty.total, cross_entropy, penalty.l1, penalty.l2)))


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The fraction of images that are recognised."""
    return (model(x).argmax(dim=1) == y).double().mean().item()


def all_weights(model: nn.Module) -> np.ndarray:
    """A copy of all parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()


def near_zero_share(weights: np.ndarray) -> float:
    """The fraction of weights with |w| < NEAR_ZERO."""
    return float(np.mean(np.abs(weights) < NEAR_ZERO))


def plot(history: list[Terms], epochs: int, initial: np.ndarray, trained: np.ndarray, title: str, path: Path) -> None:
    """Saves a picture: the parts of the loss by epoch, and the weights before and after."""
    # Without pyplot nothing looks for a display: savefig renders a PNG with Agg.
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)

    means = Terms(*np.reshape(history, (epochs, -1, len(Terms._fields))).mean(axis=1).T)
    labels = Terms("loss", "cross-entropy", "l1 part", "l2 part")
    looks = Terms("k-", "C0--", "C1-", "C2-")
    for values, label, look in zip(means, labels, looks, strict=True):
        if np.any(values):  # a part without strength has no place on a log axis
            left.plot(np.arange(1, epochs + 1), values, look, label=label, marker=".")
    left.set(xlabel="epoch", ylabel="mean over the epoch's steps", yscale="log", title="Training loss and its parts")
    left.set_xlim(0.5, epochs + 0.5)
    left.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("")
    left.legend()

    reach = max(np.abs(initial).max(), np.abs(trained).max())
    bins = np.linspace(-reach, reach, 82)  # an odd number of bins: one is centred on zero
    for weights, when, look in (
        (initial, "initial", {"color": "0.75"}),
        (trained, "trained", {"color": "C3", "histtype": "step"}),
    ):
        right.hist(weights, bins, label=f"{when}: {near_zero_share(weights):.1%} with |w| < {NEAR_ZERO}", **look)
    right.set(xlabel="weight", ylabel="weights per bin", yscale="log", title="Weights before and after training")
    right.set_ylim(0.7, 10 * initial.size)  # room for the legend above the highest possible bin
    right.legend(loc="upper left")
    figure.savefig(path, dpi=120)


def strengths(penalty: str, l1: float | None, l2: float | None) -> tuple[float, float]:
    """The strengths to train with; None stands for an option that was not given.

    Raises:
        ValueError: a strength for a part that `penalty` does not have.
    """
    found = []
    for name, given, base, share in zip(("l1", "l2"), (l1, l2), (BASE_L1, BASE_L2), SHARES[penalty], strict=True):
        if given is not None and share == 0:
            raise ValueError(
                f"argument --{name}: --penalty {penalty} has no {name} part; use --penalty elastic for both"
            )
        found.append(share * base if given is None else given)
    return found[0], found[1]


def main(argv: Sequence[str] | None = None) -> MLP:
    """Trains as the command line says, reports, plots, and returns the trained model."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        l1, l2 = strengths(args.penalty, args.l1, args.l2)
    except ValueError as error:
        parser.error(str(error))
    try:
        # Before the training, not after it: a directory that cannot be written to costs nobody a run.
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        parser.error(f"argument --out: cannot write to {str(args.out)!r}: {error.strerror}")

    data = load_data()
    torch.manual_seed(args.seed)
    model = MLP()
    initial = all_weights(model)
    print(f"penalty {args.penalty}: l1={l1:g} l2={l2:g}, {initial.size} weights, seed {args.seed}", flush=True)
    history = train(model, data, l1, l2, epochs=args.epochs, seed=args.seed, log=lambda line: print(line, flush=True))
    terms = evaluate(model, data, l1, l2)
    if not math.isfinite(terms.loss):
        sys.exit(f"training diverged: the loss is {terms.loss}; try smaller --l1 and --l2")

    trained = all_weights(model)
    test_accuracy = accuracy(model, data.x_test, data.y_test)
    path = args.out / f"digits_{args.penalty}.png"
    title = f"Digits, penalty {args.penalty} (l1={l1:g}, l2={l2:g}): test accuracy {test_accuracy:.1%}"
    plot(history, args.epochs, initial, trained, title, path)
    print(f"final  {terms}")
    print(f"accuracy  train {accuracy(model, data.x_train, data.y_train):.4f}  test {test_accuracy:.4f}")
    for name, measure in (
        ("sum|w|", lambda w: np.abs(w).sum()),
        ("sum w^2", lambda w: np.square(w).sum()),
        (f"near-zero share (|w| < {NEAR_ZERO})", near_zero_share),
    ):
        print(f"{name}  before {measure(initial):.4f}  after {measure(trained):.4f}")
    print(f"plot  {path}")
    return model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a small MLP on handwritten digits with a weight penalty.")
    parser.add_argument(
        "--penalty",
        choices=list(SHARES),
        default="elastic",
        help=f"what is added to the cross-entropy: l1 * sum|w| with l1={BASE_L1}, l2 * sum w^2 with l2={BASE_L2}, "
        f"both mixed 0.3 to 0.7 (elastic: l1=0.3*{BASE_L1}, l2=0.7*{BASE_L2}), or none (default: %(default)s)",
    )
    parser.add_argument("--l1", type=_strength, help="strength of sum|w|, instead of the one that --penalty stands for")
    parser.add_argument(
        "--l2", type=_strength, help="strength of sum w^2, instead of the one that --penalty stands for"
    )
    parser.add_argument("--epochs", type=_whole(range(1, 10**6 + 1)), default=20, help="(default: %(default)s)")
    parser.add_argument(
        "--seed", type=_whole(range(2**32)), default=0, help="of weights and data order (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="where the plot goes (default: %(default)s)")
    return parser


def _strength(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number, 0 or more, got {text!r}")
    return value


def _whole(allowed: range) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) not in allowed:
            raise argparse.ArgumentTypeError(f"must be a whole number from {allowed[0]} to {allowed[-1]}, got {text!r}")
        return int(text)

    return parse


if __name__ == "__main__":
    torch.set_num_threads(1)  # layers this small only lose time to threads
    main()
