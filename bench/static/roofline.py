"""How much of a GPU's memory bandwidth the sweeps can reach, by the machine code of their loop over full blocks.

`python -m bench.static.roofline` writes its part of bench/results/codegen.md, which says what is counted and what is
not. Bounds from counted instructions and published rates, not measurements: nothing is run.
"""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import triton

from bench.measure.internals import Mode
from bench.report.results import table
from bench.static import codegen, gpu_specs
from bench.static.codegen import DTYPES, VARIANTS, Instruction
from bench.static.gpu_specs import ARCHITECTURES, GPU, GPUS, LANES, LATENCY, Architecture

STEPS = ("elementwise-prox", "sgd", "momentum", "adam", "amsgrad", "adam-value")
MODES = ("value", "gradient", "accumulate", "accumulate-scaled", "prox", "prox-value", *STEPS)
# Numbers that are read for each weight.
READS = {Mode.ACCUMULATE: 2, Mode.ELEMENTWISE_PROX: 2, Mode.SGD: 2, Mode.MOMENTUM: 3, Mode.ADAM: 4, Mode.AMSGRAD: 5}
NARROW = ("fp32", "bf16", "fp16")  # float64 weights need float64 arithmetic
CHUNKS = (2048, 4096, 8192)
TIMES = ("memory", "issue", "FP32", "multiply", "compare", "16-bit", "convert", "float64", "latency")


class Sweep(NamedTuple):
    """What a thread executes."""

    loop: Counter[str]  # opcodes of one round of the loop over full blocks
    once: Counter[str]  # opcodes outside all loops, rare paths included
    loaded: int  # bytes, in one round
    stored: int
    elements: int  # in one round
    waits: int  # times that one round waits for memory
    first_waits: int  # the same of a program with one round, from its start: reads that depend on each other
    registers: int
    threads: int  # of a program


def clocks(architecture: Architecture, opcodes: Mapping[str, int]) -> dict[str, float]:
    """SM clocks per thread that each resource needs for these instructions; what is largest is the limit."""
    n: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        name, results = gpu_specs.unit(opcode)
        n[name] += results * count
    own_packed = architecture.fp32 == 64  # 7.5 and 8.0; later ones have packed arithmetic in the float32 pipe
    fp32 = n["fp32"] + n["multiply"] + (0 if own_packed else n["packed"] * architecture.fp32 / gpu_specs.PACKED)
    found = {
        "issue": sum(opcodes.values()) / LANES,
        "FP32": fp32 / architecture.fp32,
        "multiply": n["multiply"] / gpu_specs.MULTIPLY,
        "compare": n["compare"] / gpu_specs.COMPARE,
        "16-bit": n["packed"] / gpu_specs.PACKED,
        "convert": n["convert"] / gpu_specs.CONVERT,
        "shuffle": n["shuffle"] / gpu_specs.SHUFFLE,
        "float64": n["fp64"] / architecture.fp64,
    }
    if architecture.rations_fp64:  # taken to be one unit
        found["float64"] += n["convert64"] / architecture.convert64
    else:
        found["convert"] += n["convert64"] / architecture.convert64
    return found


