"""The kernels' sums over weights of every size, in both ways: float64 from the element on, and pairs of float32."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import fastreg
from fastreg.core import layout
from tests import oracle
from tests.support.helpers import Path, bits, naming

tables = pytest.importorskip("fastreg.kernels.tables")
target = pytest.importorskip("fastreg.kernels.target")

LENGTHS = (1, 129, 2048, 2 * 2048 + 5)
NARROW = (torch.float32, torch.bfloat16, torch.float16)
# In float64 every sum is exact but for the last rounding. Pairs keep all but one rounding, of each first sum of two.
ULPS = {torch.float64: 0.501, torch.float32: 1.5}


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "pairs"])
def sum_dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    own = target.current_target

    def chosen() -> object:
        return own()._replace(sum_dtype=request.param)

    monkeypatch.setattr(tables, "current_target", chosen)
    layout.forget_layouts()
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def kernels(path: Path) -> Path:
    if path[0] == "torch":
        pytest.skip("about the kernels")
    return path


def weights_like(values: np.ndarray, dtype: torch.dtype, device: str, offset: int = 0) -> Tensor:
    """With alternating signs, as the dtype can hold them; misaligned with an offset."""
    largest = torch.finfo(dtype).max
    signed = np.clip(values, 0, largest) * np.where(np.arange(len(values)) % 2, -1.0, 1.0)
    memory = torch.zeros(offset + len(values), dtype=dtype, device=device)
    return memory[offset:].copy_(torch.from_numpy(signed).to(dtype))


def patterns(n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Magnitudes that are hard to sum: every rounding the same way, or many orders of magnitude."""
    places = np.arange(n)
    return {
        "normal": np.abs(rng.standard_normal(n)),
        "alike": np.full(n, 1 / 3),
        "pairs": np.where(places % 2, 1 + 2.0**-7, 1.9921875 * 2.0**-17),
        "four": np.tile((1 + rng.random(4)) * 2.0 ** rng.integers(-20, 4, 4), n)[:n],
        "rising": 2.0 ** np.linspace(-70, 60, n),
        "falling": 2.0 ** np.linspace(60, -70, n),
        "one large": np.where(places == n // 2, 2.0**40, 1e-3),
        "one beyond the range": np.where(places == n // 2, 3e25, 1e-3),
        "tiny": rng.random(n) * 1e-17,
        "some tiny": np.where(places % 3, 1e-24, 1e-2),
        "subnormal squares": rng.random(n) * 3e-21,
        "vanishing squares": rng.random(n) * 1e-30,
        "large": rng.random(n) * 1e18,
        "squares beyond float32": rng.random(n) * 1e30,
        "sparse": np.where(places % 511 == 1, rng.random(n), 0.0),
    }


def ulps(found: Tensor, exact: float) -> float:
    """The distance in units in the last place of float32, at least its smallest."""
    limit = float(torch.finfo(torch.float32).max)
    if exact > limit:
        return 0.0 if float(found) == math.inf else math.inf
    unit = max(2.0 ** (math.floor(math.log2(exact)) - 23), 2.0**-149) if exact > 0 else 2.0**-149
    return abs(float(found.detach()) - exact) / unit


@pytest.mark.parametrize("dtype", NARROW)
def test_values_of_weights_of_every_size(kernels: Path, sum_dtype: torch.dtype, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    # The interpreter of Triton before 3.8 rounds fma twice, which loses what squares of float32 lost.
    allowed = ULPS[sum_dtype] + (1.0 if kernels[1] == "cpu" and dtype == torch.float32 else 0.0)
    for n in LENGTHS:
        for name, values in patterns(n, rng).items():
            with naming(f"{name}, {n}"):
                w = weights_like(values, dtype, kernels[1], offset=n % 2)
                found = fastreg.elastic_penalty([w], 1.0, 1.0, impl="triton", return_terms=True)
                _, l1_term, l2_term = oracle.penalty([w], 1.0, 1.0)
                assert ulps(found.l1, l1_term) <= allowed
                assert ulps(found.l2, l2_term) <= allowed


def test_long_sums_lose_nothing(kernels: Path, sum_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for many blocks: roundings of a running float32 would add up, those of equal numbers all one way."""
    monkeypatch.setattr(tables, "MOST_CHUNKS", 1)
    layout.forget_layouts()
    n = 24 * 2048 + 77
    rng = np.random.default_rng(2)
    hard = patterns(n, rng) | {"growing": 1 + np.arange(n) / n, "near": 1 + rng.random(n) * 2.0**-20}
    for name in ("alike", "four", "growing", "near", "normal"):
        with naming(name):
            w = weights_like(hard[name], torch.float32, kernels[1])
            found = fastreg.elastic_penalty([w], 1.0, 1.0, impl="triton", return_terms=True)
            _, l1_term, l2_term = oracle.penalty([w], 1.0, 1.0)
            assert ulps(found.l1, l1_term) <= ULPS[sum_dtype]
            assert ulps(found.l2, l2_term) <= ULPS[sum_dtype] + (kernels[1] == "cpu")


def test_large_squares_with_small_strengths(kernels: Path, sum_dtype: torch.dtype) -> None:
    """Where float32 squares would overflow though the value does not."""
    for n in (2048, 5000):
        places = np.arange(n)
        for size in (1e18, 2.0**63.7, 2.0**65, 1e20, 3e37):
            for values in (np.full(n, size), np.where(places == 77, size, 1e-3)):
                w = weights_like(values, torch.float32, kernels[1])
                with naming(f"{size}, {n}"):
                    found = fastreg.elastic_penalty([w], 0.0, 1e-50, impl="triton")
                    assert ulps(found, oracle.penalty([w], 0.0, 1e-50)[0]) <= ULPS[sum_dtype]


def test_an_infinite_strength_of_a_group_with_zeros(kernels: Path, sum_dtype: torch.dtype) -> None:
    device = kernels[1]
    infinite, nan = (torch.tensor(s, device=device) for s in (math.inf, math.nan))
    weights = [torch.cat([torch.zeros(2048), torch.ones(5)]).to(device), torch.ones(5, device=device)]
    for strength, expected in ((infinite, math.inf), (nan, math.nan)):
        groups = [{"params": weights[:1], "l1": strength}, {"params": weights[1:], "l1": 1.0}]
        np.testing.assert_equal(float(fastreg.elastic_penalty(groups, impl="triton")), expected)
        np.testing.assert_equal(float(fastreg.elastic_penalty(weights[:1], strength, impl="triton")), expected)


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_infinity_stays_infinite_and_nan_shows(kernels: Path, sum_dtype: torch.dtype, special: float) -> None:
    for dtype in NARROW:
        for n, at in ((1, 0), (2048, 7), (5000, 4999)):
            w = torch.full((n,), 0.5, dtype=dtype, device=kernels[1])
            w[at] = special
            with naming(f"{dtype}, {n}"):
                found = [float(v) for v in fastreg.elastic_penalty([w], 0.1, 0.1, impl="triton", return_terms=True)]
                assert found == [math.inf] * 3 if math.isinf(special) else np.isnan(found).all()


def test_blocks_beyond_the_range_are_updated_once(kernels: Path, sum_dtype: torch.dtype) -> None:
    """Where summing starts anew, nothing was written before, and nothing is left out."""
    values = np.full(3 * 2048 + 11, 0.25)
    values[2048 + 5] = 1e20
    for dtype in (torch.float32, torch.bfloat16):
        w = weights_like(values, dtype, kernels[1])
        expected = {how: getattr(oracle, how) for how in ("gradient", "prox")}
        w.requires_grad_()
        w.grad = torch.zeros_like(w)
        fastreg.add_elastic_grad_([w], 0.5, 0.25, impl="triton")
        slack = 1.0 + (dtype == torch.bfloat16)  # the interpreter truncates bfloat16
        assert oracle.ulp_distance(w.grad, expected["gradient"](w, 0.5, 0.25)) <= slack
        shrunk = expected["prox"](w, 0.5, 0.25, 0.1)
        reg = fastreg.ElasticNet([w], 0.5, 0.25, impl="triton")
        optimizer = torch.optim.SGD([w], lr=0.1)
        reg.attach(optimizer, mode="prox", metric="lr")
        w.grad = None
        optimizer.step()
        assert oracle.ulp_distance(w, shrunk) <= 3.0 + slack
        assert reg.last is not None
        assert ulps(reg.last.l2, oracle.penalty([weights_like(values, dtype, "cpu")], 0.5, 0.25)[2]) <= 2.5


def test_a_float64_value_is_summed_in_float64(kernels: Path, sum_dtype: torch.dtype) -> None:
    """Of all weights, as the float64 value of a model with a few float64 weights is not to lose digits."""
    narrow = [torch.full((999,), 1 / 3, dtype=dtype, device=kernels[1]) for dtype in NARROW]
    weights = [*narrow, torch.full((7,), 1 / 3, dtype=torch.float64, device=kernels[1])]
    found = fastreg.elastic_penalty(weights, 0.7, 0.3, impl="triton")
    np.testing.assert_allclose(
        float(found), oracle.penalty(weights, 0.7, 0.3)[0], rtol=oracle.VALUE_RTOL[torch.float64]
    )


def test_many_groups_of_many_dtypes(kernels: Path, sum_dtype: torch.dtype) -> None:
    """Each group's chunks are found wherever they lie: groups alternate from weight to weight, and over dtypes."""
    rng = np.random.default_rng(1)
    weights = [
        weights_like(rng.random(int(rng.integers(0, 5000))), NARROW[i % 3], kernels[1], offset=i % 2) for i in range(40)
    ]
    groups = [{"params": weights[k::13], "l1": 0.5 ** (k % 5), "l2": 0.25 * (k % 3)} for k in range(13)]
    for w in weights:
        w.requires_grad_()
    l1, l2 = (torch.tensor(s, dtype=torch.float64, device=kernels[1], requires_grad=True) for s in (1.0, 1.0))
    expected = sum(oracle.penalty(g["params"], g["l1"], g["l2"])[0] for g in groups)
    assert ulps(fastreg.elastic_penalty(groups, impl="triton"), expected) <= 2.5
    # The sums of groups, by the derivative in a strength that all but one of them share.
    shared = [{"params": g["params"]} for g in groups[1:]] + [{"params": groups[0]["params"], "l1": 3.0, "l2": 2.0}]
    fastreg.elastic_penalty(shared, l1, l2, impl="triton").backward()
    rest = [w for g in groups[1:] for w in g["params"]]
    assert l1.grad is not None
    assert l2.grad is not None
    np.testing.assert_allclose(float(l1.grad), oracle.penalty(rest, 1.0, 0.0)[0], rtol=2e-7)
    np.testing.assert_allclose(float(l2.grad), oracle.penalty(rest, 0.0, 1.0)[0], rtol=2e-7)


def test_chunks_by_group() -> None:
    groups = [torch.tensor(g) for g in ([2, 0, 2], [1, 1, 0, 2, 2])]
    table = tables.sorted_by_group(groups, 4).tolist()
    first, order, sorted_groups = table[:5], table[5:13], table[13:]
    assert first == [0, 2, 4, 8, 8]
    assert order == [1, 5, 3, 4, 0, 2, 6, 7]
    assert sorted_groups == [0, 0, 1, 1, 2, 2, 2, 2]


def grouped(weights: list[Tensor]) -> list[dict[str, object]]:
    return [{"params": [w], "l1": 0.5 + i, "l2": 0.25 * i} for i, w in enumerate(weights)]


def step_of_two(weights: list[Tensor], n_groups: int, impl: str) -> Tensor:
    """The value of the first two weights, when these alone have gradients and so are swept without the others."""
    optimizer = torch.optim.SGD(weights[:n_groups], lr=0.0)
    reg = fastreg.ElasticNet(grouped(weights[:n_groups]), impl=impl)
    reg.attach(optimizer, mode="prox")
    for w in weights[:2]:
        w.grad = torch.zeros_like(w)
    optimizer.step()
    return reg.last.total


def test_the_same_weights_among_other_numbers_of_groups(kernels: Path, sum_dtype: torch.dtype) -> None:
    """A table for fewer groups is too short, and one for more groups has its vectors in other places."""
    weights = [torch.full((3000 - 300 * i,), 0.5 + i, device=kernels[1]).requires_grad_() for i in range(8)]
    for n_groups in (2, 8, 3, 5, 2, 8):
        expected = sum(oracle.penalty([w], 0.5 + i, 0.25 * i)[0] for i, w in enumerate(weights[:n_groups]))
        with naming(f"{n_groups} groups"):
            assert ulps(step_of_two(weights, n_groups, "triton"), expected) <= 2.5


def test_tables_of_groups_evict_no_table_of_weights(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.ones(5 + i, device=kernels[1]).requires_grad_() for i in range(6)]
    build = tables.PointerTables._build
    built: list[list[int]] = []
    monkeypatch.setattr(tables.PointerTables, "_build", lambda own: built.append(own._part.addresses) or build(own))
    for n_groups in (2, 6, 3, 5, 4, 2, 6, 3):
        step_of_two(weights, n_groups, "triton")
    of_two = [addresses for addresses in built if addresses == [w.data_ptr() for w in weights[:2]]]
    assert len(of_two) == 1


def test_runs_agree_in_every_bit(kernels: Path, sum_dtype: torch.dtype) -> None:
    w = torch.randn(20_000, device=kernels[1])
    first, *others = (fastreg.elastic_penalty([w], 0.3, 0.7, impl="triton") for _ in range(3))
    assert all(bits(first) == bits(other) for other in others)
