"""Compare the proximal step with magnitude pruning: test accuracy against the share of weights that are zero.

    python examples/pruning.py           # train, store and draw: about a minute on one core
    python examples/pruning.py --plot    # draw the stored results again

Trains the MLP of exact_zeros.py on scikit-learn's digits with SGD with momentum and with Adam, for the same number of
epochs in every way:

    proximal step           fastreg.optim with prox=True
    pruned                  trained without a penalty; then the smallest weights are set to zero
    pruned, fine-tuned      pruned after half of the epochs; the other weights train on for the other half
    gradient                fastreg.optim with prox=False, for the histogram

Only the weight matrices are penalized and pruned. The results go to bench/results/training/zeros-digits.json and the
figure, drawn from this file alone, to docs/img/zeros.png. Needs: pip install ".[examples]"
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import digits
import exact_zeros
import mnist
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn

import fastreg

ROOT = Path(__file__).parents[1]
STORED = ROOT / "bench" / "results" / "training" / "zeros-digits.json"
IMAGE = ROOT / "docs" / "img" / "zeros.png"
OPTIMIZERS = ("momentum 0.9", "Adam")
PROX, PRUNED, TUNED, GRADIENT = "proximal step", "pruned", "pruned, fine-tuned", "gradient"
STRENGTHS = (3e-4, 6e-4, 1e-3, 1.5e-3, 2e-3, 2.5e-3, 3e-3)
SHARES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # of the weights, to prune
HISTOGRAM_L1 = 1e-3
REACH = 5e-4  # of the histogram, to both sides of zero
N_BINS = 41  # an odd number: one bin is centered on zero
LOOKS = {PROX: ("C3", "o"), PRUNED: ("C7", "x"), TUNED: ("C0", "s")}


def new_model(seed: int) -> nn.Sequential:
    """Return the MLP of exact_zeros.py; the seed also fixes the order of the batches."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def matrices(model: nn.Module) -> list[Tensor]:
    """Return the weights that are penalized and pruned."""
    return [p for p in model.parameters() if p.ndim > 1]


def optimizer_for(model: nn.Module, name: str, l1: float, prox: bool) -> torch.optim.Optimizer:
    """Return the optimizer, with an L1 penalty of the matrices only."""
    groups = [{"params": matrices(model), "l1": l1}, {"params": [p for p in model.parameters() if p.ndim < 2]}]
    kind = fastreg.optim.SGD if name.startswith("momentum") else fastreg.optim.Adam
    return kind(groups, prox=prox, **exact_zeros.OPTIMIZERS[name])


def train(
    model: nn.Module, data: digits.Data, optimizer: torch.optim.Optimizer, epochs: int, masks: Sequence[Tensor] = ()
) -> None:
    """Train in place. With masks, the weights where a mask is False stay zero."""
    x, y = data[:2]
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            with torch.no_grad():
                for w, mask in zip(matrices(model), masks, strict=False):
                    w.mul_(mask)


def prune(model: nn.Module, share: float) -> list[Tensor]:
    """Set the smallest weights of all matrices together to zero; return the masks of the others."""
    sizes = torch.cat([w.detach().abs().flatten() for w in matrices(model)])
    threshold = sizes.kthvalue(round(share * len(sizes))).values
    masks = [w.detach().abs() > threshold for w in matrices(model)]
    with torch.no_grad():
        for w, mask in zip(matrices(model), masks, strict=True):
            w.mul_(mask)
    return masks


def models(data: digits.Data, name: str, seed: int, epochs: int) -> Iterator[tuple[str, float, nn.Module]]:
    """Yield the way, the strength or the pruned share, and the model of each training with one optimizer and seed."""
    for l1 in STRENGTHS:
        model = new_model(seed)
        train(model, data, optimizer_for(model, name, l1, prox=True), epochs)
        yield PROX, l1, model
    model, rest = new_model(seed), epochs - epochs // 2
    optimizer = optimizer_for(model, name, 0.0, prox=False)
    train(model, data, optimizer, epochs // 2)
    half = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, data, optimizer, rest)
    yield PRUNED, 0.0, model
    for share in SHARES:  # in rising order, so that each pruning contains the last one
        prune(model, share)
        yield PRUNED, share, model
    for share in SHARES:
        model.load_state_dict(half)
        masks = prune(model, share)
        train(model, data, optimizer_for(model, name, 0.0, prox=False), rest, masks)
        yield TUNED, share, model


