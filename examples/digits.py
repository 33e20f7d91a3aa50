"""Train a small MLP on handwritten digits with an L1, L2 or elastic-net penalty, or none.

    python examples/digits.py --penalty l1
    python examples/digits.py --penalty l1 --method prox    # leaves exact zeros

For each epoch the script prints the loss, its parts, and the share of weights that are exactly zero. The elastic net
uses 0.3 of l1 and 0.7 of l2. `--method` says how the penalty is applied:

    penalty      a term of the loss
    attach       a gradient added before each optimizer step; the weights are the same, bit for bit
    prox         a proximal step after each optimizer step, which leaves exact zeros
    optimizer    the same proximal step inside fastreg.optim.SGD

digits_plots.py draws the training and compares the methods.

The data are scikit-learn's 8x8 images of digits. Needs: pip install ".[examples]"
"""

import argparse
from collections.abc import Iterator, Sequence

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fastreg

# The factors of l1 and l2 for each penalty.
SHARES = {"none": (0.0, 0.0), "l1": (1.0, 0.0), "l2": (0.0, 1.0), "elastic": (0.3, 0.7)}
METHODS = {"penalty": None, "attach": "grad", "prox": "prox", "optimizer": None}  # the mode of attach, if any
BATCH_SIZE = 32
LEARNING_RATE = 0.2
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def load_data(dtype: torch.dtype = torch.float32) -> Data:
    """Return images (n, 64) and digits (n,) for training, then for testing: a fifth of all."""
    images, digits = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=dtype)
    x_train, x_test, y_train, y_test = train_test_split(x, torch.tensor(digits), test_size=0.2, random_state=0)
    return x_train, y_train, x_test, y_test


def build_model() -> nn.Sequential:
    """Return the MLP, with the same weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def build_optimizer(model: nn.Module, l1: float, l2: float, method: str) -> torch.optim.Optimizer:
    """Return SGD, for the method "optimizer" with the penalty inside."""
    if method == "optimizer":
        return fastreg.optim.SGD(model.parameters(), lr=LEARNING_RATE, l1=l1, l2=l2, prox=True, track=True)
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


def train(
    model: nn.Module, data: Data, optimizer: torch.optim.Optimizer, l1: float, l2: float, method: str, epochs: int
) -> Iterator[Tensor]:
    """Train; yield after each epoch the loss, cross-entropy, l1 and l2 part of each step: a tensor (n_steps, 4)."""
    x, y = data[0], data[1]
    reg = fastreg.ElasticNet(model, l1=l1, l2=l2)
    mode = METHODS[method]
    if mode:
        reg.attach(optimizer, mode)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        steps = []
        for batch in torch.randperm(len(x), generator=order).split(BATCH_SIZE):
            loss = cross_entropy = nn.functional.cross_entropy(model(x[batch]), y[batch])
            if method == "penalty":
                penalty = reg(return_terms=True)
                loss = cross_entropy + penalty.total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if method != "penalty":
                # The penalty of the weights before the step; in mode "prox", of those after it.
                penalty = optimizer.last if method == "optimizer" else reg.last
                loss = cross_entropy + penalty.total
            steps.append(torch.stack([loss, cross_entropy, penalty.l1, penalty.l2]).detach())
        yield torch.stack(steps)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the fraction of images that are classified correctly."""
    return (model(x).argmax(dim=1) == y).double().mean().item()


def options() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--penalty", choices=SHARES, default="elastic", help="default: %(default)s")
    parser.add_argument("--method", choices=METHODS, default="penalty", help="default: %(default)s")
    parser.add_argument("--l1", type=float, default=1e-3, help="strength of sum|w|, before mixing (%(default)s)")
    parser.add_argument("--l2", type=float, default=3e-3, help="strength of sum w^2, before mixing (%(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
    return parser


def strengths(args: argparse.Namespace) -> tuple[float, float]:
    """Return l1 and l2 of the chosen penalty."""
    share_l1, share_l2 = SHARES[args.penalty]
    return share_l1 * args.l1, share_l2 * args.l2


def main(arguments: Sequence[str] | None = None) -> nn.Module:
    """Train as the command line says; return the model."""
    args = options().parse_args(arguments)
    l1, l2 = strengths(args)
    data, model = load_data(), build_model()
    optimizer = build_optimizer(model, l1, l2, args.method)
    print(f"penalty {args.penalty}: l1={l1:g} l2={l2:g}, method {args.method}")
    for epoch, steps in enumerate(train(model, data, optimizer, l1, l2, args.method, args.epochs), 1):
        loss, cross_entropy, l1_part, l2_part = steps.mean(dim=0)
        parts = f"cross-entropy {cross_entropy:.5f} + l1 {l1_part:.5f} + l2 {l2_part:.5f}"
        print(f"epoch {epoch:2d}  loss {loss:.5f} = {parts}  exact zeros {fastreg.sparsity(model):.2%}", flush=True)
    print(f"accuracy  train {accuracy(model, *data[:2]):.4f}  test {accuracy(model, *data[2:]):.4f}")
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower for layers this small
    main()
