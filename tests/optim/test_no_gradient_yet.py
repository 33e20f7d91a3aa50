"""Proximal steps under Adam of weights that have no gradient yet: behind a zero, unused experts, rare inputs."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import fastreg
from tests import oracle
from tests.support.helpers import Path, bits, naming

LR, L1, BETAS = 2e-3, 1e-5, (0.9, 0.999)
# How far an element may move: Kingma and Ba (2015), section 2.1.
REACH = LR * (1 - BETAS[0]) / (1 - BETAS[1]) ** 0.5

pytestmark = pytest.mark.usefixtures("one_thread")


def zeroed(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ZeroInitResidual(nn.Module):
    """ResNet's zero_init_residual, ReZero and ControlNet: a branch that counts for nothing at first."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6))
        self.norm = nn.BatchNorm1d(6) if kind == "batch norm" else None
        self.gain = nn.Parameter(torch.zeros(())) if kind == "rezero" else None
        self.zero = zeroed(nn.Linear(6, 6)) if kind == "zero convolution" else None
        if self.norm is not None:
            nn.init.zeros_(self.norm.weight)
        self.head = nn.Linear(6, 3)
        if kind == "zero convolution":
            self.head.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        found = self.branch(x)
        for each in (self.norm, self.zero):
            found = found if each is None else each(found)
        return self.head(x + (found if self.gain is None else found * self.gain))


class AdaptiveNorm(nn.Module):
    """DiT's adaLN-Zero: the gate of a block, and the last layer, start at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = zeroed(nn.Linear(6, 18))
        self.block = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6))
        self.head = zeroed(nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(x).chunk(3, -1)
        return self.head(x + gate * self.block(F.layer_norm(x, (6,)) * (1 + scale) + shift))


class LowRank(nn.Module):
    """LoRA: the first factor is random, the second zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 3).requires_grad_(False)
        self.first, self.second = nn.Linear(6, 4, bias=False), zeroed(nn.Linear(4, 3, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.second(self.first(x))


class Experts(nn.Module):
    """One expert a sample, chosen by its first feature; the last one gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, :1] > 0).long()
        return sum(expert(x) * (chosen == i) for i, expert in enumerate(self.experts))  # type: ignore[return-value]


class Tokens(nn.Module):
    """Rows of an embedding that no batch has, and an input that is always zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 5)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[:, 0] > 0).long()
        return self.head(torch.cat([self.embedding(tokens), x[:, 1:2], 0 * x[:, :1]], 1))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "zero head": lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), zeroed(nn.Linear(16, 3))),
    "zero_init_residual": lambda: ZeroInitResidual("batch norm"),
    "ReZero": lambda: ZeroInitResidual("rezero"),
    "ControlNet": lambda: ZeroInitResidual("zero convolution"),
    "adaLN-Zero": AdaptiveNorm,
    "LoRA": LowRank,
    "experts without tokens": Experts,
    "embedding rows and inputs that no batch has": Tokens,
}
WAYS: dict[str, Callable[[Any, dict[str, Any]], torch.optim.Optimizer]] = {
    "AdamW": lambda params, penalty: fastreg.optim.AdamW(params, lr=LR, weight_decay=0.0, prox=True, **penalty),
    "Adam, amsgrad": lambda params, penalty: fastreg.optim.Adam(params, lr=LR, amsgrad=True, prox=True, **penalty),
    "attached": lambda params, penalty: attached(torch.optim.Adam(params, lr=LR), params, penalty),
    "attached, amsgrad": lambda params, penalty: attached(torch.optim.Adam(params, LR, amsgrad=True), params, penalty),
}


def attached(optimizer: torch.optim.Optimizer, params: Any, penalty: dict[str, Any]) -> torch.optim.Optimizer:
    impl = penalty.pop("impl", None)
    fastreg.ElasticNet(params, **penalty, impl=impl).attach(optimizer, mode="prox")
    return optimizer


def batch(n: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 6)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_with_weights_that_have_no_gradient_yet_can_be_trained(name: str, way: str) -> None:
    """The first step leaves such weights alone, and later ones take no more from them than a step of Adam."""
    model = ARCHITECTURES[name]()
    weights = [p for p in model.parameters() if p.requires_grad]
    for strengths in ({"l1": L1}, {"l2": 0.1}, {"l1": L1, "l2": 0.1}):
        trained = copy.deepcopy(model)
        weights = [p for p in trained.parameters() if p.requires_grad]
        optimizer = WAYS[way](weights, dict(strengths))
        losses = []
        torch.manual_seed(1)
        for number in range(60 if strengths == {"l1": L1} else 3):
            x, y = batch(64)
            optimizer.zero_grad(set_to_none=False)
            loss = F.cross_entropy(trained(x), y)
            loss.backward()
            losses.append(float(loss.detach()))
            untouched = [(w.grad == 0) & (w != 0) for w in weights]  # type: ignore[union-attr]
            starts = [w.detach().clone() for w in weights]
            optimizer.step()
            if number == 0:
                assert any(each.any() for each in untouched)
                for w, start, each in zip(weights, starts, untouched, strict=True):
                    assert torch.equal(w[each], start[each])
            for w, start in zip(weights, starts, strict=True):
                # Adam's own step is as long at most, and so is the proximal one.
                assert ((w - start).abs() <= 2 * REACH * (1 + 1e-5)).all()
        if strengths == {"l1": L1}:
            assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5]), losses


