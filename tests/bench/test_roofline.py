"""How much of a GPU's memory bandwidth the compiled sweeps can reach, and the model that says so: no GPU is needed."""

import itertools
from collections import Counter

import pytest

pytest.importorskip("triton")

from bench.static import codegen, gpu_specs, roofline
from bench.static.codegen import Instruction
from bench.static.gpu_specs import ARCHITECTURES, GPU, GPUS, LATENCY
from bench.static.roofline import NARROW, STEPS, Sweep

pytestmark = [
    pytest.mark.codegen,
    pytest.mark.skipif(codegen.missing_tool() is not None, reason="Triton's wheel came without NVIDIA's tools"),
]

# Of B300's few float32 operations per byte, sums without float64 take a larger part.
BARS = {("B300", "fp32"): 0.9, ("B300", "bf16"): 0.8, ("B300", "fp16"): 0.8}
STEP_BAR = 0.85  # of steps, whose rare paths are counted as if all were taken
# The bound on a proximal step with elementwise sizes takes five instructions per element.
ELEMENTWISE_PROX_BAR = 0.8


# Not all Triton versions that the project supports know these.
NEW = ("sm_103",)
TARGETS = [
    pytest.param(t, marks=pytest.mark.skipif("not codegen.is_known('sm_103')", reason="unknown to this Triton"))
    if t in NEW
    else t
    for t in ARCHITECTURES
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        *itertools.product(["value", "accumulate", "prox"], NARROW),
        *itertools.product(["momentum", "adam", "elementwise-prox"], ["fp32", "bf16"]),
    ],
)
def test_memory_is_the_limit(mode: str, dtype: str, target: str) -> None:
    code = roofline.sweep(mode, dtype, target)
    bounds = {name: roofline.bound(gpu, code) for name, gpu in GPUS.items() if gpu.target == target}
    bar = ELEMENTWISE_PROX_BAR if mode == "elementwise-prox" else STEP_BAR if mode in STEPS else 0.95
    slow = {name: found for name, found in bounds.items() if found.share < BARS.get((name, dtype), bar)}
    assert not slow, {name: f"{found.share:.2f} of the bandwidth, by {found.limit}" for name, found in slow.items()}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", ["gradient", "prox-value", "amsgrad"])
def test_every_instruction_has_a_unit(mode: str, target: str) -> None:
    for kernel in codegen.compiled(mode, "bf16", target).values():
        instructions, _ = codegen.parse(codegen.machine_code(kernel))
        assert instructions
        for instruction in instructions:
            gpu_specs.unit(instruction.opcode)


@pytest.mark.parametrize("opcode", ["FADDX", "DADDX.F64", "IMADE", "UNHEARD.OF", "HADD3", "Q"])
def test_unknown_instruction_is_an_error(opcode: str) -> None:
    with pytest.raises(ValueError, match=f"instruction {opcode}"):
        roofline.clocks(ARCHITECTURES["sm_90"], {"FADD": 1, opcode: 1})


# What takes two clocks of an SM, by the published rates: 32 threads in each of so many instructions.
TWO_CLOCKS = [
    ("sm_90", "NOP", 256, "issue"),
    ("sm_75", "FADD", 128, "FP32"),
    ("sm_80", "FFMA", 128, "FP32"),
    ("sm_100", "FFMA2", 128, "FP32"),
    ("sm_80", "IMAD.MOV.U32", 128, "FP32"),
    ("sm_86", "HFMA2.BF16_V2", 128, "FP32"),
    ("sm_90", "IMAD.U32", 128, "multiply"),
    ("sm_90", "IMAD.WIDE.U32", 64, "multiply"),
    ("sm_90", "FSETP.GT.AND", 128, "compare"),
    ("sm_103", "LOP3.LUT", 128, "compare"),
    ("sm_80", "HADD2.F32", 128, "16-bit"),
    ("sm_120", "MUFU.RCP", 32, "convert"),
    ("sm_89", "F2FP.BF16.F32.PACK_AB", 16, "convert"),
    ("sm_90", "F2F.F64.F32", 32, "convert"),
    ("sm_86", "SHFL.BFLY", 64, "shuffle"),
    ("sm_75", "DADD", 4, "float64"),
    ("sm_80", "DFMA", 64, "float64"),
    ("sm_86", "DMUL", 4, "float64"),
    ("sm_89", "F2F.F64.F32", 4, "float64"),
    ("sm_90", "DADD", 128, "float64"),
    ("sm_100", "DADD", 128, "float64"),
    ("sm_103", "DADD", 4, "float64"),
    ("sm_120", "F2F.F32.F64", 4, "float64"),
]


