"""The code blocks of the README and of docs/: programs and commands, with the output they show.

A `python` block is a program; the `text` block after it is its output. A `console` block has
commands behind `$` and what they print. In an output, `...` stands for any text. A block that
cannot run here says so in its first line: `# Not tested: needs a GPU`.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tests.support.programs import run_program

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_TESTED = re.compile(r"# Not tested: (.+)")
# Torch and what imports it take seconds to load; the kit of kvpager.testing runs for seconds.
_HEAVY = re.compile(r"\b(torch|transformers|peft|Engine|PagedCache|patch|kvpager\.testing)\b")


@dataclass(frozen=True)
class Block:
    """A python or console block of a page."""

    page: Path
    line: int
    language: str
    code: str
    output: str | None = None  # of a program; commands have theirs in `code`

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def obstacle(self) -> str | None:
        """Return why the block cannot run here, None if it can."""
        match = _NOT_TESTED.match(self.code)
        return match[1] if match else None

    @property
    def is_slow(self) -> bool:
        """True for commands and for programs that load torch."""
        return self.language == "console" or _HEAVY.search(self.code) is not None

    def commands(self) -> list[tuple[str, str]]:
        """Return the commands of a console block, each with the output it shows."""
        parts = re.split(r"^\$ ", self.code, flags=re.MULTILINE)
        assert not parts[0].strip(), f"{self}: output before the first command"
        split = [part.replace("\\\n", "").partition("\n") for part in parts[1:]]
        return [(command, output) for command, _, output in split]


def fences(page: Path) -> list[tuple[int, str, str]]:
    """Return (line, language, text) of every fenced block of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in _FENCE.finditer(text)
    ]


def blocks(page: Path) -> list[Block]:
    """Return the python and console blocks of a page, each program with the output after it."""
    found = []
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        if match[1] not in ("python", "console"):
            continue
        after = _FENCE.match(text, match.end() + len("\n\n"))
        shown = after[2] if after is not None and after[1] == "text" else None
        line = text.count("\n", 0, match.start()) + 1
        output = shown if match[1] == "python" else None
        found.append(Block(page, line, match[1], match[2], output))
    return found


def run(block: Block, folder: Path) -> None:
    """Run a block in an empty folder and compare what it prints. Raises: `AssertionError`."""
    if block.language == "console":
        for command, shown in block.commands():
            compare(block, shown, _shell(command, folder))
        return
    program = folder / "program.py"
    program.write_text(_for_this_release(block.code), encoding="utf-8")
    result = run_program(program, cwd=folder)
    assert result.returncode == 0, f"{block}\n{result.stderr}"
    compare(block, block.output or "", result.stdout)


def _for_this_release(code: str) -> str:
    """Return the program as its page says to write it for the installed transformers."""
    release = tuple(map(int, metadata.version("transformers").split(".")[:2]))
    return (
        code
        if release >= (5, 24)
        else code.replace("(**inputs, cache=", "(**inputs, past_key_values=")
    )


def compare(block: Block, shown: str, printed: str) -> None:
    """Raise `AssertionError` unless a page shows what was printed."""
    shown, printed = (
        "\n".join(map(str.rstrip, text.strip().splitlines())) for text in (shown, printed)
    )
    equal = doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS)
    assert equal, f"{block} shows\n\n{shown}\n\nbut it prints\n\n{printed}"


def _shell(command: str, folder: Path) -> str:
    """Run a command, in the repository's root if it is one of a checkout."""
    is_of_checkout = re.match(r"make |python (-m )?(examples|benchmarks|tests)\b", command)
    # Within `make`, another make prints which folder it enters, and inherits what ARGS is.
    outside = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "ARGS"))
    }
    programs, ready = Path(sys.executable).parent, folder / "ready"
    ready.touch()
    environment = outside | {
        "COLUMNS": "100",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        # `make` uses this environment, instead of making one in .venv.
        "MAKEFLAGS": f"-- BIN={programs} STAMP={ready}",
    }
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT if is_of_checkout else folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, f"$ {command}\n{result.stdout}{result.stderr}"
    return result.stdout
