"""`ElasticNet.summary`: what counts, how strongly, how much of it is zero, and what is left out and why."""

import re

import pytest
import torch
from torch import nn

import fastreg
from tests.support.helpers import Path


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 16)
        self.body = nn.Linear(16, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(16, 100, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def cells(line: str) -> list[str]:
    return re.split(r" {2,}", line.strip())


def test_every_weight_and_everything_left_out() -> None:
    net = Net()
    with torch.no_grad():
        net.body.weight.view(-1)[:16] = 0.0
    groups = [
        {"params": net.embedding, "l1": 0.5},
        {"params": net.body, "l2": torch.tensor(0.25)},
        {"params": net.frozen},
    ]
    lines = fastreg.ElasticNet(groups, 1e-5, 0.0, exclude=fastreg.bias_and_norm).summary().splitlines()
    assert [cells(line) for line in lines if not line.startswith("-")] == [
        ["name", "shape", "dtype", "l1", "l2", "exact zeros"],
        ["weight", "100 x 16", "float32", "0.5", "0", "0.00%"],
        ["weight", "4 x 16", "float32", "1e-05", "0.25", "25.00%"],
        ["2 tensors", "1,664", "0.96%"],
        [""],
        ["left out:"],
        ["bias", "4", "excluded"],
        ["weight", "2 x 2", "frozen: requires_grad=False"],
        ["bias", "2", "frozen: requires_grad=False"],
    ]
    assert (
        len({line.index("exact") + len("exact zeros") for line in lines[:1]} | {len(line) for line in lines[2:4]}) == 1
    )


def test_tied_frozen_and_not_included() -> None:
    net = Net()
    reg = fastreg.ElasticNet(net, 0.1, include="embedding|frozen")
    assert cells(reg.summary().splitlines()[2])[0] == "embedding.weight"
    left_out = [cells(line) for line in reg.summary().split("left out:\n")[1].splitlines()]
    assert ["head.weight", "100 x 16", "tied: the same tensor as embedding.weight"] in left_out
    assert ["body.weight", "4 x 16", "not included"] in left_out
    assert ["frozen.bias", "2", "frozen: requires_grad=False"] in left_out
    net.frozen.requires_grad_(True)  # noticed, as at every call
    net.embedding.weight.requires_grad_(False)
    reg.l1 = 0.25
    assert [cells(line)[0] for line in reg.summary().splitlines()[2:4]] == ["frozen.weight", "frozen.bias"]
    assert "0.25" in reg.summary()
    assert "\n" not in repr(reg)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_plain_tensors(path: Path, dtype: torch.dtype) -> None:
    weights = [torch.zeros(3, device=path[1], dtype=dtype), torch.ones((), device=path[1]), torch.empty(0)]
    weights[2] = weights[2].to(path[1])
    text = fastreg.ElasticNet(weights, 1.0, impl=path[0]).summary()
    assert [cells(line)[-1] for line in text.splitlines()[2:5]] == ["100.00%", "0.00%", "-"]
    assert cells(text.splitlines()[3])[1] == "scalar"
    assert "left out" not in text
