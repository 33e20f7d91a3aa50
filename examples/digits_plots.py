"""Draw the training of digits.py: loss, weights and exact zeros; with `--compare`, the exact zeros of all methods.

    python examples/digits_plots.py --penalty l1
    python examples/digits_plots.py --penalty l1 --compare

The picture goes to outputs/, or to the folder of `--out`. The other options are those of digits.py.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import digits
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn

import fastreg

# Two pairs of curves coincide: draw the first of each wide and the second dashed.
LOOKS = ({"linewidth": 4}, {"linestyle": "--"}, {"linewidth": 4}, {"linestyle": "--"})


class Run(NamedTuple):
    """The results of one training. `zeros` are fractions, before training and after each epoch."""

    model: nn.Module
    initial: Tensor  # all weights in one vector
    trained: Tensor
    means: Tensor  # (epochs, 4): loss, cross-entropy, l1 and l2 part
    zeros: list[float]
    accuracy: float


def run(args: argparse.Namespace, method: str) -> Run:
    """Train with `method` and the options of the command line."""
    data, model = digits.load_data(), digits.build_model()
    initial, zeros, means = weights(model), [fastreg.sparsity(model).item()], []
    optimizer = digits.build_optimizer(model, *digits.strengths(args), method)
    for steps in digits.train(model, data, optimizer, *digits.strengths(args), method, args.epochs):
        zeros.append(fastreg.sparsity(model).item())
        means.append(steps.mean(dim=0))
    accuracy = digits.accuracy(model, *data[2:])
    print(f"{method:9}  loss {means[-1][0]:.5f}  exact zeros {zeros[-1]:.2%}  test accuracy {accuracy:.4f}", flush=True)
    return Run(model, initial, weights(model), torch.stack(means), zeros, accuracy)


def weights(model: nn.Module) -> Tensor:
    """Return a copy of all parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def draw_loss(axes: Axes, run: Run) -> None:
    """Draw the loss and its parts by epoch."""
    epochs = range(1, len(run.means) + 1)
    for values, label in zip(run.means.T, ("loss", "cross-entropy", "l1 part", "l2 part"), strict=True):
        if values.any():  # a log axis cannot show a part that is 0
            axes.plot(epochs, values, label=label, marker=".")
    axes.set(xlabel="epoch", ylabel="mean over the epoch's steps", yscale="log", title="Training loss and its parts")
    axes.legend()


def draw_weights(axes: Axes, run: Run) -> None:
    """Draw the histogram of the weights before and after training."""
    reach = torch.cat([run.initial, run.trained]).abs().max().item()
    bins = torch.linspace(-reach, reach, 82)  # an odd number of bins: one is centered on zero
    axes.hist(run.initial, bins, label="initial", color="0.75")
    axes.hist(run.trained, bins, label="trained", color="C3", histtype="step")
    axes.set(xlabel="weight", ylabel="weights per bin", yscale="log", title="Weights before and after training")
    axes.legend()


def draw_zeros(axes: Axes, runs: dict[str, Run]) -> None:
    """Draw the share of exact zeros by epoch, a curve for each method."""
    for (method, run), look in zip(runs.items(), LOOKS, strict=False):
        label = f"{method}: {run.zeros[-1]:.1%} at the end, test accuracy {run.accuracy:.1%}"
        axes.plot(run.zeros, label=label, marker=".", **look)
    axes.set(xlabel="epoch (0: before training)", ylabel="weights that are exactly zero", ylim=(-0.03, 1.03))
    axes.set_title("Exact zeros over training")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.legend()


def main(arguments: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Train and draw as the command line says; return the models by method."""
    parser = digits.options()
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--compare", action="store_true", help="draw all methods")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="a folder (default: %(default)s)")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = {method: run(args, method) for method in (digits.METHODS if args.compare else [args.method])}
    # Figure instead of pyplot: it needs no display.
    figure = Figure(figsize=(8, 4.5) if args.compare else (15, 4.2), layout="constrained")
    figure.suptitle(f"Digits, penalty {args.penalty}")
    if args.compare:
        draw_zeros(figure.subplots(), runs)
    else:
        left, middle, right = figure.subplots(1, 3)
        draw_loss(left, runs[args.method])
        draw_weights(middle, runs[args.method])
        draw_zeros(right, runs)
    path = args.out / f"digits_{args.penalty}_{'methods' if args.compare else args.method}.png"
    figure.savefig(path, dpi=120)
    print(f"plot  {path}")
    return {method: run.model for method, run in runs.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower for layers this small
    main()
