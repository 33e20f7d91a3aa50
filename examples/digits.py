"""Trains a small MLP on handwritten digits with an L1, L2 or elastic-net penalty, or none.

    python examples/digits.py --penalty l1

The penalty covers all parameters. While training it prints, per epoch, the share of exact zeros, the mean loss and what
that is made of; at the end the accuracies, the parts of the loss, the shares of near-zero and exactly zero weights, and
the path of a picture of all this.

`--penalty l1` takes l1 = 0.001, `--penalty l2` takes l2 = 0.003, and `--penalty elastic` mixes the two 0.3 to 0.7:
l1 = 0.3 * 0.001 and l2 = 0.7 * 0.003. `--l1` and `--l2` replace the strength as it stands after mixing.

`--method` says how the penalty is applied: as a term of the loss, by `attach` as a gradient added before each step (the
same weights, bit for bit), or by `attach` as a proximal step (prox), which alone leaves exact zeros. `--compare` trains
all three from the same seed and draws their exact zeros by epoch.

The data are the 8x8 images that come with scikit-learn. Needs: pip install "fastreg[examples]"
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fastreg

BASE_L1, BASE_L2 = 1e-3, 3e-3
# What each penalty takes of the two base strengths.
SHARES = {"none": (0.0, 0.0), "l1": (1.0, 0.0), "l2": (0.0, 1.0), "elastic": (0.3, 0.7)}
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
# A proximal step takes lr * l1 from each weight: with Adam's lr far too little for zeros, with SGD's enough.
SGD_LEARNING_RATE = 0.2
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, lr=LEARNING_RATE),
    "sgd": partial(torch.optim.SGD, lr=SGD_LEARNING_RATE),
}
# Each method and the mode to attach in, if any.
METHODS = {"penalty": None, "attach": "grad", "prox": "prox"}
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


class Run(NamedTuple):
    """What came of one training; the exact zeros are fractions, before training and after each epoch."""

    model: "MLP"
    initial: np.ndarray
    trained: np.ndarray
    history: list[Terms]
    zeros: list[float]
    terms: Terms
    test_accuracy: float


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
    method: str = "penalty",
    log: Callable[[str], object] = lambda line: None,
    log_zeros: Callable[[float], object] = lambda fraction: None,
) -> list[Terms]:
    """Trains `model` in place and returns the loss and its parts at every step.

    Args:
        seed: of the order of the data, so that the same model and seed train the same way.
        optimizer: Adam if None.
        method: "penalty" adds the penalty to the loss; "attach" and "prox" leave it to the optimizer's step. The parts
            returned are of the weights before the step, but with "prox" between the optimizer's and the proximal step.
        log: takes one line per epoch, with the means over its steps.
        log_zeros: takes the fraction of weights that are exactly zero, after each epoch.
    """
    criterion = nn.CrossEntropyLoss()
    if optimizer is None:
        optimizer = OPTIMIZERS["adam"](model.parameters())
    reg = fastreg.ElasticNet(model, l1=l1, l2=l2)
    mode = METHODS[method]
    handle = reg.attach(optimizer, mode) if mode else None
    generator = torch.Generator().manual_seed(seed)
    history: list[Terms] = []
    for epoch in range(1, epochs + 1):
        start = len(history)
        for x, y in minibatches(data.x_train, data.y_train, generator):
            loss = cross_entropy = criterion(model(x), y)
            if not handle:
                penalty = reg(return_terms=True)
                loss = cross_entropy + penalty.total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if handle:
                penalty = reg.last
                loss = cross_entropy.detach() + penalty.total
            history.append(Terms(loss.item(), cross_entropy.item(), penalty.l1.item(), penalty.l2.item()))
        zeros = fastreg.sparsity(model).item()
        log_zeros(zeros)
        means = Terms(*np.mean(history[start:], axis=0))
        log(f"epoch {epoch:{len(str(epochs))}}/{epochs}  exact zeros {zeros:.4f}  {means}")
    if handle:
        handle.remove()
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


def plot(runs: dict[str, Run], title: str, path: Path) -> None:
    """Saves a picture: the exact zeros by epoch, and of a single run its loss and its weights, too."""
    # Without pyplot nothing looks for a display: savefig renders a PNG with Agg.
    figure = Figure(figsize=(15, 4.2) if len(runs) == 1 else (8, 4.5), layout="constrained")
    figure.suptitle(title)
    if len(runs) == 1:
        (run,) = runs.values()
        left, middle, right = figure.subplots(1, 3)
        _draw_loss(left, run.history, epochs=len(run.zeros) - 1)
        _draw_weights(middle, run.initial, run.trained)
    else:
        right = figure.subplots()
    _draw_zeros(right, runs)
    figure.savefig(path, dpi=120)


def _draw_loss(axes: Axes, history: list[Terms], epochs: int) -> None:
    means = Terms(*np.reshape(history, (epochs, -1, len(Terms._fields))).mean(axis=1).T)
    labels = Terms("loss", "cross-entropy", "l1 part", "l2 part")
    looks = Terms("k-", "C0--", "C1-", "C2-")
    for values, label, look in zip(means, labels, looks, strict=True):
        if np.any(values):  # a part without strength has no place on a log axis
            axes.plot(np.arange(1, epochs + 1), values, look, label=label, marker=".")
    axes.set(xlabel="epoch", ylabel="mean over the epoch's steps", yscale="log", title="Training loss and its parts")
    axes.set_xlim(0.5, epochs + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.legend()


def _draw_weights(axes: Axes, initial: np.ndarray, trained: np.ndarray) -> None:
    reach = max(np.abs(initial).max(), np.abs(trained).max())
    bins = np.linspace(-reach, reach, 82)  # an odd number of bins: one is centred on zero
    for weights, when, look in (
        (initial, "initial", {"color": "0.75"}),
        (trained, "trained", {"color": "C3", "histtype": "step"}),
    ):
        axes.hist(weights, bins, label=f"{when}: {near_zero_share(weights):.1%} with |w| < {NEAR_ZERO}", **look)
    axes.set(xlabel="weight", ylabel="weights per bin", yscale="log", title="Weights before and after training")
    axes.set_ylim(0.7, 10 * initial.size)  # room for the legend above the highest possible bin
    axes.legend(loc="upper left")


def _draw_zeros(axes: Axes, runs: dict[str, Run]) -> None:
    # Of several, the first is wide and the second dashed, for curves that coincide.
    looks = [("C0-", 1.5)] if len(runs) == 1 else [("C1-", 4), ("k--", 1.5), ("C0-", 1.5)]
    for (name, run), (look, width) in zip(runs.items(), looks, strict=True):
        label = f"{name}: {run.zeros[-1]:.1%} at the end, test accuracy {run.test_accuracy:.1%}"
        axes.plot(run.zeros, look, label=label, linewidth=width, marker=".")
    axes.set(xlabel="epoch (0: before training)", ylabel="weights that are exactly zero", ylim=(-0.03, 1.03))
    axes.set_title("Exact zeros over training")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend()


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


def main(argv: Sequence[str] | None = None) -> MLP | dict[str, MLP]:
    """Does what the command line says and returns the trained model; with --compare, one for each method."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        l1, l2 = strengths(args.penalty, args.l1, args.l2)
    except ValueError as error:
        parser.error(str(error))
    if args.penalty == "none" and (args.compare or args.method != "penalty"):
        option = "--compare" if args.compare else "--method"
        parser.error(f"argument {option}: --penalty none leaves nothing to apply; use --penalty l1, l2 or elastic")
    try:
        # Before the training, not after it: a directory that cannot be written to costs nobody a run.
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        parser.error(f"argument --out: cannot write to {str(args.out)!r}: {error.strerror}")

    data = load_data()
    methods = list(METHODS) if args.compare else [args.method]
    runs = {method: run(args, method, data, l1, l2) for method in methods}
    suffix = "_methods" if args.compare else "" if args.method == "penalty" else f"_{args.method}"
    path = args.out / f"digits_{args.penalty}{suffix}.png"
    title = f"Digits, penalty {args.penalty} (l1={l1:g}, l2={l2:g}), optimizer {_optimizer(args)}"
    if not args.compare:
        title += f", method {args.method}: test accuracy {runs[args.method].test_accuracy:.1%}"
    plot(runs, title, path)
    if args.compare:
        for method, found in runs.items():
            print(f"{method:7}  exact zeros {found.zeros[-1]:.4f}  test accuracy {found.test_accuracy:.4f}")
    else:
        report(runs[args.method], data)
    print(f"plot  {path}")
    return {method: found.model for method, found in runs.items()} if args.compare else runs[args.method].model


