"""Every error of the contract, with its message."""

import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastreg

NAN, INF = float("nan"), float("inf")


def model(weight: torch.Tensor) -> nn.Module:
    net = nn.Module()
    net.fine = nn.Parameter(torch.ones(2))
    net.layer = nn.Module()
    net.layer.w = nn.Parameter(weight, requires_grad=weight.is_floating_point() or weight.is_complex())
    return net


def weights() -> list[torch.Tensor]:
    return [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]


def frozen() -> nn.Module:
    return nn.Linear(2, 2).requires_grad_(False)


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch is about to remove them, and says so
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def shared_group() -> list[dict[str, Any]]:
    one, two = weights()
    return [{"params": [one, two]}, {"params": [("twin", two)]}]


CASES: list[tuple[str, Callable[[], Any], dict[str, Any], type[Exception], str]] = [
    ("negative l1", weights, {"l1": -1.0}, ValueError, "l1 must be finite and at least 0, got -1.0"),
    ("negative l2", weights, {"l2": -1e-9}, ValueError, "l2 must be finite and at least 0, got -1e-09"),
    ("nan l1", weights, {"l1": NAN}, ValueError, "l1 must be finite and at least 0, got nan"),
    ("infinite l2", weights, {"l2": INF}, ValueError, "l2 must be finite and at least 0, got inf"),
    ("l1 of shape", weights, {"l1": torch.ones(1)}, ValueError, "l1 must be a float or a 0-dim tensor, got shape"),
    (
        "l2 elsewhere",
        weights,
        {"l2": torch.ones((), device="meta")},
        ValueError,
        "l2 is on meta but the weights",
    ),
    ("integer l1", weights, {"l1": torch.tensor(1)}, TypeError, "l1 must be a floating-point tensor, got torch.int64"),
    ("l1 a string", weights, {"l1": "0.1"}, TypeError, "l1 must be a float or a 0-dim tensor, got str '0.1'"),
    ("l1 None", weights, {"l1": None}, TypeError, "l1 must be a float or a 0-dim tensor, got NoneType"),
    ("l2 a bool", weights, {"l2": True}, TypeError, "l2 must be a float or a 0-dim tensor, got bool"),
    ("l2 complex", weights, {"l2": 1j}, TypeError, "l2 must be a float or a 0-dim tensor, got complex"),
    (
        "group strength",
        lambda: [{"params": weights()}, {"params": weights(), "l1": -2}],
        {},
        ValueError,
        "groups[1].l1 must be finite and at least 0, got -2.0",
    ),
    ("nothing", list, {}, ValueError, "nothing selected: params holds no tensors"),
    ("empty module", nn.Module, {}, ValueError, "nothing selected: params holds no tensors"),
    ("no groups", lambda: [{"params": []}], {}, ValueError, "nothing selected: params holds no tensors"),
    ("all frozen", frozen, {}, ValueError, "nothing selected: all 2 parameters are frozen (requires_grad=False)"),
    (
        "filtered away",
        lambda: nn.Linear(2, 2),
        {"include": "conv"},
        ValueError,
        "nothing selected: include='conv' matches none of 2 trainable parameters; their names are like 'weight'",
    ),
    ("no params entry", lambda: [{"l1": 0.1}], {}, ValueError, "groups[0] has no 'params' entry"),
    (
        "in two groups",
        shared_group,
        {},
        ValueError,
        "parameter 'twin' is in groups[0] and in groups[1]",
    ),
    ("bad regex", weights, {"include": "("}, ValueError, "include is not a valid regular expression: '('"),
    ("exclude a list", weights, {"exclude": ["bias"]}, TypeError, "exclude must be a regular expression, a callable"),
    ("unknown impl", weights, {"impl": "cuda"}, ValueError, 'impl must be "triton", "torch" or None, got \'cuda\''),
    ("params a string", lambda: "model", {}, TypeError, "params must be an nn.Module, a tensor, an iterable of"),
    ("params None", lambda: None, {}, TypeError, "or a list of group dicts, got NoneType"),
    (
        "params of floats",
        lambda: [1.0],
        {},
        TypeError,
        "params[0] must be a tensor or a (name, tensor)",
    ),
    (
        "swapped pair",
        lambda: [(torch.ones(2), "w")],
        {},
        TypeError,
        "params[0] must be a tensor or a (name,",
    ),
    (
        "mixed groups",
        lambda: [{"params": weights()}, torch.ones(2)],
        {},
        TypeError,
        "params mixes group dicts with Tensor; put that into a group of its own",
    ),
    ("group of None", lambda: [{"params": None}], {}, TypeError, "groups[0].params must hold tensors, got NoneType"),
    ("integers", lambda: [("w", torch.ones(2, dtype=torch.int8))], {}, TypeError, "parameter 'w' has dtype torch.int8"),
    ("complex", lambda: model(torch.ones(2) * 1j), {}, TypeError, "parameter 'layer.w' has dtype torch.complex64"),
    (
        "float8",
        lambda: torch.ones(2).to(torch.float8_e4m3fn),
        {},
        TypeError,
        "has dtype torch.float8_e4m3fn;",
    ),
    ("sparse", lambda: model(torch.eye(2).to_sparse()), {}, TypeError, "parameter 'layer.w' is sparse"),
    ("quantized", lambda: [("q", quantized())], {}, TypeError, "parameter 'q' is quantized; exclude it"),
    ("meta", lambda: nn.Linear(2, 2, device="meta"), {}, TypeError, "parameter 'weight' is on the meta device"),
    ("lazy", lambda: nn.LazyLinear(3), {}, TypeError, "parameter 'weight' is not initialized yet; run a batch through"),
    (
        "no GPU",
        weights,
        {"impl": "triton"},
        RuntimeError,
        'impl="triton" cannot run on cpu tensors; leave impl out, move the weights to a GPU, or set TRITON_INTERPRET=1',
    ),
]


