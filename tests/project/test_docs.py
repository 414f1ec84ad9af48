"""The pages of docs/ and the README lead to files that exist, and name what is in them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import kvpager
from kvpager import errors

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[((?:`[^`]*`|[^\]`])*)\]\(([^()\s]+)\)")
NAME = re.compile(r"`[A-Za-z_]\w*(\.[A-Za-z_]\w*)*`")


class Link(NamedTuple):
    """A link of a page to a file of the repository."""

    text: str
    target: Path
    anchor: str


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[Link]:
    """Return the relative links of a page."""
    found = []
    for text, address in LINK.findall(prose(page)):
        if "://" not in address and not address.startswith("mailto:"):
            path, _, anchor = address.partition("#")
            found.append(Link(text, page.parent / path if path else page, anchor))
    return found


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def defined(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Return the classes, functions and variables of a body, members as `Class.member`."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            names |= defined(node.body, f"{prefix}{node.name}.")
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        names |= {prefix + each.id for each in targets if isinstance(each, ast.Name)}
    return names


def has(target: Path, name: str) -> bool:
    """Return True if a file is the module of that name, or defines it."""
    if name in (target.name, target.stem):
        return True
    if target.suffix == ".py":
        return name in defined(ast.parse(target.read_text()).body)
    return re.search(rf"\b{name}\b", target.read_text()) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_of_a_page_leads_somewhere(page: Path) -> None:
    dead = [link.target for link in links(page) if not link.target.exists()]
    assert not dead
    lost = [
        f"{link.target.name}#{link.anchor}"
        for link in links(page)
        if link.anchor and link.anchor not in anchors(link.target)
    ]
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_linked_name_is_in_the_file_it_leads_to(page: Path) -> None:
    wrong = [
        f"{link.text} is not in {link.target.name}"
        for link in links(page)
        if NAME.fullmatch(link.text)
        and link.target.is_file()
        and not has(link.target, link.text.strip("`"))
    ]
    assert not wrong


def test_the_design_page_links_names_of_every_folder() -> None:
    """So the checks above have something to look at."""
    page = ROOT / "docs" / "design.md"
    named = [link for link in links(page) if NAME.fullmatch(link.text) and link.target.is_file()]
    folders = {link.target.resolve().relative_to(ROOT).parent.as_posix() for link in named}
    assert len(named) > 80
    for folder in ("blocks", "scheduling", "storage", "engine"):
        assert f"kvpager/{folder}" in folders
    for folder in ("patching", "prefix", "cache", "attention", "model_state", "runner"):
        assert f"integrations/huggingface/{folder}" in folders


def test_imported_and_mentioned_names_are_not_defined() -> None:
    manager = ROOT / "kvpager" / "blocks" / "manager.py"
    assert has(manager, "BlockManager.allocate")
    assert not has(manager, "Allocation")
    assert not has(manager, "allocate")


def listed(page: str, heading: str) -> set[str]:
    """Return the keyword arguments in the first column of the table under a heading."""
    text = (ROOT / "docs" / page).read_text()
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`(\w+)(?:=[^`]*)?`", cell)}


def test_the_serving_guide_lists_every_setting_of_an_engine() -> None:
    fields = {field.name for field in dataclasses.fields(kvpager.EngineConfig)}
    assert listed("guides/serving.md", "Settings") == fields


def test_the_transformers_guide_lists_every_argument_of_patch() -> None:
    pytest.importorskip("transformers")
    parameters = set(inspect.signature(kvpager.patch).parameters)
    assert listed("guides/transformers.md", "Arguments of patch") == parameters


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "models.md"],  # its tables are generated
    ids=lambda page: page.name,
)
def test_a_table_cell_has_few_words(page: Path) -> None:
    rows = [line for line in prose(page).splitlines() if line.startswith("|")]
    long = [cell for row in rows for cell in row.split("|") if len(cell.split()) > 25]
    assert long == []


def test_the_reference_lists_every_public_name() -> None:
    ops = pytest.importorskip("kvpager.ops")
    classes = [
        name
        for name, value in inspect.getmembers(errors, inspect.isclass)
        if value.__module__ == errors.__name__
    ]
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    names = [*kvpager.__all__, *ops.__all__, *classes]
    assert [name for name in names if f"`{name}`" not in pages] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 1200
