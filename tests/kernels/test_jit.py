"""What the library launches, through Triton's own JIT and down to a cubin, without a GPU:
`stub_driver.py`."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastreg
from fastreg.core import layout
from fastreg.sweep.gradient import add_gradient
from tests.support import small_sweep
from tests.support.stub_driver import Launch, StubDriver, stub_driver

pytest.importorskip("triton.backends.nvidia")
launch = pytest.importorskip("fastreg.kernels.launch")
tables = pytest.importorskip("fastreg.kernels.tables")
target = pytest.importorskip("fastreg.kernels.target")

pytestmark = pytest.mark.jit

# Parameters in upper case are constexprs; the others are int64, addresses most of them, but for these.
OTHER_TYPES = {"l1": "fp64", "l2": "fp64", "doubles": "i32", "lr": "fp64"}
# What PTX and Python call a type.
PTX_TYPES = {"i64": "u64", "i32": "u32", "fp64": "f64"}
PYTHON_TYPES = {"i64": int, "i32": int, "fp64": float}
SCRATCH = ["u64", "u64"]  # two pointers that the launcher adds
OPTIONS = {
    "_sweep_kernel": {"num_warps": launch.NUM_WARPS, "enable_fp_fusion": False, "num_ctas": 1},
    "_finish_kernel": {"num_warps": launch.FINISH_WARPS, "enable_fp_fusion": False, "num_ctas": 1},
}
# The modes that `use_all` needs, and whether a value is asked for.
MODES = [
    *(("value", True), ("gradient", True), ("gradient", False), ("rescale", False)),
    *(("accumulate", True), ("accumulate", False), ("prox", False)),
]
BLOCK = tables.BLOCK
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

Change = Callable[[fastreg.ElasticNet, list[Tensor]], object]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubDriver]:
    monkeypatch.setattr(launch, "_COMPILED", {})
    monkeypatch.setattr("fastreg.kernels.INTERPRETED", True)  # the CPU's memory is the device's here
    layout.forget_layouts()
    with stub_driver([launch._sweep_kernel, launch._finish_kernel]) as stub:
        yield stub
    layout.forget_layouts()


def parameters(*sizes: int, dtype: torch.dtype = torch.float32, first: int = 0) -> list[Tensor]:
    """Weights that begin at the element `first` of their memory."""
    return [nn.Parameter(torch.zeros(first + n, dtype=dtype)[first:]) for n in sizes]


def penalty(params: Any, l1: Any = 0.5, l2: Any = 0.25) -> fastreg.ElasticNet:
    return fastreg.ElasticNet(params, l1, l2, impl="triton")


def use_all(reg: fastreg.ElasticNet, weights: Sequence[Tensor], lr: Any = 0.1, upstream: Any = 0.5) -> None:
    """Every way to use a penalty: each mode with all that a training step does."""
    torch.no_grad()(reg)()
    (reg() * upstream).backward()
    hook = weights[0].register_hook(lambda grad: grad)
    for _ in range(2):  # the first of them did not foresee it
        (reg() * upstream).backward()
    hook.remove()
    reg.add_grad_()
    reg.prox_(lr)


def variants(launches: Sequence[Launch]) -> Counter[tuple[Any, ...]]:
    """The kernels launched with their modes."""

    def variant(each: Launch) -> tuple[Any, ...]:
        if "MODE" not in each.arguments:
            return (each.kernel,)
        return each.kernel, each.arguments["MODE"], each.arguments["SUM_DTYPE"] is not None

    return Counter(map(variant, launches))


def at(value: float, dtype: torch.dtype, place: int = 0) -> Tensor:
    """A 0-dim tensor whose address is a multiple of 16 at place 0, and is not at place 1."""
    return torch.full((2,), value, dtype=dtype)[place]


def strength(value: Any) -> Change:
    def change(reg: fastreg.ElasticNet, weights: list[Tensor]) -> None:
        reg.l1 = reg.l2 = value
        use_all(reg, weights)

    return change


def regrouped(*strengths: Any) -> Change:
    """A penalty of the same weights with their own strengths, which then become equal."""

    def change(reg: fastreg.ElasticNet, weights: list[Tensor]) -> None:
        for own in (strengths, [strengths[0]] * len(strengths)):
            groups = [{"params": [w], "l1": s, "l2": s} for w, s in zip(weights, own, strict=True)]
            use_all(penalty(groups), weights)

    return change


def move_gradients(reg: fastreg.ElasticNet, weights: list[Tensor]) -> None:
    for first in (0, 1):
        for w in weights:
            w.grad = torch.zeros(w.numel() + first, dtype=w.dtype)[first:]
        use_all(reg, weights)


def zero_grad(reg: fastreg.ElasticNet, weights: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(weights)
    for set_to_none in (True, False):
        optimizer.zero_grad(set_to_none=set_to_none)
        use_all(reg, weights)


def other_model(*sizes: int, first: int = 0) -> Change:
    def change(reg: fastreg.ElasticNet, weights: list[Tensor]) -> None:
        others = parameters(*sizes, dtype=weights[0].dtype, first=first)
        use_all(penalty(others), others)

    return change


def call_functions(reg: fastreg.ElasticNet, weights: list[Tensor]) -> None:
    fastreg.elastic_penalty(weights, 1.0, 16.0, impl="triton").backward()
    fastreg.add_elastic_grad_(weights, 16.0, 1.0, impl="triton")
    fastreg.elastic_prox_(weights, 1.0, 1.0, lr=1.0, impl="triton")


# What must not compile anything again.
CHANGES: dict[str, Change] = {
    "the same": lambda reg, weights: use_all(reg, weights),
    **{f"strength {value!r}": strength(value) for value in (0.0, 1.0, 1, 16.0, 1e-45, 1e300)},
    **{
        f"{dtype} strength at {place}": strength(at(0.5, dtype, place))
        for dtype in (torch.float64, torch.float32, torch.float16)
        for place in (0, 1)
    },
    **{
        f"lr {lr!r}": lambda reg, weights, lr=lr: use_all(reg, weights, lr=lr)  # type: ignore[misc]
        for lr in (0.0, 1.0, 16.0, at(1.0, torch.float32, 1), at(0.5, torch.float64))
    },
    **{
        f"upstream {scale!r}": lambda reg, weights, scale=scale: use_all(reg, weights, upstream=scale)  # type: ignore[misc]
        for scale in (1.0, 16.0, 65536.0, torch.tensor(1.0), torch.tensor(0.5, dtype=torch.float64))
    },
    "groups": regrouped(0.5, 1.0, 16.0),
    "groups of tensors": regrouped(at(0.5, torch.float64), 1.0, at(1.0, torch.float32, 1)),
    "moved gradients": move_gradients,
    "zero_grad": zero_grad,
    "one element": other_model(1),
    "a block": other_model(BLOCK, BLOCK),
    "misaligned": other_model(5, BLOCK + 1, first=1),
    "many": other_model(*range(50)),
    "functions": call_functions,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_compiled_after_the_first_call_of_each_mode(
    dtype: torch.dtype, driver: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = parameters(5, 16, BLOCK + 3, dtype=dtype)
    reg = penalty(weights)
    use_all(reg, weights)
    first = [each for each in driver.launches if each.by_jit]
    assert variants(first) == Counter([*(("_sweep_kernel", *mode) for mode in MODES), ("_finish_kernel",)])
    assert len(driver.compiled) == len(first)
    for name, change in CHANGES.items():
        driver.clear()
        change(penalty(weights), weights)
        assert len(driver.launches) >= 5, name
        assert not driver.compiled, name
        assert not any(each.by_jit for each in driver.launches), name
    driver.clear()
    monkeypatch.setattr(tables, "MOST_CHUNKS", 1)  # as many blocks in a chunk as large models have
    other_model(3 * BLOCK)(reg, weights)
    assert {each.grid for each in driver.launches if "MODE" in each.arguments} == {(1, 1, 1)}
    assert not driver.compiled


def test_every_launch_has_the_types_that_the_kernel_was_compiled_for(driver: StubDriver) -> None:
    weights = parameters(5, BLOCK + 3) + parameters(16, dtype=torch.float64)
    for values in ([0.5] * 3, [at(0.5, torch.float64, 1), 1.0, at(1.0, torch.float32)]):
        use_all(
            penalty([{"params": [w], "l1": s} for w, s in zip(weights, values, strict=True)]), weights, lr=values[0]
        )
    use_all(penalty(weights), weights, lr=at(1.0, torch.float32))
    assert {each.by_jit for each in driver.launches} == {True, False}
    for each in driver.launches:
        kernel = getattr(launch, each.kernel)
        types = {n: "constexpr" if n.isupper() else OTHER_TYPES.get(n, "i64") for n in kernel.arg_names}
        assert list(each.signature.items()) == list(types.items())
        for name, value in each.packed.items():
            assert type(value) is PYTHON_TYPES[types[name]], name
            assert types[name] == "fp64" or -(2 ** (bits := int(types[name][1:]) - 1)) <= value < 2**bits, name


def test_the_binary_takes_what_the_launcher_packs(driver: StubDriver) -> None:
    weights = parameters(*[5] * 16)  # a number that Triton specialises for
    use_all(penalty(weights), weights)
    assert len(driver.compiled) == len(MODES) + 1
    for binary in driver.compiled:
        packed = [type for type in binary.src.signature.values() if type != "constexpr"]
        entry = re.search(r"\.entry\s+\w+\((.*?)\)", binary.asm["ptx"], re.DOTALL)
        assert entry is not None
        assert re.findall(r"\.param \.(\w+)", entry[1]) == [*map(PTX_TYPES.__getitem__, packed), *SCRATCH]
        assert not any(binary.src.attrs.values()), "specialised for a value"
        assert {binary.src.fn.arg_names[i] for (i,) in binary.src.constants} == set(
            filter(str.isupper, binary.src.fn.arg_names)
        )
        for name, value in OPTIONS[binary.src.fn.__name__].items():
            assert getattr(binary.metadata, name) == value, name
        assert "cubin" in binary.asm


def test_grids(driver: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program for each chunk of each weight, one where it is empty, and one for the terms and one for each group."""

    def grids(*sizes: int, n_groups: int = 1) -> list[tuple[int, int, int]]:
        layout.forget_layouts()
        driver.clear()
        weights = parameters(*sizes)
        groups = [{"params": weights[i::n_groups], "l1": 0.5 + i} for i in range(n_groups)]
        fastreg.elastic_penalty(groups if n_groups > 1 else weights, 0.5, 0.25, impl="triton")
        return [each.grid for each in driver.launches]

    for _ in range(2):
        assert grids(1) == [(1, 1, 1), (2, 1, 1)]
        assert grids(BLOCK, BLOCK + 1, 0, 5) == [(5, 1, 1), (2, 1, 1)]
        assert grids(5, 5, 5, n_groups=3) == [(3, 1, 1), (4, 1, 1)]
        assert grids(0, 0) == [(2, 1, 1), (2, 1, 1)]
    monkeypatch.setattr(tables, "MOST_CHUNKS", 2)
    assert grids(3 * BLOCK, 1) == [(3, 1, 1), (2, 1, 1)]  # of two blocks, of one, and the other weight's


