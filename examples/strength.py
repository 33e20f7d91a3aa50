"""Find a strength: by a regularization path with warm starts, or for a target share of zeros.

    python examples/strength.py path                 # a linear model on scikit-learn's diabetes data, beside lasso_path
    python examples/strength.py target --zeros 0.8   # the MLP of digits.py; adjusts l1 during training

Needs: pip install ".[examples]"
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import digits
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes
from sklearn.linear_model import lasso_path
from torch import Tensor, nn

import fastreg

IMG = Path(__file__).parents[1] / "docs" / "img"


def load_problem() -> tuple[Tensor, Tensor]:
    """Return standardized features (442, 10) and the centered target (442,), in float64."""
    x, y = load_diabetes(return_X_y=True, scaled=False)
    return torch.tensor((x - x.mean(0)) / x.std(0)), torch.tensor(y - y.mean())


def largest_strength(x: Tensor, y: Tensor) -> float:
    """Return the smallest l1 at which all coefficients are zero: the largest gradient of the loss at zero."""
    return (x.T @ y / len(x)).abs().max().item()


def path(x: Tensor, y: Tensor, n: int = 30, steps: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Return strengths (n,), from the largest down to a thousandth of it, and the coefficients (n, 10) at each.

    Every fit starts from the coefficients of the last one.
    """
    model = nn.Linear(x.shape[1], 1, bias=False, dtype=x.dtype)
    nn.init.zeros_(model.weight)
    lr = 1 / torch.linalg.eigvalsh(x.T @ x / len(x))[-1].item()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.95)
    reg = fastreg.ElasticNet(model)
    reg.attach(optimizer, mode="prox")
    strengths, found = largest_strength(x, y) * np.logspace(0, -3, n), []
    for l1 in strengths:
        reg.l1 = float(l1)
        for _ in range(steps):
            optimizer.zero_grad()
            ((model(x)[:, 0] - y).square().mean() / 2).backward()
            optimizer.step()
        found.append(model.weight.detach().numpy()[0].copy())
    return strengths, np.array(found)


def train_to(zeros: float, epochs: int = 60) -> tuple[nn.Module, list[tuple[float, float]]]:
    """Train the digits MLP to a share of exact zeros; return it, with l1 and the share after each epoch."""
    data, model = digits.load_data(), digits.build_model()
    optimizer = fastreg.optim.SGD(model.parameters(), lr=digits.LEARNING_RATE, l1=1e-3, prox=True)
    group, log = optimizer.param_groups[0], []
    for _ in range(epochs):
        for batch in torch.randperm(len(data[0])).split(digits.BATCH_SIZE):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data[0][batch]), data[1][batch]).backward()
            optimizer.step()
        share = fastreg.sparsity(model).item()
        # Slowly up and quickly down: a zero returns only where the gradient of the data exceeds l1.
        group["l1"] *= 1.05 if share < zeros else 0.8
        log.append((group["l1"], share))
    return model, log


def draw(x: Tensor, y: Tensor, file: Path) -> None:
    """Draw the coefficients over l1, with scikit-learn's."""
    strengths, found = path(x, y)
    _, expected, _ = lasso_path(x.numpy(), y.numpy(), alphas=strengths, tol=1e-10, max_iter=100_000)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (own, other) in enumerate(zip(found.T, expected, strict=True)):
        axes.plot(strengths, own, color=f"C{i}", label="fastreg" if i == 0 else None)
        axes.plot(strengths, other, "k:", linewidth=1, label="scikit-learn's lasso_path" if i == 0 else None)
    axes.set(xscale="log", xlabel="l1, from strong to weak", ylabel="coefficients", title="Diabetes, ten features")
    axes.invert_xaxis()
    axes.legend()
    figure.savefig(file, dpi=120)
    print(f"largest difference {np.abs(found - expected.T).max():.1e}\nplot  {file}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the path or the training that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("path", "target"))
    parser.add_argument("--zeros", type=float, default=0.8, help="the share to reach (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=IMG, help="a folder for the plot")
    args = parser.parse_args(arguments)
    if args.what == "path":
        draw(*load_problem(), args.out / "strength_path.png")
        return
    torch.manual_seed(0)
    model, log = train_to(args.zeros, args.epochs)
    for epoch, (l1, share) in enumerate(log, 1):
        print(f"epoch {epoch:2d}  exact zeros {share:.1%}  next l1 {l1:.2e}")
    print(f"test accuracy {digits.accuracy(model, *digits.load_data()[2:]):.4f}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower for problems this small
    main()
