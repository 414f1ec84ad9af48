"""The command `kvpager demo`: generate with kvpager and without it."""

from __future__ import annotations

import typer

from kvpager.cli.files import check_writable, write_json
from kvpager.cli.options import JsonFile, takes_options
from kvpager.demo.settings import Settings


@takes_options
def demo(settings: Settings, json_file: JsonFile = None) -> None:
    """Generate with DynamicCache and with kvpager, and compare texts and memory.

    Exit status: 0 if all outputs are identical or differ only by near-ties;
    1 for any other difference; 2 for wrong usage. In a near-tie the logits of
    two tokens are equal within the dtype's rounding.
    """
    check_writable(json_file)
    settings.check()
    from kvpager.demo.runs import run

    results, console = run(settings, quiet=json_file == "-")
    write_json(json_file, results.as_json())
    if json_file not in (None, "-"):
        console.print(f"figures: {json_file}", markup=False, highlight=False)
    if results.is_wrong:
        raise typer.Exit(1)
