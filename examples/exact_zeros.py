"""How sparse a network becomes at what accuracy, by the optimizer and by how the L1 penalty is applied.

    python examples/exact_zeros.py                    # digits, all of it: some minutes
    python examples/exact_zeros.py --data FOLDER      # a folder with the four IDX files of Fashion-MNIST or MNIST
    python examples/exact_zeros.py --plot             # draws what was stored

Trains the MLP of digits.py, or 784-64-32-10, for each optimizer, way, strength and seed, and writes the share of exact
zeros among the weight matrices and the test accuracy to bench/results/training/. Needs: pip install ".[examples]"
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import digits
import mnist_data
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import nn

import fastreg

ROOT = Path(__file__).parents[1]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.2},
    "momentum 0.9": {"lr": 0.02, "momentum": 0.9},
    "Adam": {"lr": 1e-3},
    "AdamW": {"lr": 1e-3, "weight_decay": 1e-2},
}
BUILT_IN, ATTACHED, BY_LR, GRADIENT = "built in", "attached", 'attached, metric="lr"', "gradient"
WAYS = (BUILT_IN, ATTACHED, BY_LR, GRADIENT)
STRENGTHS = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 8e-3)
# Color, marker and line of each, and what the legend calls it.
LOOKS = {
    BUILT_IN: ("C3", "o", "-", "fastreg.optim, prox=True"),
    ATTACHED: ("black", "x", ":", 'attach, mode="prox"'),
    BY_LR: ("C0", "s", "--", 'attach, mode="prox", metric="lr"'),
    GRADIENT: ("C7", "^", "-.", 'attach, mode="grad"'),
}


def optimizer_of(name: str, way: str, model: nn.Module, l1: float) -> torch.optim.Optimizer:
    """The optimizer with the penalty of all matrices: biases go without."""
    options = OPTIMIZERS[name]
    kind = "SGD" if name.startswith(("SGD", "momentum")) else name
    if way == BUILT_IN:
        matrices, biases = ([p for p in model.parameters() if (p.ndim < 2) == is_bias] for is_bias in (False, True))
        groups = [{"params": matrices, "l1": l1}, {"params": biases}]
        return getattr(fastreg.optim, kind)(groups, prox=True, **options)
    optimizer = getattr(torch.optim, kind)(model.parameters(), **options)
    reg = fastreg.ElasticNet(model, l1=l1, exclude=fastreg.bias_and_norm)
    if way == GRADIENT:
        reg.attach(optimizer, mode="grad")
    else:
        reg.attach(optimizer, mode="prox", metric="lr" if way == BY_LR else "optimizer")
    return optimizer


def train(data: digits.Data, name: str, way: str, l1: float, seed: int, epochs: int) -> dict[str, Any]:
    """One training, and what came of it."""
    x, y, x_test, y_test = data
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = optimizer_of(name, way, model, l1)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    zeros = fastreg.sparsity(model, exclude=fastreg.bias_and_norm).item()
    found = {"optimizer": name, "way": way, "l1": l1, "seed": seed, "epochs": epochs, "zeros": round(zeros, 4)}
    return found | {"accuracy": round(digits.accuracy(model, x_test, y_test), 4)}


def all_runs(data: digits.Data, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every optimizer, way, strength and seed."""
    for name, way, l1, seed in itertools.product(OPTIMIZERS, WAYS, args.strengths, range(args.seeds)):
        yield train(data, name, way, l1, seed, args.epochs)


def draw(stored: dict[str, Any], path: Path) -> None:
    """Test accuracy over exact zeros: a panel per optimizer, a curve per way through the means over the seeds."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(f"{stored['data']}: {stored['epochs']} epochs, {stored['seeds']} seeds, l1 from {stored['l1']}")
    for axes, name in zip(figure.subplots(2, 2, sharex=True, sharey=True).flat, OPTIMIZERS, strict=True):
        for way in WAYS:
            own = [r for r in stored["runs"] if r["optimizer"] == name and r["way"] == way]
            strengths = sorted({r["l1"] for r in own})
            means = [
                [np.mean([r[key] for r in own if r["l1"] == l1]) for l1 in strengths] for key in ("zeros", "accuracy")
            ]
            color, marker, line, label = LOOKS[way]
            axes.scatter([r["zeros"] for r in own], [r["accuracy"] for r in own], s=8, color=color, alpha=0.3)
            axes.plot(*means, color=color, marker=marker, linestyle=line, label=label)
        axes.set_title(name)
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.grid(color="0.9")
    first: Any = figure.axes[0]
    for axes in figure.axes[2:]:
        axes.set_xlabel("weights that are exactly zero")
    for axes in figure.axes[::2]:
        axes.set_ylabel("test accuracy")
    first.set_ylim(0.75, max(r["accuracy"] for r in stored["runs"]) + 0.02)  # what is less is no model any more
    first.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=len(WAYS))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"plot  {path}")


def main(arguments: Sequence[str] | None = None, show: Callable[[str], object] = print) -> None:
    """Trains and stores, or draws, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of IDX files (default: scikit-learn's digits)")
    parser.add_argument("--name", default="digits", help="of the stored files (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS, help="of l1 (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "training")
    parser.add_argument("--img", type=Path, default=ROOT / "docs" / "img")
    parser.add_argument("--plot", action="store_true", help="draw what is stored, train nothing")
    args = parser.parse_args(arguments)
    file = args.results / f"exact-zeros-{args.name}.json"
    if not args.plot:
        found = []
        for run in all_runs(digits.load_data() if args.data is None else mnist_data.load_idx(args.data), args):
            found.append(run)
            show(
                "{optimizer:>12}  {way:20}  l1 {l1:<7g} seed {seed}: zeros {zeros:.1%}  accuracy {accuracy:.1%}".format(
                    **run
                )
            )
        span = f"{min(args.strengths):g} to {max(args.strengths):g}"
        facts = {"data": args.name, "epochs": args.epochs, "seeds": args.seeds, "l1": span, "torch": torch.__version__}
        args.results.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(map(json.dumps, found))
        file.write_text(f'{json.dumps(facts)[:-1]}, "runs": [\n{lines}\n]}}\n')
    draw(json.loads(file.read_text()), args.img / f"exact_zeros_{args.name}.png")


if __name__ == "__main__":
    torch.set_num_threads(1)  # layers this small only lose time to threads
    main()
