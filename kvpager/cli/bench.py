"""The command `kvpager bench throughput`: several systems over the same requests."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpager import _validate as arguments
from kvpager._words import counted
from kvpager.cli.app import _check_plot, _check_writable, _one_line_errors
from kvpager.cli.testing import app

if TYPE_CHECKING:
    from kvpager.bench.throughput.results import Figures
    from kvpager.bench.throughput.systems import Options, Progress
    from kvpager.bench.throughput.workload import Workload

__all__ = ["app", "throughput"]

bench = typer.Typer(help="Measure.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command()
def throughput(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A folder that save_pretrained made.",
            show_default="random weights, a bfloat16 Llama of 28 million parameters",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda:1.")] = "cpu",
    systems: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="kvpager, kvpager-compiled, generate, generate-rows, generate_batch, vllm, "
            "vllm-eager.",
            show_default="those that are there",
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="kvpager compiled by torch.compile, too.")
    ] = False,
    batch: Annotated[
        int | None,
        typer.Option(metavar="ROWS", help="generate in padded batches of so many, too."),
    ] = None,
    vllm_python: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="An interpreter that has vLLM, or its environment's folder."
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many.", show_default="64, or all of the trace"),
    ] = None,
    prompt_tokens: Annotated[
        str, typer.Option(metavar="LOW-HIGH", help="Of a prompt; all lengths are as likely.")
    ] = "32-512",
    new_tokens: Annotated[int, typer.Option(help="Of each reply.")] = 128,
    shared_prefix: Annotated[
        int, typer.Option(metavar="TOKENS", help="What all prompts begin with, besides.")
    ] = 0,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests a second, at random moments (Poisson).", show_default="all at once"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of lengths, token ids and moments.")] = 0,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Recorded requests instead, JSON lines or .csv; see docs/benchmarks.md.",
        ),
    ] = None,
    longest: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", help="Leave out requests of a trace that have more, reply included."
        ),
    ] = None,
    speed: Annotated[
        float, typer.Option(help="How many times as quickly a trace's requests come.")
    ] = 1.0,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Of keys and values in kvpager and vLLM, such as 64MiB.",
            show_default="enough for all requests at once",
        ),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(help="Of the host, for kvpager to swap to.", show_default="none"),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Token slots of kvpager's blocks.")] = 16,
    max_running: Annotated[int, typer.Option(help="The most rows at a time.")] = 256,
    max_batch_tokens: Annotated[
        int, typer.Option(help="Of a step of kvpager and generate_batch.")
    ] = 1024,
    prefix_cache: Annotated[bool, typer.Option(help="Reuse what prompts have in common.")] = True,
    threads: Annotated[
        int | None, typer.Option(help="Of each system.", show_default="torch's own choice")
    ] = None,
    generate_batch_requests: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="generate_batch gets the first N alone.", show_default="all"
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Figures are the medians of so many.")] = 1,
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Draw kvpager's last run; ends in .png or .svg."),
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE|-", help="JSON lines; - prints them alone."),
    ] = None,
) -> None:
    """Have kvpager, transformers and vLLM serve the same requests, and compare.

    Each first serves a few others that are not counted; then they take turns, --repeats times.

    Exit code: 0, or 2 for bad input.
    """
    with _one_line_errors(), _bad_values():
        _check_writable(json_file)
        _check_plot(plot)
        options = _options(
            memory=memory,
            host_memory=host_memory,
            block_size=block_size,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            prefix_cache=prefix_cache,
            batch=batch,
            threads=threads,
            vllm_python=vllm_python,
        )
        names = _names(systems, options, compiled)
        _check_drawn(plot, names)
        settings = {
            "model_path": model,
            "repeats": repeats,
            "subsets": _subsets(generate_batch_requests),
        }
        arguments.count("repeats", repeats, at_least=1)
        loaded = _load(model, device)
        work = _workload(
            loaded,
            requests=requests,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            shared_prefix=shared_prefix,
            rate=rate,
            seed=seed,
            trace=trace,
            longest=longest,
            speed=speed,
        )
        work.check(_max_length(loaded))
    with _one_line_errors(), _failures():
        figures = _measure(names, loaded, work, options, settings, quiet=json_file == "-")
        machine = _described(loaded, work, options, settings)
        _give(machine, figures, work, plot, json_file)


# -------------------------------------------------------------------- inputs


@contextlib.contextmanager
def _bad_values() -> Iterator[None]:
    """What the library refuses is bad input here."""
    from kvpager.demo.settings import BadInput

    try:
        yield
    except OSError as error:
        raise BadInput(f"{error.filename}: {error.strerror or error}") from None
    except (ValueError, TypeError) as error:
        raise BadInput(str(error)) from None


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """A system that cannot serve the model, and why."""
    from kvpager.demo.settings import BadInput
    from kvpager.errors import KVPagerError, OutOfBlocks

    try:
        yield
    except OutOfBlocks:
        raise
    except (KVPagerError, OSError) as error:
        raise BadInput(str(error)) from None


def _options(**given: Any) -> Options:
    from kvpager.bench.throughput.systems import Options

    options = Options(**given)
    options.check()
    return options


def _names(systems: str | None, options: Options, compiled: bool) -> list[str]:
    from kvpager.bench.throughput.systems import check_names, usual

    if systems is None:
        return usual(options, compiled=compiled)
    names = [name.strip() for name in systems.split(",")]
    if compiled:
        names.append("kvpager-compiled")
    return check_names(names, options)


def _check_drawn(plot: str | None, names: list[str]) -> None:
    if plot is not None and _drawn(names) is None:
        raise ValueError("--plot draws kvpager's steps: have kvpager among the --systems")


def _drawn(names: list[str]) -> str | None:
    return next((name for name in names if name.startswith("kvpager")), None)


def _subsets(count: int | None) -> dict[str, int]:
    if count is None:
        return {}
    return {"generate_batch": arguments.count("generate_batch requests", count, at_least=1)}


def _load(path: str | None, device: str) -> Any:
    from kvpager.bench.throughput import models
    from kvpager.demo.settings import Settings

    place = Settings(device=device).found_device()
    return models.load(path, str(place))


def _max_length(model: Any) -> int | None:
    from kvpager.bench.throughput import models

    return models.max_length(model)


def _workload(
    model: Any,
    *,
    requests: int | None,
    prompt_tokens: str,
    new_tokens: int,
    shared_prefix: int,
    rate: float | None,
    seed: int,
    trace: str | None,
    longest: int | None,
    speed: float,
) -> Workload:
    from kvpager.bench.throughput import models
    from kvpager.bench.throughput.workload import from_trace, synthetic

    vocabulary = models.vocabulary(model)
    if trace is not None:
        return from_trace(
            trace,
            vocabulary=vocabulary,
            limit=requests,
            longest=models.max_length(model) if longest is None else longest,
            speed=speed,
            seed=seed,
        )
    return synthetic(
        64 if requests is None else requests,
        _range(prompt_tokens),
        new_tokens,
        vocabulary=vocabulary,
        shared=shared_prefix,
        rate=rate,
        seed=seed,
    )


def _range(text: str) -> tuple[int, int]:
    """`32-512`, or one number for both."""
    match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", text)
    if match is None:
        raise ValueError(f"prompt tokens {text!r}: expected LOW-HIGH, such as 32-512")
    return int(match[1]), int(match[2] or match[1])


# -------------------------------------------------------------------- the run, and what it gave


def _measure(
    names: list[str],
    model: Any,
    work: Workload,
    options: Options,
    settings: dict[str, Any],
    *,
    quiet: bool,
) -> list[Figures]:
    from kvpager.bench.throughput import session

    with contextlib.ExitStack() as stack:
        stage = _Bars(stack, settings["repeats"], quiet)
        return session.measure(names, model, work, options, stage=stage, **settings)


class _Bars:
    """A progress bar for each system and repeat, on stderr."""

    def __init__(self, stack: contextlib.ExitStack, repeats: int, quiet: bool) -> None:
        self._repeats = repeats
        self._disable = True if quiet else None  # tqdm's None: on a terminal only
        self._bar: Any = None
        stack.callback(self._close)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, name: str, repeat: int, num_requests: int) -> Progress:
        from tqdm import tqdm

        self._close()
        what = "getting ready" if repeat == 0 else f"{repeat} of {self._repeats}"
        self._bar = tqdm(
            total=num_requests,
            desc=f"{name}, {what}",
            unit="request",
            leave=False,
            file=sys.stderr,
            disable=self._disable,
        )
        progress: Progress = self._bar.update
        return progress


def _described(
    model: Any, work: Workload, options: Options, settings: dict[str, Any]
) -> dict[str, Any]:
    from kvpager.bench.throughput import session

    return session.describe(model, work, options, **settings)


def _give(
    machine: dict[str, Any],
    figures: list[Figures],
    work: Workload,
    plot: str | None,
    json_file: str | None,
) -> None:
    from rich.console import Console

    from kvpager.bench.throughput import report

    if json_file is not None:
        text = report.lines(machine, figures)
        if json_file == "-":
            sys.stdout.write(text)
        else:
            Path(json_file).write_text(text, encoding="utf-8")
    if plot is not None:
        drawn = next(each for each in figures if each.system.startswith("kvpager"))
        report.draw(plot, drawn, work.name)
    if json_file == "-":
        return
    model, threads = machine["model"], machine["machine"]["threads"]
    typer.echo(
        f"{work.name}: {work.prompt_tokens:,} prompt tokens, {work.new_tokens:,} new\n"
        f"{model['class']}, {model['parameters'] / 1e6:,.0f} million parameters, {model['dtype']}, "
        f"{model['device']}, {counted(threads, 'thread')}"
    )
    Console(highlight=False).print(report.table(figures))
    for line in report.notes(figures):
        typer.echo(line)
    for name, file in (("figures", json_file), ("plot", plot)):
        if file is not None:
            typer.echo(f"{name}: {file}")
