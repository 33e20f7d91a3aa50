"""What the compiler makes of the kernels, for the launches that the library makes: no GPU is needed."""

import functools
import importlib.util
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from bench.static import codegen
from bench.static.codegen import CASES, DTYPES, TARGETS, VARIANTS, Report
from fastreg.core.types import Mode
from fastreg.kernels import launch, sweep
from fastreg.kernels.tables import BLOCK, MOST_CHUNKS

pytestmark = [
    pytest.mark.codegen,
    pytest.mark.skipif(codegen.missing_tool() is not None, reason="Triton's wheel came without NVIDIA's tools"),
]


# Numbers for each weight: with a gradient, a momentum buffer or first moment, a second moment, the largest of those.
READ_AND_WRITTEN = {
    Mode.ELEMENTWISE_PROX: (2, 1),
    Mode.SGD: (2, 1),
    Mode.MOMENTUM: (3, 2),
    Mode.ADAM: (4, 3),
    Mode.AMSGRAD: (5, 4),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("variant", "dtype"), CASES)
def test_sweep_is_vectorised_and_stays_in_registers(variant: str, dtype: str, target: str) -> None:
    kernel = codegen.compiled(variant, dtype, target)["_sweep_kernel"]
    assert_vectorised(codegen.inspect(kernel), variant, dtype, target)
    # Of pairs, one register may be put aside between loops.
    assert_in_registers(codegen.inspect(kernel), spare=8 if target == "sm_86" else 0)
    assert not any(opcode.startswith(("STL", "LDL", "scratch")) for opcode in codegen.machine_loop(kernel))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("variant", ["value", "value-grouped"])
def test_finish_stays_in_registers(variant: str, dtype: str, target: str) -> None:
    assert_in_registers(codegen.inspect(codegen.compiled(variant, dtype, target)["_finish_kernel"]))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("variant", ["value", "gradient", "accumulate", "accumulate-scaled", "prox"])
def test_float64_instructions_per_element(variant: str, dtype: str) -> None:
    loop = codegen.machine_loop(codegen.compiled(variant, dtype, "sm_90")["_sweep_kernel"])
    elements = elements_per_thread("sm_90") if VARIANTS[variant].with_value else 0
    converted = sum(n for opcode, n in loop.items() if opcode.startswith("F2F.F64"))
    computed = sum(n for opcode, n in loop.items() if opcode.startswith(("DADD", "DFMA", "DMUL")))
    # One conversion, one addition of |w|, and 1.5 operations for w * w: two take the squares of two elements and add
    # them, one adds that to others. Nothing where no value is asked for.
    assert elements <= converted <= elements + (elements > 0)  # one is computed again rather than kept
    assert computed == 2.5 * elements


@pytest.mark.parametrize("target", TARGETS)
def test_what_changes_between_calls_compiles_nothing(target: str) -> None:
    def requests(variant: str, n: int, strength: float, offset: int) -> list[codegen.Launch]:
        weights = [torch.empty(n + offset)[offset:]]
        factor = torch.ones(1 + offset)[offset]  # at an address that is a multiple of 16, or is not
        scale = (factor, factor) if VARIANTS[variant].scaled else None
        call = functools.partial(codegen.sweep_once, VARIANTS[variant], weights, strength, scale)
        return codegen.record(TARGETS[target], call)

    for variant in ("value", "accumulate", "accumulate-scaled", "prox", "momentum", "adam", "elementwise-prox"):
        first = requests(variant, BLOCK, 1.0, 0)
        assert requests(variant, BLOCK, 0.0, 0) == first
        assert requests(variant, BLOCK, 0.1, 1) == first
        assert requests(variant, 1, 16.0, 1) == first
        assert requests(variant, BLOCK * MOST_CHUNKS + 1, 1.0, 0) == first  # more than one block per chunk


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_without_alignment_hints_the_check_fails(target: str, tmp_path: Path) -> None:
    changed = edited_kernels(r"tl\.multiple_of\((.+?\)\)), 16\)", r"(\1)", tmp_path)
    with pytest.raises(AssertionError, match="16-byte loads"):
        assert_vectorised(inspect_with(changed, "accumulate", "bf16", target), "accumulate", "bf16", target)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_with_an_atomic_reduction_the_check_fails(target: str, tmp_path: Path) -> None:
    changed = edited_kernels(r"tl\.store\(_pointer\(partials_ptr", "tl.atomic_add(_pointer(partials_ptr", tmp_path)
    with pytest.raises(AssertionError, match="atomics"):
        assert_in_registers(inspect_with(changed, "value", "fp32", target))


# Few registers make either compiler spill: at most 32 per thread, or what lets 8 wavefronts share
# a unit, of which two hold a block.
@pytest.mark.parametrize(
    ("target", "option"), [("sm_90", {"maxnreg": 32}), ("gfx942", {"num_warps": 2, "waves_per_eu": 8})]
)
def test_with_too_few_registers_the_check_fails(target: str, option: dict[str, int]) -> None:
    with pytest.raises(AssertionError, match="scratch"):
        assert_in_registers(inspect_with(sweep, "accumulate", "fp64", target, option))


def elements_per_thread(target: str) -> int:
    return BLOCK // (TARGETS[target].warp_size * launch.NUM_WARPS)


def assert_vectorised(report: Report, variant: str, dtype: str, target: str) -> None:
    """Full blocks are read and written 16 bytes at a time, each byte once."""
    mode = VARIANTS[variant].mode
    elements = launch.STEP_ELEMENTS if mode in READ_AND_WRITTEN else elements_per_thread(target)
    accesses = elements * DTYPES[dtype].itemsize // 16
    n_read, n_written = READ_AND_WRITTEN.get(mode, (2 if mode == Mode.ACCUMULATE else 1, int(mode != Mode.VALUE)))
    loads = Counter({16: accesses * n_read})
    stores = Counter({16: accesses * n_written} if n_written else {})
    assert report.loads == loads, "16-byte loads"
    assert report.stores == stores, "16-byte stores"


def assert_in_registers(report: Report, spare: int = 0) -> None:
    """No spills, no local memory, no stack; and no atomics, whose order would change from run to run."""
    assert report.scratch <= spare, "scratch memory"
    assert report.atomics == 0, "atomics"


def edited_kernels(pattern: str, replacement: str, folder: Path) -> ModuleType:
    """The kernels with something replaced in their source."""
    source, n = re.subn(pattern, replacement, Path(sweep.__file__).read_text())
    assert n > 0, "nothing was replaced"
    path = folder / "edited_kernels.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inspect_with(
    module: ModuleType, variant: str, dtype: str, target: str, option: dict[str, int] | None = None
) -> Report:
    """The report on another module's `_sweep_kernel`, compiled for the launch that the library makes of its own."""
    found = codegen.launches(VARIANTS[variant], DTYPES[dtype], TARGETS[target])["_sweep_kernel"]
    changed = found._replace(function=module._sweep_kernel, options=found.options | (option or {}))
    return codegen.inspect(codegen.compile_for(TARGETS[target], changed))
