"""The entry point of the command `kvpager`. The commands themselves are in `kvpager.cli.app`."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line. Exits with 0, 1 (the work failed) or 2 (wrong usage)."""
    missing = [name for name in ("typer", "rich", "tqdm") if find_spec(name) is None]
    if missing:
        message = f"the command line needs {' and '.join(missing)}: pip install 'kvpager[cli]'"
        print(f"kvpager: {message}", file=sys.stderr)
        raise SystemExit(2)
    from kvpager.cli.app import app

    app(prog_name="kvpager")