def test_strengths_and_scales_come_as_values_or_by_address(driver: StubDriver) -> None:
    names = ("l1", "l2", "scale_l1", "scale_l2")
    (w,) = parameters(5)
    w.grad = torch.zeros(5)
    for bit, name in enumerate(names):
        for dtype in (torch.float64, torch.float32, torch.float16):
            driver.clear()
            numbers: list[Any] = [2.0, 3.0, 4.0, 5.0]
            numbers[bit] = at(0.5, dtype, 1)
            add_gradient(penalty([w], *numbers[:2])._current(), scale=tuple(numbers[2:]))
            sweep, finish = (each.arguments for each in driver.launches)
            assert (
                sweep["doubles"] == finish["doubles"] == (dtype != torch.float32) << bit
            )  # float16 is read as float64
            assert [each for each in names if sweep[f"{each}_ptr"]] == [name]
            assert dtype == torch.float16 or sweep[f"{name}_ptr"] == numbers[bit].data_ptr()
            l1, l2, scale_l1, scale_l2 = (1.0 if isinstance(n, Tensor) else n for n in numbers)
            assert (sweep["l1"], sweep["l2"]) == (l1 * scale_l1, l2 * scale_l2)
            assert (finish["l1"], finish["l2"]) == (l1, l2)
            assert finish["l1_ptr"] == sweep["l1_ptr"]
            assert finish["l2_ptr"] == sweep["l2_ptr"]


