"""What a release relies on: versions that agree, packages that are listed, commands that exist."""

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import fastreg

ROOT = Path(fastreg.__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
CHECK = ROOT / ".ci" / "check_release.py"


def check(root: Path, *options: str) -> tuple[int, str]:
    command = [sys.executable, str(CHECK), "--root", str(root), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def test_versions_agree() -> None:
    assert check(ROOT) == (0, "versions agree\n")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    files = ["CITATION.cff", "CHANGELOG.md", "README.md", "pyproject.toml", "mkdocs.yml", "docs/index.md"]
    for file in [*files, "fastreg/__init__.py", ".github/ISSUE_TEMPLATE/config.yml"]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


@pytest.mark.parametrize("file", ["CITATION.cff", "CHANGELOG.md", "fastreg/__init__.py"])
def test_a_version_that_was_forgotten_is_found(copied: Path, file: str) -> None:
    text = (copied / file).read_text()
    assert fastreg.__version__ in text
    (copied / file).write_text(text.replace(fastreg.__version__, "9.9.9", 1))
    status, output = check(copied)
    assert status == 1
    assert "9.9.9" in output


def test_placeholders_and_unreleased_versions_are_no_release(copied: Path) -> None:
    status, output = check(copied, "--final")
    assert status == 1
    assert "OWNER" in output
    assert "unreleased" in output
    for file in [each for each in copied.rglob("*") if each.is_file()]:
        file.write_text(file.read_text().replace("OWNER", "someone").replace("(unreleased)", "(2027-01-01)"))
    assert check(copied, "--final") == (0, "versions agree\n")


def test_every_folder_is_a_package_of_the_wheel() -> None:
    (listed,) = re.findall(r"^packages = \[(.*fastreg\.kernels.*)\]$", PYPROJECT, re.MULTILINE)
    found = [".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "fastreg").rglob("__init__.py")]
    if "fastreg.kernels" not in found:  # a link, which Path.rglob does not follow in every version of Python
        found.append("fastreg.kernels")
    assert sorted(re.findall(r'"(.+?)"', listed)) == sorted(found)


def test_extras_name_the_distribution() -> None:
    (name,) = re.findall(r'^name = "(.+)"$', PYPROJECT, re.MULTILINE)
    assert name == "fastreg-torch"
    assert metadata.metadata(name)["Name"] == name
    assert set(re.findall(r'"([\w-]+)\[(?:test|bench|examples)', PYPROJECT)) == {name}


def test_workflows_call_commands_that_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    phony = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())  # type: ignore[index]
    assert phony == targets
    files = [*(ROOT / ".github" / "workflows").glob("*.yml"), ROOT / ".ci" / "run", ROOT / "CONTRIBUTING.md"]
    assert len(files) > 4
    for file in files:
        for words in re.findall(r"^\s*(?:- )?(?:run: )?make ([a-z][a-z \-]*)", file.read_text(), re.MULTILINE):
            assert set(words.split()) <= targets, f"{file.name}: make {words}"
