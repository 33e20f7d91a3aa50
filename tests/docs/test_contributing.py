"""CONTRIBUTING.md and docs/design.md agree with the code. `make recipes` copies the code into CONTRIBUTING.md again."""

import ast
import re
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRIBUTING, DESIGN = ROOT / "CONTRIBUTING.md", ROOT / "docs" / "design.md"
PAGES = [CONTRIBUTING, DESIGN]
# The line that names a file and a function, class or variable in it, and the code block below that line.
BLOCK = re.compile(r"^(( *)<!-- code: (\S+) (\S+) -->\n\2```python\n)(.*?)^(\2```\n)", re.MULTILINE | re.DOTALL)


def names_of(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def code_of(file: str, name: str) -> str:
    """The source of the function, class or variable `name`, such as `Class.method`, without its indentation."""
    source = (ROOT / file).read_text()
    node: ast.Module | ast.stmt = ast.parse(source)
    for part in name.split("."):
        assert isinstance(node, ast.Module | ast.ClassDef), f"{file} has no {name}"
        nodes = [child for child in node.body if part in names_of(child)]
        assert len(nodes) == 1, f"{file} defines {name} {len(nodes)} times"
        (node,) = nodes
    assert isinstance(node, ast.stmt)
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return textwrap.dedent("".join(source.splitlines(keepends=True)[first - 1 : node.end_lineno]))


def with_code(text: str) -> str:
    return BLOCK.sub(lambda match: match[1] + textwrap.indent(code_of(match[3], match[4]), match[2]) + match[6], text)


def test_blocks_are_the_code() -> None:
    text = CONTRIBUTING.read_text()
    blocks = [match[0] for match in BLOCK.finditer(text)]
    assert len(blocks) == text.count("<!-- code:") == text.count("```python") > 0
    stale = [block.split("-->")[0] for block in blocks if block != with_code(block)]
    assert not stale, f"the code changed; run `make recipes`: {stale}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_commands_and_modules_exist(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    suffixes = (".py", ".md", ".txt", ".toml", ".yml", ".json", ".cff")
    paths = [name for name in re.findall(r"`([^`\s]+)`", text) if "/" in name or name.endswith(suffixes)]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`| {4})make ([\w-]+)", text)) <= set(targets)
    modules = re.findall(r"python -m ([\w.]+)", text)
    assert [name for name in modules if not (ROOT / name.replace(".", "/")).with_suffix(".py").exists()] == []


def test_rooms_are_those_of_the_structure_test() -> None:
    rows = re.findall(r"^\| (\d) \| `(?:fastreg/)?(\w+)(?:/|\.py)` \|", CONTRIBUTING.read_text(), re.MULTILINE)
    floors: dict[str, list[str]] = {}
    for floor, room in rows:
        floors.setdefault(floor, []).append("fastreg" if room == "__init__" else room)
    assert list(floors) == [str(number) for number in range(1, len(floors) + 1)]
    expected = code_of("tests/test_structure.py", "ROOMS").removeprefix("ROOMS = ")
    assert list(floors.values()) == ast.literal_eval(expected)


def test_functions_on_the_road_are_in_their_files() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\S+\.py)` \|", CONTRIBUTING.read_text(), re.MULTILINE)
    assert len(rows) > 5
    for name, file in rows:
        defined = [each for node in ast.parse((ROOT / file).read_text()).body for each in names_of(node)]
        assert name in defined, f"{file} has no {name}"


def test_lanes_have_the_names_of_their_markers() -> None:
    rows = re.findall(r"^\| (\w+) \| `make test-(\S+)` \|", CONTRIBUTING.read_text(), re.MULTILINE)
    assert all(lane == command for lane, command in rows)
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {re.split(r"\W", marker)[0] for marker in options["markers"]}
    # The torch lane runs what has no marker of another lane.
    assert {lane for lane, _ in rows} == {"torch", *markers} - {"xdist_group"}


def test_every_mode_is_explained() -> None:
    listed = re.findall(r"`([A-Z_]+)`", "".join(re.findall(r"^\| (.*?) \|", DESIGN.read_text(), re.MULTILINE)))
    assert listed == re.findall(r"^    ([A-Z_]+) = ", code_of("fastreg/core/types.py", "Mode"), re.MULTILINE)


if __name__ == "__main__":
    CONTRIBUTING.write_text(with_code(CONTRIBUTING.read_text()))
