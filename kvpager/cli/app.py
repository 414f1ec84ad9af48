"""The command `kvpager`: each of its commands is a module of this folder.

torch, transformers and NumPy load only when a command needs them.
"""

from __future__ import annotations

from typing import Annotated

import typer

import kvpager
from kvpager.cli.bench import throughput
from kvpager.cli.bench_modes import modes
from kvpager.cli.check import check
from kvpager.cli.demo import demo
from kvpager.cli.env import env
from kvpager.cli.errors import Command, Commands, Group, Program
from kvpager.cli.mutants import mutants
from kvpager.cli.report import report
from kvpager.cli.run import PASS_THROUGH, run
from kvpager.cli.simulate import simulate
from kvpager.cli.tiers import gc, ls, probe, stats, verify
from kvpager.cli.top import top

app = typer.Typer(
    name="kvpager",
    cls=Commands,
    help="Paged KV-cache memory for PyTorch LLM inference.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(cls=Group, help="Measure throughput and latency.", no_args_is_help=True)
tiers = typer.Typer(cls=Group, help="Look at the blocks in a store.", no_args_is_help=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvpager {kvpager.__version__}")
        raise typer.Exit


@app.callback()
def kvpager_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Paged KV-cache memory for PyTorch LLM inference."""


for command in (demo, env, simulate, report, top, check, mutants):
    app.command(cls=Command)(command)
app.command(cls=Program, context_settings=PASS_THROUGH)(run)
for command in (throughput, modes):
    bench.command(cls=Command)(command)
app.add_typer(bench, name="bench")
for command in (ls, stats, verify, gc, probe):
    tiers.command(cls=Command)(command)
app.add_typer(tiers, name="tiers")
