"""What the compiler makes of the kernels: registers, spills, width of memory accesses, length of the inner loop.

`python -m bench.codegen` writes the table in docs/codegen.md. It needs no GPU: the library's own launcher runs on CPU
tensors while a recorder stands in for Triton's driver and notes what the JIT is asked to compile, down to the alignment
of pointers, and that is then compiled ahead of time for each target.
"""

import functools
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from fastreg.kernels import launch
from fastreg.plan import BLOCK, Mode, plan_for
from fastreg.strengths import Scale, Strengths

TABLE = Path(__file__).parents[1] / "docs" / "codegen.md"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Variant(NamedTuple):
    """A way the library launches its kernels."""

    mode: Mode
    reduce: bool  # whether the value is wanted
    scaled: bool = False  # by an upstream gradient on the device
    grouped: bool = False  # strengths of two groups, on the device


VARIANTS = {
    "value": Variant(Mode.VALUE, reduce=True),
    "gradient": Variant(Mode.GRADIENT, reduce=True),
    "gradient-scaled": Variant(Mode.GRADIENT, reduce=False, scaled=True),
    "rescale": Variant(Mode.RESCALE, reduce=False, scaled=True),
    "accumulate": Variant(Mode.ACCUMULATE, reduce=True),
    "accumulate-scaled": Variant(Mode.ACCUMULATE, reduce=False, scaled=True),
    "prox": Variant(Mode.PROX, reduce=False),
    "value-grouped": Variant(Mode.VALUE, reduce=True, grouped=True),
    "accumulate-grouped": Variant(Mode.ACCUMULATE, reduce=True, grouped=True),
    "prox-grouped": Variant(Mode.PROX, reduce=False, grouped=True),
}


class Launch(NamedTuple):
    """What the JIT was asked to compile."""

    function: Any  # triton.JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


class Instruction(NamedTuple):
    """A line of SASS or of AMD assembly."""

    guard: str  # SASS only: the predicate without which it does nothing
    opcode: str
    operands: str


class Report(NamedTuple):
    """What was found in one compiled kernel; `loop`, `loads` and `stores` are of the loop over full blocks."""

    registers: int  # per thread
    scratch: int  # bytes of stack and local memory per thread, and registers spilled
    shared: int  # bytes per program
    atomics: int  # instructions, of any type
    loop: Counter[str]  # how often each opcode occurs
    loads: Counter[int]  # how often each width in bytes occurs
    stores: Counter[int]


