"""The command `kvpager simulate`: replay a trace under each eviction policy, without torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from kvpager._text import counted
from kvpager.bench.options import option
from kvpager.cli.errors import wrong_usage
from kvpager.cli.files import check_plot, check_writable, name_files, write_json
from kvpager.cli.options import JsonFile, PlotFile, takes_options
from kvpager.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console

    from kvpager.simulate.replay import Result, Trace

CAPACITIES = (1000, 5859, 10000, 30000, 50000)
GENERATED = 4000  # requests


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command, except those of its output."""

    capacity: list[str] | None = option(
        "Cache", "Pool sizes in blocks.", "BLOCKS,...", shown=",".join(map(str, CAPACITIES))
    )
    policy: str | None = option(
        "Cache",
        "Eviction policies: lru, priority, lifetime; baselines: s3-fifo, arc, 2q.",
        "NAME,...",
        shown="all",
    )
    tiers: str | None = option(
        "Cache",
        "Tiers below the pool, in order: host and disk, with their blocks.",
        "NAME=BLOCKS,...",
        shown="none",
    )
    generate: int | None = option(
        "Requests", "Generate a trace of N requests.", "N", shown=str(GENERATED)
    )
    kind: str | None = option(
        "Requests",
        "Generated traffic: mixed, chat, agents, evaluation, one-shot or shifting.",
        "KIND",
        shown="mixed",
    )
    seed: int = option("Requests", "Seed of the generated trace.", "N", 0)
    skip_bad: bool = option(
        "Requests", "Skip lines that are not requests.", default=False, name="--skip-bad"
    )


_Trace = Annotated[
    str | None,
    typer.Argument(
        metavar="TRACE",
        help="Requests as JSON lines (also .gz): timestamp, input_length, output_length and "
        "hash_ids, one id per block of the prompt.",
        show_default="a generated trace",
    ),
]


_RecordFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Record the replay of one policy in a pool of one size.",
        rich_help_panel="Output",
    ),
]


@takes_options
def simulate(
    options: Options,
    trace: _Trace = None,
    record: _RecordFile = None,
    plot: PlotFile = None,
    json_file: JsonFile = None,
) -> None:
    """Replay a trace and compare the hit ratios of eviction policies.

    Exit status: 0, 1 if a result cannot be written, or 2 for wrong usage.
    """
    from kvpager.simulate.replay import summary

    check_writable(json_file)
    check_plot(plot)
    with wrong_usage():
        capacities, policies = _capacities(options.capacity), _policies(options.policy)
        tiers = _tiers(options.tiers)
        if tiers and plot is not None:
            raise BadInput(f"--plot={plot}: conflicts with --tiers. Give one of the two.")
        if record is not None and (tiers or len(capacities) * len(policies) > 1):
            raise BadInput(
                f"--record={record}: records one replay. Give one --capacity, one --policy and no "
                "--tiers."
            )
        replayed = _find_trace(trace, options)
    results = _replay_all(replayed, capacities, policies, tiers, record, quiet=json_file == "-")
    if plot is not None:
        _draw(plot, replayed, results)
    write_json(json_file, summary(replayed, results))
    if json_file != "-":
        if trace is None and options.generate is None and options.kind is None:
            typer.echo("No TRACE given: generating one.")
        _show(replayed, results)
        name_files(figures=json_file, plot=plot, recording=record)


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


def _tiers(wanted: str | None) -> dict[str, int]:
    if wanted is None:
        return {}
    from kvpager import _validate as arguments
    from kvpager.simulate.tiers import TIERS

    sizes: dict[str, int] = {}
    for tier in wanted.split(","):
        name, _, size = (part.strip() for part in tier.partition("="))
        if not name or not size.isdecimal():
            example = "such as host=20000,disk=200000"
            raise BadInput(f"--tiers={tier}: expected name=blocks, {example}.")
        if name not in TIERS:
            raise BadInput(f"--tiers={tier}: expected one of {', '.join(TIERS)}.")
        if name in sizes:
            raise BadInput(f"--tiers={tier}: {name} is repeated. Name each tier once.")
        sizes[name] = arguments.count("tiers", int(size), at_least=1)
    return sizes


