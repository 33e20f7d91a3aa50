"""How kernels are launched: the first time by the JIT, then by what it compiled, with the same arguments."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastreg
from fastreg import layout

triton = pytest.importorskip("triton")
launch = pytest.importorskip("fastreg.kernels.launch")


class Compiled(triton.compiler.CompiledKernel):  # type: ignore[misc]
    """A compiled kernel that notes its launches."""

    def __init__(self, names: list[str], launches: list[dict[str, Any]]) -> None:
        self.names, self.launches = names, launches
        self.module = None  # nothing to unload

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            assert len(grid) == 3, "a compiled kernel is launched on three axes"
            self.launches.append({"by": "compiled", **dict(zip(self.names, arguments, strict=True))})

        return run


class Jitted(triton.runtime.JITFunction):  # type: ignore[misc]
    """A JIT function that compiles nothing and notes its launches."""

    def __init__(self, kernel: Any, launches: list[dict[str, Any]]) -> None:
        self.launches = launches
        self.names = list(kernel.arg_names)
        self.compiled = Compiled(self.names, launches)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def run(*, num_warps: int, enable_fp_fusion: bool, **arguments: Any) -> Compiled:
            assert list(arguments) == self.names, "compiled kernels take arguments by their place"
            self.launches.append({"by": "JIT", **arguments})
            return self.compiled

        return run


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    noted: list[dict[str, Any]] = []
    for name in ("_sweep_kernel", "_finish_kernel"):
        monkeypatch.setattr(launch, name, Jitted(getattr(launch, name), noted))
    monkeypatch.setattr(launch, "_COMPILED", {})
    monkeypatch.setattr("fastreg.kernels.INTERPRETED", True)
    layout.forget_layouts()
    return noted


def test_only_the_first_launch_of_a_variant_goes_by_the_jit(launches: list[dict[str, Any]]) -> None:
    w = nn.Parameter(torch.ones(5))
    w.grad = torch.zeros(5)
    reg = fastreg.ElasticNet([w], 0.5, 0.25, impl="triton")
    double, single = (torch.tensor(0.5, dtype=dtype) for dtype in (torch.float64, torch.float32))
    reg.add_grad_()
    assert [each["by"] for each in launches] == ["JIT", "JIT"]
    strengths = [0.0, 1.0, 1, double, single, single.half(), torch.stack([double] * 3)[1]]
    for strength in strengths:
        launches.clear()
        reg.l1 = strength
        reg.add_grad_()
        assert [each["by"] for each in launches] == ["compiled", "compiled"]
        sweep = launches[0]
        if isinstance(strength, torch.Tensor):
            assert sweep["l1"] == 1.0
            assert sweep["doubles"] == int(strength.dtype != torch.float32)  # half precision is read as float64
            assert strength.dtype == torch.float16 or sweep["l1_address"] == strength.data_ptr()
        else:
            assert (sweep["l1"], sweep["l1_address"], sweep["doubles"]) == (strength, 0, 0)


def test_other_dtypes_modes_and_settings_are_other_variants(
    launches: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def jitted(call: Callable[[], object]) -> int:
        launches.clear()
        call()
        call()
        assert [each["by"] for each in launches[len(launches) // 2 :]] == ["compiled"] * (len(launches) // 2)
        return sum(each["by"] == "JIT" for each in launches)

    weights = {dtype: nn.Parameter(torch.ones(5, dtype=dtype)) for dtype in (torch.float32, torch.float64)}
    single, double = (fastreg.ElasticNet([w], 0.5, 0.25, impl="triton") for w in weights.values())
    assert jitted(torch.no_grad()(single)) == 2
    assert jitted(torch.no_grad()(double)) == 2
    assert jitted(single.add_grad_) == 1
    assert jitted(lambda: single.prox_(0.1)) == 1
    assert jitted(lambda: single().backward()) == 1  # the gradient without a value
    grouped = fastreg.ElasticNet(
        [{"params": [w], "l1": 0.1 + i} for i, w in enumerate(weights.values())], impl="triton"
    )
    assert jitted(grouped.add_grad_) == 2  # of float64, and of float32 with sums in float64
    monkeypatch.setattr(launch, "BLOCK", 1024)
    layout.forget_layouts()
    assert jitted(single.add_grad_) == 1


def test_what_is_no_compiled_kernel_is_launched_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter, and what tools put in a kernel's place, see every launch."""
    seen = []

    class Spy:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Callable[..., Compiled]:
            def run(**arguments: Any) -> Compiled:
                seen.append(self.name)
                return Compiled([], [])

            return run

    for name in ("_sweep_kernel", "_finish_kernel"):
        monkeypatch.setattr(launch, name, Spy(name))
    monkeypatch.setattr("fastreg.kernels.INTERPRETED", True)
    w = nn.Parameter(torch.ones(5))
    for _ in range(2):
        fastreg.add_elastic_grad_([w], 0.5, 0.25, impl="triton")
    assert seen == ["_sweep_kernel", "_finish_kernel"] * 2


def test_sums_and_partial_sums_do_not_overlap(launches: list[dict[str, Any]]) -> None:
    weights = [torch.ones(5, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.float32)]
    fastreg.elastic_penalty([{"params": w, "l1": 0.5 + i} for i, w in enumerate(weights)], impl="triton")
    first, second, finish = launches
    assert first["partials"] == finish["partials"] == finish["sums"] + 3 * 16
    assert second["partials"] == first["partials"] + 2 * 16
