"""What the in-place calls refuse, touching nothing, and what refuses to run after them."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastreg
from tests.support.cases import GRADS, INF, L1, L2, LR, NAN, leaf, make
from tests.support.helpers import INTERPRETED, Path, bits

Named = list[tuple[str, Tensor]]


def pair(bad: Tensor | None = None, bad_grad: Tensor | None = None) -> Callable[[], Named]:
    """A good weight with a gradient, and after it one that may be bad."""

    def build() -> Named:
        good, last = leaf(torch.tensor([1.0, -2.0, 0.01])), leaf(torch.ones(4, 2) if bad is None else bad)
        good.grad = torch.ones(3)
        if bad_grad is not None and bad_grad.dtype != last.dtype:
            if not hasattr(Tensor, "grad_dtype"):
                pytest.skip("this PyTorch lets no .grad differ from its weight")
            last.grad_dtype = None  # type: ignore[attr-defined]
        last.grad = bad_grad
        return [("good", good), ("bad", last)]

    return build


def inference_tensors() -> Named:
    with torch.inference_mode():
        return [("good", torch.ones(2)), ("bad", torch.ones(3))]


def inference_grad() -> Named:
    with torch.inference_mode():
        grad = torch.ones(4, 2)
    return pair(None, grad)()


def integers() -> Named:
    return [("good", torch.ones(2)), ("bad", torch.ones(3, dtype=torch.int32))]


def computed() -> Named:
    return [("good", leaf(torch.ones(3))), ("bad", leaf(torch.ones(2)) * 1)]


NO_GPU = 'impl="triton" cannot run on cpu tensors'
Error = tuple[str, Callable[[], Named], dict[str, Any], type[Exception], str]
PROX_ERRORS: list[Error] = [
    ("negative lr", pair(), {"lr": -0.1}, ValueError, "lr must be finite and at least 0, got -0.1"),
    ("nan lr", pair(), {"lr": NAN}, ValueError, "lr must be finite and at least 0, got nan"),
    ("infinite lr", pair(), {"lr": INF}, ValueError, "lr must be finite and at least 0, got inf"),
    ("lr None", pair(), {"lr": None}, TypeError, "lr must be a float or a 0-dim tensor, got NoneType"),
    ("lr of shape", pair(), {"lr": torch.ones(1)}, ValueError, "lr must be a float or a 0-dim tensor, got shape (1,)"),
    ("integer lr", pair(), {"lr": torch.tensor(1)}, TypeError, "lr must be a floating-point tensor, got torch.int64"),
    ("lr elsewhere", pair(), {"lr": torch.ones((), device="meta")}, ValueError, "lr is on meta but the weights are on"),
    (
        "expanded",
        pair(torch.ones(1, 2).expand(4, 2)),
        {},
        ValueError,
        "parameter 'bad' is expanded: its elements share",
    ),
    ("integers", integers, {}, TypeError, "parameter 'bad' has dtype torch.int32"),
    ("inference tensors", inference_tensors, {}, RuntimeError, "nference"),
    ("negative l1", pair(), {"l1": -1.0}, ValueError, "l1 must be finite and at least 0, got -1.0"),
    ("nothing", pair(), {"exclude": "."}, ValueError, "nothing selected: include and exclude leave none of 2"),
    ("no GPU", pair(), {"impl": "triton"}, RuntimeError, NO_GPU),
]
ADD_ERRORS: list[Error] = [
    (
        "float64 .grad",
        pair(None, torch.ones(4, 2).double()),
        {},
        TypeError,
        "the .grad of parameter 'bad' is torch.float64 on cpu",
    ),
    (
        "sparse .grad",
        pair(None, torch.eye(4, 2).double().to_sparse()),
        {},
        TypeError,
        "the .grad of parameter 'bad' is torch.float64 on cpu",
    ),
    ("inference .grad", inference_grad, {}, RuntimeError, "nference"),
    ("expanded .grad", pair(None, torch.ones(1, 2).expand(4, 2)), {}, ValueError, "share memory"),
    ("integers", integers, {}, TypeError, "parameter 'bad' has dtype torch.int32"),
    ("computed", computed, {}, ValueError, "parameter 'bad' is computed from other tensors"),
    ("negative l2", pair(), {"l2": -1.0}, ValueError, "l2 must be finite and at least 0, got -1.0"),
    ("nothing", pair(), {"include": "conv"}, ValueError, "nothing selected: include='conv' matches none of 2"),
    ("no GPU", pair(), {"impl": "triton"}, RuntimeError, NO_GPU),
    ("unknown impl", pair(), {"impl": "cuda"}, ValueError, 'impl must be "triton", "torch" or None'),
]


@pytest.mark.parametrize(
    ("call", "case"),
    [
        *(pytest.param(fastreg.elastic_prox_, case, id=f"prox {case[0]}") for case in PROX_ERRORS),
        *(pytest.param(fastreg.add_elastic_grad_, case, id=f"add {case[0]}") for case in ADD_ERRORS),
    ],
)
def test_an_error_leaves_weights_and_gradients_as_they_were(call: Callable[..., Any], case: Error) -> None:
    _, build, keywords, error, message = case
    if message == NO_GPU and INTERPRETED:
        pytest.skip("the interpreter takes CPU tensors")
    pairs = build()
    grads = [w.grad if w.is_leaf else None for _, w in pairs]
    dense = [None if g is None else g.to_dense() for g in grads]
    before = bits(*(w for _, w in pairs), *dense)
    defaults = {"l1": 0.5, "lr": 0.5} if call is fastreg.elastic_prox_ else {"l1": 0.5}

    with pytest.raises(error, match=re.escape(message)):
        call(pairs, **defaults | keywords)

    for (_, w), grad in zip(pairs, grads, strict=True):
        assert not w.is_leaf or w.grad is grad
    dense = [None if g is None else g.to_dense() for g in grads]
    assert bits(*(w for _, w in pairs), *dense) == before


def test_a_first_gradient_that_is_to_have_another_dtype_is_refused_before_the_first_write() -> None:
    if not hasattr(Tensor, "grad_dtype"):
        pytest.skip("this PyTorch lets no .grad differ from its weight")
    pairs = pair(torch.ones(4, 2).half())()
    pairs[1][1].grad_dtype = torch.float32  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"is to be torch\.float32"):
        fastreg.add_elastic_grad_(pairs, 0.5)
    assert torch.equal(pairs[0][1].grad, torch.ones(3))
    assert pairs[1][1].grad is None


@pytest.mark.parametrize("case", ["matrix", "every_other", "channels_last"])
def test_a_pending_backward_refuses_to_run_on_shrunk_weights(path: Path, case: str) -> None:
    impl, device = path
    w = make(case, torch.float32, path)
    x = torch.randn(w.shape, device=device, requires_grad=True)
    data_loss, penalty = (w * x).sum(), fastreg.elastic_penalty(w, L1, L2, impl=impl)
    fastreg.elastic_prox_(w, L1, L2, lr=LR, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        data_loss.backward()
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        penalty.backward()


@pytest.mark.parametrize("present", ["like the weight", "other strides"])
def test_a_pending_backward_refuses_to_run_on_a_grad_added_to(path: Path, present: str) -> None:
    w = make("matrix", torch.float32, path)
    w.grad = GRADS[present](w)
    x = torch.randn(w.shape, device=path[1], requires_grad=True)
    product = (w.grad * x).sum()
    fastreg.add_elastic_grad_(w, L1, L2, impl=path[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