def _find_trace(path: str | None, options: Options) -> Trace:
    from kvpager import _validate as arguments
    from kvpager.simulate.generate import GENERATED_MAX, generate_trace
    from kvpager.simulate.replay import read_trace

    if path is None:
        count = GENERATED if options.generate is None else options.generate
        arguments.count("generate", count, at_least=1, at_most=GENERATED_MAX)
        return generate_trace(count, options.seed, options.kind or "mixed")
    for name in ("generate", "kind"):
        if (value := getattr(options, name)) is not None:
            raise BadInput(f"--{name}={value}: conflicts with TRACE. Give one of the two.")
    return read_trace(path, options.skip_bad)


def _replay_all(
    trace: Trace,
    capacities: list[int],
    policies: list[str],
    tiers: dict[str, int],
    record: str | None,
    quiet: bool,
) -> list[Result]:
    """Replay each policy at each capacity; the offline optimum last, if there are no tiers."""
    from tqdm import tqdm

    from kvpager.simulate.replay import offline_optimum, replay

    if tiers:
        from kvpager.simulate.tiers import replay_tiers
    results = []
    total = len(trace.prompts) * len(capacities) * len(policies)
    hidden = quiet or None  # tqdm's None: on a terminal only
    with tqdm(total=total, leave=False, disable=hidden, file=sys.stderr, unit=" requests") as bar:
        for capacity in capacities:
            for policy in policies:
                bar.set_description(f"{policy}, {capacity} blocks")
                if tiers:
                    results.append(replay_tiers(trace, capacity, policy, tiers, bar.update))
                else:
                    with wrong_usage():  # of `record`
                        results.append(replay(trace, capacity, policy, bar.update, record))
            if not tiers:
                results.append(offline_optimum(trace, capacity))
    return results


def _show(trace: Trace, results: list[Result]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(
        f"{trace.name}: {counted(len(trace.prompts), 'request')}, "
        f"{counted(trace.num_blocks, 'block')}, "
        f"{trace.num_prefixes} of them distinct\nhit ratio by "
        f"{'tier, and blocks written to each' if results[0].tiers else 'pool size'}:",
        markup=False,
    )
    by_size: dict[int, list[Result]] = {}
    for result in results:
        by_size.setdefault(result.capacity, []).append(result)
    if results[0].tiers:
        for found in by_size.values():
            _show_tiers(console, trace, found)
    else:
        _show_hit_ratios(console, trace, by_size)
    for found in by_size.values():
        if too_long := found[-1].too_long:  # the same for all policies
            console.print(
                f"Prompts longer than {counted(found[-1].capacity, 'block')}: {too_long}. "
                "Their hits count, but they are never cached.",
                markup=False,
            )
    if trace.skipped:
        console.print(
            f"{counted(len(trace.skipped), 'line')} skipped, the first: {trace.skipped[0]}",
            markup=False,
        )


def _show_hit_ratios(console: Console, trace: Trace, by_size: dict[int, list[Result]]) -> None:
    from kvpager.bench import tables

    policies = [result.policy for result in next(iter(by_size.values()))]
    columns = [
        tables.Column(
            _sized(capacity),
            [f"{each.hit_ratio:.4f}" for each in found] + [f"{trace.unlimited:.4f}"],
        )
        for capacity, found in by_size.items()
    ]
    tables.show(console, "policy", [*policies, "unlimited"], columns)


def _show_tiers(console: Console, trace: Trace, results: list[Result]) -> None:
    """Show the results of one pool size."""
    from kvpager.bench import tables

    def ratios(hits: list[int]) -> list[str]:
        return [f"{each / max(trace.num_blocks, 1):.4f}" for each in hits]

    pool = [result.hits for result in results]
    totals = [result.hits + sum(tier.hits for tier in result.tiers) for result in results]
    columns = [tables.Column(f"pool\n{_sized(results[0].capacity)}", ratios(pool))]
    written = []
    for tiers in zip(*(result.tiers for result in results), strict=True):
        name, size = tiers[0].name, _sized(tiers[0].capacity)
        columns.append(tables.Column(f"{name}\n{size}", ratios([tier.hits for tier in tiers])))
        writes = [f"{tier.written:,}" for tier in tiers]
        written.append(tables.Column(f"written\nto {name}", writes))
    columns += [tables.Column("all", ratios(totals)), *written]
    tables.show(console, "policy", [result.policy for result in results], columns)


def _sized(capacity: int) -> str:
    return f"{capacity:,}\nblocks"


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
