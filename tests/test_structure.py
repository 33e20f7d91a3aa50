"""The structure that CONTRIBUTING promises: imports that point one way, unique names, a short way to a sweep."""

import ast
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
FOLDERS = {"fastreg": "fastreg", "integrations": "fastreg.integrations", "kernels": "fastreg.kernels"}
FILES = sorted(
    [*(ROOT / "fastreg").glob("*.py"), *(ROOT / "fastreg/integrations").glob("*.py"), *(ROOT / "kernels").glob("*.py")]
)
CALLBACKS = [
    file for file in FILES if file.parent.name == "integrations" and file.stem in ("lightning", "transformers")
]
# From top to bottom: a file imports only from lines below its own.
LAYERS = [
    ["fastreg.integrations.lightning", "fastreg.integrations.transformers"],
    ["fastreg.integrations.attached"],
    ["fastreg", "fastreg.integrations"],
    ["fastreg.penalty", "fastreg.elastic_net", "fastreg.optim"],
    ["fastreg.attach"],
    ["fastreg.step_sizes", "fastreg.summary"],
    ["fastreg.penalized", "fastreg.options"],
    ["fastreg.autograd"],
    ["fastreg.selection"],
    ["fastreg.filters"],
    ["fastreg.collect"],
    ["fastreg.steps"],
    ["fastreg.inplace", "fastreg.direct"],
    ["fastreg.sweep"],
    ["fastreg.traced", "fastreg.sharded"],
    ["fastreg.local"],
    ["fastreg.blocks", "fastreg.kernels"],
    ["fastreg.block_steps", "fastreg.kernels.launch"],
    ["fastreg.walk", "fastreg.kernels.tables"],
    ["fastreg.block_ops", "fastreg.kernels.finish_kernel", "fastreg.kernels.target"],
    ["fastreg.scratch", "fastreg.work", "fastreg.kernels.sweep_kernel"],
    ["fastreg.layout", "fastreg.kernels.step_rules", "fastreg.kernels.sums"],
    ["fastreg.rules", "fastreg.kinds"],
    ["fastreg.formulas"],
    ["fastreg.strengths"],
    ["fastreg.device_cache", "fastreg.dtensor"],
]


def module_of(file: Path) -> str:
    package = FOLDERS[file.parent.name]
    return package if file.stem == "__init__" else f"{package}.{file.stem}"


def imports_of(file: Path) -> set[str]:
    """The modules of this package that a file imports, at its top or in a function."""
    known = {module_of(each) for each in FILES}
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file.name} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
            if node.module == "fastreg":
                names.remove("fastreg")  # a submodule is meant, which is in the list
        found |= known.intersection(names)
    return found


def test_imports_point_one_way() -> None:
    layer = {module: depth for depth, modules in enumerate(LAYERS) for module in modules}
    assert sorted(layer) == sorted(map(module_of, FILES)), "LAYERS does not name every file"
    for file in FILES:
        own = module_of(file)
        for other in imports_of(file):
            assert layer[other] > layer[own] or own == "fastreg", f"{own} imports {other}, which does not lie below it"


def test_kernels_import_triton_alone() -> None:
    for name in ("sweep_kernel", "finish_kernel", "step_rules", "sums"):
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
    assert sorted(name for name in defined if "sweep" in name) == [
        *("_sweep_block", "_sweep_blocks", "_sweep_kernel", "block_sweep", "kernel_sweep", "local_sweep"),
        *("sharded_sweep", "sweep_for", "traced_sweep"),
    ]


def test_no_keyword_bags() -> None:
    for file in set(FILES) - set(CALLBACKS):  # hooks take what a Trainer hands them
        for node in ast.walk(ast.parse(file.read_text())):
            assert not (isinstance(node, ast.FunctionDef) and node.args.kwarg), f"{file.name}: {node.name}"


def test_files_stay_short() -> None:
    lines = {file.name: len(file.read_text().splitlines()) for file in FILES}
    assert max(lines.values()) <= 250, lines


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
    own = {file for file in files if Path(file).parent.name in ("fastreg", "kernels")}
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
    assert len(forward_files) <= 11, forward_files
    assert len(backward_files) <= 10, backward_files
