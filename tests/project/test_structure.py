"""How the package is laid out: no import cycles, and arrays that one class writes."""

from __future__ import annotations

import ast
import os
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kvpager
from kvpager.scheduling.sequence_state import SequenceState

PACKAGE = Path(kvpager.__file__).parent


def modules() -> dict[str, Path]:
    """Return every module of the library by its name."""
    found = {}
    for folder, _, names in os.walk(PACKAGE, followlinks=True):
        for name in names:
            if name.endswith(".py"):
                file = Path(folder, name)
                parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
                found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imports(file: Path) -> set[str]:
    """Return the names that a file imports, wherever in it, `TYPE_CHECKING` included."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_no_modules_import_each_other() -> None:
    files = modules()
    assert len(files) > 100
    # `kvpager` itself loads every public name when it is first asked for.
    names = files.keys() - {"kvpager"}
    graph = {name: imports(files[name]) & names - {name} for name in names}
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize(
    ("folder", "foreign"),
    [("blocks", "torch"), ("scheduling", "torch"), ("engine", "transformers")],
)
def test_a_folder_never_imports_what_it_must_do_without(folder: str, foreign: str) -> None:
    for name, file in modules().items():
        if name.startswith(f"kvpager.{folder}."):
            assert foreign not in {each.partition(".")[0] for each in imports(file)}, name
            assert not any(each.startswith("kvpager.integrations") for each in imports(file)), name


def test_the_loop_of_an_engine_imports_no_torch() -> None:
    """Neither do the modules that it stands on."""
    found, pending = set(), {"kvpager.engine.core"}
    files = modules()
    while pending:
        name = pending.pop()
        found.add(name)
        pending |= (imports(files[name]) & files.keys()) - found - {"kvpager"}
        assert "torch" not in {each.partition(".")[0] for each in imports(files[name])}, name
    assert {"kvpager.engine.loop", "kvpager.scheduling.scheduler"} <= found


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
