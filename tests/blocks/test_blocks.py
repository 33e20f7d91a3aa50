"""The PyTorch path's blocks on a CPU: pieces of every length, sums of many, memory that is kept."""

import contextlib
import math
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastreg
from fastreg.blocks import plan, scratch
from fastreg.blocks.plan import LANES, BlockPlan
from fastreg.core.layout import Layout, forget_layouts
from tests import oracle
from tests.support.cases import L1, L2, leaf

SMALL, BLOCK = plan.CPU_SMALL, plan.CPU_BLOCK
SIZES = [1, LANES - 1, LANES, LANES + 1, SMALL - 1, SMALL, SMALL + LANES + 3, BLOCK // 4]
SIZES += [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + SMALL + 5]


def term(weights: list[Tensor], l1: float = 0.0, l2: float = 0.0) -> float:
    return float(fastreg.elastic_penalty(weights, l1, l2).detach())


def assert_exact(actual: float, expected: float) -> None:
    assert abs(actual - expected) <= oracle.VALUE_RTOL[torch.float32] * expected, (actual, expected)


def heavy_first() -> np.ndarray:
    """Squares that a float32 sum rounds up at every step: some large, many of a bit more than half a last place."""
    row = np.full(128, np.sqrt(0.5000001 * np.spacing(np.float32(1.025))), np.float32)
    row[:4] = np.sqrt(np.float32(1.025))
    return row


@pytest.mark.parametrize("row", [heavy_first(), np.float32([1.1]), np.float32([1.0540466, 1e-4, 3e-5])], ids=len)
def test_weights_that_repeat_keep_their_digits(row: np.ndarray) -> None:
    """No sum is in float32, in which roundings that are the same everywhere add up."""
    w = torch.from_numpy(np.tile(row, 3 * BLOCK // len(row) + 5))
    values = oracle.array(w)
    assert term([w], l1=1.0) == pytest.approx(math.fsum(np.abs(values)), rel=2.0**-24)
    assert term([w], l2=1.0) == pytest.approx(math.fsum(values * values), rel=2.0**-24)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-21, 1e-12, 1e12, 1e18, 1e19, 3e30])
def test_squares_that_leave_the_range_of_float32(scale: float) -> None:
    w = torch.randn(BLOCK + 77, dtype=torch.float64).mul_(scale).float()
    values = oracle.array(w)
    square_sum = math.fsum(values * values)
    l2 = 1 / square_sum if square_sum < 1e300 else 1e-300
    if 0 < l2 < 1e300:
        assert_exact(term([w], l2=l2), l2 * square_sum)
    assert_exact(term([w], l1=1 / scale), math.fsum(np.abs(values)) / scale)


def test_strengths_of_groups_of_every_size() -> None:
    weights = [torch.randn(n) for n in (300, 3 * BLOCK, 40, 5, 700, BLOCK + 3)]
    groups = [{"params": [w], "l2": 0.1 * (i % 3 + 1)} for i, w in enumerate(weights)]
    expected = math.fsum(oracle.penalty([w], 0.0, 0.1 * (i % 3 + 1))[0] for i, w in enumerate(weights))
    assert_exact(float(fastreg.elastic_penalty(groups)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_groups_of_large_pieces_and_of_many_blocks(dtype: torch.dtype) -> None:
    """Each group has pieces that are a block by themselves, and small ones of more than one block together."""
    sizes = [plan.CPU_ALONE, BLOCK + 3, plan.CPU_ALONE + SMALL + 5, *[plan.CPU_ALONE - 40] * 34]
    n_groups = 3
    weights = [leaf(torch.randn(n).to(dtype)) for n in sizes for _ in range(n_groups)]
    own = [0.1 * (i % n_groups + 1) for i in range(len(weights))]
    groups = [{"params": weights[i::n_groups], "l1": own[i], "l2": own[i] / 2} for i in range(n_groups)]
    (part,) = Layout(weights, [i % n_groups for i in range(len(weights))]).parts[torch.device("cpu")]
    blocks = BlockPlan(part)
    pieces = blocks.pieces_of(weights)
    assert max(sum(pieces[i].numel() for i in block.pieces) for block in blocks.blocks) <= BLOCK
    found = fastreg.add_elastic_grad_(groups)
    expected = []
    for w, strength in zip(weights, own, strict=True):
        expected.append(oracle.penalty([w], strength, strength / 2)[0])
        assert w.grad is not None
        assert oracle.ulp_distance(w.grad, oracle.gradient(w, strength, strength / 2)) <= 1
    assert_exact(float(found.total), math.fsum(expected))


@pytest.mark.parametrize("position", [0, 100, BLOCK + SMALL])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_show_in_every_block(position: int, bad: float) -> None:
    weights = [torch.ones(100), torch.ones(BLOCK + SMALL), torch.ones(3)]
    torch.cat(weights)  # their elements in a row, as `position` counts them
    for w in weights:
        if position < w.numel():
            w[position] = bad
            break
        position -= w.numel()
    found = fastreg.elastic_penalty(weights, L1, L2, return_terms=True)
    assert [float(x) for x in found] == pytest.approx([abs(bad)] * 3, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_pieces_of_every_length(size: int, dtype: torch.dtype) -> None:
    """Twice, with other numbers: what a block leaves in kept memory is not seen by the next."""
    for sign in (1, -1):
        sizes = (size, 3, size // 2 + 1)
        weights = [leaf((sign * torch.randn(n, dtype=torch.float64)).clamp_(min=-1.5).to(dtype)) for n in sizes]
        before = [w.detach().clone() for w in weights]
        found = fastreg.elastic_penalty(weights, L1, L2)
        np.testing.assert_allclose(float(found.detach()), oracle.penalty(weights, L1, L2)[0], rtol=1e-6)

        found.backward()
        direct = [w.grad.clone() for w in weights if w.grad is not None]
        again = fastreg.add_elastic_grad_(weights, L1, L2)
        assert torch.equal(again.total, found.detach())
        formed = torch.autograd.grad(fastreg.elastic_penalty(weights, L1, L2), weights)
        fastreg.elastic_prox_(weights, L1, L2, lr=0.25)

        for w, old, grad, one in zip(weights, before, direct, formed, strict=True):
            assert oracle.ulp_distance(grad, oracle.gradient(old, L1, L2)) <= 1
            # Formed at once, and added in one pass: the same bits, also at the ends of vectors.
            assert torch.equal(one, grad)
            assert w.grad is not None
            assert torch.equal(w.grad, grad + grad)
            assert oracle.ulp_distance(w.detach(), oracle.prox(old, L1, L2, 0.25)) <= 2


def test_learnt_strengths_get_all_digits() -> None:
    w = torch.randn(BLOCK + 5)
    l1, l2 = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (L1, L2))
    fastreg.elastic_penalty([w], l1, l2).backward()
    exact = oracle.penalty([w], 1.0, 1.0)[1:]
    for strength, derivative in zip((l1, l2), exact, strict=True):
        assert strength.grad is not None
        np.testing.assert_allclose(float(strength.grad), derivative, rtol=1e-13)


def in_a_thread(call: Callable[[], object]) -> None:
    """Runs `call` where the memory is new, and its own."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures, failures


def test_memory_made_in_inference_mode_serves_every_other() -> None:
    w = leaf(torch.randn(1000))

    def first_in_inference_mode() -> None:
        with torch.inference_mode():
            value = fastreg.elastic_penalty([w], L1, L2)
        found = fastreg.elastic_penalty([w], L1, L2)
        found.backward()
        assert torch.equal(value, found.detach())
        with torch.inference_mode():
            fastreg.elastic_prox_([w], L1, L2, lr=0.1)

    in_a_thread(first_in_inference_mode)


def test_threads_do_not_share_their_memory() -> None:
    weights = [[leaf(torch.full((n,), float(i + 1))) for n in (700, 3, BLOCK)] for i in range(4)]
    expected = [oracle.penalty(of_thread, L1, L2)[0] for of_thread in weights]
    wrong: list[float] = []
    together = threading.Barrier(len(weights))

    def run(i: int) -> None:
        together.wait()
        for _ in range(30):
            found = float(fastreg.add_elastic_grad_(weights[i], L1, 0.0).total) + term(weights[i], l2=L2)
            if not abs(found - expected[i]) <= 1e-6 * expected[i]:
                wrong.append(found)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(weights))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_kept_memory_does_not_grow() -> None:
    """It is some blocks, however many models pass through it."""

    def kept() -> int:
        memory = scratch._KEPT.memory
        assert memory is not None
        return sum(buffer.numel() * buffer.element_size() for buffer in memory._buffers.values())

    def many_models() -> None:
        w = [leaf(torch.randn(3 * BLOCK)), leaf(torch.randn(9))]
        fastreg.add_elastic_grad_(w, L1, L2)
        before = kept()
        assert before == (2 * 4 + 8) * BLOCK
        for n in range(600):
            forget_layouts()
            term([torch.ones(n + 1), torch.ones(2)], l2=1.0)
        assert kept() == before
        views = [scratch._KEPT.memory._n_views]
        for n in range(40):
            term([torch.ones(n + 1)] * 1 + [torch.ones(2) for _ in range(1000)], l2=1.0)
            views.append(scratch._KEPT.memory._n_views)
        assert max(views) < scratch.MOST_VIEWS + 1003
        assert views != sorted(views)

    in_a_thread(many_models)


def test_memory_is_not_shared_with_modes_and_transforms() -> None:
    """Whose tensors are not what they seem, and would be found there by every later call."""
    w = torch.randn(1000)
    expected = term([w], L1, L2)

    def under_modes() -> None:
        with FakeTensorMode(allow_non_fake_inputs=True):
            fastreg.elastic_penalty([w], L1, L2)
        assert term([w], L1, L2) == expected
        traced = make_fx(lambda: fastreg.elastic_penalty([w], L1, L2))()
        assert float(traced()) == expected
        with contextlib.suppress(RuntimeError):
            torch.func.functionalize(lambda v: fastreg.elastic_prox_([v], L1, L2, lr=0.1))(w.clone())
        assert term([w], L1, L2) == expected

    in_a_thread(under_modes)


def test_planning_takes_no_longer_per_tensor_for_many() -> None:
    def calls(n: int) -> int:
        (part,) = Layout([torch.ones(2) for _ in range(n)], [i % 50 for i in range(n)]).parts[torch.device("cpu")]
        counted = 0

        def trace(frame: Any, event: str, arg: Any) -> Any:
            nonlocal counted
            counted += 1
            return trace

        sys.settrace(trace)
        try:
            assert sum(len(block.pieces) for block in BlockPlan(part).blocks) == n
        finally:
            sys.settrace(None)
        return counted

    assert calls(2000) < 2.2 * calls(1000)


def test_views_of_kept_memory_are_made_once() -> None:
    def twice() -> None:
        weights = [leaf(torch.randn(n)) for n in (700, 3)]
        for _ in range(2):  # in the first, a buffer that is added gives up the views of others
            fastreg.add_elastic_grad_(weights, L1, L2)
        memory = scratch._KEPT.memory
        assert memory is not None
        before = dict(memory._views)
        assert before
        fastreg.add_elastic_grad_(weights, L1, L2)
        assert scratch._KEPT.memory is memory
        assert memory._views.keys() == before.keys()
        assert all(memory._views[key] is view for key, view in before.items())

    in_a_thread(twice)


@pytest.mark.parametrize("n", [SMALL - 1, SMALL + 3, SMALL + LANES + 3, BLOCK, BLOCK + 5, BLOCK + SMALL + 5])
def test_only_small_pieces_and_tails_are_packed(n: int) -> None:
    """What is large and fills the vector units is changed where it is, also in small models."""
    w = torch.ones(n)
    (part,) = Layout([w, torch.ones(7)], [0, 0]).parts[torch.device("cpu")]
    blocks = BlockPlan(part)
    pieces = blocks.pieces_of([w, torch.ones(7)])
    rest = n % BLOCK
    large = rest - rest % LANES if rest - rest % LANES >= SMALL else 0
    sizes = [size for size in (*[BLOCK] * (n // BLOCK), large, rest - large) if size]
    assert sorted(pieces[i].numel() for block in blocks.blocks for i in block.pieces) == sorted([*sizes, 7])
    in_place = [pieces[i].numel() for block in blocks.blocks for i in block.in_place]
    assert sorted(in_place) == sorted(size for size in sizes if size >= SMALL)
    for block in blocks.blocks:
        assert sorted(block.in_place + block.packed) == sorted(block.pieces)
