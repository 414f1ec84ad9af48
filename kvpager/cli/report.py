"""The command `kvpager report`: turns a recording into one HTML file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from kvpager._text import size
from kvpager.cli.errors import wrong_usage
from kvpager.cli.files import check_page

_Recording = Annotated[
    str,
    typer.Argument(
        metavar="RUN.jsonl",
        help="A recording of Engine(record=...), patch(record=...) or kvpager simulate "
        "--record, also gzipped (.gz).",
        show_default=False,
    ),
]
_Output = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE.html",
        help="The report.",
        show_default="RUN.html",
        rich_help_panel="Output",
    ),
]


def report(recording: _Recording, output: _Output = None) -> None:
    """Write a page that compares a recorded run with one reserved region per request.

    The page is one file of at most 500 kB. It needs no network and sends nothing.

    Exit status: 0, 1 if the page cannot be written, or 2 for a bad recording or wrong usage.
    """
    from kvpager.report import writer

    with wrong_usage(), warnings.catch_warnings(record=True) as cut:
        warnings.simplefilter("always")
        page = Path(output) if output is not None else _beside(Path(recording))
        check_page("output", str(page))
        html = writer.report(Path(recording))
    for warning in cut:
        typer.echo(f"kvpager: {warning.message}", err=True)
    page.write_bytes(html)
    typer.echo(f"report: {page} ({size(len(html))})")


def _beside(recording: Path) -> Path:
    return recording.with_name(f"{recording.name.removesuffix('.gz').removesuffix('.jsonl')}.html")
