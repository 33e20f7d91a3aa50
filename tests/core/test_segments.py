"""Segments: parts of a weight, such as its rows, with strengths and sums of their own, as strength groups have them."""

import itertools

import numpy as np
import pytest
import torch

from fastreg.core.layout import Layout
from fastreg.core.types import Mode, Request, Want, Work
from fastreg.formulas.penalty import ElasticNetPenalty
from fastreg.sweep.local import local_sweep
from tests import oracle
from tests.support.cases import DTYPES
from tests.support.helpers import Path, prox_ulps, slack

# Rows that are longer and shorter than a block, a column, one row, and a whole weight between them.
SHAPES = [(3, 2049), (7, 5), (4, 1), (1, 40), (2, 3, 4, 5)]


def work_of(dtype: torch.dtype, path: Path) -> tuple[Work, np.ndarray]:
    """A group for each row of every weight but the last, which is in the first row's group; and the strengths."""
    weights = [torch.randn(shape, device=path[1]).to(dtype) for shape in SHAPES]
    weights[1] = weights[1].t().contiguous().t()  # its rows are not contiguous
    firsts = np.cumsum([0, *(shape[0] for shape in SHAPES[:-1])])
    groups: list[int | range] = [range(a, b) for a, b in itertools.pairwise(map(int, firsts))]
    groups.append(0)
    n_groups = int(firsts[-1])
    strengths = np.random.default_rng(0).uniform(0.1, 0.5, (2, n_groups))
    penalty = ElasticNetPenalty((*torch.tensor(strengths, device=path[1]),))
    return Work([str(i) for i in range(len(weights))], weights, groups, n_groups, penalty, path[0]), strengths


def rows(work: Work) -> list[tuple[torch.Tensor, int]]:
    found = []
    for w, group in zip(work.weights, work.groups, strict=True):
        found += [(w, 0)] if isinstance(group, int) else list(zip(w, group, strict=True))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_and_value_of_each_segment(path: Path, dtype: torch.dtype) -> None:
    work, strengths = work_of(dtype, path)
    measured = local_sweep(work, Request(Mode.VALUE))
    assert measured is not None
    exact = np.zeros((work.n_groups, 2))
    for row, group in rows(work):
        exact[group] += oracle.penalty([row], 1.0, 1.0)[1:]
    np.testing.assert_allclose(measured.sums(work.n_groups).cpu().numpy(), exact, rtol=oracle.VALUE_RTOL[dtype])
    terms = (strengths.T * exact).sum(0)
    np.testing.assert_allclose([float(x) for x in work.penalty.result(measured)], [terms.sum(), *terms], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_segment_takes_its_own_strengths(path: Path, dtype: torch.dtype) -> None:
    work, strengths = work_of(dtype, path)
    grads = [torch.full_like(w, 7.0) for w in work.weights]
    local_sweep(work, Request(Mode.GRADIENT, Want.NOTHING, grads))
    expected = [
        (oracle.gradient(row, *strengths[:, g]), oracle.prox(row, *strengths[:, g], 0.5)) for row, g in rows(work)
    ]
    graded = [row for row, _ in rows(work._replace(weights=grads))]
    for row, (gradient, _) in zip(graded, expected, strict=True):
        assert oracle.ulp_distance(row, gradient) <= 1 + slack(path, dtype)
    local_sweep(work, Request(Mode.PROX, Want.NOTHING, scale=(0.5, 0.5)))
    for (row, _), (_, shrunk) in zip(rows(work), expected, strict=True):
        assert oracle.ulp_distance(row, shrunk) <= prox_ulps(path, dtype)


def test_segments_have_equal_sizes() -> None:
    with pytest.raises(ValueError, match="10 elements cannot be cut into 3 segments"):
        Layout([torch.ones(10)], [range(3)])


def test_works_are_regrouped_by_segments() -> None:
    work, _ = work_of(torch.float32, ("torch", "cpu"))
    finer, pairs = work.regrouped(["a", "b", "a", "a", "a"])
    assert finer.groups == [range(3), range(3, 10), range(10, 14), range(14, 15), 15]
    assert pairs[:4] == [(0, "a"), (1, "a"), (2, "a"), (3, "b")]
    assert pairs[-1] == (0, "a")
    assert finer.n_groups == len(pairs) == 16
