"""Train the MLP 784-64-32-10 with an L1, L2 or elastic-net penalty, as articles that explain these penalties do.

    python examples/mnist.py --penalty elastic                    # MNIST, through torchvision
    python examples/mnist.py --data FOLDER --penalty l1           # a folder with the four IDX files
    python examples/mnist.py --data FOLDER --compare              # four ways to write the same training
    python examples/mnist.py --plot                               # draws what --compare stored

The batch size is 10 and the optimizer is Adam. The strengths are 1 for L1 and for L2, and 0.3 and 0.7 for the elastic
net; `--weight` scales them. Every 500 batches the script prints the loss of the batch and the L1 and L2 parts of it.

There are four methods. `cat` is the usual form with torch.cat. `penalty` adds fastreg.ElasticNet to the loss. `attach`
adds its gradient at the optimizer's step. `optimizer` is fastreg.optim.Adam. Needs: pip install ".[examples]"
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mnist_data
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastreg

ROOT = Path(__file__).parents[1]
STORED = ROOT / "bench" / "results" / "training" / "mnist-compare.json"
WEIGHTS = {"l1": (1.0, 0.0), "l2": (0.0, 1.0), "elastic": (0.3, 0.7)}
METHODS = ("cat", "penalty", "attach", "optimizer")
BATCH_SIZE = 10
LEARNING_RATE = 1e-4
EVERY = 500


class Training:
    """One model and its optimizer, trained by one method."""

    def __init__(self, method: str, l1: float, l2: float) -> None:
        torch.manual_seed(42)
        self.model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.method, self.l1, self.l2 = method, l1, l2
        # PyTorch's fastest form, so that the comparison is about the penalty and not about the optimizer.
        adam = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, fused=True)
        self.optimizer: torch.optim.Optimizer = adam
        self.reg = fastreg.ElasticNet(self.model, l1=l1, l2=l2)
        if method == "attach":
            self.reg.attach(self.optimizer)
        if method == "optimizer":
            options: dict[str, Any] = {"l1": l1, "l2": l2, "track": True}
            self.optimizer = fastreg.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, **options)

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Train on a batch; return its loss and the L1 and L2 parts of it."""
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        if self.method == "cat":
            weights = torch.cat([p.view(-1) for p in self.model.parameters()])
            l1, l2 = self.l1 * weights.abs().sum(), self.l2 * weights.square().sum()
            loss = loss + l1 + l2
        elif self.method == "penalty":
            total, l1, l2 = self.reg(return_terms=True)
            loss = loss + total
        loss.backward()
        self.optimizer.step()
        if self.method in ("attach", "optimizer"):
            last = self.reg.last if self.method == "attach" else self.optimizer.last
            loss, l1, l2 = loss + last.total, last.l1, last.l2
        return loss.detach(), l1.detach(), l2.detach()


