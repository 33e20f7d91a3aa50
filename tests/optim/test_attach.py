"""ElasticNet.attach against training loops with the penalty written out by hand, bit for bit."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam, Optimizer

from fastreg import ElasticNet
from tests import oracle
from tests.support.helpers import Path, assert_value, bits, needs_compiler, prox_ulps
from tests.support.training import (
    L1,
    L2,
    MAKERS,
    MODES,
    Maker,
    add_autograd,
    add_formula,
    attached,
    by_hand,
    net,
    plain,
    shrink,
    train,
)

WAYS = {"foreach": {"foreach": True}, "loop": {"foreach": False}, "fused": {"fused": True}}
KINDS = [
    *(
        pytest.param(partial(m, **w), "cpu", id=f"{name}-{way}")
        for name, m in MAKERS.items()
        for way, w in WAYS.items()
    ),
    # PyTorch takes capturable optimizers on GPUs alone.
    pytest.param(partial(MAKERS["Adam"], capturable=True), "cuda", id="Adam-capturable", marks=pytest.mark.gpu),
    pytest.param(partial(MAKERS["AdamW"], fused=True), "cuda", id="AdamW-fused-cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("scaled", ["no scaler", "scaler", "scaler and unscale_"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("maker", "device"), KINDS)
def test_attached_is_the_penalty_by_hand(maker: Maker, device: str, mode: str, scaled: str) -> None:
    scaler = partial(GradScaler, device) if scaled != "no scaler" else lambda: None
    # Only an unscaled gradient can be added to by hand.
    model = net(device)
    expected = by_hand(mode, model, maker(model.parameters()), scaler=scaler(), unscale=True)
    model, optimizer, _ = attached(mode, maker, device)
    assert train(model, optimizer, scaler=scaler(), unscale=scaled == "scaler and unscale_") == expected
    model = net(device)
    assert train(model, maker(model.parameters())) != expected


@pytest.mark.parametrize(("maker", "device"), KINDS)
def test_attached_is_the_formula_by_hand(maker: Maker, device: str) -> None:
    model = net(device)
    expected = train(model, maker(model.parameters()), before=partial(add_formula, model))
    model, optimizer, _ = attached("grad", maker, device)
    assert train(model, optimizer) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize(("maker", "device"), KINDS)
def test_a_step_with_infinite_gradients_changes_nothing(maker: Maker, device: str, unscale: bool, mode: Any) -> None:
    model = net(device)
    optimizer = maker([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}])
    ElasticNet(model, L1, L2).attach(optimizer, mode)
    scaler = GradScaler(device)
    options: dict[str, Any] = {"scaler": scaler, "unscale": unscale}
    before, scale = train(model, optimizer, **options), scaler.get_scale()

    hook = model[2].bias.register_hook(lambda grad: grad * float("inf"))
    assert train(model, optimizer, **options, steps=1) == before
    assert scaler.get_scale() == scale / 2
    hook.remove()
    assert train(model, optimizer, **options, steps=1) != before


@pytest.mark.parametrize("mode", MODES)
def test_float64_keeps_its_digits_under_a_fused_optimizer_and_a_scaler(mode: Any) -> None:
    found = []
    for scaler in (None, GradScaler("cpu")):
        w = nn.Parameter(torch.tensor([1.0, -2.0, 0.3], dtype=torch.float64))
        optimizer = SGD([w], lr=0.1, fused=True)
        ElasticNet([w], 0.3, 0.7).attach(optimizer, mode)
        loss = 0.0 * w.sum()  # the step is the penalty's alone
        (loss if scaler is None else scaler.scale(loss)).backward()
        optimizer.step() if scaler is None else scaler.step(optimizer)
        found.append(bits(w))
    assert found[0] == found[1]


def scheduled(model: nn.Sequential, tensor_lr: bool) -> tuple[Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    rates = [torch.tensor(0.25), torch.tensor(0.5)] if tensor_lr else [0.1, 0.3]
    groups = [{"params": m.parameters(), "lr": lr} for m, lr in zip((model[0], model[2]), rates, strict=True)]
    optimizer = Adam(groups, foreach=False)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_prox_follows_the_learning_rate_of_each_group(tensor_lr: bool) -> None:
    model = net()
    optimizer, schedule = scheduled(model, tensor_lr)
    expected = train(model, optimizer, after=lambda: (shrink(optimizer), schedule.step()))
    other = net()
    optimizer, schedule = scheduled(other, tensor_lr)
    ElasticNet(other, L1, L2).attach(optimizer, mode="prox", metric="lr")
    assert train(other, optimizer, after=schedule.step) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("same_lr", [False, True], ids=["lr per group", "one lr"])
@pytest.mark.parametrize("kind", ["floats", "tensors"])
def test_groups_of_strengths_times_groups_of_learning_rates(path: Path, kind: str, same_lr: bool, mode: Any) -> None:
    impl, device = path
    own = [(0.05, 0.7), (0.05, 0.7), (0.3, 0.1), (0.3, 0.1)]
    rates = [0.5, 0.5 if same_lr else 0.25] * 2  # powers of two: lr * grad is exact

    def strength(value: float) -> float | Tensor:
        dtype = torch.float64
        return value if kind == "floats" else torch.tensor(value, dtype=dtype, device=device, requires_grad=True)

    weights = [nn.Parameter(torch.randn(n, device=device)) for n in (3000, 1, 40, 7)]
    for w in weights:
        w.grad = torch.randn_like(w)
    before = [(w.detach().clone(), w.grad.clone()) for w in weights if w.grad is not None]
    # The optimizer's groups run across those of the penalty.
    optimizer = SGD([{"params": weights[i::2], "lr": rates[i]} for i in (0, 1)])
    groups = [{"params": weights[:2], "l1": strength(0.05), "l2": strength(0.7)}, {"params": weights[2:]}]
    reg = ElasticNet(groups, strength(0.3), strength(0.1), impl=impl)
    assert reg.last is None
    reg.attach(optimizer, mode)

    optimizer.step()

    at = [w for w, _ in before] if mode == "grad" else [w - lr * g for (w, g), lr in zip(before, rates, strict=True)]
    exact = [sum(terms) for terms in zip(*(oracle.penalty([w], *s) for w, s in zip(at, own, strict=True)), strict=True)]
    assert reg.last is not None
    for actual, expected in zip(reg.last, exact, strict=True):
        assert_value(actual, expected, path)
        assert not actual.requires_grad
    for w, start, (old, grad), s, lr in zip(weights, at, before, own, rates, strict=True):
        if mode == "prox":
            assert oracle.ulp_distance(w.detach(), oracle.prox(start, *s, lr)) <= prox_ulps(path, w.dtype)
        else:
            step = lr * (oracle.array(grad) + oracle.gradient(old, *s))
            # The gradient, its sum with the old one, its product with lr and the difference are rounded to float32.
            scale = abs(oracle.array(old)) + 4 * abs(lr * oracle.array(grad)) + 4 * abs(step)
            assert (abs(oracle.array(w) - (oracle.array(old) - step)) <= oracle.FLOAT32_ULP * scale).all()


@pytest.mark.parametrize("n_strengths", [1, 2])
def test_values_between_the_steps_change_nothing(path: Path, n_strengths: int) -> None:
    """What a value learns of the weights' memory is for its own groups, not for those of a step."""
    impl, device = path

    def trained(with_values: bool) -> list[Tensor]:
        weights = [nn.Parameter(torch.linspace(-1, 1, n, device=device)) for n in (300, 1, 40, 7)]
        optimizer = SGD([{"params": weights[i::2], "lr": lr} for i, lr in enumerate((0.5, 0.125))])
        groups = [{"params": weights[:2], "l1": 0.25}, {"params": weights[2:]}]
        reg = ElasticNet(groups if n_strengths == 2 else weights, 0.125, 0.25, impl=impl)
        reg.attach(optimizer, mode="prox")
        for _ in range(3):
            for w in weights:
                w.grad = torch.ones_like(w)
            if with_values:
                with torch.no_grad():
                    reg()
            optimizer.step()
        return [w.detach() for w in weights]

    for found, expected in zip(trained(with_values=True), trained(with_values=False), strict=True):
        assert torch.equal(found, expected)