def test_what_is_launched_by_the_jit_and_what_by_the_compiled_kernel(
    driver: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def jitted(call: Callable[[], object]) -> int:
        """How many launches of a first call go by the JIT; none of a second one does."""
        driver.clear()
        call()
        first = sum(each.by_jit for each in driver.launches)
        call()
        assert sum(each.by_jit for each in driver.launches) == len(driver.compiled) == first
        return first

    weights = [parameters(5, dtype=dtype)[0] for dtype in (torch.float32, torch.float64)]
    single, double = (penalty([w]) for w in weights)
    assert jitted(torch.no_grad()(single)) == 2
    assert jitted(torch.no_grad()(double)) == 2
    assert jitted(single.add_grad_) == 1
    assert jitted(lambda: single.prox_(0.1)) == 1
    assert jitted(lambda: single().backward()) == 1  # the gradient without a value
    grouped = penalty([{"params": [w], "l1": 0.1 + i} for i, w in enumerate(weights)])
    # Of float64; on GPUs that sum in pairs also of float32, whose sums are float64 beside such weights.
    assert jitted(grouped.add_grad_) == 1
    monkeypatch.setattr(launch, "BLOCK", 1024)
    layout.forget_layouts()
    assert jitted(single.add_grad_) == 1
    monkeypatch.setattr(tables, "current_target", lambda: target.Target(torch.float32, 32))
    layout.forget_layouts()
    assert jitted(penalty(weights[:1]).add_grad_) == 1
    assert {each.arguments["SUM_DTYPE"].name for each in driver.launches if "MODE" in each.arguments} == {"fp32"}


def test_what_is_no_compiled_kernel_is_launched_as_it_is(driver: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter, and what tools put in a kernel's place, see every launch."""
    (w,) = parameters(5)
    fastreg.add_elastic_grad_([w], impl="triton", l1=0.5)
    compiled, seen = driver.compiled[0], []

    class Spy:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            return lambda **arguments: seen.append(self.name) or compiled

    for name in ("_sweep_kernel", "_finish_kernel"):
        monkeypatch.setattr(launch, name, Spy(name))
    for _ in range(2):
        fastreg.add_elastic_grad_([w], 0.5, 0.25, impl="triton")
    assert seen == ["_sweep_kernel", "_finish_kernel"] * 2


def test_sums_and_partial_sums_do_not_overlap(driver: StubDriver) -> None:
    weights = [torch.ones(5, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.float32)]
    fastreg.elastic_penalty([{"params": w, "l1": 0.5 + i} for i, w in enumerate(weights)], impl="triton")
    first, second, finish = (each.arguments for each in driver.launches)
    assert first["partials_ptr"] == finish["partials_ptr"] == finish["sums_ptr"] + 3 * 16
    assert second["partials_ptr"] == first["partials_ptr"] + 2 * 16


@pytest.mark.parametrize("own", [torch.float64, torch.float32], ids=str)
def test_the_sweep_for_sanitizers_launches_every_kernel(
    own: torch.dtype, driver: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "current_target", lambda: target.Target(own, 32))
    small_sweep.sweep("cpu", "triton")
    found = {
        (a["DTYPE"].name, a["MODE"], a["SUM_DTYPE"] and a["SUM_DTYPE"].name)
        for a in (each.arguments for each in driver.launches)
        if "MODE" in a
    }
    modes = [(mode, has_value) for mode, has_value in MODES if (mode, has_value) != ("gradient", False)]
    sums = {"bf16": own, "fp16": own, "fp32": own, "fp64": torch.float64}
    names = {torch.float64: "fp64", torch.float32: "fp32"}
    for dtype, sum_dtype in sums.items():
        for mode, has_value in [*modes, ("prox", True)]:
            assert (dtype, mode, names[sum_dtype] if has_value else None) in found


def step_of(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor]) -> None:
    for w in weights:
        w.grad = torch.zeros_like(w)
    optimizer.step()


STEPS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "sgd": (fastreg.optim.SGD, {}),
    "momentum": (fastreg.optim.SGD, {"momentum": 0.9}),
    "adam": (fastreg.optim.AdamW, {}),
    "amsgrad": (fastreg.optim.Adam, {"amsgrad": True}),
}


