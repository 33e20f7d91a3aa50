"""What the compiler makes of the kernels: registers, spills, width of memory accesses, length of the inner loop.

`python -m bench.static.codegen` writes the table in bench/results/codegen.md. It needs no GPU: the library's own
launcher runs on CPU tensors while a recorder stands in for Triton's driver and notes what the JIT is asked to compile,
down to the alignment of pointers, and that is then compiled ahead of time for each target.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import driver
from triton.runtime.errors import PTXASError

from bench.measure.internals import STEPS, Mode, Scale, Strength, kernel_settings, launch_kernels
from bench.report.results import FOLDER, table

TABLE = FOLDER / "codegen.md"
ROOFLINE = "# How much of a GPU's memory bandwidth the sweeps can reach\n"  # where the part of roofline.py begins
ALL_TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (75, 80, 86, 89, 90, 100, 103, 120)}
ALL_TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
# Those of the tables here; sm_86 has sums in pairs of float32. roofline.py takes all of NVIDIA's.
TARGETS = {name: ALL_TARGETS[name] for name in ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Variant(NamedTuple):
    mode: Mode
    with_value: bool = True
    scaled: bool = False  # by an upstream gradient on the device
    grouped: bool = False  # strengths of two groups, on the device


VARIANTS = {
    "value": Variant(Mode.VALUE),
    "gradient": Variant(Mode.GRADIENT),
    "gradient-scaled": Variant(Mode.GRADIENT, with_value=False, scaled=True),
    "rescale": Variant(Mode.RESCALE, with_value=False, scaled=True),
    "accumulate": Variant(Mode.ACCUMULATE),
    "accumulate-scaled": Variant(Mode.ACCUMULATE, with_value=False, scaled=True),
    "prox": Variant(Mode.PROX, with_value=False),
    "prox-value": Variant(Mode.PROX),
    "value-grouped": Variant(Mode.VALUE, grouped=True),
    "accumulate-grouped": Variant(Mode.ACCUMULATE, grouped=True),
    "elementwise-prox": Variant(Mode.ELEMENTWISE_PROX, with_value=False),
    "sgd": Variant(Mode.SGD, with_value=False),
    "momentum": Variant(Mode.MOMENTUM, with_value=False),
    "adam": Variant(Mode.ADAM, with_value=False),
    "adam-value": Variant(Mode.ADAM),
    "amsgrad": Variant(Mode.AMSGRAD, with_value=False),
    "prox-grouped": Variant(Mode.PROX, with_value=False, grouped=True),
}
# Strengths on the device change nothing in the loop, and float16 is as bfloat16 in a step: two dtypes are enough.
CASES = [
    (name, dtype)
    for name, variant in VARIANTS.items()
    for dtype in DTYPES
    if dtype in ("fp32", "bf16") or not (variant.grouped or variant.mode in STEPS)
]


class Launch(NamedTuple):
    function: Any  # triton.JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


class Report(NamedTuple):
    registers: int  # per thread
    scratch: int  # bytes of stack and local memory per thread, and registers spilled
    shared: int  # bytes per program
    atomics: int  # instructions, on any type
    loads: Counter[int]  # in the loop over full blocks, how often each width in bytes occurs
    stores: Counter[int]


def record(target: GPUTarget, call: Callable[[], object]) -> list[Launch]:
    """The kernels that `call` would launch on `target`; nothing is compiled or run."""
    found = []

    def refuse(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion")}
        (attributes,) = compile["configs"]
        found.append(Launch(fn.jit_function, compile["signature"], compile["constants"], attributes, options))
        return True

    stand_in = SimpleNamespace(get_current_target=lambda: target, get_current_stream=lambda device: 0)
    stand_in.get_current_device = lambda: str(target)  # the JIT keeps one cache per device
    driver.set_active(stand_in)
    try:
        with knobs.runtime.scope():
            knobs.runtime.jit_cache_hook = refuse
            call()
    finally:
        driver.set_active(None)  # found again at the next use
    return found


def sweep_once(variant: Variant, weights: Sequence[torch.Tensor], strength: Strength, scale: Scale) -> object:
    return launch_kernels(weights, variant.mode, strength, scale, variant.with_value)


def launches(variant: Variant, dtype: torch.dtype, target: GPUTarget) -> dict[str, Launch]:
    """The launches of one sweep in this variant, by the kernel's name."""
    weights = [torch.empty(kernel_settings()["BLOCK"], dtype=dtype) for _ in range(1 + variant.grouped)]
    strength = torch.ones(2, dtype=torch.float64) if variant.grouped else 1.0
    scale = (torch.ones(()), torch.ones(())) if variant.scaled else None
    found = record(target, functools.partial(sweep_once, variant, weights, strength, scale))
    return {each.function.__name__: each for each in found}


