"""The command `kvpager bench throughput`: several systems over the same requests."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpager.cli.errors import one_line_errors
from kvpager.cli.files import check_plot, check_writable
from kvpager.cli.options import takes
from kvpager.errors import BadInput

if TYPE_CHECKING:
    from kvpager.bench.throughput.results import Figures
    from kvpager.bench.throughput.systems import Options as SystemOptions
    from kvpager.bench.throughput.systems import Progress
    from kvpager.bench.throughput.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command."""

    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A folder that save_pretrained made.",
            show_default="random weights, a bfloat16 Llama of 28 million parameters",
        ),
    ] = None
    device: Annotated[str, typer.Option(help="Such as cpu or cuda:1.")] = "cpu"
    systems: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="kvpager, kvpager-compiled, generate, generate-rows, generate_batch, vllm, "
            "vllm-eager.",
            show_default="those that are there",
        ),
    ] = None
    compiled: Annotated[
        bool, typer.Option("--compile", help="kvpager compiled by torch.compile, too.")
    ] = False
    batch: Annotated[
        int | None,
        typer.Option(metavar="ROWS", help="generate in padded batches of so many, too."),
    ] = None
    vllm_python: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="An interpreter that has vLLM, or its environment's folder."
        ),
    ] = None
    requests: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many.", show_default="64, or all of the trace"),
    ] = None
    prompt_tokens: Annotated[
        str, typer.Option(metavar="LOW-HIGH", help="Of a prompt; all lengths are as likely.")
    ] = "32-512"
    new_tokens: Annotated[int, typer.Option(help="Of each reply.")] = 128
    shared_prefix: Annotated[
        int, typer.Option(metavar="TOKENS", help="What all prompts begin with, besides.")
    ] = 0
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests a second, at random moments (Poisson).", show_default="all at once"
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Of lengths, token ids and moments.")] = 0
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Recorded requests instead, JSON lines or .csv; see docs/benchmarks.md.",
        ),
    ] = None
    longest: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", help="Leave out requests of a trace that have more, reply included."
        ),
    ] = None
    speed: Annotated[
        float, typer.Option(help="How many times as quickly a trace's requests come.")
    ] = 1.0
    memory: Annotated[
        str | None,
        typer.Option(
            help="Of keys and values in kvpager and vLLM, such as 64MiB.",
            show_default="enough for all requests at once",
        ),
    ] = None
    host_memory: Annotated[
        str | None,
        typer.Option(help="Of the host, for kvpager to swap to.", show_default="none"),
    ] = None
    block_size: Annotated[int, typer.Option(help="Token slots of kvpager's blocks.")] = 16
    max_num_seqs: Annotated[int, typer.Option(help="The most rows at a time.")] = 256
    max_batch_tokens: Annotated[
        int, typer.Option(help="Of a step of kvpager and generate_batch.")
    ] = 1024
    prefix_cache: Annotated[bool, typer.Option(help="Reuse what prompts have in common.")] = True
    threads: Annotated[
        int | None, typer.Option(help="Of each system.", show_default="torch's own choice")
    ] = None
    generate_batch_requests: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="generate_batch gets the first N alone.", show_default="all"
        ),
    ] = None
    repeats: Annotated[int, typer.Option(help="Figures are the medians of so many.")] = 1
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Draw kvpager's last run; ends in .png or .svg."),
    ] = None
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE|-", help="JSON lines; - prints them alone."),
    ] = None


@takes(Options)
def throughput(options: Options) -> None:
    """Have kvpager, transformers and vLLM serve the same requests, and compare.

    Each first serves a few others that are not counted; then they take turns, --repeats times.

    Exit code: 0, or 2 for bad input.
    """
    with one_line_errors(), _bad_values():
        check_writable(options.json_file)
        check_plot(options.plot)
        bench = _prepare(options)
    with one_line_errors(), _failures():
        machine, figures = _run(bench, quiet=options.json_file == "-")
        _report(machine, figures, bench.workload, options)


# -------------------------------------------------------------------- inputs


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """What is run: everything that the options name, found and checked."""

    systems: list[str]
    given: SystemOptions
    model: Any
    workload: Workload
    settings: dict[str, Any]  # further arguments of the session


