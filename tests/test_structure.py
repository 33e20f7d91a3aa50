"""The structure that CONTRIBUTING promises: imports that point one way, unique names, a short way to a sweep."""

import ast
import graphlib
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastreg

ROOT = Path(fastreg.__file__).parents[1]
FILES = sorted(
    [
        # kernels/ is a link there, which some versions of Python follow.
        *(file for file in (ROOT / "fastreg").rglob("*.py") if "kernels" not in file.relative_to(ROOT).parts),
        *(ROOT / "kernels").glob("*.py"),
    ]
)
CALLBACKS = [
    file for file in FILES if file.parent.name == "integrations" and file.stem in ("lightning", "transformers")
]
# Folders and public files, by floor, from the lowest: a room imports only from rooms on lower floors.
ROOMS = [
    ["core"],
    ["formulas", "selection"],
    ["blocks", "kernels"],
    ["sweep"],
    ["autograd", "optim", "sparsity"],
    ["regularizer"],
    ["functional", "elastic_net"],
    ["integrations", "fastreg"],
]


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = ("fastreg", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def imports_of(file: Path) -> set[str]:
    """The modules of this package that a file imports, at its top or in a function."""
    known = {module_of(each) for each in FILES}
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= known.intersection(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= known & names
            if not names <= known:
                found |= known & {str(node.module)}
    return found


def test_rooms_import_from_lower_floors() -> None:
    floor = {room: number for number, rooms in enumerate(ROOMS) for room in rooms}
    assert set(floor) == {room_of(module_of(file)) for file in FILES}, "ROOMS does not name every room"
    for file in FILES:
        own = module_of(file)
        for other in imports_of(file):
            is_lower = floor[room_of(other)] < floor[room_of(own)]
            assert is_lower or room_of(other) == room_of(own), f"{own} imports {other}, which is not on a lower floor"


def test_no_room_imports_the_package_itself() -> None:
    for file in FILES:
        assert "fastreg" not in imports_of(file), f"{module_of(file)} imports fastreg/__init__.py"


def test_imports_make_no_cycles() -> None:
    graph = {module_of(file): imports_of(file) for file in FILES}
    assert sum(map(len, graph.values())) > len(FILES)
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the modules


def test_kernels_import_triton_alone() -> None:
    for name in ("sweep", "finish", "steps", "penalty", "pointers", "sums"):
        source = (ROOT / "kernels" / f"{name}.py").read_text()
        imported = {line.split()[1] for line in source.splitlines() if line.startswith(("import", "from"))}
        assert all(module.split(".")[0] == "triton" or module.startswith("fastreg.kernels.") for module in imported)
    for file in FILES:
        if file.parent.name != "kernels":
            assert not re.search(r"^\s*(import|from) triton", file.read_text(), re.MULTILINE), file.name


def test_every_function_and_class_has_a_name_of_its_own() -> None:
    defined = Counter(
        node.name
        for file in FILES
        if file not in CALLBACKS  # which have one name in both, as users import one of them
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)
    )
    assert [name for name, n in defined.items() if n > 1] == []
    assert sorted(name for name in defined if "sweep" in name and name != "_prox_sweep") == [
        *("_sweep_block", "_sweep_blocks", "_sweep_kernel", "block_sweep", "kernel_sweep", "local_sweep"),
        *("sharded_sweep", "sweep", "traced_sweep"),
    ]


def test_no_keyword_bags() -> None:
    for file in set(FILES) - set(CALLBACKS):  # hooks take what a Trainer hands them
        for node in ast.walk(ast.parse(file.read_text())):
            assert not (isinstance(node, ast.FunctionDef) and node.args.kwarg), f"{file.name}: {node.name}"


def test_dir_shows_what_users_may_use() -> None:
    public = {name for name in dir(fastreg) if not name.startswith("_")}
    assert public == set(fastreg.__all__) - {"__version__"}


class NoKernel:
    """A launch that does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda **arguments: None


def calls_of(call: Callable[[], Any]) -> tuple[int, set[str], Any]:
    """How many Python functions `call` calls, those of PyTorch included, and the files of fastreg among them."""
    files: list[str] = []

    def profile(frame: Any, event: str, arg: Any) -> None:
        if event == "call":
            files.append(frame.f_code.co_filename)

    sys.setprofile(profile)
    try:
        result = call()
    finally:
        sys.setprofile(None)
    folders = ROOT / "fastreg", ROOT / "kernels"
    own = {file for file in files if any(map(Path(file).is_relative_to, folders))}
    return len(files), own, result


@pytest.mark.skipif(sys.version_info < (3, 11), reason="counted on Python 3.11 and newer")
def test_the_way_to_a_sweep_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python calls of a repeated penalty and its backward pass; it began with 126 and 144 of them."""
    launch = pytest.importorskip("fastreg.kernels.launch")
    for kernel in ("_sweep_kernel", "_finish_kernel"):
        monkeypatch.setattr(launch, kernel, NoKernel())
    monkeypatch.setattr("fastreg.kernels.INTERPRETED", True)
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    reg = fastreg.ElasticNet(model, 1e-3, 1e-4, impl="triton")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        reg().backward()
    forward, forward_files, penalty = calls_of(reg)
    backward, backward_files, _ = calls_of(penalty.backward)
    assert forward <= 46, forward
    assert backward <= 50, backward
    assert len(forward_files) <= 13, forward_files
    assert len(backward_files) <= 10, backward_files
