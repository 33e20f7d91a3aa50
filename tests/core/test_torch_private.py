"""Private names of PyTorch: in two files only, and with the same results where one is missing or has changed."""

import ast
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastreg
from tests.support.helpers import Path as HelperPath
from tests.support.private_names import BREAKS, WAYS

ROOT = Path(fastreg.__file__).parents[1]
HOMES = ("fastreg/core/torch_private.py", "fastreg/autograd/engine.py")
FILES = sorted(
    [
        *(file for file in (ROOT / "fastreg").rglob("*.py") if "kernels" not in file.relative_to(ROOT).parts),
        *(ROOT / "kernels").glob("*.py"),
    ]
)
# Private names of others, with the reason for each.
OTHERS = {
    "_replace": "of every NamedTuple",
    "_value_": "of every Enum, and faster than the property `value`",
    "_getframe": "of sys, to find the caller's line",
    "_logger_connector": "of Lightning's Trainer, which has no public way to log where this does",
}
# Attributes of our classes that PyTorch's have, too, used on something else than `self`.
OWN_DESPITE_THE_NAME = {("fastreg/selection/selection.py", "twin._modules"): "the modules of a Selection"}

_MODULE, _PARAMETER = nn.Module(), nn.Parameter(torch.zeros(1))
PYTORCH = {
    name
    for owner in (_PARAMETER, _MODULE, torch.optim.Adam([_PARAMETER], fused=True), torch.autograd.Function)
    for name in dir(owner)
    if name.startswith("_") and not name.startswith("__")
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def stored_names(tree: ast.AST) -> set[str]:
    """Names that functions, classes, variables and attributes are given."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def root_of(node: ast.expr) -> str | None:
    """`torch`, of `torch.nn.Module`."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def private_names(tree: ast.AST, own: set[str]) -> Iterator[tuple[int, str]]:
    """Lines and expressions that use a private name of PyTorch; `own` are names that the package defines."""
    of_torch: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            if any(module.split(".")[0] == "torch" for module in modules):
                of_torch |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
                names = [part for each in [*modules, *(alias.name for alias in node.names)] for part in each.split(".")]
                if any(map(is_private, names)):
                    yield node.lineno, ast.unparse(node)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    derived = [each for each in classes if of_torch & set(map(root_of, each.bases))]
    of_self = {name for each in classes if each not in derived for name in stored_names(each)}

    def is_pytorchs(name: str, of: str | None) -> bool:
        if name in PYTORCH:
            return of != "self" or name not in of_self
        return is_private(name) and name not in own and name not in OTHERS

    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root = root_of(node)
            if is_private(node.attr) and (root in of_torch or is_pytorchs(node.attr, root)):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            parts = node.value.split(".")
            is_path = all(part.isidentifier() for part in parts) and any(map(is_private, parts))
            if is_path and (parts[0] == "torch" or any(is_pytorchs(part, "self") for part in parts)):
                yield node.lineno, repr(node.value)
    for each in derived:
        for name in stored_names(each) & PYTORCH:
            yield each.lineno, f"{each.name}.{name}"


OWN = {name for file in FILES for name in stored_names(ast.parse(file.read_text()))}


def strays(file: str, source: str) -> list[str]:
    return [
        f"{file}:{line}: {text}"
        for line, text in private_names(ast.parse(source), OWN)
        if (file, text) not in OWN_DESPITE_THE_NAME
    ]


def test_private_names_are_in_two_files() -> None:
    files = {str(file.relative_to(ROOT)): file.read_text() for file in FILES}
    assert set(HOMES) < set(files)
    assert all(strays(home, files[home]) for home in HOMES)
    found = [stray for file, source in files.items() if file not in HOMES for stray in strays(file, source)]
    assert not found, "move these to fastreg/core/torch_private.py or fastreg/autograd/engine.py:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._dispatch_keys(w)",
        "from torch._C import _dispatch_keys",
        "import torch._dynamo",
        "from torch import _foreach_add_",
        "torch._foreach_add_(ws, 1)",
        "torch.autograd.Variable._execution_engine.queue_callback(f)",
        "nn.Module._apply(m, f)",
        "w._version",
        "version = operator.attrgetter('_version')",
        "getattr(f, '_backward_cls', None)",
        "sys.modules.get('torch._dynamo.compiled_autograd')",
        "w._local_tensor",
        "module._get_fsdp_state()",
        "class Own(torch.optim.Adam):\n    _step_supports_amp_scaling = True",
        "class Own(nn.Module):\n    def f(self):\n        self._parameters = {}",
        "class Own:\n    def f(self, module):\n        self._buffers = module._buffers",
    ],
)
def test_a_stray_is_found(line: str) -> None:
    source = f"import operator, sys, torch\nfrom torch import nn\n\n{line}\n"
    assert strays("fastreg/sweep/local.py", source)


