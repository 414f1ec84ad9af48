"""The commands `kvpager check` and `kvpager mutants`: the testing kit from the shell."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from kvpager.cli.app import app

__all__ = ["app", "check", "mutants"]

# What "proven" asks for: of the planted bugs, this part must be noticed.
KILLED_LEAST = 0.95
_NUM_CPUS = os.cpu_count() or 1


def _count(value: str | int) -> int:
    """`1e7` and `10_000_000` are the same number."""
    try:
        number = float(str(value).replace("_", ""))
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not a number") from None
    if not 1 <= number <= 1e12 or number != int(number):
        raise typer.BadParameter(f"{value}: expected a whole number from 1 to 1e12")
    return int(number)


Operations = Annotated[int, typer.Option(metavar="N", parser=_count, help="How many, such as 1e7.")]
Processes = Annotated[
    int, typer.Option(min=1, max=256, help="How many at a time.", show_default="one for each CPU")
]


@app.command()
def check(
    operations: Operations = 1_000_000,
    seed: Annotated[
        int, typer.Option(min=0, help="The first seed; a new one every 5,000 operations.")
    ] = 0,
    processes: Processes = _NUM_CPUS,
) -> None:
    """Simulate random histories of the block manager against plain lists.

    Every operation's contents are read back. A failure prints its seed and a short history.

    Exit code: 0 if no law was broken, 1 if one was, 2 for bad input.
    """
    from tqdm import tqdm

    from kvpager.testing.simulator import run

    with tqdm(total=operations, unit="op", unit_scale=True, disable=_is_quiet()) as bar:
        summary = run(operations, seed, processes, progress=bar.update)
    typer.echo(str(summary))
    if summary.failures:
        raise typer.Exit(1)


@app.command()
def mutants(
    operations: Operations = 30_000,
    only: Annotated[
        str, typer.Option(metavar="TEXT", help="Those whose name or module contains this.")
    ] = "",
    processes: Processes = _NUM_CPUS,
) -> None:
    """Plant known bugs in the block manager, one at a time, and show which the tests notice.

    Each is simulated for at most --operations operations, in an interpreter of its own.

    Exit code: 0 if at least 95 % are killed, 1 if fewer, 2 for bad input.
    """
    from tqdm import tqdm

    from kvpager.testing.mutant_list import MUTANTS
    from kvpager.testing.mutants import kill, table

    chosen = [mutant for mutant in MUTANTS if only in mutant.name or only in mutant.module]
    if not chosen:
        typer.echo(f"kvpager: --only {only}: no mutant of that name or module", err=True)
        raise typer.Exit(2)
    with tqdm(total=len(chosen), unit="mutant", disable=_is_quiet()) as bar:
        outcomes = kill(chosen, operations=operations, processes=processes, progress=bar.update)
    typer.echo(table(outcomes))
    if sum(outcome.killed for outcome in outcomes) < KILLED_LEAST * len(outcomes):
        raise typer.Exit(1)


def _is_quiet() -> bool:
    return not sys.stderr.isatty()
