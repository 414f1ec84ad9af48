"""Files that commands write: figures as JSON, and plots."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvpager.cli.errors import fail
from kvpager.errors import BadInput


def check_writable(json_file: str | None) -> None:
    """Raise `BadInput` if `--json` names no file that could be written. O(1)."""
    if json_file is None or json_file == "-":
        return
    path = Path(json_file)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise BadInput(f"--json {json_file}: expected a file in a folder that exists, or -")


def check_plot(file: str | None) -> None:
    """Raise `BadInput` if `--plot` names no picture, or matplotlib is missing. O(1)."""
    if file is None:
        return
    path = Path(file)
    if path.suffix not in (".png", ".svg") or not path.absolute().parent.is_dir():
        raise BadInput(f"--plot {file}: expected a .png or .svg file in a folder that exists")
    if find_spec("matplotlib") is None:
        raise BadInput(
            "--plot needs matplotlib, which is not installed: pip install 'kvpager[plot]'"
        )


def write_json(json_file: str | None, figures: dict[str, Any]) -> None:
    """Write the figures to a file, or to stdout for -. O(figures)."""
    if json_file is None:
        return
    text = json.dumps(figures, indent=2) + "\n"
    if json_file == "-":
        sys.stdout.write(text)
        return
    try:
        Path(json_file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise fail(f"--json {json_file}: {error.strerror or error}") from None
