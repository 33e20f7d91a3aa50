"""Weights that change their dtype or kind after they were selected get the error that a fresh call gives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastreg
from tests.support.cases import L1, L2
from tests.support.helpers import Path


def to_complex(model: nn.Module) -> None:
    model.to(torch.complex64)


def to_float8(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None
        p.data = p.data.to(torch.float8_e4m3fn)


def one_to_complex(model: nn.Module) -> None:
    model[1].bias.grad = None
    model[1].bias.data = model[1].bias.data.to(torch.complex64)


CALLS: dict[str, Callable[[fastreg.ElasticNet], object]] = {
    "value": lambda reg: reg(),
    "value without grad": lambda reg: torch.no_grad()(reg)(),
    "backward": lambda reg: reg().backward(),
    "add_grad_": lambda reg: reg.add_grad_(),
    "prox_": lambda reg: reg.prox_(0.5),
}


def bits(model: nn.Module) -> list[list[int] | None]:
    tensors = [t for p in model.parameters() for t in (p, p.grad)]
    return [None if t is None else t.detach().cpu().contiguous().view(-1).view(torch.uint8).tolist() for t in tensors]


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("change", [to_complex, to_float8, one_to_complex])
@pytest.mark.parametrize("call", CALLS)
def test_changed_kind_raises_before_anything_is_written(
    path: Path, call: str, change: Callable[[nn.Module], None]
) -> None:
    impl, device = path
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)).to(device)
    reg = fastreg.ElasticNet(model, L1, L2, impl=impl)
    for _ in range(2):
        reg().backward()
    change(model)
    before = bits(model)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"parameter '.*' has dtype torch\.(complex64|float8)") as found:
            CALLS[call](reg)
        with pytest.raises(TypeError) as fresh:
            fastreg.elastic_penalty(model, L1, L2, impl=impl)
        assert str(found.value) == str(fresh.value)
    assert bits(model) == before


def test_supported_dtypes_may_change(path: Path) -> None:
    impl, device = path
    model = nn.Linear(5, 4).to(device)
    reg = fastreg.ElasticNet(model, L1, L2, impl=impl)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        model.to(dtype)
        assert torch.equal(reg().detach(), fastreg.elastic_penalty(model, L1, L2, impl=impl).detach())


def lazily_negated(values: Tensor) -> Tensor:
    """A tensor whose memory holds the opposite of its values: a view of a complex conjugate's imaginary part."""
    negated = torch._neg_view(-values)
    assert negated.is_neg()
    return negated


def test_negative_bit_is_resolved(path: Path) -> None:
    impl, device = path
    values = torch.tensor([0.5, -2.0, 0.0, 0.125, 3.0], device=device)
    plain, lazy = values.clone().requires_grad_(), lazily_negated(values).detach().requires_grad_()
    for w in (plain, lazy):
        fastreg.elastic_penalty(w, 0.25, 0.5, impl=impl).backward()
        w.grad = None if w.grad is None else w.grad.resolve_neg()
    assert torch.equal(lazy.grad, plain.grad)  # type: ignore[arg-type]

    lazy.grad, plain.grad = lazily_negated(torch.ones_like(values)), torch.ones_like(values)
    for w in (plain, lazy):
        fastreg.add_elastic_grad_(w, 0.25, 0.5, impl=impl)
        fastreg.elastic_prox_(w, 0.25, 0.5, lr=0.5, impl=impl)
    assert torch.equal(lazy.grad.resolve_neg(), plain.grad)
    assert torch.equal(lazy.detach().resolve_neg(), plain.detach())
