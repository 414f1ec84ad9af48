"""The command `kvpager mutants`: planted bugs, and which of them the tests notice."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvpager.cli.errors import fail
from kvpager.cli.options import NUM_CPUS, Operations, Processes

# What "proven" asks for: of the planted bugs, this part must be noticed.
KILLED_LEAST = 0.95


def mutants(
    operations: Operations = 30_000,
    only: Annotated[
        str, typer.Option(metavar="TEXT", help="Those whose name or module contains this.")
    ] = "",
    processes: Processes = NUM_CPUS,
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
        raise fail(f"--only {only}: no mutant of that name or module")
    with tqdm(total=len(chosen), unit="mutant", disable=not sys.stderr.isatty()) as bar:
        outcomes = kill(chosen, operations=operations, processes=processes, progress=bar.update)
    typer.echo(table(outcomes))
    if sum(outcome.killed for outcome in outcomes) < KILLED_LEAST * len(outcomes):
        raise typer.Exit(1)
