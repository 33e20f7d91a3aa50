"""What NVIDIA publishes of its GPUs, with the document that each figure is from; roofline.py computes with it.

Rates are results per clock and SM, from "Throughput of Native Arithmetic Instructions": Table 7 of the CUDA C++
Programming Guide up to 12.9, section 12.1.1 of the CUDA C++ Best Practices Guide (BPG) since 13.0. Where two editions
differ on a rate, the lower one stands here: a bound that is too low hides no defect.
"""

import re
from typing import NamedTuple

SCHEDULERS = 4  # of an SM, each issues one warp instruction per clock: Programming Guide, sections on each capability
LANES = 32 * SCHEDULERS  # instructions of single threads per clock, therefore
REGISTERS = 65536  # per SM: Programming Guide, "Technical Specifications per Compute Capability"
REGISTER_UNIT = 256  # registers are given to a warp by so many: CUDA Occupancy Calculator, 7.5 to 9.0; later ones alike

COMPARE = 64  # "compare, minimum, maximum", "integer shift", "bitwise AND, OR, XOR"; some columns have 128 for some
MULTIPLY = 64  # "32-bit integer multiply, multiply-add"
# Packed 16-bit arithmetic, which also widens float16 to float32: 64 instructions on two values each for 10.0 and 12.0
# (BPG 13), 64 to 128 for 7.5 to 9.0 (128 to 256 results, Programming Guide 12.6).
PACKED = 64
CONVERT = 16  # "all other type conversions", and reciprocals
SHUFFLE = 32  # "warp shuffle"

# Latency of global memory under load, in clocks. An ASSUMPTION: the upper end of "400-800 cycles", from NVIDIA's GTC
# talks "Fundamental Optimizations in CUDA"; it varies by GPU, load and translation of addresses.
LATENCY = 800


class Architecture(NamedTuple):
    """An SM of one compute capability. Threads and blocks: Programming Guide, as for registers."""

    fp32: int  # float32 additions, multiplications, fused multiply-adds
    fp64: int  # the same in float64
    convert64: int  # "type conversions from and to 64-bit types"
    threads: int  # most resident threads
    blocks: int  # most resident blocks

    @property
    def rations_fp64(self) -> bool:
        return self.fp64 < CONVERT


ARCHITECTURES = {
    "sm_75": Architecture(64, 2, 2, 1024, 16),
    "sm_80": Architecture(64, 32, 16, 2048, 32),
    "sm_86": Architecture(128, 2, 2, 1536, 16),
    "sm_89": Architecture(128, 2, 2, 1536, 24),
    "sm_90": Architecture(128, 64, 16, 2048, 32),
    # fp64 of 10.0: BPG 13; convert64 is an assumption: as 9.0.
    "sm_100": Architecture(128, 64, 16, 2048, 32),
    # fp64 of 10.3 derived: B300's 1.25 TFLOPS / (2 * 148 SMs * 1.98 GHz) = 2.1; convert64 is an assumption: as all
    # others that ration float64. Threads and blocks as 10.0.
    "sm_103": Architecture(128, 2, 2, 2048, 32),
    "sm_120": Architecture(128, 2, 2, 1536, 24),
}


class GPU(NamedTuple):
    target: str
    sms: int
    tflops: float  # float32, not by tensor cores
    bandwidth: float  # GB/s
    source: str

    @property
    def ghz(self) -> float:
        """The clock that the published TFLOPS assume, two operations per fused multiply-add: about the boost clock."""
        return self.tflops * 1000 / (2 * ARCHITECTURES[self.target].fp32 * self.sms)