def _use(reg: torch.Tensor | fastreg.ElasticNet) -> None:
    if isinstance(reg, fastreg.ElasticNet):
        reg()


@pytest.mark.parametrize("kind", ["function", "object"])
@pytest.mark.parametrize(("params", "keywords", "error", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_errors(
    params: Callable[[], Any], keywords: dict[str, Any], error: type[Exception], message: str, kind: str
) -> None:
    if error is RuntimeError and "TRITON_INTERPRET" in message:
        pytest.importorskip("triton")
    call = fastreg.elastic_penalty if kind == "function" else fastreg.ElasticNet
    with pytest.raises(error, match=re.escape(message)):
        _use(call(params(), **keywords))


def test_assigned_strengths_are_checked() -> None:
    reg = fastreg.ElasticNet(weights(), l1=0.5)
    with pytest.raises(ValueError, match=r"l1 must be finite and at least 0, got -1\.0"):
        reg.l1 = -1.0
    with pytest.raises(TypeError, match="l2 must be a float"):
        reg.l2 = "1"  # type: ignore[assignment]
    assert (reg.l1, reg.l2) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("alpha", "l1_ratio", "message"),
    [
        (-1.0, 0.5, "alpha must be finite and at least 0, got -1.0"),
        (1.0, 1.5, "l1_ratio must be between 0 and 1, got 1.5"),
        (1.0, -0.5, "l1_ratio must be finite and at least 0, got -0.5"),
    ],
)
def test_from_alpha_checks(alpha: float, l1_ratio: float, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fastreg.ElasticNet.from_alpha(weights(), alpha, l1_ratio)


def test_triton_asked_for_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("fastreg.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("fastreg.kernels", raising=False)
    with pytest.raises(RuntimeError, match='impl="triton" needs Triton, which is not installed'):
        fastreg.elastic_penalty(weights(), l1=0.1, impl="triton")
    assert float(fastreg.elastic_penalty(weights(), l1=0.1).detach()) == pytest.approx(0.5)
