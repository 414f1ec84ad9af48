"""The commands `kvpager demo`, `kvpager env` and `kvpager simulate`.

torch and transformers load when a command runs that needs them; `simulate` does not.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import kvpager

if TYPE_CHECKING:
    from kvpager.simulate.replay import Result, Trace

app = typer.Typer(
    name="kvpager",
    help="Paged KV-cache memory for PyTorch LLM inference.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

CAPACITIES = (1000, 5859, 10000, 30000, 50000)
GENERATED = 4000  # requests

JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE|-", help="The figures as JSON; - prints them alone."),
]


def _fail(message: str) -> typer.Exit:
    typer.echo(f"kvpager: {message}", err=True)
    return typer.Exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvpager {kvpager.__version__}")
        raise typer.Exit


@app.callback()
def kvpager_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Paged KV-cache memory for PyTorch LLM inference."""


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_PATH",
            help="Any transformers causal language model.",
            show_default="the bundled one, offline",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A prompt of scenario (a); may be given repeatedly."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each row.")] = 32,
    device: Annotated[
        str | None,
        typer.Option(help="Such as cpu or cuda:1.", show_default="cuda if there is one, else cpu"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, float16, or auto: as the checkpoint says.",
            show_default="float32 for the bundled model, else auto",
        ),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Token slots of a block, a power of two.")] = 16,
    memory: Annotated[
        str | None,
        typer.Option(
            help="The most bytes the blocks may take, such as 64MiB.", show_default="no bound"
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Generate with transformers' own cache and with kvpager, and compare texts and memory.

    Exit code: 0 if all outputs are identical or differ by near-ties only (two tokens whose logits
    are equal within the dtype's rounding), 1 for any other difference, 2 for bad input.
    """
    from kvpager.demo.settings import Settings

    settings = Settings(
        model=model,
        prompts=tuple(prompt or ()),
        new_tokens=new_tokens,
        device=device,
        dtype=dtype,
        block_size=block_size,
        memory=memory,
    )
    with _one_line_errors():
        _check_writable(json_file)
        settings.check()
        from kvpager.demo.session import run

        results, console = run(settings, quiet=json_file == "-")
    _write_json(json_file, results.as_json())
    if json_file not in (None, "-"):
        console.print(f"figures: {json_file}", markup=False, highlight=False)
    if results.is_wrong:
        raise typer.Exit(1)


@app.command()
def env(
    json_file: JsonFile = None,
) -> None:
    """Show versions, devices, and which kernels run where and why."""
    from kvpager.bench import environment

    with _one_line_errors():
        _check_writable(json_file)
        found = environment.collect()
    _write_json(json_file, found)
    if json_file != "-":
        environment.show(found)


@app.command()
def simulate(
    trace: Annotated[
        str | None,
        typer.Argument(
            metavar="TRACE",
            help="Requests as JSON lines, see docs/simulate.md; may be gzipped.",
            show_default="a generated one",
        ),
    ] = None,
    capacity: Annotated[
        list[int] | None,
        typer.Option(
            metavar="BLOCKS",
            help="Blocks of the pool; may be given repeatedly.",
            show_default="1000, 5859, 10000, 30000 and 50000",
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Eviction policies.", show_default="all"),
    ] = None,
    generate: Annotated[
        int | None,
        typer.Option(metavar="N", help="Make up a trace of so many requests.", show_default="4000"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the generated trace.")] = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out lines that are not requests.")
    ] = False,
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Draw the hit ratios; the name ends in .png or .svg."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Replay a trace and compare the hit ratios of the eviction policies.

    Exit code: 0, or 2 for bad input.
    """
    from kvpager.simulate.replay import summary

    with _one_line_errors():
        _check_writable(json_file)
        _check_plot(plot)
        capacities, policies = _capacities(capacity), _policies(policy)
        found = _find_trace(trace, generate, seed, skip_bad)
        results = _replay_all(found, capacities, policies, quiet=json_file == "-")
        if plot is not None:
            _draw(plot, found, results)
    _write_json(json_file, summary(found, results))
    if json_file != "-":
        if trace is None and generate is None:
            typer.echo("no TRACE given, so this one is made up:")
        _show_hit_ratios(found, results)
        for name, file in (("figures", json_file), ("plot", plot)):
            if file is not None:
                typer.echo(f"{name}: {file}")


# -------------------------------------------------------------------- simulate


def _capacities(wanted: list[int] | None) -> list[int]:
    from kvpager import _validate as arguments
    from kvpager.demo.settings import BadInput

    try:
        found = [arguments.count("capacity", n, at_least=1) for n in wanted or CAPACITIES]
    except ValueError as error:
        raise BadInput(str(error)) from None
    return sorted(set(found))


def _policies(wanted: str | None) -> list[str]:
    from kvpager.blocks.policies import POLICIES
    from kvpager.demo.settings import BadInput

    names = list(POLICIES) if wanted is None else [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in POLICIES:
            raise BadInput(f"policy {name!r}: choose from {', '.join(POLICIES)}")
    return list(dict.fromkeys(names))


def _find_trace(path: str | None, generate: int | None, seed: int, skip_bad: bool) -> Trace:
    from kvpager.demo.settings import BadInput
    from kvpager.simulate.replay import generate_trace, read_trace

    if path is not None and generate is not None:
        raise BadInput("TRACE and --generate: expected one of the two")
    try:
        if path is None:
            return generate_trace(GENERATED if generate is None else generate, seed)
        return read_trace(path, skip_bad)
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


def _check_plot(file: str | None) -> None:
    from importlib.util import find_spec

    from kvpager.demo.settings import BadInput

    if file is None:
        return
    path = Path(file)
    if path.suffix not in (".png", ".svg") or not path.absolute().parent.is_dir():
        raise BadInput(f"--plot {file}: expected a .png or .svg file in a folder that exists")
    if find_spec("matplotlib") is None:
        raise BadInput(
            "--plot needs matplotlib, which is not installed: pip install 'kvpager[plot]'"
        )


def _draw(file: str, trace: Trace, results: list[Result]) -> None:
    from matplotlib.figure import Figure

    from kvpager.demo.settings import BadInput

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


# -------------------------------------------------------------------- inputs and outputs


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 2."""
    from kvpager.demo.settings import BadInput
    from kvpager.errors import OutOfBlocks

    try:
        yield
    except BadInput as error:
        raise _fail(str(error)) from None
    except OutOfBlocks as error:
        raise _fail(str(error)) from None
    except ImportError as error:
        if "transformers" not in str(error):
            raise
        raise _fail(
            "this needs transformers, which is not installed: pip install 'kvpager[transformers]'"
        ) from error


def _check_writable(json_file: str | None) -> None:
    from kvpager.demo.settings import BadInput

    if json_file is None or json_file == "-":
        return
    path = Path(json_file)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise BadInput(f"--json {json_file}: expected a file in a folder that exists, or -")


def _write_json(json_file: str | None, figures: dict[str, Any]) -> None:
    if json_file is None:
        return
    text = json.dumps(figures, indent=2) + "\n"
    if json_file == "-":
        sys.stdout.write(text)
        return
    try:
        Path(json_file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise _fail(f"--json {json_file}: {error.strerror or error}") from None
