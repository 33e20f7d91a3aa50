"""The documentation: links lead somewhere, every page is reached, titles are unique, and every recipe runs."""

import copy
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import fastreg

ROOT = Path(fastreg.__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")])
WITH_RECIPES = [
    *("index.md", "which-way.md", "attaching.md", "l1-no-zeros.md", "exact-zeros.md", "strength.md", "devices.md"),
    "threads.md",
]


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub and Python-Markdown make them from headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"`|\[|\]\([^)]*\)", "", heading)).strip().lower() for heading in headings]
    return {re.sub(r"[ -]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if target.startswith(("http", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [README, *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_link_texts_are_titles_and_not_names_of_pages(page: Path) -> None:
    text = re.sub(r"<!-- bench:start -->.*<!-- bench:end -->", "", without_code(page), flags=re.DOTALL)
    assert not re.findall(r"\[`?[\w./-]+\.md`?\]\(", text)


def test_every_page_is_in_the_navigation_under_its_title() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1].split("\n\n")[0]
    listed = re.findall(r"- (.+): (\S+\.md)$", nav, re.MULTILINE)
    assert sorted(file for _, file in listed) == sorted(page.name for page in DOCS.glob("*.md"))
    for title, file in listed:
        if file != "index.md":  # "Start", the name of the project as its title
            assert (DOCS / file).read_text().startswith(f"# {title}\n"), file
    titles = [title for title, _ in listed]
    assert len(titles) == len(set(titles))


def test_cost_table_stands_once() -> None:
    assert [page.name for page in PAGES if "3N backward" in page.read_text()] == ["which-way.md"]


def test_readme_is_short() -> None:
    assert len(README.read_text().split()) < 900


def test_every_public_name_is_in_the_reference() -> None:
    listed = set(re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    names = {f"fastreg.{name}" for name in fastreg.__all__ if name != "__version__"}
    optimizers = {f"fastreg.optim.{name}" for name in fastreg.optim.__all__}
    callbacks = {f"fastreg.integrations.{name}.ElasticNetCallback" for name in ("transformers", "lightning")}
    assert listed == names | optimizers | callbacks


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def recipes(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def run_recipes(page: Path) -> dict[str, Any]:
    """Run the blocks of a page in order, with something small to train; return what they left behind."""
    model: nn.Module = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 1))
    if page.name == "strength.md":  # whose path is that of a linear model
        model = nn.Linear(20, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    x, y = torch.randn(8, 20), torch.randn(8, 1)
    criterion = nn.MSELoss()
    logged: list[Any] = []

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    namespace: dict[str, Any] = {
        "fastreg": fastreg, "torch": torch, "np": np, "model": model, "x": x, "y": y, "loader": [(x, y)] * 3,
        "criterion": criterion, "optimizer": optimizer, "logged": logged, "log": lambda *values: logged.append(values),
        "reg": fastreg.ElasticNet(model), "lr": 1e-2, "fit": fit, "coefficients": [], "fully_shard": fully_shard,
        "layer": nn.Linear(20, 1), "weight": next(model.parameters()), "loaded": {},
    }  # fmt: skip
    for block in recipes(page):
        exec(compile(block, page.name, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("name", [name for name in WITH_RECIPES if name != "devices.md"])
def test_recipes_run(name: str) -> None:
    logged = run_recipes(DOCS / name)["logged"]
    assert len(logged) == {"index.md": 4, "attaching.md": 3}.get(name, 0)


def test_recipe_for_sharded_models_runs(one_process_group: None) -> None:
    namespace = run_recipes(DOCS / "devices.md")
    namespace["criterion"](namespace["model"](namespace["x"]), namespace["y"]).backward()
    namespace["optimizer"].step()
    assert namespace["reg"].last.l1 > 0


def test_readme_recipes_run(capsys: pytest.CaptureFixture[str]) -> None:
    namespace = run_recipes(README)
    (header,) = re.findall(r"^name +shape.*$", README.read_text(), re.MULTILINE)
    assert header.split() in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert isinstance(namespace["optimizer"], fastreg.optim.AdamW)
    assert [group["l1"] for group in namespace["optimizer"].param_groups] == [1e-3, 0.0]


def test_every_page_with_recipes_is_run() -> None:
    elsewhere = {"integrations.md"}  # by tests/integrations/test_recipes.py
    assert {page.name for page in DOCS.glob("*.md") if recipes(page)} == {*WITH_RECIPES, *elsewhere}


MAKERS: dict[str, Any] = {
    "SGD": lambda groups: fastreg.optim.SGD(groups, lr=0.05, momentum=0.9, l1=0.05, prox=True),
    "Adam": lambda groups: fastreg.optim.Adam(groups, lr=0.01, l1=0.05, l2=0.01, prox=True),
    "AdamW": lambda groups: fastreg.optim.AdamW(groups, lr=0.01, l1=0.05, amsgrad=True, prox=True),
}


@pytest.mark.parametrize("name", MAKERS)
def test_model_and_optimizer_resume_bit_for_bit(name: str) -> None:
    """As the README says: training that stopped, was saved and went on, against training that never stopped."""

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3))
        return model, MAKERS[name]([{"params": p} for p in model.parameters()])

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(16, 20, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (model(x) - x[:, :3]).square().mean().backward()
            optimizer.step()

    whole = start()
    train(*whole, range(20))
    model, optimizer = start()
    train(model, optimizer, range(10))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file)
    resumed = start()
    with torch.no_grad():
        for p in resumed[0].parameters():
            p.fill_(7.0)
    resumed[0].load_state_dict(checkpoint["model"])
    resumed[1].load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
    train(*resumed, range(10, 20))
    assert fastreg.sparsity(whole[0]) > 0.1
    for p, q in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert p.detach().numpy().tobytes() == q.detach().numpy().tobytes()
