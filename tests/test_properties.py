"""Hypothesis looks for weights, strides and strengths on which value or gradient leave the oracle."""

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastreg
from tests import oracle
from tests.cases import BLOCK, leaf
from tests.conftest import INTERPRETED

EXAMPLES = settings(max_examples=60 if INTERPRETED else 200, deadline=None, derandomize=True)

strengths = st.one_of(st.just(0.0), st.floats(1e-12, 1e6))
special = st.sampled_from([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-40, 5e-8, 6e4, -1e30, 3e38])
numbers = st.one_of(st.floats(-10, 10, width=16), st.floats(-(2.0**99), 2.0**99, width=32), special)
VIEWS = {
    "whole": lambda x: x,
    "transposed": lambda x: x.t(),
    "columns": lambda x: x[:, ::2],
    "offset": lambda x: x.reshape(-1)[1:],
    "reversed rows": lambda x: x.t()[1:].t(),
    "one row for all": lambda x: x[:1].expand(3, -1),
}


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    rows, columns = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 3, 7, 8, BLOCK // 2 - 1, BLOCK]))
    seed = draw(st.integers(0, 2**31))
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    flat = values.view(-1)
    for position, number in draw(st.dictionaries(st.integers(0, flat.numel() - 1), numbers, max_size=4)).items():
        flat[position] = number
    values = values.to(dtype)
    if INTERPRETED and dtype == torch.bfloat16:
        values = torch.where(values.abs() < torch.finfo(dtype).tiny, 0.0, values)  # read as zero there, unlike on a GPU
    return VIEWS[draw(st.sampled_from(sorted(VIEWS)))](values)


@EXAMPLES
@given(tensors=st.lists(weights(), min_size=1, max_size=4), l1=strengths, l2=strengths, factor=st.floats(2**-8, 2**16))
@example(tensors=[torch.tensor([[6e4, -6e4]], dtype=torch.float16)], l1=1e-5, l2=1e-5, factor=65536.0)
@example(tensors=[torch.full((3, BLOCK), 0.1)], l1=0.3, l2=0.0, factor=1.0)
def test_value_and_gradient(path: tuple[str, str], tensors: list[Tensor], l1: float, l2: float, factor: float) -> None:
    impl, device = path
    leaves = [leaf(t.to(device)) for t in tensors]
    wide = any(w.dtype == torch.float64 for w in leaves)

    found = fastreg.elastic_penalty(leaves, l1, l2, return_terms=True, impl=impl)
    (found.total * factor).backward()

    with np.errstate(all="ignore"):
        expected = np.array(oracle.penalty(leaves, l1, l2))
        if not wide:
            expected = expected.astype(np.float32).astype(np.float64)
    # Below the smallest normal number, digits get lost on the final rounding; above float32's largest, it gives inf.
    np.testing.assert_allclose([t.item() for t in map(Tensor.detach, found)], expected, rtol=1e-6, atol=1e-44)
    scale = factor if wide else float(np.float32(factor))
    for w in leaves:
        assert w.grad is not None
        # One unit as everywhere; one more because the strength, its factor and their product are each rounded here.
        slack = 2 if path == ("triton", "cpu") and w.dtype == torch.bfloat16 else 1
        assert oracle.ulp_distance(w.grad, oracle.gradient(w, l1 * scale, l2 * scale)) <= 1 + slack