@pytest.mark.parametrize(("target", "opcode", "count", "limit"), TWO_CLOCKS)
def test_each_unit_can_be_the_limit(target: str, opcode: str, count: int, limit: str) -> None:
    clocks = roofline.clocks(ARCHITECTURES[target], {opcode: count})
    assert clocks[limit] == max(clocks.values()) == 2
    # On one SM at 1 GHz that is 2 ns for 8 elements, and 1 byte of each takes half of that at 8 GB/s.
    found = roofline.bound(one_sm(target, bandwidth=8), made_up(Counter({opcode: count}), elements=8))
    assert found.times["memory"] == pytest.approx(125)
    assert found.times[limit] == pytest.approx(250)
    assert found.share == pytest.approx(0.5)


def test_rationed_float64_and_its_conversions_share_a_unit() -> None:
    opcodes = {"DADD": 4, "F2F.F64.F32": 4}
    assert roofline.clocks(ARCHITECTURES["sm_89"], opcodes)["float64"] == 4
    others = roofline.clocks(ARCHITECTURES["sm_90"], opcodes)
    assert (others["float64"], others["convert"]) == (4 / 64, 4 / 16)


def test_memory_can_be_the_limit() -> None:
    found = roofline.bound(one_sm("sm_90", bandwidth=1), made_up(Counter(), elements=4, loaded=16, stored=16))
    assert found.times["memory"] == pytest.approx(8000)
    assert (found.limit, found.share) == ("memory", 1)


def test_latency_can_be_the_limit() -> None:
    # Two waits of 800 clocks for each 8 bytes of 2048 threads: 10.24 bytes per clock, and so GB/s at 1 GHz.
    once = made_up(Counter(), elements=8, loaded=8, waits=2)
    assert LATENCY == 800
    assert roofline.bound(one_sm("sm_90", bandwidth=10.24), once).share == pytest.approx(1)
    found = roofline.bound(one_sm("sm_90", bandwidth=20.48), once)
    assert (found.limit, found.share) == ("latency", pytest.approx(0.5))
    assert found.in_flight / found.needed == pytest.approx(0.5)


def test_one_block_pays_for_what_is_executed_once() -> None:
    found = made_up(Counter(NOP=8), elements=8, once=Counter(NOP=24))
    per_element = [roofline.bound(one_sm("sm_90", 1), found, one_block).times["issue"] for one_block in (False, True)]
    assert per_element == pytest.approx([1000 / 128, 4 * 1000 / 128])
    waits = [roofline.bound(one_sm("sm_90", 1), found, one_block).times["latency"] for one_block in (False, True)]
    assert waits[1] == pytest.approx(3 * waits[0])


@pytest.mark.parametrize(
    ("target", "registers", "threads", "programs"),
    [
        ("sm_75", 32, 128, 8),  # by threads
        ("sm_86", 32, 128, 12),
        ("sm_90", 32, 128, 16),
        ("sm_86", 32, 64, 16),  # by blocks
        ("sm_89", 32, 32, 24),
        ("sm_90", 64, 128, 8),  # by registers
        ("sm_90", 65, 128, 7),  # which come in eights per thread
        ("sm_75", 128, 256, 2),
    ],
)
def test_resident_programs(target: str, registers: int, threads: int, programs: int) -> None:
    assert roofline.resident(ARCHITECTURES[target], registers, threads) == programs


# Boost clocks (GHz) and float64 TFLOPS of the same documents, which the table does not use: they test it.
PUBLISHED = {
    "T4": (1.59, None),
    "A10": (1.695, None),
    "A100 40G": (1.41, 9.7),
    "A100 80G": (1.41, 9.7),
    "RTX 3090": (1.695, 0.556),
    "RTX 4090": (2.52, 1.29),
    "L4": (2.04, 0.473),
    "L40S": (2.52, 1.43),
    "H100 SXM": (1.98, 34),
    "H200": (1.98, 34),
    "B200": (None, 37),
    "B300": (None, 1.25),
    "RTX 5090": (2.407, 1.637),
}