def compile_for(target: GPUTarget, found: Launch) -> CompiledKernel:
    source = ASTSource(found.function, found.signature, found.constants, found.attributes)
    return triton.compile(source, target=target, options=found.options)


@functools.cache
def compiled(variant: str, dtype: str, target: str) -> dict[str, CompiledKernel]:
    found = launches(VARIANTS[variant], DTYPES[dtype], ALL_TARGETS[target])
    return {name: compile_for(ALL_TARGETS[target], each) for name, each in found.items()}


def inspect(kernel: CompiledKernel) -> Report:
    """Reads what the compiler says of a kernel, and its text: PTX or AMD assembly."""
    asm = kernel.asm
    if "cubin" in asm:
        text, form = tool("cuobjdump", "--dump-resource-usage", asm["cubin"]), r"\b{}:(\d+)"
        names = "REG", "STACK", "LOCAL"
    else:
        text, form = asm["amdgcn"], r"\s\.{}: +(\d+)"
        names = "vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count"
    registers, *scratch = (int(found) for name in names for found in re.findall(form.format(name), text))
    assert len(scratch) == len(names) - 1, "one figure for each name"
    code = asm["ptx"] if "ptx" in asm else asm["amdgcn"]
    atomics = sum(bool(ATOMIC.match(i.opcode)) for i in parse(code)[0])
    accesses = [found for i in full_block_loop(code) if (found := access(i.opcode))]
    loads, stores = (Counter(width for kind, width in accesses if kind == wanted) for wanted in ("load", "store"))
    return Report(registers, sum(scratch), kernel.metadata.shared, atomics, loads, stores)


def machine_code(kernel: CompiledKernel) -> str:
    return kernel.asm["amdgcn"] if "amdgcn" in kernel.asm else tool("nvdisasm", "--print-code", kernel.asm["cubin"])


def machine_loop(kernel: CompiledKernel) -> Counter[str]:
    """How often each opcode occurs in the machine code of the loop over full blocks."""
    return Counter(i.opcode for i in full_block_loop(machine_code(kernel)))


@functools.cache
def is_known(target: str) -> bool:
    """Whether Triton's assembler and disassembler know this GPU; older versions miss the newest ones."""
    try:
        machine_code(compiled("prox", "fp32", target)["_sweep_kernel"])
    except (subprocess.CalledProcessError, PTXASError):
        return False
    return True


def missing_tool() -> str | None:
    """Why CUDA binaries cannot be read here, or None: the tools for it come with Triton's wheels."""
    try:
        _ = knobs.nvidia.cuobjdump.path, knobs.nvidia.nvdisasm.path
    except RuntimeError as error:
        return str(error)
    return None


def tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, name).path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Instruction(NamedTuple):
    guard: str  # the predicate without which it does nothing; AMD has none
    opcode: str
    operands: str


