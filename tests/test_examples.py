"""The examples and the README's programs run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_paged_decoder_agrees_with_plain_attention() -> None:
    output = run("examples/paged_decoder.py", cwd=ROOT)
    assert "prompt of 52 tokens, 48 of them found in the pool" in output
    assert "is attention over plain tensors" in output


def programs(page: str = "README.md") -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(programs())))
def test_a_program_of_the_readme_runs(number: int, tmp_path: Path) -> None:
    program = programs()[number]
    if "transformers" in program:
        pytest.importorskip("transformers")
    script = tmp_path / "program.py"
    script.write_text(program)
    run(str(script), cwd=tmp_path)


def test_the_lines_about_eight_bits_follow_the_program_of_the_readme(tmp_path: Path) -> None:
    tensors = next(program for program in programs() if "BlockStorage(" in program)
    script = tmp_path / "program.py"
    script.write_text("\n".join([tensors, *programs("docs/kernels.md")]))
    run(str(script), cwd=tmp_path)