@pytest.mark.parametrize("name", GPUS)
def test_derived_clock_and_float64_rate_agree_with_published_ones(name: str) -> None:
    gpu = GPUS[name]
    clock, tflops64 = PUBLISHED[name]
    if clock is not None:
        assert gpu.ghz == pytest.approx(clock, rel=0.01)
    if tflops64 is not None:
        rate = ARCHITECTURES[gpu.target].fp64
        assert 2 * rate * gpu.sms * gpu.ghz / 1000 == pytest.approx(tflops64, rel=0.07)


def instruction(opcode: str, operands: str, guard: str = "") -> Instruction:
    return Instruction(guard, opcode, f" {operands}")


@pytest.mark.parametrize(
    ("uses", "expected"),
    [
        (["R8", "R12"], 1),  # both loads came before
        (["R11", "R15"], 1),  # of four registers each
        (["R7", "R16"], 1),  # no register that was loaded; a round waits at least once
    ],
)
def test_loads_before_the_first_use_arrive_together(uses: list[str], expected: int) -> None:
    loads = [instruction("LDG.E.128", f"R{n}, desc[UR4][R2.64]") for n in (8, 12)]
    assert roofline.waits([*loads, *(instruction("FADD", f"R20, {use}, R21") for use in uses)]) == expected


def test_each_use_before_the_next_load_is_a_wait() -> None:
    one = [instruction("LDG.E.128", "R8, desc[UR4][R2.64]"), instruction("FADD", "R20, R9, R21")]
    chain = [instruction("LDG.E.64", "R2, desc[UR4][R4.64]"), *one, instruction("STG.E.128", "desc[UR4][R2.64], R8")]
    assert roofline.waits(one * 3) == 3
    assert roofline.waits(chain) == 2  # the second load needs the first one's address
    assert roofline.waits([one[0], instruction("STG.E.128", "desc[UR4][R30.64], R8"), one[0], one[1]]) == 2
    pipelined = one[::-1]  # in a loop, what the round before asked for
    assert [roofline.waits(pipelined, rounds) for rounds in (1, 2)] == [1, 1]
    predicated = [one[0]._replace(guard="P0"), one[1]] * 2
    assert [roofline.waits(predicated, guarded=guarded) for guarded in (False, True)] == [1, 2]


def test_what_is_executed_once_leaves_out_loops_and_padding() -> None:
    text = """
        /*0000*/ S2R R0, SR_CTAID.X ;
.L_x_0:
        /*0010*/ FADD R1, R1, R0 ;
        /*0020*/ @P0 BRA `(.L_x_0) ;
        /*0030*/ EXIT ;
.L_x_1:
        /*0040*/ BRA `(.L_x_1);
        /*0050*/ NOP;
"""
    assert [i.opcode for i in roofline.outside_loops(*codegen.parse(text))] == ["S2R", "EXIT"]


def test_finish_takes_longer_where_float64_is_rationed() -> None:
    times = {name: roofline.finish(GPUS[name], 8192)[0] for name in ("H100 SXM", "RTX 4090")}
    assert times["RTX 4090"] > 4 * times["H100 SXM"]
    assert roofline.finish(GPUS["RTX 4090"], 4096)[0] < times["RTX 4090"]


def one_sm(target: str, bandwidth: float) -> GPU:
    """At 1 GHz, so that clocks are nanoseconds."""
    return GPU(target, 1, 2 * ARCHITECTURES[target].fp32 / 1000, bandwidth, "")


def made_up(
    loop: "Counter[str]",
    elements: int,
    loaded: int = 0,
    stored: int = 0,
    waits: int = 0,
    once: "Counter[str] | None" = None,
) -> Sweep:
    loaded = loaded or elements
    return Sweep(loop, once or Counter(), loaded, stored, elements, waits or 1, 3 * (waits or 1), 32, 128)