def batches(x: Tensor, y: Tensor, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the examples in batches, in the same shuffled order at every call."""
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=order).split(BATCH_SIZE):
            yield x[batch], y[batch]


def interval(n_images: int, epochs: int) -> int:
    """Return how many batches lie between two log entries: EVERY, or all batches if there are fewer."""
    return min(EVERY, epochs * math.ceil(n_images / BATCH_SIZE))


def train(data: mnist_data.Data, method: str, l1: float, l2: float, epochs: int) -> nn.Module:
    """Train, print the losses, and return the model."""
    training, every = Training(method, l1, l2), interval(len(data[0]), epochs)
    for i, (x, y) in enumerate(batches(*data[:2], epochs), 1):
        loss, l1_part, l2_part = training.step(x, y)
        if i % every == 0:
            parts = f"of which {l1_part:.5f} L1 loss; {l2_part:.5f} L2 loss"
            print(f"Loss after mini-batch {i:5d}: {loss:.5f} ({parts})", flush=True)
    return training.model


def compare(data: mnist_data.Data, l1: float, l2: float, epochs: int) -> dict[str, Any]:
    """Train with all methods on the same batches, in turn; return losses, accuracy and the median time of a step."""
    every = interval(len(data[0]), epochs)
    trainings = {method: Training(method, l1, l2) for method in METHODS}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    logged: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for i, (x, y) in enumerate(batches(*data[:2], epochs), 1):
        turn = i % len(METHODS)  # no method is always first
        for method in METHODS[turn:] + METHODS[:turn]:
            start = time.perf_counter()
            found = trainings[method].step(x, y)
            times[method].append(time.perf_counter() - start)
            if i % every == 0:
                logged[method].append([each.item() for each in found])
    test = {method: accuracy(training.model, *data[2:]) for method, training in trainings.items()}
    return {
        method: {
            "microseconds": round(statistics.median(times[method]) * 1e6, 1),
            "accuracy": round(test[method], 4),
            "logged": logged[method],
        }
        for method in METHODS
    }


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the fraction of images that are classified correctly."""
    with torch.no_grad():
        return (model(x).argmax(dim=1) == y).double().mean().item()


def environment() -> dict[str, Any]:
    """Return device, versions and commit."""
    sys.path.append(str(ROOT))
    from bench.report import results

    return results.environment(torch.device("cpu"))


def table(runs: dict[str, Any]) -> str:
    """Return the comparison as text."""
    lines = ["method      us per step  of cat     loss  L1 part  L2 part  farthest  accuracy"]
    for method, run in runs.items():
        ratio = run["microseconds"] / runs["cat"]["microseconds"]
        loss, l1, l2 = run["logged"][-1]
        pairs = zip(run["logged"], runs["cat"]["logged"], strict=True)
        farthest = max(abs(own[0] - other[0]) / other[0] for own, other in pairs)
        lines.append(
            f"{method:11} {run['microseconds']:11.0f} {ratio:7.2f} {loss:8.5f} {l1:8.5f} {l2:8.5f} "
            f"{farthest:9.1e} {run['accuracy']:9.4f}"
        )
    return "\n".join(lines)


def draw(stored: dict[str, Any], path: Path) -> None:
    """Draw the losses, which coincide, and the time of a step."""
    every = interval(stored["images"], stored["epochs"])
    figure = Figure(figsize=(11, 4), layout="constrained")
    figure.suptitle(f"{stored['data']}, penalty {stored['penalty']}: the same training, written in four ways")
    left, right = figure.subplots(1, 2)
    for width, (method, run) in zip((7, 5, 3, 1), stored["runs"].items(), strict=True):
        positions = [every * (i + 1) for i in range(len(run["logged"]))]
        left.plot(positions, [losses[0] for losses in run["logged"]], linewidth=width, label=method)
    left.set(xlabel="batch", ylabel="loss of the batch, with its penalty", yscale="log")
    left.legend()
    left.grid(color="0.9", which="both")
    times = [run["microseconds"] for run in stored["runs"].values()]
    right.bar_label(right.bar(METHODS, times, color=["C0", "C1", "C2", "C3"]), fmt="%.0f")
    right.set(ylabel="microseconds per step, median", xlabel=stored["environment"]["cpu"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"plot  {path}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, compare or draw, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--penalty", choices=WEIGHTS, default="elastic", help="default: %(default)s")
    parser.add_argument("--data", default="mnist", help="mnist, fashion, or a folder of IDX files (%(default)s)")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision downloads to (%(default)s)")
    parser.add_argument("--method", choices=METHODS, default="penalty", help="default: %(default)s")
    parser.add_argument("--weight", type=float, default=1.0, help="factor of the strengths (%(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--limit", type=int, help="number of training images to use")
    parser.add_argument("--compare", action="store_true", help="train with all methods; print a table and draw a plot")
    parser.add_argument("--plot", action="store_true", help="draw the stored results, train nothing")
    parser.add_argument("--results", type=Path, default=STORED, help="the file that --compare writes")
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "img" / "mnist_compare.png")
    args = parser.parse_args(arguments)
    l1, l2 = (args.weight * share for share in WEIGHTS[args.penalty])
    if args.plot:
        draw(json.loads(args.results.read_text()), args.image)
        return
    x, y, *test = mnist_data.load(args.data, args.root)
    data = (x[: args.limit], y[: args.limit], *test)
    if not args.compare:
        model = train(data, args.method, l1, l2, args.epochs)
        print(f"accuracy  train {accuracy(model, *data[:2]):.4f}  test {accuracy(model, *test):.4f}")
        print(f"exact zeros {fastreg.sparsity(model):.2%}")
        return
    facts = {"data": Path(args.data).name, "images": len(data[0]), "epochs": args.epochs, "batch_size": BATCH_SIZE}
    facts |= {"penalty": f"{args.penalty}, l1={l1:g}, l2={l2:g}", "environment": environment()}
    stored = {**facts, "runs": compare(data, l1, l2, args.epochs)}
    print(table(stored["runs"]))
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(stored, indent=1) + "\n")
    draw(stored, args.image)


if __name__ == "__main__":
    torch.set_num_threads(1)  # layers this small only lose time to threads
    main()
