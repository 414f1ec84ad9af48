"""Files that commands write: figures as JSON, and plots."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from kvpager.errors import BadInput


def check_writable(json_file: str | None) -> None:
    """Raise `BadInput` if the folder of `--json` does not exist. O(1)."""
    if json_file is None or json_file == "-":
        return
    path = Path(json_file)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise BadInput(f"--json={json_file}: expected a file in a folder that exists, or -.")


def check_page(name: str, file: str | None) -> None:
    """Raise `BadInput` if the folder of `--name` does not exist. O(1)."""
    if file is None:
        return
    path = Path(file)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise BadInput(f"--{name}={file}: expected a file in a folder that exists.")


def check_plot(file: str | None) -> None:
    """Raise `BadInput` if `--plot` names no picture, or matplotlib is missing. O(1)."""
    if file is None:
        return
    path = Path(file)
    if path.suffix not in (".png", ".svg") or not path.absolute().parent.is_dir():
        raise BadInput(f"--plot={file}: expected a .png or .svg file in a folder that exists.")
    if find_spec("matplotlib") is None:
        raise BadInput(
            f"--plot={file}: matplotlib is not installed. Run: pip install 'kvpager[plot]'"
        )


def write_json(json_file: str | None, figures: dict[str, Any]) -> None:
    """Write the figures to a file, or to stdout for `-`. O(figures). Raises `OSError`."""
    if json_file is not None:
        write_text(json_file, json.dumps(figures, indent=2) + "\n")


def write_text(file: str, text: str) -> None:
    """Write `text` to a file, or to stdout for `-`. O(text). Raises `OSError`."""
    if file == "-":
        sys.stdout.write(text)
    else:
        Path(file).write_text(text, encoding="utf-8")


def name_files(**files: str | None) -> None:
    """Print the files that a command has written. O(files)."""
    for name, file in files.items():
        if file is not None:
            typer.echo(f"{name}: {file}")
