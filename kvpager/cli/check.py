"""The command `kvpager check`: random histories of the block manager."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvpager.cli.options import NUM_CPUS, Operations, Processes


def check(
    operations: Operations = 1_000_000,
    seed: Annotated[
        int, typer.Option(min=0, help="The first seed; a new one every 5,000 operations.")
    ] = 0,
    processes: Processes = NUM_CPUS,
) -> None:
    """Simulate random histories of the block manager against plain lists.

    Every operation's contents are read back. A failure prints its seed and a short history.

    Exit code: 0 if no law was broken, 1 if one was, 2 for bad input.
    """
    from tqdm import tqdm

    from kvpager.testing.simulator import run

    with tqdm(total=operations, unit="op", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        summary = run(operations, seed, processes, progress=bar.update)
    typer.echo(str(summary))
    if summary.failures:
        raise typer.Exit(1)
