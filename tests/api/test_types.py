"""What a user's own file may say: `make types` checks this one with mypy --strict, and pytest runs it."""

from typing import Any, assert_type

import pytest
import torch
from torch import Tensor, nn

import fastreg


def model_with_gradients() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model(torch.ones(2, 3)).sum().backward()
    return model


def test_the_type_of_a_penalty_follows_return_terms() -> None:
    model = model_with_gradients()
    reg = fastreg.ElasticNet(model, l1=0.1)
    assert_type(fastreg.elastic_penalty(model, 0.1), Tensor)
    assert_type(fastreg.elastic_penalty(model, 0.1, return_terms=True), fastreg.Penalty)
    assert_type(reg(return_terms=False), Tensor)
    assert_type(reg(return_terms=True), fastreg.Penalty)
    for flag in (True, False):
        asked: bool = flag  # not a literal any more
        either = assert_type(fastreg.elastic_penalty(model, 0.1, return_terms=asked), Tensor | fastreg.Penalty)
        again = assert_type(reg(return_terms=asked), Tensor | fastreg.Penalty)
        assert type(either) is type(again) is (fastreg.Penalty if flag else Tensor)


def penalty_of_anything(params: fastreg.Params, l1: float | Tensor) -> Tensor:
    """As a user wraps the call."""
    return fastreg.elastic_penalty(params, l1)


def test_every_kind_of_params() -> None:
    model = model_with_gradients()
    groups: list[dict[str, Any]] = [{"params": model[0], "l1": 0.1}, {"params": model[1].parameters()}]
    optimizer = torch.optim.AdamW(model.parameters())
    expected = penalty_of_anything(model, 0.1)
    kinds: list[fastreg.Params] = [
        *(model.parameters(), list(model.parameters()), tuple(model.parameters())),
        *(model.named_parameters(), dict(model.named_parameters()), groups, optimizer.param_groups),
    ]
    for params in kinds:
        assert torch.equal(penalty_of_anything(params, 0.1), expected)
    assert penalty_of_anything(torch.ones(3), torch.tensor(0.5)) == 1.5


def test_an_attachment_has_a_public_type() -> None:
    model = model_with_gradients()
    optimizer = fastreg.optim.AdamW(model.parameters(), lr=0.1, prox=True)
    handle: fastreg.Attachment = fastreg.ElasticNet(model, l1=0.1).attach(optimizer, mode="prox", metric="lr")
    optimizer.step()
    assert_type(handle.is_active, bool)
    handle.remove()
    assert not handle.is_active


def test_mistakes_that_a_type_checker_sees() -> None:
    model = model_with_gradients()
    with pytest.raises(TypeError):
        fastreg.elastic_penalty("model")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        fastreg.ElasticNet(3.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        fastreg.elastic_penalty(model, l3=0.1)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        fastreg.elastic_penalty(model, "0.1")  # type: ignore[call-overload]
    reg = fastreg.ElasticNet(model)
    with pytest.raises(ValueError, match="mode must be"):
        reg.attach(torch.optim.SGD(model.parameters()), "l1")  # type: ignore[arg-type]
