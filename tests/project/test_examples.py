"""The examples run as they stand."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.support.programs import run_program

ROOT = Path(__file__).resolve().parents[2]


def run(program: str | Path, *, cwd: Path, **environment: str) -> str:
    """Run a program, which has to end well, and return its output."""
    result = run_program(program, cwd=cwd, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_paged_decoder_agrees_with_plain_attention() -> None:
    output = run("examples/paged_decoder.py", cwd=ROOT)
    assert "prompt of 52 tokens, 48 of them found in the pool" in output
    assert "is attention over plain tensors" in output


def test_a_prompt_is_found_on_disk_after_a_restart() -> None:
    pytest.importorskip("xxhash")
    output = run("examples/tiers.py", cwd=ROOT)
    assert output.splitlines() == [
        "fetched: {} computed: 100 tokens",
        "fetched: {'disk': 96} computed: 4 tokens",
    ]


SAID = {
    "generate": ["paged: 6 layers, full attention", "the same tokens as without kvpager: True"],
    "chat": ["user: What does", "assistant: if the sequence", "(288 of 318 prompt tokens were"],
    "beams": ["8 beams at their peak: ", "blocks were copied"],
    "eight_bits": ["bfloat16   96.0 KiB", "int8       54.0 KiB", "fp8_e4m3   54.0 KiB"],
    "namespaces": ["umbrella     0 of 243", "acme       240 of 243", "umbrella   240 of 243"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_an_example_for_transformers_shows_what_it_says(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    output = run(ROOT / "examples/huggingface" / f"{name}.py", cwd=tmp_path)
    assert [text for text in SAID[name] if text not in output] == []


NOTEBOOK = ROOT / "examples/huggingface/tour.ipynb"


def steady(printed: str) -> list[str]:
    """The lines that are the same in every run: those without times."""
    return [line for line in printed.splitlines() if not line.endswith(" ms")]


@pytest.mark.slow
def test_the_notebook_holds_what_its_cells_print(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    cells = [
        cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    script = tmp_path / "tour.py"
    between = "\nprint('\\x1e', end='')\n"
    script.write_text(between.join("".join(cell["source"]) for cell in cells))
    printed = run(script, cwd=tmp_path, MPLBACKEND="agg").split("\x1e")
    outputs = [cell["outputs"] for cell in cells]
    stored = ["".join(line for part in parts for line in part.get("text", [])) for parts in outputs]
    assert sum("image/png" in part.get("data", {}) for parts in outputs for part in parts) == 2
    assert [*map(steady, printed)] == [*map(steady, stored)]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]


def test_every_example_for_transformers_is_run() -> None:
    found = {path.stem for path in (ROOT / "examples/huggingface").glob("*.py")}
    assert found == {*SAID, "serve"}  # test_serve_example.py runs the server


def imported(source: str) -> set[str]:
    """Return the dotted names of kvpager that a program imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "kvpager"}


_DEEPER = {
    "kvpager.testing.": 4,
    "kvpager.integrations.": 4,
    "kvpager.storage.": 5,  # as the guide of tiers imports them
}


def is_public(name: str) -> bool:
    """True for names of `kvpager` and its first folders, and of the modules in `_DEEPER`."""
    parts = name.split(".")
    most = next((most for start, most in _DEEPER.items() if name.startswith(start)), 3)
    return len(parts) <= most and not any(part.startswith("_") for part in parts)


def sources() -> dict[str, str]:
    """Return the text of every example, the notebook's cells joined."""
    found = {str(path): path.read_text() for path in (ROOT / "examples").rglob("*.py")}
    for path in (ROOT / "examples").rglob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        found[str(path)] = "\n".join(code)
    return found


def test_examples_import_public_names_only() -> None:
    names = {(path, name) for path, source in sources().items() for name in imported(source)}
    assert len(names) > 10
    assert [each for each in sorted(names) if not is_public(each[1])] == []


@pytest.mark.parametrize(
    "name", ["kvpager._text.size", "kvpager._validate", "kvpager.blocks.state.BlockState"]
)
def test_an_internal_name_is_not_public(name: str) -> None:
    assert not is_public(name)
