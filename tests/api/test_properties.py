"""Hypothesis looks for weights, strides and strengths on which value or gradient leave the oracle."""

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import fastreg
from tests import oracle
from tests.support.cases import BLOCK, leaf
from tests.support.helpers import Path, slack
from tests.support.strategies import EXAMPLES, strengths, weights


@EXAMPLES
@given(tensors=st.lists(weights(), min_size=1, max_size=4), l1=strengths, l2=strengths, factor=st.floats(2**-8, 2**16))
@example(tensors=[torch.tensor([[6e4, -6e4]], dtype=torch.float16)], l1=1e-5, l2=1e-5, factor=65536.0)
@example(tensors=[torch.full((3, BLOCK), 0.1)], l1=0.3, l2=0.0, factor=1.0)
def test_value_and_gradient(path: Path, tensors: list[Tensor], l1: float, l2: float, factor: float) -> None:
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
        limit = 2 + slack(path, w.dtype)
        assert oracle.ulp_distance(w.grad, oracle.gradient(w, l1 * scale, l2 * scale)) <= limit
