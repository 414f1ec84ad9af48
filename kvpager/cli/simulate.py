"""The command `kvpager simulate`: replay a trace under each eviction policy, without torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from kvpager._text import counted
from kvpager.cli.errors import wrong_usage
from kvpager.cli.files import check_plot, check_writable, write_json
from kvpager.cli.options import JsonFile, PlotFile, option, takes
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
            help="Requests as JSON lines (also .gz): timestamp, input_length, output_length and "
            "hash_ids, one id per block of the prompt.",
            show_default="a generated trace",
        ),
    ] = None
    capacity: Annotated[
        list[str] | None,
        option(
            "Cache",
            "Pool sizes in blocks.",
            metavar="BLOCKS,...",
            show_default=",".join(map(str, CAPACITIES)),
        ),
    ] = None
    policy: Annotated[
        str | None,
        option(
            "Cache",
            "Eviction policies: lru, priority, lifetime; baselines: s3-fifo, arc, 2q.",
            metavar="NAME,...",
            show_default="all",
        ),
    ] = None
    generate: Annotated[
        int | None,
        option("Requests", "Generate a trace of N requests.", metavar="N", show_default="4000"),
    ] = None
    kind: Annotated[
        str | None,
        option(
            "Requests",
            "Generated traffic: mixed, chat, agents, evaluation, one-shot or shifting.",
            metavar="KIND",
            show_default="mixed",
        ),
    ] = None
    seed: Annotated[int, option("Requests", "Seed of the generated trace.", metavar="N")] = 0
    skip_bad: Annotated[
        bool, option("Requests", "Skip lines that are not requests.", "--skip-bad")
    ] = False
    plot: PlotFile = None
    json_file: JsonFile = None


@takes(Options)
def simulate(options: Options) -> None:
    """Replay a trace and compare the hit ratios of eviction policies.

    Exit status: 0, 1 if a result cannot be written, or 2 for wrong usage.
    """
    from kvpager.simulate.replay import summary

    json_file, plot = options.json_file, options.plot
    check_writable(json_file)
    check_plot(plot)
    with wrong_usage():
        capacities, policies = _capacities(options.capacity), _policies(options.policy)
        trace = _find_trace(options)
    results = _replay_all(trace, capacities, policies, quiet=json_file == "-")
    if plot is not None:
        _draw(plot, trace, results)
    write_json(json_file, summary(trace, results))
    if json_file != "-":
        if all(given is None for given in (options.trace, options.generate, options.kind)):
            typer.echo("No TRACE given: generating one.")
        _show_hit_ratios(trace, results)
        for name, file in (("figures", json_file), ("plot", plot)):
            if file is not None:
                typer.echo(f"{name}: {file}")


def _capacities(wanted: list[str] | None) -> list[int]:
    from kvpager import _validate as arguments

    sizes = CAPACITIES if wanted is None else map(_size, ",".join(wanted).split(","))
    return sorted({arguments.count("capacity", size, at_least=1) for size in sizes})


def _size(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise BadInput(f"--capacity={text}: expected blocks, such as 1000,5000.") from None


def _policies(wanted: str | None) -> list[str]:
    from kvpager.simulate.policies import COMPARED

    names = list(COMPARED) if wanted is None else [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in COMPARED:
            raise BadInput(f"--policy={name}: expected one of {', '.join(COMPARED)}.")
    return list(dict.fromkeys(names))


def _find_trace(options: Options) -> Trace:
    from kvpager import _validate as arguments
    from kvpager.simulate.generate import GENERATED_MAX, generate_trace
    from kvpager.simulate.replay import read_trace

    path, generate, kind = options.trace, options.generate, options.kind
    for name, value in (("generate", generate), ("kind", kind)):
        if path is not None and value is not None:
            raise BadInput(f"--{name}={value}: conflicts with TRACE. Give one of the two.")
    if path is not None:
        return read_trace(path, options.skip_bad)
    count = GENERATED if generate is None else generate
    arguments.count("generate", count, at_least=1, at_most=GENERATED_MAX)
    return generate_trace(count, options.seed, "mixed" if kind is None else kind)


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
    from rich.console import Console

    from kvpager.bench import tables

    console = Console(highlight=False)
    console.print(
        f"{trace.name}: {counted(len(trace.prompts), 'request')}, "
        f"{counted(trace.num_blocks, 'block')}, "
        f"{trace.num_prefixes} of them distinct\nhit ratio by pool size:",
        markup=False,
    )
    by_size: dict[int, list[Result]] = {}
    for result in results:
        by_size.setdefault(result.capacity, []).append(result)
    policies = [result.policy for result in next(iter(by_size.values()))]
    columns = [
        tables.Column(
            f"{capacity:,} blocks".replace(" ", "\n"),
            [f"{each.hit_ratio:.4f}" for each in found] + [f"{trace.unlimited:.4f}"],
        )
        for capacity, found in by_size.items()
    ]
    tables.show(console, "policy", [*policies, "unlimited"], columns)
    optimum = policies[-1]  # the offline optimum is replayed last
    for result in results:
        if result.policy == optimum and result.too_long:
            console.print(
                f"Prompts longer than {counted(result.capacity, 'block')}: {result.too_long}. "
                "Their hits count, but they are never cached.",
                markup=False,
            )
    if trace.skipped:
        console.print(
            f"{counted(len(trace.skipped), 'line')} skipped, the first: {trace.skipped[0]}",
            markup=False,
        )


def _draw(file: str, trace: Trace, results: list[Result]) -> None:
    from kvpager.bench import plots

    optimum = results[-1].policy
    with plots.saved(file, (7, 4.5)) as figure:
        axes = figure.subplots()
        looks = plots.looks()
        for name in dict.fromkeys(result.policy for result in results):
            mine = [result for result in results if result.policy == name]
            look = next(looks)
            axes.plot(
                [result.capacity for result in mine],
                [result.hit_ratio for result in mine],
                **look | ({"color": "black", "linewidth": 2} if name == optimum else {}),
                label=name,
            )
        axes.axhline(trace.unlimited, label="unlimited", color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel="pool size, blocks", ylabel="hit ratio")
        axes.set_ylim(bottom=0)
        axes.legend()
        subtitle = f"{len(trace.prompts):,} requests, {trace.num_prefixes:,} distinct blocks"
        plots.titles(figure, trace.name, subtitle)
