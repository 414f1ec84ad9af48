"""The command `kvpager demo`: generate with kvpager and without it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from kvpager.cli.files import check_page, check_writable, write_json
from kvpager.cli.options import JsonFile, takes_options
from kvpager.demo.settings import Settings

_Report = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.html",
        help="Write the page there.",
        show_default="a new folder of temporary files",
        rich_help_panel="Output",
    ),
]


@takes_options
def demo(settings: Settings, report: _Report = None, json_file: JsonFile = None) -> None:
    """Generate with DynamicCache and with kvpager, and compare texts and memory.

    At the end, an engine serves 48 requests, and a page shows their memory.

    Exit status: 0 if all outputs are identical or differ only by near-ties;
    1 for any other difference; 2 for wrong usage. In a near-tie the logits of
    two tokens are equal within the dtype's rounding.
    """
    check_writable(json_file)
    check_page("report", report)
    settings.check()
    from kvpager.demo.runs import run

    quiet = json_file == "-"
    page = None if report is None else Path(report)
    if page is None and not quiet:
        page = Path(tempfile.mkdtemp(prefix="kvpager-demo-"), "report.html")
    results, console = run(settings, quiet=quiet, page=page)
    write_json(json_file, results.as_json())
    if not quiet and json_file is not None:
        console.print(f"figures: {json_file}", markup=False, highlight=False)
    if results.is_wrong:
        raise typer.Exit(1)
