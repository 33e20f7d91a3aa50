"""What NVIDIA publishes of its GPUs, with the document that each figure is from; roofline.py computes with it.

The GPUs, architectures and instructions are in gpu_specs.json, constants are here.

Rates are results per clock and SM, from "Throughput of Native Arithmetic Instructions": Table 7 of the CUDA C++
Programming Guide up to 12.9, section 12.1.1 of the CUDA C++ Best Practices Guide (BPG) since 13.0. Where two editions
differ on a rate, the lower one stands here: a bound that is too low hides no defect.
"""

import json
import re
from pathlib import Path
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
    note: str = ""

    @property
    def rations_fp64(self) -> bool:
        return self.fp64 < CONVERT


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


_STORED = json.loads(Path(__file__).with_suffix(".json").read_text())
ARCHITECTURES = {target: Architecture(**facts) for target, facts in _STORED["architectures"].items()}
GPUS = {name: GPU(**facts) for name, facts in _STORED["gpus"].items()}


def unit(opcode: str) -> tuple[str, int]:
    """The unit that executes an instruction, and how many results it counts for; the first pattern that matches holds.

    By the pipelines of the Nsight Compute Profiling Guide. `issue`: a scheduler's slot is all that is counted.
    """
    for each in _STORED["units"]:
        if re.match(each["pattern"], opcode):
            return each["unit"], each["results"]
    raise ValueError(f"no unit is known for the instruction {opcode}; add it to bench/static/gpu_specs.json")
