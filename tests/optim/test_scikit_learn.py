"""Training with proximal steps against scikit-learn: the same coefficients and zeros, whatever the optimizer."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet
from torch import Tensor, nn

import fastreg
import fastreg.optim
from tests import oracle
from tests.support import metric

# (alpha, l1_ratio) that leave some coefficients at zero, not all; with a ratio of 1 it is the Lasso.
PROBLEMS = [(1.0, 1.0), (4.0, 1.0), (3.0, 0.8), (20.0, 0.5)]
STEPS = 400


pytestmark = pytest.mark.usefixtures("one_thread")


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


# Below, the data is centred, and only coefficients are sought: where Adam's gradient ends at zero, as that of an
# intercept does, its steps never settle.
SETTLED = [("diabetes", 4.0, 1.0), ("diabetes", 3.0, 0.8), ("made", 0.5, 1.0), ("made", 0.5, 0.8)]
# Found to end within 1e-11 of the optimum after 500 steps; half and twice the learning rates of Adam do, too. These are
# in units of 1 / L, those of all but SGD of l1 / L: where they end, all gradients that count are l1.
OPTIMIZERS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "SGD": ("SGD", 1.0, {}),
    "momentum": ("SGD", 0.1, {"momentum": 0.9}),
    "dampening": ("SGD", 0.7, {"momentum": 0.5, "dampening": 0.3}),
    "nesterov": ("SGD", 0.1, {"momentum": 0.9, "nesterov": True}),
    "Adam": ("Adam", 2.0, {}),
    "Adam, slow average": ("Adam", 2.0, {"betas": (0.9, 0.99999)}),  # after 500 steps at 0.005 of what it averages
    "Adam, short average": ("Adam", 2.0, {"betas": (0.9, 0.9)}),  # whose own steps are no longer than lr
    "Adam, large eps": ("Adam", 2.0, {"eps": 0.1}),
    "AdamW": ("AdamW", 2.0, {"weight_decay": 0.0}),
    "AdamW, large eps": ("AdamW", 2.0, {"weight_decay": 0.0, "eps": 0.1}),
    "amsgrad": ("Adam", 4.0, {"betas": (0.9, 0.9), "amsgrad": True}),  # whose maximum stays that of the first steps
}
OTHERS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "RMSprop": ("RMSprop", 1.0, {}),
    "RMSprop, large eps": ("RMSprop", 1.0, {"eps": 0.1}),
    # The buffer holds steps of the past, by squares of the past, which have to settle too.
    "RMSprop, momentum": ("RMSprop", 0.2, {"momentum": 0.9, "alpha": 0.9}),
    "RMSprop, centered": ("RMSprop", 0.5, {"centered": True, "eps": 1.0}),  # where a variance of 0 is the rule
    "Adagrad": ("Adagrad", 20.0, {}),
    "Adagrad, lr_decay": ("Adagrad", 40.0, {"lr_decay": 0.01}),
    "Adagrad, large eps": ("Adagrad", 20.0, {"eps": 1.0, "initial_accumulator_value": 0.1}),
    "NAdam": ("NAdam", 2.0, {}),
    "NAdam, decoupled": ("NAdam", 2.0, {"decoupled_weight_decay": True, "weight_decay": 0.0}),
    "NAdam, large eps": ("NAdam", 2.0, {"eps": 0.1, "betas": (0.8, 0.99), "momentum_decay": 0.1}),
    "Adamax": ("Adamax", 8.0, {}),  # whose norm stays that of the first steps
    "Adamax, short memory": ("Adamax", 2.0, {"betas": (0.9, 0.9)}),
}
EVERY = {**OPTIMIZERS, **OTHERS}
N_STEPS = {"Adagrad": 2000}  # whose steps become shorter and shorter; of the others, 500
LEFT_OUT = [
    ("RMSprop, momentum", "momentum"),
    ("RMSprop, centered", "centered"),
    ("RMSprop, large eps", "eps"),
    ("Adagrad, lr_decay", "lr_decay"),
    ("Adagrad, large eps", "eps"),
    ("NAdam", "average"),
    ("NAdam, large eps", "eps"),
    ("momentum", "momentum"),
    ("dampening", "momentum"),
    ("nesterov", "momentum"),
    ("Adam, slow average", "bias correction"),
    ("Adam", "bias correction"),
    ("Adam, large eps", "eps"),
    ("AdamW, large eps", "eps"),
    ("amsgrad", "maximum"),
]


@cache
def centred(data: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and target; the made ones depend on 5 of 30 features."""
    if data == "diabetes":
        x, y = (t.numpy() for t in diabetes())
        return x, y - y.mean()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 30))
    return x, x[:, :5] @ [3.0, -2.0, 1.5, -1.0, 2.0] + 0.1 * rng.standard_normal(200)