def resident(architecture: Architecture, registers: int, threads: int) -> int:
    """Programs that an SM holds at a time."""
    per_warp = -(-registers * 32 // gpu_specs.REGISTER_UNIT) * gpu_specs.REGISTER_UNIT
    by_registers = gpu_specs.REGISTERS // per_warp // (threads // 32)
    return min(architecture.blocks, architecture.threads // threads, by_registers)


class Bound(NamedTuple):
    times: dict[str, float]  # picoseconds per element, of the memory and of each other resource
    in_flight: float  # bytes of loads per SM
    needed: float  # the same, for full bandwidth at the assumed latency

    @property
    def limit(self) -> str:
        return max(self.times, key=self.times.__getitem__)  # the memory where there is a tie: it comes first

    @property
    def share(self) -> float:
        return self.times["memory"] / self.times[self.limit]


def bound(gpu: GPU, sweep: Sweep, one_block: bool = False) -> Bound:
    """For large weights, or for programs of one block each, which starts by looking its tensor up."""
    architecture = ARCHITECTURES[gpu.target]
    threads = resident(architecture, sweep.registers, sweep.threads) * sweep.threads
    waits, opcodes = (sweep.first_waits, sweep.loop + sweep.once) if one_block else (sweep.waits, sweep.loop)
    per_clock = 1000 / (gpu.ghz * gpu.sms * sweep.elements)  # from clocks of a thread to ps per element of the GPU
    moved = sweep.loaded + sweep.stored
    times = {"memory": moved / sweep.elements / gpu.bandwidth * 1000}
    times |= {name: found * per_clock for name, found in clocks(architecture, opcodes).items()}
    times["latency"] = waits * LATENCY / threads * per_clock
    needed = gpu.bandwidth * sweep.loaded / moved * LATENCY / gpu.ghz / gpu.sms
    return Bound(times, threads * sweep.loaded / waits, needed)


def registers_of(i: Instruction) -> tuple[set[str], set[str]]:
    """The registers that an instruction writes, and those that it reads; of pairs and quadruples each one."""
    width = 4 if ".128" in i.opcode else 2 if re.match(r"D[A-Z]|F\w+2\b|F2F\..*F64|IMAD.WIDE|.*\.64\b", i.opcode) else 1
    read_width = 1 if i.opcode.startswith(("F2F.F64", "IMAD")) else width
    first, *others = i.operands.split(",")
    if re.match(r"ST|BRA|EXIT", i.opcode):  # writes none
        first, others = "", [first, *others]
    written = numbered(first, width)
    return written, set().union(*(numbered(each, 2 if "[" in each else read_width) for each in others))


def numbered(operand: str, width: int) -> set[str]:
    return {f"R{int(n) + k}" for n in re.findall(r"\bR(\d+)", operand) for k in range(width)}


def waits(instructions: Sequence[Instruction], rounds: int = 1, guarded: bool = False) -> int:
    """How often a thread waits for memory, in the last of some rounds.

    Instructions are issued in order, so a thread stops where it uses what it has loaded, and what it asked for until
    then arrives together. Loads under a predicate count only with `guarded`: strengths in device memory are such.
    """
    waiting: set[str] = set()
    n = 0
    for _ in range(rounds):
        n = 0
        for i in instructions:
            written, read = registers_of(i)
            if read & waiting:
                n += 1
                waiting = set()
            if (codegen.access(i.opcode) or ("",))[0] == "load" and (guarded or not i.guard):
                waiting |= written
    return max(n, 1)


def outside_loops(instructions: Sequence[Instruction], labels: dict[str, int]) -> list[Instruction]:
    """All that a program executes once, up to the branch to itself that ends the code."""
    ends = [loop.start for loop in codegen.loops(instructions, labels) if loop.stop - loop.start == 1]
    inside = {n for loop in codegen.loops(instructions, labels) for n in range(loop.start, loop.stop)}
    return [i for n, i in enumerate(instructions[: min(ends, default=None)]) if n not in inside]


@functools.cache
def sweep(variant: str, dtype: str, target: str) -> Sweep:
    kernel = codegen.compiled(variant, dtype, target)["_sweep_kernel"]
    text = codegen.machine_code(kernel)
    instructions, labels = codegen.parse(text)
    loop = codegen.full_block_loop(text)
    if not loop:
        raise ValueError(f"{variant} {dtype} {target}: no loop without masks")
    end = next(each.stop for each in codegen.loops(instructions, labels) if instructions[each] == loop)
    moved = {"load": 0, "store": 0}
    for i in loop:
        kind, width = codegen.access(i.opcode) or ("load", 0)
        moved[kind] += width
    reads = READS.get(VARIANTS[variant].mode, 1)
    return Sweep(
        Counter(i.opcode for i in loop),
        Counter(i.opcode for i in outside_loops(instructions, labels)),
        moved["load"],
        moved["store"],
        moved["load"] // (reads * DTYPES[dtype].itemsize),
        waits(loop, rounds=2),
        waits(instructions[:end]),
        codegen.inspect(kernel).registers,
        32 * kernel.metadata.num_warps,
    )


def finish(gpu: GPU, n_chunks: int) -> tuple[float, float]:
    """Microseconds of `_finish_kernel`, one program for all chunks: float64 arithmetic, and waiting for memory."""
    found = codegen.launches(VARIANTS["value"], DTYPES["fp32"], codegen.ALL_TARGETS[gpu.target])["_finish_kernel"]
    block = found.constants[(found.function.arg_names.index("BLOCK"),)]
    kernel = codegen.compiled("value", "fp32", gpu.target)["_finish_kernel"]
    instructions, labels = codegen.parse(codegen.machine_code(kernel))
    bodies = (instructions[each] for each in codegen.loops(instructions, labels))
    loop = next(body for body in bodies if any(codegen.access(i.opcode) for i in body))
    rounds, threads = -(-n_chunks // block), 32 * kernel.metadata.num_warps
    opcodes = Counter({opcode: n * rounds for opcode, n in Counter(i.opcode for i in loop).items()})
    opcodes += Counter(i.opcode for i in outside_loops(instructions, labels))
    float64 = clocks(ARCHITECTURES[gpu.target], opcodes)["float64"] * threads
    return float64 / gpu.ghz / 1000, (rounds * waits(loop, 2, guarded=True) + 1) * LATENCY / gpu.ghz / 1000


def share_rows() -> Iterator[tuple[object, ...]]:
    for (name, gpu), dtype in itertools.product(GPUS.items(), NARROW):
        bounds = [bound(gpu, sweep(mode, dtype, gpu.target)) for mode in MODES]
        yield name, dtype, *(f"{each.share:.2f} {each.limit}" for each in bounds)


def time_rows() -> Iterator[tuple[object, ...]]:
    for (name, gpu), mode, dtype in itertools.product(GPUS.items(), MODES, NARROW):
        code = sweep(mode, dtype, gpu.target)
        found, small = bound(gpu, code), bound(gpu, code, one_block=True)
        chain = f"{code.first_waits} = {code.first_waits * LATENCY / gpu.ghz / 1000:.1f} µs"
        in_flight = f"{found.in_flight / 1024:.0f} / {found.needed / 1024:.0f}"
        times = (f"{found.times[each]:.2f}" for each in TIMES)
        yield name, mode, dtype, *times, in_flight, chain, f"{small.share:.2f} {small.limit}"


def section() -> str:
    gpus = (
        (name, gpu.target, gpu.sms, f"{gpu.ghz:.2f}", gpu.bandwidth, ARCHITECTURES[gpu.target].fp64, gpu.source)
        for name, gpu in GPUS.items()
    )
    finished = ((name, *("{:.1f} + {:.1f}".format(*finish(gpu, n)) for n in CHUNKS)) for name, gpu in GPUS.items())
    tables = {
        "gpus": table(("GPU", "code", "SMs", "GHz", "GB/s", "float64 per clock and SM", "source"), gpus, 2),
        "shares": table(("GPU", "dtype", *MODES), share_rows(), 2),
        "times": table(("GPU", "mode", "dtype", *TIMES, "in flight", "waits", "one block"), time_rows(), 3),
        "finish": table(("GPU", *map(str, CHUNKS)), finished),
    }
    facts = {"triton": triton.__version__, "schedulers": gpu_specs.SCHEDULERS, "latency": LATENCY}
    about = Path(__file__).with_name("roofline.in.md").read_text()
    return about.format(**facts, **{name: "\n".join(lines) for name, lines in tables.items()})


if __name__ == "__main__":
    if problem := codegen.missing_tool():
        raise SystemExit(problem)
    codegen.write(roofline=section())
