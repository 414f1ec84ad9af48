"""The command `kvpager mutants`: mutation tests of the kit in `kvpager.testing`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvpager.cli.options import NUM_CPUS, Operations, Processes
from kvpager.errors import BadInput

# The fraction of mutants that the kit must kill.
KILLED_LEAST = 0.95


def mutants(
    operations: Operations = 60_000,
    only: Annotated[
        str, typer.Option(metavar="TEXT", help="Only mutants with TEXT in their name or module.")
    ] = "",
    processes: Processes = NUM_CPUS,
) -> None:
    """Change the library by one known bug at a time, and show which are killed.

    A mutant of the block manager runs for at most --operations operations, and one of the tiers
    through the suite of stores, each in its own interpreter.

    Exit status: 0 if at least 95 % are killed, 1 if fewer, 2 for wrong usage.
    """
    from tqdm import tqdm

    from kvpager.testing.mutant_list import MUTANTS
    from kvpager.testing.mutants import kill, table

    chosen = [mutant for mutant in MUTANTS if only in mutant.name or only in mutant.module]
    if not chosen:
        raise BadInput(f"--only={only}: no mutant has this in its name or module.")
    with tqdm(total=len(chosen), unit="mutant", disable=not sys.stderr.isatty()) as bar:
        outcomes = kill(chosen, operations=operations, processes=processes, progress=bar.update)
    typer.echo(table(outcomes))
    if sum(outcome.killed for outcome in outcomes) < KILLED_LEAST * len(outcomes):
        raise typer.Exit(1)
