"""The documentation: every page is reached, every link leads somewhere, and the first snippets run."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastreg

ROOT = Path(fastreg.__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")])


def anchors(page: Path) -> set[str]:
    """As GitHub and Python-Markdown make them of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"`|\[|\]\([^)]*\)", "", heading)).strip().lower() for heading in headings]
    return {re.sub(r"[ -]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1].split("\n\n")[0]
    listed = re.findall(r": (\S+\.md)$", nav, re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))
    assert len(listed) == len(set(listed))


def test_every_public_name_is_in_the_reference() -> None:
    listed = set(re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    names = {f"fastreg.{name}" for name in fastreg.__all__ if name != "__version__"}
    optimizers = {f"fastreg.optim.{name}" for name in fastreg.optim.__all__}
    callbacks = {f"fastreg.integrations.{name}.ElasticNetCallback" for name in ("transformers", "lightning")}
    assert listed == names | optimizers | callbacks


@pytest.mark.parametrize("name", ["index.md", "which-way.md"])
def test_snippets_run(name: str) -> None:
    model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 1))
    x, y = torch.randn(8, 20), torch.randn(8, 1)
    logged: list[Any] = []
    namespace = {
        "fastreg": fastreg, "torch": torch, "model": model, "x": x, "y": y, "loader": [(x, y)] * 3,
        "criterion": nn.MSELoss(), "optimizer": torch.optim.AdamW(model.parameters()),
        "log": lambda *values: logged.append(values),
    }  # fmt: skip
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)
    assert len(logged) == (4 if name == "index.md" else 0)