def test_a_zero_head_learns_digits_and_gets_zeros() -> None:
    """The README's line on a model whose last layer starts at zero."""
    features, target = load_digits(return_X_y=True)
    x, y = torch.tensor(features, dtype=torch.float32) / 16, torch.tensor(target)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), zeroed(nn.Linear(64, 10)))
    optimizer = fastreg.optim.AdamW(model.parameters(), lr=1e-3, l1=1e-5, prox=True)
    for _ in range(20):
        for chosen in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    assert float((model(x).argmax(1) == y).float().mean()) > 0.95
    assert 0.05 < float(fastreg.sparsity(model)) < 0.6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_first_step_with_zero_gradients_changes_nothing(path: Path, way: str, dtype: torch.dtype) -> None:
    """Engines make one to allocate the optimizer's states; after it, weights without gradient shrink by the bound."""
    weights = [nn.Parameter(torch.randn(n, device=path[1]).to(dtype)) for n in (5, 2049)]
    weights[1].data[::7] = -0.0
    before = bits(*(w.detach() + 0.0 for w in weights))  # zeros may lose their sign
    optimizer = WAYS[way](weights, {"l1": L1, "l2": 0.01, "impl": path[0]})
    optimizer.param_groups[0]["eps"] = 1e-7  # torch.optim's own steps divide 0 by 0 where eps is nothing in float16
    for number in range(3):
        for w in weights:
            w.grad = torch.zeros_like(w)
        starts = [oracle.array(w).copy() for w in weights]
        optimizer.step()
        if number == 0:
            assert bits(*(w.detach() + 0.0 for w in weights)) == before
            continue
        for w, start in zip(weights, starts, strict=True):
            exact = np.sign(start) * np.maximum(np.abs(start) - REACH * (1 + oracle.rounding(dtype)), 0.0)
            eps = float(torch.finfo(dtype).eps)
            np.testing.assert_allclose(oracle.array(w), exact, rtol=eps, atol=0 if dtype == torch.float64 else 1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_dead_inputs_still_go_to_zero(path: Path, way: str) -> None:
    w = nn.Parameter(torch.tensor([0.5, -0.25, 1.0, -0.0], device=path[1]) * REACH * 4)
    optimizer = WAYS[way]([w], {"l1": L1, "impl": path[0]})
    counts = []
    for _ in range(6):
        w.grad = torch.zeros_like(w)
        optimizer.step()
        counts.append(int((w == 0).sum()))
    assert counts == [1, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("way", WAYS)
def test_nan_and_infinity_are_not_bounded_away(path: Path, way: str) -> None:
    w = nn.Parameter(torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], device=path[1]))
    optimizer = WAYS[way]([w], {"l1": L1, "l2": 0.01, "impl": path[0]})
    for _ in range(2):
        with naming(way):
            w.grad = torch.tensor([0.0, 0.0, 0.0, torch.nan], device=path[1])
            optimizer.step()
            assert torch.isnan(w[[0, 3]]).all()
            assert torch.equal(w[1:3].cpu(), torch.tensor([torch.inf, -torch.inf]))


@pytest.mark.parametrize(
    "momentum", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 1.0}]
)
def test_sgd_with_momentum_takes_no_more_than_its_settled_step(momentum: dict[str, Any]) -> None:
    """SGD divides by nothing: a weight without gradient loses t * l1 a step, from the first one on."""
    factor = {0.0: 10.0, 1.0: 0.0}[momentum.get("dampening", 0.0)]
    w = nn.Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64))
    optimizer = fastreg.optim.SGD([w], lr=0.1, l1=0.01, prox=True, **momentum)
    for number in range(1, 4):
        w.grad = torch.zeros_like(w)
        optimizer.step()
        np.testing.assert_allclose(w[0].item(), 1 - number * 0.1 * 0.01 * factor, rtol=1e-12)


def test_dampening_beyond_1_is_refused() -> None:
    """Its settled step goes up the gradient, and the proximal one would grow weights."""
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"dampening=1\.5.*grow"):
        fastreg.optim.SGD([w], lr=0.1, momentum=0.9, dampening=1.5, l1=0.01, prox=True)
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9, dampening=1.5)
    with pytest.raises(ValueError, match=r"dampening=1\.5.*grow"):
        fastreg.ElasticNet([w], 0.01).attach(optimizer, mode="prox")
    fastreg.ElasticNet([w], 0.01).attach(optimizer, mode="prox", metric="lr")
