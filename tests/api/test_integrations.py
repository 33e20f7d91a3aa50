"""That fastreg needs none of the training libraries, and what it says where one is missing."""

import importlib
import subprocess
import sys

import pytest


def test_fastreg_imports_no_training_library() -> None:
    code = "import sys, fastreg; print([n for n in ('transformers', 'lightning', 'accelerate') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "missing", "advice"),
    [
        ("transformers", ["transformers"], r'pip install "transformers\[torch\]"'),
        ("lightning", ["lightning", "lightning.pytorch", "pytorch_lightning"], "pip install lightning"),
    ],
)
def test_a_missing_library(name: str, missing: list[str], advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in missing:
        monkeypatch.setitem(sys.modules, each, None)
    monkeypatch.delitem(sys.modules, f"fastreg.integrations.{name}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=f"fastreg.integrations.{name} is for .*{advice}"):
        importlib.import_module(f"fastreg.integrations.{name}")