BLACKWELL = "TFLOPS: Blackwell technical brief, HGX B200; GB/s and SMs: what the driver reports (pytorch/ao pull 4002)"
BLACKWELL_ULTRA = (
    "TFLOPS: Blackwell technical brief, HGX B300; GB/s: Blackwell Ultra datasheet; SMs: as B200 (up to 160, by product)"
)
GPUS = {
    "T4": GPU("sm_75", 40, 8.1, 320, "T4 datasheet; SMs: 2,560 CUDA cores / 64"),
    "A10": GPU("sm_86", 72, 31.2, 600, "A10 datasheet; SMs: 9,216 CUDA cores / 128"),
    "A100 40G": GPU("sm_80", 108, 19.5, 1555, "A100 datasheet; SMs: A100 architecture whitepaper"),
    "A100 80G": GPU("sm_80", 108, 19.5, 2039, "A100 datasheet, SXM; SMs: A100 architecture whitepaper"),
    "RTX 3090": GPU("sm_86", 82, 35.6, 936, "GA102 architecture whitepaper"),
    "RTX 4090": GPU("sm_89", 128, 82.6, 1008, "Ada architecture whitepaper"),
    "L4": GPU("sm_89", 58, 30.3, 300, "L4 datasheet; SMs: Ada architecture whitepaper 2.01"),
    "L40S": GPU("sm_89", 142, 91.6, 864, "L40S datasheet; SMs: 18,176 CUDA cores / 128"),
    "H100 SXM": GPU("sm_90", 132, 67, 3350, "H100 datasheet; SMs: H100 architecture whitepaper"),
    "H200": GPU("sm_90", 132, 67, 4800, "H200 datasheet; SMs as H100 SXM"),
    "B200": GPU("sm_100", 148, 75, 7700, BLACKWELL),
    "B300": GPU("sm_103", 148, 75, 7700, BLACKWELL_ULTRA),
    "RTX 5090": GPU("sm_120", 170, 104.8, 1792, "RTX Blackwell architecture whitepaper"),
}

# The unit that executes an instruction, and how many results it counts for; the first pattern that matches holds. By
# the pipelines of the Nsight Compute Profiling Guide. `issue`: a scheduler's slot is all that is counted.
UNITS = [
    (r"F2F\..*F64|[FI]2[FI]\..*[FSU]64", "convert64", 1),
    (r"D(ADD|MUL|FMA|SETP|MNMX)\b", "fp64", 1),
    (r"F(ADD|MUL|FMA)2\b", "fp32", 2),  # two float32 operations in one instruction
    (r"F(ADD|MUL|FMA)(32I)?\b", "fp32", 1),
    (r"IMAD\.(WIDE|HI)\b", "multiply", 2),
    (r"(IMAD|IMUL|IDP)\b", "multiply", 1),
    (r"H(ADD2|MUL2|FMA2|SETP2|SET2|MNMX2)(_32I)?\b", "packed", 1),
    (r"FH(ADD|MUL|FMA)\b", "packed", 1),  # a 16-bit and a float32 operand; the slower of the two units
    (r"F2FP\b", "convert", 2),  # two floats to one register; Nsight Compute describes it as faster from 8.0 on
    (r"(F2F|F2IP?|I2FP?|I2IP?|FRND|MUFU|POPC|FLO|BREV)\b", "convert", 1),
    (r"SHFL\b", "shuffle", 1),
    (r"C?REDUX\b", "shuffle", 2),  # "warp reduce": 16
    (r"(FSEL|FSETP?|FMNMX3?|FCHK|ISETP|V?IMNMX3?|VIADDMNMX|SEL|PLOP3|PSETP|P2R|R2P|VOTE)\b", "compare", 1),
    (r"(IADD3?|IADD32I|IABS|VIADD|LEA|LOP3?|LOP32I|SH[FLR]|SGXT|BMSK|PRMT|MOV|MOV32I|CS2R)\b", "compare", 1),
    (r"(LDG?|STG?|LDL|STL|LDS|STS|U?LDCU?|S2U?R|R2UR|B2R|R2B|ERRBAR|CCTL|MEMBAR|FENCE)\b", "issue", 1),
    (r"(BRA|BRX|BSSY|BSYNC|BREAK|BMOV|CALL|RET|EXIT|NOP|BAR|WARPSYNC|DEPBAR|YIELD|NANOSLEEP)\b", "issue", 1),
    # The unit for what is the same in all threads of a warp.
    (
        r"VOTEU\b|U(F[A-Z]+|IADD3?|IMAD|ISETP|LEA|LOP3|MOV|SEL|SHF|PLOP3|PRMT|P2UR|BMSK|SGXT|VIADD|V?IMNMX)\b",
        "issue",
        1,
    ),
]


def unit(opcode: str) -> tuple[str, int]:
    for pattern, name, results in UNITS:
        if re.match(pattern, opcode):
            return name, results
    raise ValueError(f"no unit is known for the instruction {opcode}; add it to UNITS in bench/static/gpu_specs.py")
