"""Proximal gradient descent against scikit-learn: the same coefficients and the same zeros on its diabetes data."""

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet
from torch import Tensor, nn

import fastreg

# (alpha, l1_ratio) that leave some coefficients at zero, not all; with a ratio of 1 it is the Lasso.
PROBLEMS = [(1.0, 1.0), (4.0, 1.0), (3.0, 0.8), (20.0, 0.5)]
STEPS = 400


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operations: on a busy machine, threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def diabetes() -> tuple[Tensor, Tensor]:
    """Standardised features [442, 10], and the target as it comes, far from centred."""
    x, y = load_diabetes(return_X_y=True, scaled=False)
    return torch.from_numpy((x - x.mean(0)) / x.std(0)), torch.from_numpy(y)


def step_size(alpha: float, l1_ratio: float, way: str) -> float:
    """1 / L of what is descended along its gradient: ||y - xw - b||² / 2n, and the penalty unless it goes by prox."""
    x, _ = diabetes()
    # The intercept b adds an eigenvalue of 1, below the largest, as the features are centred.
    largest = float(torch.linalg.eigvalsh(x.T @ x / len(x))[-1])
    return 1 / (largest + (alpha * (1 - l1_ratio) if way == "subgradient" else 0.0))


def train(alpha: float, l1_ratio: float, way: str) -> nn.Linear:
    """Full-batch descent; the intercept is not penalised."""
    x, y = diabetes()
    model = nn.Linear(10, 1, dtype=torch.float64)
    lr = step_size(alpha, l1_ratio, way)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    reg = fastreg.ElasticNet.from_alpha(model, alpha, l1_ratio, exclude=fastreg.bias_and_norm)
    if way == "attached":
        reg.attach(optimizer, mode="prox")
    for _ in range(STEPS):
        optimizer.zero_grad()
        ((y - model(x)[:, 0]).square().mean() / 2).backward()
        if way == "subgradient":
            reg.add_grad_()
        optimizer.step()
        if way == "prox":
            reg.prox_(lr)
    return model


@cache
def truth(alpha: float, l1_ratio: float) -> ElasticNet:
    x, y = diabetes()
    return ElasticNet(alpha=alpha, l1_ratio=l1_ratio, tol=1e-12, max_iter=100_000).fit(x.numpy(), y.numpy())


def objective(coefficients: np.ndarray, alpha: float, l1_ratio: float) -> float:
    """What scikit-learn minimises, at the best intercept."""
    x, y = (t.numpy() for t in diabetes())
    residual = y - y.mean() - x @ coefficients
    penalty = l1_ratio * np.abs(coefficients).sum() + (1 - l1_ratio) / 2 * np.square(coefficients).sum()
    return float(np.square(residual).mean() / 2 + alpha * penalty)


@pytest.mark.parametrize("way", ["prox", "attached"])
@pytest.mark.parametrize(("alpha", "l1_ratio"), PROBLEMS)
def test_the_coefficients_of_scikit_learn(alpha: float, l1_ratio: float, way: str) -> None:
    expected = truth(alpha, l1_ratio)
    model = train(alpha, l1_ratio, way)
    found = model.weight.detach().numpy()[0]
    zeros = expected.coef_ == 0
    assert 0 < zeros.sum() < len(zeros)
    assert ((found == 0) == zeros).all()
    assert float(fastreg.sparsity(model.weight)) == np.float32(zeros.mean())
    # Relative to the largest coefficient. The descent ends within 1e-9 of the optimum, scikit-learn within √tol.
    np.testing.assert_allclose(found, expected.coef_, rtol=0, atol=1e-5 * np.abs(expected.coef_).max())
    assert float(model.bias.detach()) == pytest.approx(expected.intercept_, rel=1e-9)


@pytest.mark.parametrize(("alpha", "l1_ratio"), PROBLEMS)
def test_the_gradient_alone_gives_no_zeros(alpha: float, l1_ratio: float) -> None:
    found = train(alpha, l1_ratio, "subgradient").weight.detach().numpy()[0]
    expected = truth(alpha, l1_ratio)
    assert (found != 0).all()
    # It did descend, to where its steps of lr * l1 about zero keep it: 94% of the way, or further.
    start, optimum = objective(np.zeros(10), alpha, l1_ratio), objective(expected.coef_, alpha, l1_ratio)
    assert objective(found, alpha, l1_ratio) - optimum <= 0.1 * (start - optimum)
