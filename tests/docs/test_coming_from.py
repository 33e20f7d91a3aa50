"""The conversions of docs/coming-from.md: others end at a minimum of loss + penalty with the converted strengths."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge, SGDClassifier
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

import fastreg

N = 60
X = torch.randn(N, 8, generator=torch.Generator().manual_seed(0)).double()
TRUTH = torch.tensor([1.5, -2.0, 0.8, 0.0, 0.0, 0.0, 0.1, 0.0]).double()
Y = X @ TRUTH + 0.3 * torch.randn(N, generator=torch.Generator().manual_seed(1)).double()
CLASSES = (Y > 0).double()


def half_mse(w: Tensor) -> Tensor:
    return mse_loss(X @ w, Y) / 2


def mse(w: Tensor) -> Tensor:
    return mse_loss(X @ w, Y)


def cross_entropy(w: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(X @ w, CLASSES)


def assert_minimum(w: Tensor, loss: Callable[[Tensor], Tensor], l1: float, l2: float, tolerance: float) -> None:
    """Zero is in the subdifferential of loss + penalty, and is not with other strengths."""

    def distance(l1: float, l2: float) -> float:
        leaf = w.clone().requires_grad_()
        loss(leaf).backward()
        of_data = leaf.grad
        assert of_data is not None
        leaf.grad = None
        fastreg.elastic_penalty(leaf, l1, l2).backward()
        assert leaf.grad is not None
        beyond = torch.where(w == 0, (of_data.abs() - l1).clamp(min=0), (of_data + leaf.grad).abs())
        return beyond.max().item()

    assert distance(l1, l2) < tolerance
    assert distance(2 * l1, l2) > 20 * tolerance or l1 == 0
    assert distance(l1, 2 * l2) > 20 * tolerance or l2 == 0


def of_alpha(alpha: float, l1_ratio: float) -> tuple[float, float]:
    reg = fastreg.ElasticNet.from_alpha([torch.ones(1)], alpha, l1_ratio)
    return float(reg.l1), float(reg.l2)


def fitted(model: object, y: Tensor = Y) -> Tensor:
    return torch.from_numpy(np.ravel(model.fit(X.numpy(), y.numpy()).coef_).copy())  # type: ignore[attr-defined]


@pytest.mark.parametrize("l1_ratio", [0.2, 0.7])
def test_elastic_net_of_scikit_learn(l1_ratio: float) -> None:
    w = fitted(ElasticNet(alpha=0.3, l1_ratio=l1_ratio, fit_intercept=False, tol=1e-14, max_iter=10_000))
    assert_minimum(w, half_mse, *of_alpha(0.3, l1_ratio), tolerance=1e-6)


def test_lasso_and_ridge_of_scikit_learn() -> None:
    w = fitted(Lasso(alpha=0.3, fit_intercept=False, tol=1e-14, max_iter=10_000))
    assert (w == 0).any()
    assert_minimum(w, half_mse, 0.3, 0.0, tolerance=1e-6)
    assert_minimum(w, mse, 0.6, 0.0, tolerance=1e-6)  # without the ½, double
    assert_minimum(fitted(Ridge(alpha=5.0, fit_intercept=False, tol=1e-12)), mse, 0.0, 5.0 / N, tolerance=1e-6)


@pytest.mark.parametrize("l1_ratio", [0.0, 0.4, 1.0])
def test_logistic_regression_of_scikit_learn(l1_ratio: float) -> None:
    c = 0.5
    model = LogisticRegression(
        C=c, l1_ratio=l1_ratio, solver="saga", fit_intercept=False, tol=1e-10, max_iter=100_000, random_state=0
    )
    if "penalty" in model.get_params() and model.get_params()["penalty"] == "l2":  # before scikit-learn 1.8
        model.set_params(penalty="elasticnet")
    w = fitted(model, CLASSES)
    assert_minimum(w, cross_entropy, l1_ratio / (c * N), (1 - l1_ratio) / (2 * c * N), tolerance=1e-6)


def test_stochastic_gradient_descent_of_scikit_learn() -> None:
    model = SGDClassifier(
        loss="log_loss", penalty="elasticnet", alpha=0.2, l1_ratio=0.4, fit_intercept=False, learning_rate="constant",
        eta0=1e-5, tol=None, max_iter=30_000, random_state=0,
    )  # fmt: skip
    w = fitted(model, CLASSES)
    # Its steps are for one example each: it ends near the minimum.
    w[w.abs() < 1e-3] = 0
    assert 0 < (w == 0).sum() < 7
    assert_minimum(w, cross_entropy, *of_alpha(0.2, 0.4), tolerance=1e-3)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_weight_decay_of_torch(name: str) -> None:
    ends = []
    for decay, l2 in ((0.4, 0.0), (0.0, 0.2)):
        w = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        optimizer = getattr(torch.optim, name)([w], lr=0.05, weight_decay=decay)
        for _ in range(20):
            optimizer.zero_grad()
            (mse(w) + fastreg.elastic_penalty(w, 0.0, l2)).backward()
            optimizer.step()
        ends.append(w.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=0)


def test_step_of_tensorflows_proximal_gradient_descent() -> None:
    lr, l1, l2 = 0.1, 0.3, 0.8
    w = TRUTH.clone().requires_grad_()
    optimizer = fastreg.optim.SGD([w], lr=lr, l1=l1, l2=l2 / 2, prox=True)
    half_mse(w).backward()
    assert w.grad is not None
    moved = (w - lr * w.grad).detach().numpy()
    optimizer.step()
    # As the documentation of tf.raw_ops.ApplyProximalGradientDescent writes it.
    expected = np.sign(moved) / (1 + lr * l2) * np.maximum(np.abs(moved) - lr * l1, 0)
    np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-12)


def test_proximal_operator_of_jaxopt() -> None:
    a, b, scaling = 0.5, 0.6, 0.7
    w = TRUTH.clone()
    fastreg.elastic_prox_(w, l1=a, l2=a * b / 2, lr=scaling)
    # argmin ½(x - y)² + scaling * a * (|y| + b * ½ y²), on a grid of y: as the documentation of jaxopt.prox defines it.
    grid = np.linspace(-3, 3, 600_001)
    for x, found in zip(TRUTH.numpy(), w.numpy(), strict=True):
        best = grid[np.argmin((x - grid) ** 2 / 2 + scaling * a * (np.abs(grid) + b * grid**2 / 2))]
        assert found == pytest.approx(best, abs=1e-5)