LABEL = re.compile(r"([.$]L\w+):")
INSTRUCTION = re.compile(r"\s+(?:/\*\w+\*/\s+)?(?:@(!?%?\w+)\s+)?([A-Za-z][\w.:]*)([^;\n]*)")
BRANCH = re.compile(r"bra\b|BRA\b|s_c?branch")
ATOMIC = re.compile(r"atom\b|red\b|(global|flat|buffer)_atomic")
PTX_ACCESS = re.compile(r"(ld|st)\.global\b.*?(?:\.v(\d))?\.[bfsu](\d+)$")
SASS_ACCESS = re.compile(r"(LD|ST)G?\.E\b(?:.*\.[US]?(8|16|64|128|256)\b)?")
AMD_ACCESS = re.compile(r"(?:global|flat|buffer)_(load|store)_[us]?(dword|short|byte)(?:x(\d))?")


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of PTX, SASS or AMD assembly, and for each label the number of the one that follows it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append(Instruction(found[1] or "", found[2], found[3]))
    return instructions, labels


def loops(instructions: Sequence[Instruction], labels: dict[str, int]) -> Iterator[slice]:
    """What stands from a label to a branch back to it, in the order of these branches."""
    for end, instruction in enumerate(instructions, 1):
        target = re.search(r"[.$]L\w+", instruction.operands)
        if target and BRANCH.match(instruction.opcode) and labels.get(target[0], end) < end:
            yield slice(labels[target[0]], end)


def full_block_loop(text: str) -> list[Instruction]:
    """The first loop that reads or writes global memory without a mask; empty if there is none.

    A mask is a predicate on the access, or in AMD's assembly a change of the execution mask around it.
    """
    instructions, labels = parse(text)
    for body in (instructions[loop] for loop in loops(instructions, labels)):
        guards = [i.guard for i in body if access(i.opcode)]
        if guards and not any(guards) and not any("saveexec" in i.opcode for i in body):
            return body
    return []


def access(opcode: str) -> tuple[str, int] | None:
    """("load" or "store", bytes per thread) of an instruction on global memory, None of any other."""
    if found := PTX_ACCESS.match(opcode):
        return "load" if found[1] == "ld" else "store", int(found[2] or 1) * int(found[3]) // 8
    if found := SASS_ACCESS.match(opcode):
        return "load" if found[1] == "LD" else "store", int(found[2] or 32) // 8
    if found := AMD_ACCESS.match(opcode):
        return found[1], {"dword": 4, "short": 2, "byte": 1}[found[2]] * int(found[3] or 1)
    return None


def rows(target: str) -> Iterator[list[object]]:
    """One per variant and dtype, and one for each different `_finish_kernel`."""
    elements = kernel_settings()["BLOCK"] // (TARGETS[target].warp_size * kernel_settings()["NUM_WARPS"])
    seen = set()
    for variant, dtype in CASES:
        for name, kernel in compiled(variant, dtype, target).items():
            if name == "_sweep_kernel" or kernel.hash not in seen:
                seen.add(kernel.hash)
                report, length = inspect(kernel), machine_loop(kernel).total()
                widths = [", ".join(f"{n} x {width} B" for width, n in found.items()) for found in report[4:]]
                rest = [*widths, length, f"{length / elements:.1f}"] if name == "_sweep_kernel" else [""] * 4
                yield [name, variant, dtype, *report[:4], *rest]


def document() -> str:
    names = ["kernel", "variant", "dtype", "registers", "scratch", "shared", "atomics", "loads", "stores", "loop"]
    lines: list[str] = []
    for name, target in TARGETS.items():
        lines += ["", f"## {name} ({target.backend}, {target.warp_size} threads per warp)", ""]
        lines += table([*names, "per element"], rows(name), 3)
    about = Path(__file__).with_name("codegen.in.md").read_text()
    return about.format(triton=triton.__version__, tables="\n".join(lines[1:]), **kernel_settings())


def write(facts: str | None = None, roofline: str | None = None) -> None:
    """Writes one of the two parts of bench/results/codegen.md; the other, which roofline.py writes, stays as it is."""
    old_facts, _, old_roofline = TABLE.read_text().partition(ROOFLINE)
    TABLE.write_text((facts or old_facts.rstrip() + "\n") + "\n" + ROOFLINE + (roofline or old_roofline))
    print(f"wrote {TABLE}")


if __name__ == "__main__":
    if problem := missing_tool():
        raise SystemExit(problem)
    write(facts=document())