@pytest.mark.parametrize("mode", STEPS)
def test_a_step_is_one_launch_and_nothing_of_it_compiles_again(driver: StubDriver, mode: str) -> None:
    kind, options = STEPS[mode]
    weights = parameters(5, BLOCK + 3, 0, 7)
    groups = [{"params": weights[:2], "l1": 0.5}, {"params": weights[2:], "lr": 0.25, "prox": True}]
    optimizer = kind(groups, lr=0.1, l1=0.1, impl="triton", **options)
    for _ in range(3):
        step_of(optimizer, weights)
        assert variants(driver.launches) == {("_sweep_kernel", mode, False): 1}
        driver.clear()
    n_compiled = len(driver.compiled)
    optimizer.param_groups[0].update(lr=torch.tensor(0.3), l1=torch.tensor(0.2), l2=16.0, weight_decay=1.0)
    step_of(optimizer, weights)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(16.0), torch.tensor(1.0)
    step_of(optimizer, weights)
    others = parameters(16, first=1)
    step_of(kind(others, lr=1, l2=1, prox=True, impl="triton", **options), others)
    assert {each[1] for each in variants(driver.launches)} == {mode}
    assert len(driver.compiled) == n_compiled
    tracked = kind(weights, lr=0.1, l1=0.1, track=True, impl="triton", **options)
    driver.clear()
    step_of(tracked, weights)
    assert variants(driver.launches) == {("_sweep_kernel", mode, True): 1, ("_finish_kernel",): 1}
    signatures = [each.signature for each in driver.launches if each.kernel == "_sweep_kernel"]
    assert all(signature["lr"] == "fp64" and signature["settings_ptr"] == "i64" for signature in signatures)


def test_the_proximal_step_after_adam_is_one_launch_beside_the_value(driver: StubDriver) -> None:
    weights = parameters(5, BLOCK + 3)
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    penalty(weights).attach(optimizer, mode="prox")
    for n_compiled in (2, 0, 0):
        driver.clear()
        step_of(optimizer, weights)
        assert variants(driver.launches) == {("_sweep_kernel", "elementwise_prox", True): 1, ("_finish_kernel",): 1}
        assert len(driver.compiled) == n_compiled
