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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import driver

from fastreg.kernels import launch
from fastreg.plan import BLOCK, Mode, plan_for
from fastreg.strengths import UNSCALED, Scale, Strength, Strengths

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
    "prox-value": Variant(Mode.PROX, reduce=True),
    "value-grouped": Variant(Mode.VALUE, reduce=True, grouped=True),
    "accumulate-grouped": Variant(Mode.ACCUMULATE, reduce=True, grouped=True),
    "prox-grouped": Variant(Mode.PROX, reduce=False, grouped=True),
}
# Strengths on the device change nothing in the loop: two dtypes are enough.
CASES = [(v, d) for v in VARIANTS for d in DTYPES if d in ("fp32", "bf16") or not VARIANTS[v].grouped]


class Launch(NamedTuple):
    """What the JIT was asked to compile."""

    function: Any  # triton.JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


class Instruction(NamedTuple):
    """A line of PTX, SASS or AMD assembly."""

    guard: str  # the predicate without which it does nothing; AMD has none
    opcode: str
    operands: str


class Report(NamedTuple):
    """What was found in a compiled kernel; `loads` and `stores` are those of the loop over full blocks."""

    registers: int  # per thread
    scratch: int  # bytes of stack and local memory per thread, and registers spilled
    shared: int  # bytes per program
    atomics: int  # instructions, on any type
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


def sweep_once(
    variant: Variant, weights: Sequence[torch.Tensor], strength: Strength, scale: Scale = UNSCALED
) -> object:
    """The launcher's work for one sweep: the last of several weights is a strength group of its own."""
    plan = plan_for(weights, [0] * (len(weights) - 1) + [int(len(weights) > 1)])
    (parts,) = plan.shards.values()
    grads = weights if variant.mode in (Mode.GRADIENT, Mode.RESCALE, Mode.ACCUMULATE) else None
    value_dtype = plan.value_dtype if variant.reduce else None
    strengths = Strengths(strength, strength)
    return launch.sweep(parts, variant.mode, weights, grads, strengths, scale, plan.n_groups, value_dtype)


def launches(variant: Variant, dtype: torch.dtype, target: GPUTarget) -> dict[str, Launch]:
    """The launches of one sweep in this variant, by the kernel's name."""
    weights = [torch.empty(BLOCK, dtype=dtype) for _ in range(1 + variant.grouped)]
    strength = torch.ones(2, dtype=torch.float64) if variant.grouped else 1.0
    scale = Scale(torch.ones(()), torch.ones(())) if variant.scaled else UNSCALED
    found = record(target, functools.partial(sweep_once, variant, weights, strength, scale))
    return {each.function.__name__: each for each in found}


def compile_for(target: GPUTarget, found: Launch) -> CompiledKernel:
    """The compiler's output for a recorded launch."""
    source = ASTSource(found.function, found.signature, found.constants, found.attributes)
    return triton.compile(source, target=target, options=found.options)


@functools.cache
def compiled(variant: str, dtype: str, target: str) -> dict[str, CompiledKernel]:
    """The kernels of a variant, by name."""
    found = launches(VARIANTS[variant], DTYPES[dtype], TARGETS[target])
    return {name: compile_for(TARGETS[target], each) for name, each in found.items()}


def inspect(kernel: CompiledKernel) -> Report:
    """Reads what the compiler says of a kernel, and its text: PTX or AMD assembly."""
    code = parse(kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"])
    accesses = [found for i in full_block_loop(code) if (found := access(i.opcode))]
    return Report(
        *_resources(kernel.asm),
        kernel.metadata.shared,
        sum(bool(_ATOMIC.match(i.opcode)) for i in itertools.chain(*code.values())),
        Counter(width for kind, width in accesses if kind == "load"),
        Counter(width for kind, width in accesses if kind == "store"),
    )


def machine_loop(kernel: CompiledKernel) -> Counter[str]:
    """The machine instructions of the loop over full blocks: how often each opcode occurs."""
    text = kernel.asm["amdgcn"] if "amdgcn" in kernel.asm else _tool("nvdisasm", "--print-code", kernel.asm["cubin"])
    return Counter(i.opcode for i in full_block_loop(parse(text)))


def missing_tool() -> str | None:
    """Why CUDA binaries cannot be read here, or None: the tools for it come with Triton's wheels."""
    try:
        _ = knobs.nvidia.cuobjdump.path, knobs.nvidia.nvdisasm.path
    except RuntimeError as error:
        return str(error)
    return None


def _tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, name).path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _resources(asm: Any) -> tuple[int, int]:
    """Registers, and scratch memory with spills, as `Report` has them."""
    if "cubin" in asm:
        text = _tool("cuobjdump", "--dump-resource-usage", asm["cubin"])
        registers, *scratch = (int(_only(rf"\b{name}:(\d+)", text)) for name in ("REG", "STACK", "LOCAL"))
    else:
        names = "vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count"
        registers, *scratch = (int(_only(rf"\s\.{name}: +(\d+)", asm["amdgcn"])) for name in names)
    return registers, sum(scratch)


