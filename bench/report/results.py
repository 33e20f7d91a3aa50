"""Results files, what each has to be read with, and tables in Markdown."""

import json
import platform
import re
import subprocess
from collections.abc import Hashable, Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

import fastreg

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "bench" / "results"
TOOLS = {"PyTorch": "torch", "Triton": "triton", "CUDA": "cuda", "ROCm": "hip", "Python": "python"}

Case = dict[str, Any]
T = TypeVar("T", bound=Hashable)


def environment(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions and commit; dirty if files differ from it, outside of where documents are written."""
    cuda = device.type == "cuda"
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    cpu_name = cpu[1].strip() if cpu else platform.processor()
    changes = _git("status", "--porcelain", "--", ".", ":!bench/results", ":!docs", ":!README.md")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name,
        "device_type": device.type,
        "cpu": cpu_name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": import_module("triton").__version__ if find_spec("triton") else None,
        "cuda": torch.version.cuda if cuda else None,
        "hip": torch.version.hip if cuda else None,
        "fastreg": fastreg.__version__,
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(facts: dict[str, Any]) -> str:
    """One line for a caption."""
    threads = f", {facts['threads']} threads" if facts["device_type"] == "cpu" else ""
    host = f" beside {facts['cpu']}" if facts["device_type"] != "cpu" and facts.get("cpu") else ""
    tools = ", ".join(f"{tool} {facts[key]}" for tool, key in TOOLS.items() if facts.get(key))
    changes = " with uncommitted changes" if facts["dirty"] else ""
    return f"{facts['device']}{host}{threads}; {tools}; commit {facts['commit']}{changes}"


def file_name(facts: dict[str, Any], dtype: str) -> str:
    """`<device>-<dtype>`, for the file of a run and for figures made of it."""
    return f"{device_name(facts)}-{dtype}"


def device_name(facts: dict[str, Any]) -> str:
    """The device as part of a file's name."""
    device = re.sub(r"\((R|TM)\)", "", facts["device"]).lower()
    return re.sub(r"[^a-z0-9]+", "-", device).strip("-")


def store(folder: Path | None, name: str, facts: dict[str, Any], cases: list[Case]) -> None:
    """For commands: writes what was found so far, as a run may be cut short; nothing without a folder."""
    if folder is not None:
        write(folder / f"{name}.json", facts, cases)


def write(path: Path, facts: dict[str, Any], cases: list[Case]) -> None:
    """One case per line, so that two runs can be compared by eye."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Four digits: no measurement has more.
    rounded = json.loads(json.dumps(cases), parse_float=lambda number: float(f"{float(number):.4g}"))
    lines = ",\n".join(map(json.dumps, rounded))
    part = path.with_suffix(".part")  # a run may be stopped at any moment
    part.write_text(f'{{"environment": {json.dumps(facts)},\n"cases": [\n{lines}\n]}}\n')
    part.replace(path)


def read(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The results in `folder`, CUDA before CPU, then by name."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda result: result["environment"]["device_type"] != "cuda")


def table(names: Sequence[str], rows: Iterable[Sequence[object]], text_columns: int = 1) -> list[str]:
    """Markdown; columns after the first `text_columns` hold numbers."""
    marks = ["---"] * text_columns + ["---:"] * (len(names) - text_columns)
    return [f"| {' | '.join(map(str, cells))} |" for cells in (names, marks, *rows)]


def pivot(
    cases: Sequence[Case], corner: str, form: str = "{:.2f}", less: int = 0, row: str = "label", column: str = "method"
) -> list[str]:
    """Median ratios, `less` something: a row for each `row` of each task, a column for each `column` of the cases."""
    found = {(c["task"], c[row], c[column]): c for c in cases}
    tasks, columns = unique(c["task"] for c in cases), unique(c[column] for c in cases)
    several = len(tasks) > 1

    def cell(case: Case | None) -> str:
        if case is None:
            return "-"
        return form.format(case["ratio"]["p50"] - less) if case["status"] == "measured" else "wrong"

    rows = []
    for task, name in sorted(unique((c["task"], c[row]) for c in cases), key=lambda pair: tasks.index(pair[0])):
        shown = f"{int(name):,}" if name.isdigit() else name
        rows.append([shown, *[task] * several, *(cell(found.get((task, name, each))) for each in columns)])
    return table([corner, *["task"] * several, *columns], rows)


def unique(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))
