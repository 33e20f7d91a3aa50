"""What a figure has to be read with: device, versions, commit, threads."""

import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def facts(device: torch.device) -> dict[str, Any]:
    """The environment of a run, as stored with its results."""
    cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda if cuda else None,
        "hip": torch.version.hip if cuda else None,
        "fastreg": _version("fastreg"),
        **git_state(),
    }


def device_name(device: torch.device) -> str:
    """The name that the vendor gives the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def git_state() -> dict[str, Any]:
    """Commit, and whether files differ from it outside of where results and documents are written."""
    written = (":!bench/results", ":!docs", ":!README.md")
    head, changes = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "--", ".", *written)
    return {"commit": head, "dirty": None if changes is None else bool(changes)}


def slug(name: str) -> str:
    """`name` as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((R|TM)\)", "", name).lower()).strip("-")


def describe(facts: dict[str, Any]) -> str:
    """One line for a caption."""
    threads = f", {facts['threads']} threads" if facts["device_type"] == "cpu" else ""
    tools = ", ".join(f"{tool} {facts[key]}" for tool, key in _TOOLS.items() if facts.get(key))
    return f"{facts['device']}{threads}; {tools}; {commit(facts)}"


def commit(state: dict[str, Any]) -> str:
    """The commit in words."""
    return f"commit {state['commit']}{' with uncommitted changes' if state['dirty'] else ''}"


_TOOLS = {"PyTorch": "torch", "Triton": "triton", "CUDA": "cuda", "ROCm": "hip", "Python": "python"}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
