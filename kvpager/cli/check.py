"""The command `kvpager check`: random tests of the block manager."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvpager.cli.options import NUM_CPUS, Operations, Processes


def check(
    operations: Operations = 1_000_000,
    seed: Annotated[
        int, typer.Option(min=0, help="First seed; every 5,000 operations start a new seed.")
    ] = 0,
    processes: Processes = NUM_CPUS,
) -> None:
    """Test the block manager with random operations against a reference of plain lists.

    Every operation reads the contents of its blocks back. A failure prints its
    seed and a short history.

    Exit status: 0 if every property held, 1 if not, 2 for wrong usage.
    """
    from tqdm import tqdm

    from kvpager.testing.simulator import run

    with tqdm(total=operations, unit="op", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        summary = run(operations, seed, processes, progress=bar.update)
    typer.echo(str(summary))
    if summary.failures:
        raise typer.Exit(1)
