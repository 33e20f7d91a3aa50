"""What the library launches, through Triton's own JIT and down to a cubin, without a GPU: `tests/stub_driver.py`."""

import ctypes
import functools
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton.backends.nvidia")

import fastreg
from fastreg import layout
from fastreg.formulas import Mode
from fastreg.inplace import add_gradient
from fastreg.kernels import launch
from fastreg.kernels.launch import BLOCK
from fastreg.layout import Part
from fastreg.selection import select
from fastreg.strengths import UNSCALED, Scale, Strengths
from fastreg.work import Work
from tests.helpers import naming
from tests.stub_driver import Launch, StubDriver, stub_driver

pytestmark = pytest.mark.jit

KERNELS = ("_sweep_kernel", "_finish_kernel")
# Parameters in upper case are constexprs; the others are int64, addresses most of them, but for these.
OTHER_TYPES = {"l1": "fp64", "l2": "fp64", "doubles": "i32", "blocks_per_chunk": "i32"}
# Each type in PTX, in Python, and for struct.pack.
TYPES = {"i64": ("u64", int, "q"), "i32": ("u32", int, "i"), "fp64": ("f64", float, "d")}
SCRATCH = ["u64", "u64"]  # two pointers that every launcher adds
OPTIONS = {
    "_sweep_kernel": {"num_warps": launch.NUM_WARPS, "enable_fp_fusion": True},
    "_finish_kernel": {"num_warps": launch.FINISH_WARPS, "enable_fp_fusion": True},
}
# The modes that `use_all` needs, and whether a value is asked for.
MODES = [
    *(("value", True), ("gradient", True), ("gradient", False), ("rescale", False)),
    *(("accumulate", True), ("accumulate", False), ("prox", False)),
]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubDriver]:
    monkeypatch.setattr(launch, "_COMPILED", {})
    monkeypatch.setattr("fastreg.kernels.INTERPRETED", True)  # the host's memory is the device's here
    layout.forget_layouts()
    with stub_driver([getattr(launch, name) for name in KERNELS]) as stub:
        yield stub
    layout.forget_layouts()


def parameters(*sizes: int, dtype: torch.dtype = torch.float32, first: int = 0) -> list[Tensor]:
    """Weights that begin at the element `first` of their memory."""
    return [nn.Parameter(torch.zeros(first + n, dtype=dtype)[first:]) for n in sizes]


def use_all(
    weights: Sequence[Tensor], l1: Any = 0.5, l2: Any = 0.25, *, lr: Any = 0.1, scale: Any = 0.5, own: Any = None
) -> None:
    """Every way to use a penalty of `weights`, which may have their `own` strengths: each mode and all launches."""
    params = weights if own is None else [{"params": [w], "l1": s, "l2": s} for w, s in zip(weights, own, strict=True)]
    reg = fastreg.ElasticNet(params, l1, l2, impl="triton")
    torch.no_grad()(reg)()
    (reg() * scale).backward()
    torch.autograd.grad(reg() * scale, weights)
    (fastreg.elastic_penalty([w * 1 for w in weights], l1, l2, impl="triton") * scale).backward()
    reg.add_grad_()
    reg.prox_(lr)


def at(value: float, dtype: torch.dtype, place: int = 0) -> Tensor:
    """A 0-dim tensor whose address is a multiple of 16 at place 0, and is not at place 1."""
    return torch.full((2,), value, dtype=dtype)[place]


def variant(launched: Launch) -> tuple[Any, ...]:
    """The kernel, and of the sweep its mode and whether a value is asked for."""
    return (launched.kernel, *(launched.arguments[n] for n in ("MODE", "REDUCE") if n in launched.arguments))


def move_gradients(weights: list[Tensor], first: int) -> None:
    for w in weights:
        w.grad = torch.zeros(w.numel() + first, dtype=w.dtype)[first:]
    use_all(weights)


def zero_grad(weights: list[Tensor], set_to_none: bool) -> None:
    torch.optim.SGD(weights).zero_grad(set_to_none)
    use_all(weights)


def call_functions(weights: list[Tensor]) -> None:
    fastreg.elastic_penalty(weights, 1.0, 16.0, impl="triton").backward()
    fastreg.add_elastic_grad_(weights, 16.0, 1.0, impl="triton")
    fastreg.elastic_prox_(weights, 1.0, 1.0, lr=1.0, impl="triton")