@pytest.mark.parametrize(
    "line",
    [
        '"""`torch._C._dispatch_keys` in a docstring."""',
        "work._replace(layout=None)",
        "memory._reserve",  # in fastreg/blocks/scratch.py
        "class Own:\n    def f(self):\n        self._buffers = []\n        return self._buffers, {'_buffers': None}",
        "torch.__version__",
        "type(w).__torch_dispatch__",
        "for _, w in pairs: pass",
    ],
)
def test_nothing_else_is_found(line: str) -> None:
    assert strays("fastreg/sweep/local.py", f"import torch\n\n{line}\n") == []


def test_every_name_is_tested() -> None:
    """Below, each in both ways; or in a test of its own."""
    others = {
        "_C", "_dynamo", "_functorch", "_execution_engine",  # where names are
        "_local_tensor", "_get_fsdp_state", "_fsdp_param_groups", "_fsdp_param_group", "_unsharded_param",
        "_sharded_post_forward_param",
        "_dynamo_marked_constant",  # tests/sweep/test_compile.py
        "_metadata",  # tests/selection/test_detached.py
    }  # fmt: skip
    used = set()
    for home in HOMES:
        for _, text in private_names(ast.parse((ROOT / home).read_text()), OWN):
            used |= {part for part in text.strip("'").split(".") if is_private(part)}
    assert used - others <= set(BREAKS)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("private_names") / "results"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.private_names", str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    return pickle.loads(out.read_bytes())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each name")
@pytest.mark.xdist_group("private names")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BREAKS)
def test_results_are_the_same_without(results: Any, name: str, way: str) -> None:
    expected, actual = results[None, ""], results[name, way]
    assert isinstance(expected, dict), expected
    assert isinstance(actual, dict), actual
    assert actual.keys() == expected.keys()
    for case, wanted in expected.items():
        assert len(actual[case]) == len(wanted)
        for one, other in zip(actual[case], wanted, strict=True):
            if not isinstance(other, np.ndarray):
                assert one == other, case
            elif "_fused_" in name and case in ("optimizers", "attached", "scaled_steps"):
                # Three steps by expressions, which round float32 numbers in another order.
                np.testing.assert_allclose(one, other, rtol=0, atol=4 * 2**-23 * np.abs(other).max(), err_msg=case)
            else:
                assert one.dtype == other.dtype, case
                assert one.tobytes() == other.tobytes(), case


def test_changes_in_place_are_noticed_in_all_of_them(results: Any) -> None:
    assert results[None, ""]["change_in_place"] == [True, True, True]


def test_kernels_count_steps_without_versions(path: HelperPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after somebody else has set the optimizer's counters."""

    def trained() -> list[torch.Tensor]:
        torch.manual_seed(0)
        ws = [nn.Parameter(torch.randn(n, device=path[1])) for n in (5, 3000)]
        optimizer = fastreg.optim.AdamW(ws, lr=0.1, l1=0.1, prox=True, impl=path[0])
        for i in range(4):
            for w in ws:
                w.grad = torch.ones_like(w)
            optimizer.step()
            if i == 1:
                optimizer.state[ws[0]]["step"].fill_(10)
        return [w.detach() for w in ws] + [optimizer.state[w]["step"] for w in ws]

    expected = trained()
    if path[0] == "triton":
        monkeypatch.setattr("fastreg.kernels.tables.version", lambda tensor: 0)
    assert all(map(torch.equal, trained(), expected))