def run(args: argparse.Namespace, method: str, data: Data, l1: float, l2: float) -> Run:
    """Trains one model with `method`, as the command line says otherwise."""
    torch.manual_seed(args.seed)
    model = MLP()
    initial, zeros = all_weights(model), [fastreg.sparsity(model).item()]
    optimizer = OPTIMIZERS[_optimizer(args)](model.parameters())
    print(f"penalty {args.penalty}: l1={l1:g} l2={l2:g}, {initial.size} weights, seed {args.seed}")
    print(f"method {method}, optimizer {_optimizer(args)}, lr {optimizer.param_groups[0]['lr']:g}", flush=True)
    log = partial(print, flush=True)
    options = {"epochs": args.epochs, "seed": args.seed, "optimizer": optimizer, "method": method}
    history = train(model, data, l1, l2, **options, log=log, log_zeros=zeros.append)
    terms = evaluate(model, data, l1, l2)
    if not math.isfinite(terms.loss):
        sys.exit(f"training diverged: the loss is {terms.loss}; try smaller --l1 and --l2")
    return Run(model, initial, all_weights(model), history, zeros, terms, accuracy(model, data.x_test, data.y_test))


def _optimizer(args: argparse.Namespace) -> str:
    return args.optimizer or ("sgd" if args.compare or args.method == "prox" else "adam")


def report(run: Run, data: Data) -> None:
    """Prints the loss, the accuracies, and the weights in figures."""
    print(f"final  {run.terms}")
    print(f"accuracy  train {accuracy(run.model, data.x_train, data.y_train):.4f}  test {run.test_accuracy:.4f}")
    for name, measure in (
        ("sum|w|", lambda w: np.abs(w).sum()),
        ("sum w^2", lambda w: np.square(w).sum()),
        (f"near-zero share (|w| < {NEAR_ZERO})", near_zero_share),
    ):
        print(f"{name}  before {measure(run.initial):.4f}  after {measure(run.trained):.4f}")
    print(f"exact-zero share (w = 0)  before {run.zeros[0]:.4f}  after {run.zeros[-1]:.4f}")


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
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--method",
        choices=list(METHODS),
        default="penalty",
        help="how the penalty is applied: penalty adds it to the loss, attach adds its gradient before each step, prox "
        "shrinks the weights after each step, to exactly zero where they are small (default: %(default)s)",
    )
    way.add_argument("--compare", action="store_true", help="train with all three methods and draw their exact zeros")
    parser.add_argument(
        "--optimizer",
        choices=list(OPTIMIZERS),
        help=f"adam with lr={LEARNING_RATE} or sgd with lr={SGD_LEARNING_RATE}. A proximal step takes lr*l1 from each "
        "weight, and Adam's lr makes that too little for zeros in so few epochs (default: sgd for --method prox and "
        "--compare, else adam)",
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