def _only(pattern: str, text: str) -> str:
    (found,) = re.findall(pattern, text)
    return found


Code = dict[str, list[Instruction]]  # what follows each label, in the order of the text

_LABEL = re.compile(r"([.$]L\w+):")
_INSTRUCTION = re.compile(r"\s+(?:/\*\w+\*/\s+)?(?:@(!?%?\w+)\s+)?([A-Za-z][\w.:]*)([^;\n]*)")
_BRANCH = re.compile(r"bra\b|BRA\b|s_c?branch")
_ATOMIC = re.compile(r"atom\b|red\b|(global|flat|buffer)_atomic")
_PTX_ACCESS = re.compile(r"(ld|st)\.global\b.*?(?:\.v(\d))?\.[bfsu](\d+)$")
_SASS_ACCESS = re.compile(r"(LD|ST)G?\.E\b(?:.*\.[US]?(8|16|64|128|256)\b)?")
_AMD_ACCESS = re.compile(r"(?:global|flat|buffer)_(load|store)_[us]?(dword|short|byte)(?:x(\d))?")


def parse(text: str) -> Code:
    """The instructions of PTX, SASS or AMD assembly."""
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

    A mask is a predicate on the access, or in AMD's assembly a change of the execution mask around it.
    """
    for body in _loops(code):
        guards = [i.guard for i in body if access(i.opcode)]
        if guards and not any(guards) and not any("saveexec" in i.opcode for i in body):
            return body
    return []


def _loops(code: Code) -> Iterator[list[Instruction]]:
    """The instructions from a label to a branch back to it, for every such branch."""
    labels = list(code)
    for last, label in enumerate(labels):
        for end, instruction in enumerate(code[label], 1):
            target = re.search(r"[.$]L\w+", instruction.operands)
            if target and _BRANCH.match(instruction.opcode):
                first = labels.index(target[0])
                if first <= last:
                    yield [*itertools.chain(*(code[name] for name in labels[first:last])), *code[label][:end]]


def access(opcode: str) -> tuple[str, int] | None:
    """("load" or "store", bytes per thread) of an instruction on global memory, None of any other."""
    if found := _PTX_ACCESS.match(opcode):
        return "load" if found[1] == "ld" else "store", int(found[2] or 1) * int(found[3]) // 8
    if found := _SASS_ACCESS.match(opcode):
        return "load" if found[1] == "LD" else "store", int(found[2] or 32) // 8
    if found := _AMD_ACCESS.match(opcode):
        return found[1], {"dword": 4, "short": 2, "byte": 1}[found[2]] * int(found[3] or 1)
    return None


def _table(target: str) -> Iterator[str]:
    """The lines of one target's table: a row per variant and dtype, and one for each different `_finish_kernel`."""
    yield "| kernel | variant | dtype | registers | scratch | shared | atomics | loads | stores | loop | per element |"
    yield "| --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- | ---: | ---: |"
    elements = BLOCK // (TARGETS[target].warp_size * launch.NUM_WARPS)
    finished = set()
    for variant, dtype in CASES:
        kernels = compiled(variant, dtype, target)
        report, length = inspect(kernels["_sweep_kernel"]), machine_loop(kernels["_sweep_kernel"]).total()
        widths = [", ".join(f"{n} x {width} B" for width, n in found.items()) for found in report[4:]]
        yield _row("_sweep_kernel", variant, dtype, *report[:4], *widths, length, f"{length / elements:.1f}")
        if "_finish_kernel" in kernels and kernels["_finish_kernel"].hash not in finished:
            finished.add(kernels["_finish_kernel"].hash)
            yield _row("_finish_kernel", variant, dtype, *inspect(kernels["_finish_kernel"])[:4], "", "", "", "")


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def document() -> str:
    """The contents of docs/codegen.md."""
    lines = [
        "# What the compiler makes of the kernels",
        "",
        "Facts about compiled code, not measurements: nothing here was run. Written by `python -m bench.codegen` with",
        f"Triton {triton.__version__}, for the launches that fastreg makes: blocks of {BLOCK} elements, "
        f"{launch.NUM_WARPS} warps.",
        "",
        "- registers: per thread (AMD: vector registers); scratch: bytes of stack and local memory, and spills",
        "- loads, stores: accesses to global memory per thread in the loop over full blocks, and the width of each",
        "- shared: bytes of shared memory per program; atomics: atomic instructions of any kind",
        "- loop: instructions in that loop, which handles one block, and the same per element",
        "- variants: scaled, by an upstream gradient on the device; grouped, strengths of two groups on the device",
    ]
    for name, target in TARGETS.items():
        lines += ["", f"## {name} ({target.backend}, {target.warp_size} threads per warp)", "", *_table(name)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if problem := missing_tool():
        raise SystemExit(problem)
    text = document()
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text)
    print(text, end="")