def test_clipping_does_not_see_the_penalty() -> None:
    def clip(model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    model = net()
    expected = train(model, plain(model.parameters()), before=lambda: (clip(model), add_autograd(model)))
    other, optimizer, _ = attached("grad")
    assert train(other, optimizer, before=partial(clip, other)) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_micro_batches_count_the_penalty_once(mode: str, set_to_none: bool) -> None:
    model = net()
    options: dict[str, Any] = {"micro_batches": 3, "set_to_none": set_to_none}
    expected = by_hand(mode, model, plain(model.parameters()), **options)
    other, optimizer, _ = attached(mode)
    assert train(other, optimizer, **options) == expected


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_strengths_assigned_between_steps_take_effect(as_tensor: bool) -> None:
    schedule = [0.5, 0.0, 0.25, 0.125]
    model, l1_by_hand, l1 = net(), iter(schedule), iter(schedule)
    expected = train(model, plain(model.parameters()), before=lambda: add_autograd(model, next(l1_by_hand)))
    other, optimizer, reg = attached("grad")

    def assign() -> None:
        reg.l1 = torch.tensor(next(l1)) if as_tensor else next(l1)

    assert train(other, optimizer, before=assign) == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, as it imports its compiler
@needs_compiler
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_step(mode: Any) -> None:
    def two_rates(model: nn.Sequential) -> Optimizer:
        return plain([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.3}])

    model = net()
    expected = by_hand(mode, model, two_rates(model), steps=2)
    other = net()
    optimizer = two_rates(other)
    reg = ElasticNet(other, L1, L2)
    reg.attach(optimizer, mode)
    optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
    assert train(other, optimizer, steps=2) == expected
    assert reg.last is not None


def test_last_follows_every_step() -> None:
    model, optimizer, reg = attached("grad")
    assert reg.last is None
    for _ in range(3):
        expected = oracle.penalty(model.parameters(), L1, L2)
        train(model, optimizer, steps=1)
        assert reg.last is not None
        for actual, exact in zip(reg.last, expected, strict=True):
            assert_value(actual, exact, ("torch", "cpu"))
