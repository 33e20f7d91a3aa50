"""The file that a run leaves behind: what was found, and what it has to be read with."""

import json
import platform
import re
import subprocess
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import fastreg

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "bench" / "results"
TOOLS = {"PyTorch": "torch", "Triton": "triton", "CUDA": "cuda", "ROCm": "hip", "Python": "python"}

Case = dict[str, Any]


def environment(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions and commit of a run."""
    cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": import_module("triton").__version__ if find_spec("triton") else None,
        "cuda": torch.version.cuda if cuda else None,
        "hip": torch.version.hip if cuda else None,
        "fastreg": fastreg.__version__,
        **git_state(),
    }


def device_name(device: torch.device) -> str:
    """The name that the vendor gives the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def git_state() -> dict[str, Any]:
    """Commit, and whether files differ from it outside of where results and documents are written; None without git."""
    written = (":!bench/results", ":!docs", ":!README.md")
    head, changes = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "--", ".", *written)
    return {"commit": head, "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(facts: dict[str, Any]) -> str:
    """One line for a caption."""
    threads = f", {facts['threads']} threads" if facts["device_type"] == "cpu" else ""
    tools = ", ".join(f"{tool} {facts[key]}" for tool, key in TOOLS.items() if facts.get(key))
    changes = " with uncommitted changes" if facts["dirty"] else ""
    return f"{facts['device']}{threads}; {tools}; commit {facts['commit']}{changes}"


def slug(name: str) -> str:
    """`name` as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((R|TM)\)", "", name).lower()).strip("-")


def path_for(target: Path, facts: dict[str, Any], dtype: str) -> Path:
    """`target` itself if it names a JSON file, else `<device>-<dtype>.json` in the folder that it names."""
    return target if target.suffix == ".json" else target / f"{slug(facts['device'])}-{dtype}.json"


def write(path: Path, facts: dict[str, Any], cases: list[Case]) -> None:
    """One case per line, so that two runs can be compared by eye."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(_rounded(case)) for case in cases)
    path.write_text(f'{{"environment": {json.dumps(facts)},\n"cases": [\n{lines}\n]}}\n')


def read(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The results in `folder`, CUDA before CPU, then by name."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda result: result["environment"]["device_type"] != "cuda")


def _rounded(value: Any) -> Any:
    """Four digits: no measurement has more."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