def later_calls(weights: list[Tensor]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls in the modes and the dtype of an earlier one, by what is different."""
    use, single, double, half = functools.partial, torch.float32, torch.float64, torch.float16
    for value in (0.0, 1.0, 1, 16.0, 1e-45, 1e300, *(at(0.5, d, i) for d in (double, single, half) for i in (0, 1))):
        yield f"strength {value!r}", use(use_all, weights, value, value)
    for value in (0.0, 1.0, 16.0, at(1.0, single, 1), at(0.5, double)):
        yield f"lr {value!r}", use(use_all, weights, lr=value)
        yield f"upstream {value!r}", use(use_all, weights, scale=value)
    for own in ([0.5, 1.0, 16.0], [16.0] * 3, [at(0.5, double), 1.0, at(1.0, single, 1)]):
        yield f"groups {own}", use(use_all, weights, own=own)
    for i in (0, 1):
        yield f"gradients at {i}", use(move_gradients, weights, i)
        yield f"zero_grad({i})", use(zero_grad, weights, bool(i))
        for sizes in ([1], [16], [BLOCK, BLOCK], [5, BLOCK + 1], range(50)):
            yield f"{sizes} at {i}", use(use_all, parameters(*sizes, dtype=weights[0].dtype, first=i))
    yield "functions", use(call_functions, weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_is_compiled_after_the_first_call_of_each_mode(
    dtype: torch.dtype, driver: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = parameters(5, 16, BLOCK + 3, dtype=dtype)
    use_all(weights)
    first = [each for each in driver.launches if each.by_jit]
    assert Counter(map(variant, first)) == Counter([*(("_sweep_kernel", *mode) for mode in MODES), ("_finish_kernel",)])
    assert len(driver.compiled) == len(first)
    driver.clear()
    for name, call in later_calls(weights):
        with naming(name):
            call()
            assert not driver.compiled
            assert not any(each.by_jit for each in driver.launches)
    assert set(map(variant, driver.launches)) == set(map(variant, first))
    driver.clear()
    monkeypatch.setattr(launch, "MOST_CHUNKS", 1)  # as many blocks in a chunk as large models have
    use_all(parameters(3 * BLOCK, dtype=dtype))
    assert {each.arguments.get("blocks_per_chunk") for each in driver.launches} == {3, None}
    assert not driver.compiled


def test_every_launch_has_the_types_that_the_kernel_was_compiled_for(driver: StubDriver) -> None:
    weights = parameters(5, BLOCK + 3) + parameters(16, dtype=torch.float64)
    strengths = [at(0.5, torch.float64, 1), 1.0, at(1.0, torch.float32)]
    use_all(weights[:2])
    use_all(weights, own=[0.5] * 3)
    use_all(weights, own=strengths, lr=strengths[0], scale=strengths[0])
    use_all(weights, strengths[0], 1, lr=1, scale=1)
    assert {each.by_jit for each in driver.launches} == {True, False}
    for each in driver.launches:
        names = getattr(launch, each.kernel).arg_names
        types = ["constexpr" if name.isupper() else OTHER_TYPES.get(name, "i64") for name in names]
        assert list(each.signature.items()) == list(zip(names, types, strict=True))
        for name, value in each.packed.items():
            _, python_type, packed = TYPES[each.signature[name]]
            assert type(value) is python_type, name
            struct.pack(packed, value)  # raises where it does not fit


def test_the_binary_takes_what_a_launcher_packs(driver: StubDriver) -> None:
    use_all(parameters(5, 16))
    assert len(driver.compiled) == len(MODES) + 1
    for binary in driver.compiled:
        kernel, signature = binary.src.fn, binary.src.signature
        packed = [TYPES[each][0] for each in signature.values() if each != "constexpr"]
        entry = re.search(rf"\.entry {kernel.__name__}\((.*?)\)", binary.asm["ptx"], re.DOTALL)
        assert entry is not None
        assert re.findall(r"\.param \.(\w+)", entry[1]) == packed + SCRATCH
        constants = [kernel.arg_names[i] for (i,) in binary.src.constants]
        assert constants == [name for name in kernel.arg_names if name.isupper()]
        assert not any(binary.src.attrs.values()), "specialised for a value's alignment"
        options = OPTIONS[kernel.__name__]
        assert {name: getattr(binary.metadata, name) for name in options} == options


def test_grids(driver: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program for each chunk of each weight, and one for the terms and one for each group."""

    def grids(*sizes: int, n_groups: int = 1) -> list[tuple[int, int, int]]:
        layout.forget_layouts()
        driver.clear()
        weights = parameters(*sizes)
        groups = [{"params": weights[i::n_groups], "l1": 0.5 + i} for i in range(n_groups)]
        fastreg.elastic_penalty(groups if n_groups > 1 else weights, 0.5, 0.25, impl="triton")
        return [each.grid for each in driver.launches]

    for _ in range(2):
        assert grids(1) == [(1, 1, 1), (2, 1, 1)]
        assert grids(BLOCK, BLOCK + 1, 0, 5) == [(4, 1, 1), (2, 1, 1)]
        assert grids(5, 5, 5, n_groups=3) == [(3, 1, 1), (4, 1, 1)]
        assert grids(0, 0) == [(2, 1, 1)]
    monkeypatch.setattr(launch, "MOST_CHUNKS", 2)
    assert grids(4 * BLOCK, 1) == [(3, 1, 1), (2, 1, 1)]  # chunks of three blocks: two of the first weight, and one


def test_strengths_and_scales_come_as_values_or_by_address(driver: StubDriver) -> None:
    names = ("l1", "l2", "scale_l1", "scale_l2")
    (w,) = parameters(5)
    w.grad = torch.zeros(5)
    for bit, name in enumerate(names):
        for dtype in (torch.float64, torch.float32, torch.float16):
            driver.clear()
            numbers: list[Any] = [2.0, 3.0, 4.0, 5.0]
            numbers[bit] = at(0.5, dtype, 1)
            add_gradient(select([w], *numbers[:2], None, None, "triton"), scale=Scale(*numbers[2:]))
            sweep, finish = (each.arguments for each in driver.launches)
            # Half precision is read as float64.
            assert sweep["doubles"] == finish["doubles"] == (dtype != torch.float32) << bit
            assert [each for each in names if sweep[f"{each}_address"]] == [name]
            assert dtype == torch.float16 or sweep[f"{name}_address"] == numbers[bit].data_ptr()
            l1, l2, scale_l1, scale_l2 = (1.0 if isinstance(n, Tensor) else n for n in numbers)
            assert (sweep["l1"], sweep["l2"]) == (l1 * scale_l1, l2 * scale_l2)
            assert (finish["l1"], finish["l2"]) == (l1, l2)
            assert finish["l1_address"] == sweep["l1_address"]
            assert finish["l2_address"] == sweep["l2_address"]


def test_sums_and_partial_sums_do_not_overlap(driver: StubDriver) -> None:
    weights = [torch.ones(5, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.float32)]
    fastreg.elastic_penalty([{"params": w, "l1": 0.5 + i} for i, w in enumerate(weights)], impl="triton")
    first, second, finish = (each.arguments for each in driver.launches)
    assert first["partials"] == finish["partials"] == finish["sums"] + 3 * 16
    assert second["partials"] == first["partials"] + 2 * 16


def test_a_compiled_kernel_gets_the_addresses_of_this_call(driver: StubDriver) -> None:
    weights = parameters(3, 4)
    reg = fastreg.ElasticNet(weights, 0.5, 0.25, impl="triton")
    memory = torch.zeros(32)
    for first, second in ((0, 4), (0, 12), (1, 13), (20, 4), (0, 4)):
        driver.clear()
        weights[0].grad, weights[1].grad = memory[first : first + 3], memory[second : second + 4]
        total = reg.add_grad_().total
        sweep, finish = (each.arguments for each in driver.launches)
        offsets = (ctypes.c_int64 * 2).from_address(sweep["grad_table"])
        assert [sweep["grad_base"] + offset for offset in offsets] == [w.grad.data_ptr() for w in weights]
        assert finish["total"] == total.data_ptr()


def test_each_setting_compiles_kernels_of_its_own(driver: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    (w,) = parameters(5)
    for name, value in [("BLOCK", 512), ("BLOCK", 1024), ("NUM_WARPS", 8), ("FINISH_BLOCK", 512), ("FINISH_WARPS", 4)]:
        monkeypatch.setattr(launch, name, value)
        layout.forget_layouts()
        for _ in range(2):
            driver.clear()
            fastreg.add_elastic_grad_([w], 0.5, 0.25, impl="triton")
            changed = driver.launches[name.startswith("FINISH")]
            assert value in (changed.arguments["BLOCK"], changed.metadata.num_warps)


def test_each_device_is_given_a_binary_of_its_own(driver: StubDriver) -> None:
    work = Work([], [], [0], 1, Strengths(0.5, 0.25), "triton")
    for driver.device in (0, 1, 0, 1):
        part = Part(torch.float32, torch.device("meta", driver.device))
        part.positions, part.addresses, part.numels, part.groups = [0], [16], [5], [0]
        launch.kernel_sweep([part], Mode.VALUE, work, None, UNSCALED, torch.float32)
    assert [(each.device, each.loaded_on) for each in driver.launches] == [(i, i) for i in (0, 0, 1, 1) * 2]
    assert [each.by_jit for each in driver.launches] == [True] * 4 + [False] * 4


def test_only_a_compiled_kernel_is_kept(driver: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it compiles in the background, and where a hook forbids it to compile, the JIT returns something else."""
    ran: list[str] = []
    for name in KERNELS:
        run = functools.partial(lambda name, *arguments, **keywords: ran.append(name) or object(), name)
        monkeypatch.setattr(getattr(launch, name), "run", run)
    for _ in range(2):
        fastreg.elastic_penalty([torch.ones(5)], 0.5, impl="triton")
    assert ran == [*KERNELS] * 2


def test_what_stands_in_a_kernels_place_sees_every_launch(driver: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter, and what tools put there."""
    seen = []

    class Spy:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            seen.append(self.kernel.__name__)
            return self.kernel[grid]

    for name in KERNELS:
        monkeypatch.setattr(launch, name, Spy(getattr(launch, name)))
    for _ in range(2):
        fastreg.elastic_penalty([torch.ones(5)], 0.5, impl="triton")
    assert seen == [each.kernel for each in driver.launches] == [*KERNELS] * 2
