"""The examples run as they stand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.programs import run_program

ROOT = Path(__file__).resolve().parents[2]


def run(program: str | Path, *, cwd: Path) -> str:
    """Run a program, which has to end well, and return its output."""
    result = run_program(program, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_paged_decoder_agrees_with_plain_attention() -> None:
    output = run("examples/paged_decoder.py", cwd=ROOT)
    assert "prompt of 52 tokens, 48 of them found in the pool" in output
    assert "is attention over plain tensors" in output


SAID = {
    "serve": ["'The with statement ' goes on", "the same tokens as alone: True"],
    "generate": ["paged: 6 layers, full attention", "the same tokens as without: True"],
    "chat": ["0 of them cached", "318 tokens, 288 of them cached"],
    "beams": ["8 beams at their peak: ", "blocks were copied"],
    "eight_bits": ["bfloat16   96.0 KiB", "int8       54.0 KiB", "fp8_e4m3   54.0 KiB"],
    "tenants": ["umbrella     0 of 243", "acme       240 of 243", "umbrella   240 of 243"],
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
    cells = [
        cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    script = tmp_path / "tour.py"
    between = "\nprint('\\x1e', end='')\n"
    script.write_text(between.join("".join(cell["source"]) for cell in cells))
    printed = run(script, cwd=tmp_path).split("\x1e")
    stored = ["".join(line for part in cell["outputs"] for line in part["text"]) for cell in cells]
    assert [*map(steady, printed)] == [*map(steady, stored)]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]


def test_every_example_for_transformers_is_run() -> None:
    assert {path.stem for path in (ROOT / "examples/huggingface").glob("*.py")} == set(SAID)
