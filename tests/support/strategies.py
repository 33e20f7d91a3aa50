"""Weights and strengths that Hypothesis makes up."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.cases import BLOCK
from tests.support.helpers import INTERPRETED

EXAMPLES = settings(max_examples=60 if INTERPRETED else 200, deadline=None, derandomize=True)
FEWER_EXAMPLES = settings(EXAMPLES, max_examples=30 if INTERPRETED else 100)

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
