"""How the package is laid out: no import cycles, and arrays that one class writes."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kvpager
from kvpager.scheduling.sequence_state import SequenceState

PACKAGE = Path(kvpager.__file__).parent


def imports(file: Path, folder: str) -> set[str]:
    """The modules of `folder` that a file imports, `TYPE_CHECKING` included."""
    prefix = f"kvpager.{folder}."
    names = [
        name
        for node in ast.walk(ast.parse(file.read_text()))
        for name in (
            [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    ]
    modules = {path.stem for path in file.parent.glob("*.py")}
    found = {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}
    return found & modules


@pytest.mark.parametrize("folder", ["cli", "scheduling"])
def test_no_modules_of_a_folder_import_each_other(folder: str) -> None:
    files = (PACKAGE / folder).glob("*.py")
    graph = {file.stem: imports(file, folder) for file in files}
    assert sum(map(len, graph.values())) > 1
    TopologicalSorter(graph).prepare()  # raises CycleError


def written(tree: ast.AST) -> set[str]:
    """The attributes that code assigns, or assigns into."""
    names = set()
    for node in ast.walk(tree):
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, (ast.AugAssign, ast.AnnAssign))
            else []
        )
        for target in targets:
            inner = target.value if isinstance(target, ast.Subscript) else target
            if isinstance(inner, ast.Attribute):
                names.add(inner.attr)
    return names


def test_only_the_sequence_state_writes_its_arrays() -> None:
    arrays = {name for name in vars(SequenceState()) if not name.startswith("_")}
    writers = {
        file.stem
        for file in (PACKAGE / "scheduling").glob("*.py")
        if written(ast.parse(file.read_text())) & arrays
    }
    assert writers == {"sequence_state"}