class _Recorder:
    """Stands in for Triton's driver, and refuses every compilation after noting it: nothing is compiled or run."""

    def __init__(self, target: GPUTarget) -> None:
        self.launches: list[Launch] = []
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)  # the JIT keeps one cache per device

    def get_current_stream(self, device: str) -> int:
        return 0

    def refuse(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion")}
        (attributes,) = compile["configs"]
        self.launches.append(Launch(fn.jit_function, compile["signature"], compile["constants"], attributes, options))
        return True


def record(target: GPUTarget, call: Callable[[], object]) -> list[Launch]:
    """The kernels that `call` would launch on `target`."""
    recorder = _Recorder(target)
    driver.set_active(recorder)
    try:
        with knobs.runtime.scope():
            knobs.runtime.jit_cache_hook = recorder.refuse
            call()
    finally:
        driver.set_active(None)  # found again at the next use
    return recorder.launches


def launches(variant: Variant, dtype: torch.dtype, target: GPUTarget) -> dict[str, Launch]:
    """The launches of one sweep in this variant, by the kernel's name."""
    weights = [torch.empty(BLOCK, dtype=dtype) for _ in range(1 + variant.grouped)]
    plan = plan_for(weights, range(len(weights)))
    (parts,) = plan.shards.values()
    strength = torch.ones(len(weights), dtype=torch.float64) if variant.grouped else 1.0
    factor = torch.ones(()) if variant.scaled else None
    call = functools.partial(
        launch.sweep,
        parts,
        variant.mode,
        weights,
        weights if variant.mode in (Mode.GRADIENT, Mode.RESCALE, Mode.ACCUMULATE) else None,
        Strengths(strength, strength),
        Scale(factor, factor),
        plan.n_groups,
        plan.value_dtype if variant.reduce else None,
    )
    return {found.function.__name__: found for found in record(target, call)}


def inspect(found: Launch, target: GPUTarget) -> Report:
    """Compiles a recorded launch and reads the result."""
    source = ASTSource(found.function, found.signature, found.constants, found.attributes)
    compiled = triton.compile(source, target=target, options=found.options)
    read = _read_hip if target.backend == "hip" else _read_cuda
    code, registers, scratch = read(compiled.asm)
    loop = full_block_loop(code)
    opcodes = [i.opcode for i in itertools.chain(*code.values())]
    return Report(
        registers,
        scratch,
        compiled.metadata.shared,
        sum(bool(_ATOMIC.match(opcode)) for opcode in opcodes),
        Counter(i.opcode for i in loop),
        Counter(w for i in loop if (w := _width(i.opcode, "load"))),
        Counter(w for i in loop if (w := _width(i.opcode, "store"))),
    )


@functools.cache
def reports(variant: str, dtype: str, target: str) -> dict[str, Report]:
    """What `inspect` says of each kernel of a variant, by the kernel's name."""
    found = launches(VARIANTS[variant], DTYPES[dtype], TARGETS[target])
    return {name: inspect(each, TARGETS[target]) for name, each in found.items()}


def missing_tool() -> str | None:
    """Why CUDA binaries cannot be read here, or None: the disassemblers come with Triton's wheels."""
    try:
        _ = knobs.nvidia.cuobjdump.path, knobs.nvidia.nvdisasm.path
    except RuntimeError as error:
        return str(error)
    return None


Code = dict[str, list[Instruction]]  # instructions after each label, in the order of the text


def _read_cuda(asm: Any) -> tuple[Code, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        code = parse(_run(knobs.nvidia.nvdisasm.path, "--print-code", file.name))
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return code, numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def _read_hip(asm: Any) -> tuple[Code, int, int]:
    text = asm["amdgcn"]
    names = "vgpr_count|private_segment_fixed_size|vgpr_spill_count|sgpr_spill_count"
    numbers = {name: int(value) for name, value in re.findall(rf"^\s+\.({names}): +(\d+)", text, re.MULTILINE)}
    registers = numbers.pop("vgpr_count")
    if len(numbers) != 3:
        raise ValueError(f"the metadata of the AMD kernel lacks some of {names}")
    return parse(text), registers, sum(numbers.values())


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


_LABEL = re.compile(r"(\.L\w+):")
_INSTRUCTION = re.compile(r"\s+(?:/\*\w+\*/\s+)?(?:@(!?U?P\w+)\s+)?([A-Za-z][\w.]*)([^;\n]*)")
_ATOMIC = re.compile(r"(ATOM|RED\b|global_atomic|flat_atomic|buffer_atomic)")
_SASS_ACCESS = re.compile(r"(?P<kind>LDG?|STG?)\.E(?:\.\w+)*?(?:\.(?P<size>[US]?(?:8|16|64|128|256)))?$")
_HIP_ACCESS = re.compile(r"(?:global|flat|buffer)_(?P<kind>load|store)_(?P<size>dword|[us]?byte|[us]?short)(?:x(?P<n>\d))?")


def parse(text: str) -> Code:
    """The instructions of SASS or AMD assembly."""
    code: Code = {"": []}
    block = code[""]
    for line in text.splitlines():
        if label := _LABEL.match(line):
            block = code.setdefault(label[1], [])
        elif found := _INSTRUCTION.match(line):
            block.append(Instruction(found[1] or "", found[2], found[3]))
    return code


def full_block_loop(code: Code) -> list[Instruction]:
    """The first loop that reads or writes global memory without a mask; empty if there is none.

    A mask is a predicate on the access in SASS, and a change of the execution mask around it in AMD's assembly.
    """
    for body in _loops(code):
        accesses = [i for i in body if _width(i.opcode, "load") or _width(i.opcode, "store")]
        masked = any(i.guard for i in accesses) or any("saveexec" in i.opcode for i in body)
        if accesses and not masked:
            return body
    return []


def _loops(code: Code) -> Iterator[list[Instruction]]:
    """From each label to each branch back to it."""
    labels = list(code)
    for last, label in enumerate(labels):
        for end, instruction in enumerate(code[label], 1):
            target = re.search(r"\.L\w+", instruction.operands)
            if instruction.opcode.startswith(("BRA", "s_cbranch", "s_branch")) and target:
                first = labels.index(target[0])
                if first <= last:
                    yield [*itertools.chain(*(code[name] for name in labels[first:last])), *code[label][:end]]


def _width(opcode: str, kind: str) -> int:
    """Bytes per thread that an instruction loads from or stores to global memory: 0 if it does not."""
    if found := _SASS_ACCESS.match(opcode):
        matches = found["kind"].startswith("LD" if kind == "load" else "ST")
        return matches * int((found["size"] or "32").lstrip("US")) // 8
    if found := _HIP_ACCESS.match(opcode):
        size = {"dword": 4, "short": 2, "byte": 1}[found["size"].lstrip("us") if found["size"] != "short" else "short"]
        return (found["kind"] == kind) * size * int(found["n"] or 1)
    return 0
