"""The command `kvpager simulate`: a trace under each eviction policy. It needs no torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from kvpager.cli.errors import one_line_errors
from kvpager.cli.files import check_plot, check_writable, write_json
from kvpager.cli.options import JsonFile, takes
from kvpager.errors import BadInput

if TYPE_CHECKING:
    from kvpager.simulate.replay import Result, Trace

CAPACITIES = (1000, 5859, 10000, 30000, 50000)
GENERATED = 4000  # requests


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command."""

    trace: Annotated[
        str | None,
        typer.Argument(
            metavar="TRACE",
            help="Requests as JSON lines, see docs/guides/eviction.md; may be gzipped.",
            show_default="a generated one",
        ),
    ] = None
    capacity: Annotated[
        list[int] | None,
        typer.Option(
            metavar="BLOCKS",
            help="Blocks of the pool; may be given repeatedly.",
            show_default="1000, 5859, 10000, 30000 and 50000",
        ),
    ] = None
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Eviction policies, and s3-fifo, arc and 2q to compare them with.",
            show_default="all",
        ),
    ] = None
    generate: Annotated[
        int | None,
        typer.Option(metavar="N", help="Make up a trace of so many requests.", show_default="4000"),
    ] = None
    kind: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Traffic to make up: mixed, chat, agents, evaluation, one-shot or shifting.",
            show_default="mixed",
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Of the generated trace.")] = 0
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out lines that are not requests.")
    ] = False
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Draw the hit ratios; the name ends in .png or .svg."),
    ] = None
    json_file: JsonFile = None


@takes(Options)
def simulate(options: Options) -> None:
    """Replay a trace and compare the hit ratios of the eviction policies.

    Exit code: 0, or 2 for bad input.
    """
    from kvpager.simulate.replay import summary

    json_file, plot = options.json_file, options.plot
    with one_line_errors():
        check_writable(json_file)
        check_plot(plot)
        capacities, policies = _capacities(options.capacity), _policies(options.policy)
        trace = _find_trace(options)
        results = _replay_all(trace, capacities, policies, quiet=json_file == "-")
        if plot is not None:
            _draw(plot, trace, results)
    write_json(json_file, summary(trace, results))
    if json_file != "-":
        if all(given is None for given in (options.trace, options.generate, options.kind)):
            typer.echo("no TRACE given, so this one is made up:")
        _show_hit_ratios(trace, results)
        for name, file in (("figures", json_file), ("plot", plot)):
            if file is not None:
                typer.echo(f"{name}: {file}")


def _capacities(wanted: list[int] | None) -> list[int]:
    from kvpager import _validate as arguments

    try:
        found = [arguments.count("capacity", n, at_least=1) for n in wanted or CAPACITIES]
    except ValueError as error:
        raise BadInput(str(error)) from None
    return sorted(set(found))


def _policies(wanted: str | None) -> list[str]:
    from kvpager.simulate.policies import COMPARED

    names = list(COMPARED) if wanted is None else [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in COMPARED:
            raise BadInput(f"policy {name!r}: choose from {', '.join(COMPARED)}")
    return list(dict.fromkeys(names))


def _find_trace(options: Options) -> Trace:
    from kvpager.simulate.generate import generate_trace
    from kvpager.simulate.replay import read_trace

    path, generate, kind = options.trace, options.generate, options.kind
    for name, value in (("generate", generate), ("kind", kind)):
        if path is not None and value is not None:
            raise BadInput(f"TRACE and --{name}: expected one of the two")
    try:
        if path is None:
            count = GENERATED if generate is None else generate
            return generate_trace(count, options.seed, "mixed" if kind is None else kind)
        return read_trace(path, options.skip_bad)
    except OSError as error:
        raise BadInput(f"trace {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise BadInput(" ".join(str(error).split())) from None


def _replay_all(
    trace: Trace, capacities: list[int], policies: list[str], quiet: bool
) -> list[Result]:
    from tqdm import tqdm

    from kvpager.simulate.replay import offline_optimum, replay

    results = []
    total = len(trace.prompts) * len(capacities) * len(policies)
    shown = None if not quiet else True  # tqdm's None: on a terminal only
    with tqdm(total=total, leave=False, disable=shown, file=sys.stderr, unit=" requests") as bar:
        for capacity in capacities:
            for policy in policies:
                bar.set_description(f"{policy}, {capacity} blocks")
                results.append(replay(trace, capacity, policy, bar.update))
            results.append(offline_optimum(trace, capacity))
    return results


def _show_hit_ratios(trace: Trace, results: list[Result]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows: dict[str, list[str]] = {}
    for result in results:
        rows.setdefault(result.policy, []).append(f"{result.hit_ratio:.4f}")
    best = results[-1].policy  # the offline optimum is replayed last
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("blocks")
    for result in results:
        if result.policy == best:
            table.add_column(str(result.capacity), justify="right")
    for name, ratios in rows.items():
        table.add_row(name, *ratios, style="bold" if name == best else "")
    table.add_row("unlimited", *[f"{trace.unlimited:.4f}"] * len(rows[best]), style="dim")
    typer.echo(
        f"{trace.name}: {len(trace.prompts)} requests, {trace.num_blocks} blocks, "
        f"{trace.num_prefixes} of them different\nhit ratios:"
    )
    Console(highlight=False).print(table)
    for result in results:
        if result.policy == best and result.too_long:
            typer.echo(
                f"prompts longer than {result.capacity} blocks, "
                f"counted with what they found but never held: {result.too_long}"
            )
    if trace.skipped:
        typer.echo(f"lines left out: {len(trace.skipped)}, the first: {trace.skipped[0]}")


def _draw(file: str, trace: Trace, results: list[Result]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    best = results[-1].policy
    for name in dict.fromkeys(result.policy for result in results):
        mine = [result for result in results if result.policy == name]
        axes.plot(
            [result.capacity for result in mine],
            [result.hit_ratio for result in mine],
            "k--o" if name == best else "-o",
            label=name,
        )
    axes.axhline(trace.unlimited, label="unlimited", color="grey", linestyle=":")
    axes.set(xscale="log", xlabel="blocks", ylabel="hit ratio", title=trace.name)
    axes.set_ylim(bottom=0)
    axes.legend()
    try:
        figure.savefig(file)
    except OSError as error:
        raise BadInput(f"--plot {file}: {error.strerror or error}") from None