@cache
def settled(data: str, alpha: float, l1_ratio: float) -> np.ndarray:
    model = ElasticNet(alpha=alpha, l1_ratio=l1_ratio, tol=1e-14, max_iter=100_000, fit_intercept=False)
    return model.fit(*centred(data)).coef_  # type: ignore[no-any-return]


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative to the largest coefficient; infinite where other ones are zero."""
    if ((found == 0) != (expected == 0)).any():
        return np.inf
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def descend(
    problem: tuple[str, float, float],
    name: str,
    way: str,
    after: Callable[[Tensor, torch.optim.Optimizer, float, float], object] = lambda *_: None,
    **attached: Any,
) -> np.ndarray:
    """The coefficients after the steps along the gradient of ||y - xw||² / 2n."""
    data, alpha, l1_ratio = problem
    x, y = map(torch.from_numpy, centred(data))
    gram, target = x.T @ x / len(x), x.T @ y / len(x)
    l1, l2 = alpha * l1_ratio, alpha * (1 - l1_ratio) / 2
    cls, units, options = EVERY[name]
    lr = units * (1.0 if cls == "SGD" else l1) / float(torch.linalg.eigvalsh(gram)[-1])
    w = nn.Parameter(torch.zeros_like(target))
    if way == "built in":
        optimizer = getattr(fastreg.optim, cls)([w], lr=lr, **options, l1=l1, l2=l2, prox=True)
    else:
        optimizer = getattr(torch.optim, cls)([w], lr=lr, **options)
    if way == "attached":
        fastreg.ElasticNet([w], l1, l2).attach(optimizer, mode="prox", **attached)
    for _ in range(N_STEPS.get(cls, 500)):
        w.grad = torch.addmv(target, gram, w.detach(), beta=-1)
        optimizer.step()
        after(w.detach(), optimizer, l1, l2)
    return w.detach().numpy()


@pytest.mark.parametrize(
    ("name", "way"), [*((name, "attached") for name in EVERY), *((name, "built in") for name in OPTIMIZERS)]
)
@pytest.mark.parametrize("problem", SETTLED, ids=str)
def test_every_optimizer_ends_at_the_coefficients_of_scikit_learn(problem: Any, name: str, way: str) -> None:
    expected = settled(*problem)
    assert 0 < (expected == 0).sum() < len(expected)
    assert distance(descend(problem, name, way), expected) <= 1e-6


@pytest.mark.parametrize(("name", "left_out"), LEFT_OUT)
@pytest.mark.parametrize("problem", SETTLED, ids=str)
def test_every_part_of_the_step_size_matters(problem: Any, name: str, left_out: str) -> None:
    """By hand: what the test above would see of a library that forgot it."""

    def found(left_out: str) -> np.ndarray:
        def shrink(w: Tensor, optimizer: torch.optim.Optimizer, l1: float, l2: float) -> None:
            (group,), (state,) = optimizer.param_groups, optimizer.state.values()
            t = oracle.step_size(optimizer, group, state, left_out)
            w.copy_(torch.from_numpy(metric.prox(w.numpy(), t, l1, l2)))

        return descend(problem, name, "by hand", shrink)

    assert distance(found(""), settled(*problem)) <= 1e-6
    assert distance(found(left_out), settled(*problem)) >= 1e-3


@pytest.mark.parametrize("problem", SETTLED, ids=str)
def test_proximal_steps_have_to_be_longer_than_those_of_adam(problem: Any) -> None:
    """Bounded by lr, they only undo the steps that a constant gradient makes: weights stay where they are."""

    def found(bound: float) -> np.ndarray:
        def shrink(w: Tensor, optimizer: torch.optim.Optimizer, l1: float, l2: float) -> None:
            (group,), (state,) = optimizer.param_groups, optimizer.state.values()
            t = oracle.step_size(optimizer, group, state)
            w.copy_(torch.from_numpy(metric.prox(w.numpy(), t, l1, l2, bound * group["lr"])))

        return descend(problem, "Adam, short average", "by hand", shrink)

    assert distance(found(2.0), settled(*problem)) <= 1e-6
    assert distance(found(1.0), settled(*problem)) >= 1e-5


@pytest.mark.parametrize("problem", SETTLED, ids=str)
def test_steps_of_lr_under_momentum_solve_for_a_tenth_of_the_strength(problem: Any) -> None:
    data, alpha, l1_ratio = problem
    found = descend(problem, "momentum", "attached", metric="lr")
    # So weak a strength takes more steps to settle. From the strength's own coefficients it is 0.2 to 0.5 away.
    assert distance(found, settled(data, alpha / 10, l1_ratio)) <= 1e-3