def _prepare(options: Options) -> _Bench:
    from kvpager import _validate as arguments

    given = _system_options(options)
    systems = _systems(options, given)
    settings = {
        "model_path": options.model,
        "repeats": options.repeats,
        "subsets": _subsets(options.generate_batch_requests),
    }
    arguments.count("repeats", options.repeats, at_least=1)

    # Here, for torch and transformers take seconds to load, and options are looked at before.
    from kvpager.bench.throughput import models
    from kvpager.demo.settings import Settings

    device = Settings(device=options.device).found_device()
    model = models.load(options.model, str(device))
    workload = _workload(options, models.vocabulary(model), models.max_length(model))
    workload.check(models.max_length(model))
    return _Bench(systems=systems, given=given, model=model, workload=workload, settings=settings)


def _system_options(options: Options) -> SystemOptions:
    from kvpager.bench.throughput.systems import Options as SystemOptions

    given = SystemOptions(
        memory=options.memory,
        host_memory=options.host_memory,
        block_size=options.block_size,
        max_num_seqs=options.max_num_seqs,
        max_batch_tokens=options.max_batch_tokens,
        prefix_cache=options.prefix_cache,
        batch=options.batch,
        threads=options.threads,
        vllm_python=options.vllm_python,
    )
    given.check()
    return given


def _systems(options: Options, given: SystemOptions) -> list[str]:
    from kvpager.bench.throughput.systems import check_names, usual

    if options.systems is None:
        return usual(given, compiled=options.compiled)
    names = [name.strip() for name in options.systems.split(",")]
    if options.compiled:
        names.append("kvpager-compiled")
    names = check_names(names, given)
    if options.plot is not None and not any(map(_is_drawn, names)):
        raise ValueError("--plot draws kvpager's steps: have kvpager among the --systems")
    return names


def _is_drawn(system: str) -> bool:
    return system.startswith("kvpager")


def _subsets(count: int | None) -> dict[str, int]:
    from kvpager import _validate as arguments

    if count is None:
        return {}
    return {"generate_batch": arguments.count("generate_batch requests", count, at_least=1)}


def _workload(options: Options, vocabulary: int, max_length: int | None) -> Workload:
    from kvpager.bench.throughput.workload import from_trace, synthetic

    if options.trace is not None:
        return from_trace(
            options.trace,
            vocabulary=vocabulary,
            limit=options.requests,
            longest=max_length if options.longest is None else options.longest,
            speed=options.speed,
            seed=options.seed,
        )
    return synthetic(
        64 if options.requests is None else options.requests,
        _range(options.prompt_tokens),
        options.new_tokens,
        vocabulary=vocabulary,
        shared=options.shared_prefix,
        rate=options.rate,
        seed=options.seed,
    )


def _range(text: str) -> tuple[int, int]:
    """Return the bounds in `32-512`; one number is both."""
    match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", text)
    if match is None:
        raise ValueError(f"prompt tokens {text!r}: expected LOW-HIGH, such as 32-512")
    return int(match[1]), int(match[2] or match[1])


@contextlib.contextmanager
def _bad_values() -> Iterator[None]:
    """Turn what the library refuses into bad input."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{error.filename}: {error.strerror or error}") from None
    except (ValueError, TypeError) as error:
        raise BadInput(str(error)) from None


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Turn the failure of a system to serve the model into bad input."""
    from kvpager.errors import KVPagerError, OutOfBlocks

    try:
        yield
    except OutOfBlocks:
        raise
    except (KVPagerError, OSError) as error:
        raise BadInput(str(error)) from None


# -------------------------------------------------------------------- the run


def _run(bench: _Bench, *, quiet: bool) -> tuple[dict[str, Any], list[Figures]]:
    """Return what the figures depend on, and the figures."""
    from kvpager.bench.throughput import session

    given, settings = (bench.model, bench.workload, bench.given), bench.settings
    with contextlib.ExitStack() as stack:
        stage = _Bars(stack, settings["repeats"], quiet)
        figures = session.measure(bench.systems, *given, stage=stage, **settings)
    return session.describe(*given, **settings), figures


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


# -------------------------------------------------------------------- the report


def _report(
    machine: dict[str, Any], figures: list[Figures], workload: Workload, options: Options
) -> None:
    from kvpager.bench.throughput import report

    json_file, plot = options.json_file, options.plot
    if json_file is not None:
        text = report.lines(machine, figures)
        if json_file == "-":
            sys.stdout.write(text)
        else:
            Path(json_file).write_text(text, encoding="utf-8")
    if plot is not None:
        report.draw(plot, next(each for each in figures if _is_drawn(each.system)), workload.name)
    if json_file == "-":
        return
    report.show(machine, figures, workload)
    for name, file in (("figures", json_file), ("plot", plot)):
        if file is not None:
            typer.echo(f"{name}: {file}")