def all_runs(data: digits.Data, epochs: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Yield the share of zeros and the test accuracy of every training."""
    for name, seed in itertools.product(OPTIMIZERS, range(seeds)):
        for way, value, model in models(data, name, seed, epochs):
            zeros, accuracy = fastreg.sparsity(matrices(model)).item(), digits.accuracy(model, *data[2:])
            facts = {"optimizer": name, "way": way, "value": value, "seed": seed}
            yield facts | {"zeros": round(zeros, 4), "accuracy": round(accuracy, 4)}


def histograms(data: digits.Data, epochs: int) -> dict[str, Any]:
    """Return counts of small weights after training with the gradient of L1 and with the proximal step, seed 0."""
    edges = np.linspace(-REACH, REACH, N_BINS + 1)
    counts: dict[str, Any] = {}
    for way in (GRADIENT, PROX):
        model = new_model(0)
        train(model, data, optimizer_for(model, OPTIMIZERS[0], HISTOGRAM_L1, prox=way == PROX), epochs)
        weights = torch.cat([w.detach().flatten() for w in matrices(model)]).numpy()
        counts[way] = {"exact zeros": int((weights == 0).sum()), "bins": np.histogram(weights, edges)[0].tolist()}
    return {"optimizer": OPTIMIZERS[0], "l1": HISTOGRAM_L1, "reach": REACH, "weights": weights.size, "counts": counts}


def means(stored: dict[str, Any], name: str, way: str) -> list[tuple[float, float]]:
    """Return zeros and accuracy of a way, means over the seeds, in order of their zeros."""
    own = [r for r in stored["runs"] if (r["optimizer"], r["way"]) == (name, way)]
    points = []
    for value in {r["value"] for r in own}:
        same = [r for r in own if r["value"] == value]
        points.append((float(np.mean([r["zeros"] for r in same])), float(np.mean([r["accuracy"] for r in same]))))
    return sorted(points)


def draw_histogram(axes: Axes, stored: dict[str, Any]) -> None:
    """Draw the histogram of the weights around zero."""
    histogram = stored["histogram"]
    edges = np.linspace(-histogram["reach"], histogram["reach"], N_BINS + 1)
    for way, color, filled in ((GRADIENT, "0.55", True), (PROX, "C3", False)):
        own = histogram["counts"][way]
        share = own["exact zeros"] / histogram["weights"]
        label = f"{'gradient of L1' if filled else way}: {share:.0%} exactly zero"
        axes.stairs(own["bins"], edges, label=label, color=color, fill=filled, linewidth=1.8)
    axes.set(xlabel="weight", ylabel="weights per bin", xlim=(edges[0], edges[-1]))
    axes.set_xticks(np.linspace(edges[0], edges[-1], 5))
    axes.set_ylim(0, 1.3 * max(max(own["bins"]) for own in histogram["counts"].values()))  # room for the legend
    axes.set_title(f"Weights near zero, l1 = {histogram['l1']:g}")
    axes.legend(loc="upper right")


def draw_accuracy(axes: Axes, stored: dict[str, Any]) -> None:
    """Draw accuracy against zeros: a color per way, a line style per optimizer."""
    for name, line, is_filled in zip(OPTIMIZERS, ("-", "--"), (True, False), strict=True):
        for way, (color, marker) in LOOKS.items():
            label = f"{way}, {'SGD with momentum' if is_filled else name}"
            face = color if is_filled else "none"
            points = zip(*means(stored, name, way), strict=True)
            axes.plot(*points, color=color, marker=marker, linestyle=line, markerfacecolor=face, label=label)
    axes.set(xlabel="weights that are exactly zero", ylabel="test accuracy", ylim=(0.8, 1.0), xlim=(0, 1))
    axes.set_title(f"Accuracy, {stored['epochs']} epochs in every way")
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.grid(color="0.9")
    axes.legend(loc="lower left", fontsize="small")


def draw(stored: dict[str, Any], path: Path) -> None:
    """Draw the figure of the README from stored results."""
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_histogram(left, stored)
    draw_accuracy(right, stored)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"plot  {path}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and store, or only draw, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=STORED, help="the file to write or draw")
    parser.add_argument("--image", type=Path, default=IMAGE, help="the figure to write")
    parser.add_argument("--plot", action="store_true", help="draw the stored results, train nothing")
    args = parser.parse_args(arguments)
    if not args.plot:
        data, runs = digits.load_data(), []
        for run in all_runs(data, args.epochs, args.seeds):
            runs.append(run)
            print("{optimizer:>12}  {way:18} {value:<6g} seed {seed}: {zeros:.1%} zeros, {accuracy:.1%}".format(**run))
        facts = {"data": "digits", "epochs": args.epochs, "seeds": args.seeds, "environment": mnist.environment()}
        facts["histogram"] = histograms(data, args.epochs)
        lines = ",\n".join(map(json.dumps, runs))
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(f'{json.dumps(facts)[:-1]}, "runs": [\n{lines}\n]}}\n')
    draw(json.loads(args.results.read_text()), args.image)


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower for layers this small
    main()
