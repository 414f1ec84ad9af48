"""The command `kvpager bench throughput`: several systems over the same requests."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvpager.bench.options import option
from kvpager.bench.throughput.systems import Options as SystemOptions
from kvpager.bench.throughput.systems import check_names, usual
from kvpager.cli.errors import wrong_usage
from kvpager.cli.files import check_plot, check_writable, name_files, write_text
from kvpager.cli.options import takes_options

if TYPE_CHECKING:
    from kvpager.bench.throughput.results import Figures
    from kvpager.bench.throughput.systems import Progress
    from kvpager.bench.throughput.workload import Workload

_model = functools.partial(option, "Model and hardware")
_systems_option = functools.partial(option, "Systems")
_requests = functools.partial(option, "Requests")
_trace = functools.partial(option, "Recorded requests")
_output = functools.partial(option, "Output")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command, except those of the systems."""

    model: str | None = _model(
        "Folder written by save_pretrained.",
        "PATH",
        shown="random weights: a bfloat16 Llama of 28 million parameters",
    )
    device: str | None = _model(
        "Device, such as cpu or cuda:1.", "DEVICE", shown="cuda if torch finds one, else cpu"
    )
    systems: str | None = _systems_option(
        "kvpager, kvpager-compiled, generate, generate-rows, generate_batch, vllm, vllm-eager.",
        "NAME,...",
        shown="those installed",
    )
    compiled: bool = _systems_option(
        "Add kvpager-compiled: torch.compile.", default=False, name="--compile"
    )
    generate_batch_limit: int | None = _systems_option(
        "Requests for generate_batch: the first N.", "N", shown="all"
    )
    num_prompts: int | None = _requests("Number of requests.", "N", shown="64, or all of the trace")
    input_len: str = _requests("Tokens per prompt, uniformly distributed.", "LOW-HIGH", "32-512")
    output_len: int = _requests("Generated tokens per request.", "TOKENS", 128)
    prefix_len: int = _requests("Length of a prefix shared by all prompts.", "TOKENS", 0)
    request_rate: float | None = _requests(
        "Requests per second (Poisson arrivals).", "RATE", shown="all at once"
    )
    seed: int = _requests("Seed of lengths, token ids and arrival times.", "N", 0)
    trace: str | None = _trace(
        "Replay a trace: .jsonl as for kvpager simulate, or .csv.",
        "FILE",
        shown="synthetic requests",
    )
    max_request_len: int | None = _trace(
        "Skip requests with more tokens, reply included.", "TOKENS"
    )
    speed: float = _trace("Replay speed; 2 halves the time between arrivals.", "FACTOR", 1.0)
    repeats: int = _output("Runs per system; figures are medians.", "N", 1)
    plot: str | None = _output("Plot kvpager's last run to a .png or .svg file.", "FILE")
    json_file: str | None = _output(
        "Write JSON lines; - prints only them.", "FILE|-", name="--json"
    )


@takes_options
def throughput(given: SystemOptions, options: Options) -> None:
    """Measure throughput and latency of kvpager, transformers and vLLM on the same requests.

    Every system warms up on a few other requests. Then the systems take turns,
    --repeats times.

    Exit status: 0, 1 if a system fails, or 2 for wrong usage.
    """
    check_writable(options.json_file)
    check_plot(options.plot)
    with wrong_usage():
        given.check()
        systems = _systems(given, options)
        settings = _settings(options)

        # Imported here: torch and transformers take seconds to load.
        from kvpager.bench import models

        model = models.load(options.model, models.find_device(options.device))
        workload = _workload(options, models.vocabulary(model), models.max_length(model))
        workload.check(models.max_length(model))
    from kvpager.bench.throughput import comparison

    served = model, workload, given
    with contextlib.ExitStack() as bars:
        stage = functools.partial(bar, bars, options.repeats, options.json_file == "-")
        figures = comparison.measure(systems, *served, stage=stage, **settings)
    _report(comparison.describe(*served, **settings), figures, workload, options)


# -------------------------------------------------------------------- inputs


def _systems(given: SystemOptions, options: Options) -> list[str]:
    if options.systems is None:
        return usual(given, compiled=options.compiled)
    names = [name.strip() for name in options.systems.split(",")]
    if options.compiled:
        names.append("kvpager-compiled")
    names = check_names(names, given)
    if options.plot is not None and not any(map(_is_drawn, names)):
        raise ValueError(f"plot={options.plot}: shows kvpager's steps. Add kvpager to --systems.")
    return names


def _is_drawn(system: str) -> bool:
    return system.startswith("kvpager")


def _settings(options: Options) -> dict[str, Any]:
    """Return further arguments of `comparison.measure`."""
    from kvpager import _validate as arguments

    arguments.count("repeats", options.repeats, at_least=1)
    subsets, limit = {}, options.generate_batch_limit
    if limit is not None:
        subsets["generate_batch"] = arguments.count("generate_batch_limit", limit, at_least=1)
    return {"model_path": options.model, "repeats": options.repeats, "subsets": subsets}


def _workload(options: Options, vocabulary: int, max_length: int | None) -> Workload:
    from kvpager.bench.throughput.workload import from_trace, synthetic

    if options.trace is not None:
        limit = options.max_request_len
        return from_trace(
            options.trace,
            vocabulary=vocabulary,
            num_prompts=options.num_prompts,
            max_request_len=max_length if limit is None else limit,
            speed=options.speed,
            seed=options.seed,
        )
    return synthetic(
        64 if options.num_prompts is None else options.num_prompts,
        length_range(options.input_len),
        options.output_len,
        vocabulary=vocabulary,
        prefix_len=options.prefix_len,
        request_rate=options.request_rate,
        seed=options.seed,
    )


def length_range(text: str) -> tuple[int, int]:
    """Return the bounds in `32-512`; one number is both. O(1). Raises: `ValueError`."""
    match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", text)
    if match is None:
        raise ValueError(f"input_len={text!r}: expected LOW-HIGH, such as 32-512.")
    return int(match[1]), int(match[2] or match[1])


# -------------------------------------------------------------------- the output


def bar(
    bars: contextlib.ExitStack,
    repeats: int,
    is_quiet: bool,
    name: str,
    repeat: int,
    num_requests: int,
) -> Progress:
    """Show a progress bar on stderr in place of the one before. O(1)."""
    from tqdm import tqdm

    bars.close()
    what = "getting ready" if repeat == 0 else f"{repeat} of {repeats}"
    shown = tqdm(
        total=num_requests,
        desc=f"{name}, {what}",
        unit="request",
        leave=False,
        file=sys.stderr,
        disable=is_quiet or None,  # tqdm's None: on a terminal only
    )
    progress: Progress = bars.enter_context(shown).update
    return progress


def _report(
    machine: dict[str, Any], figures: list[Figures], workload: Workload, options: Options
) -> None:
    from kvpager.bench.throughput import report

    json_file, plot = options.json_file, options.plot
    if json_file is not None:
        write_text(json_file, report.lines(machine, figures))
    if plot is not None:
        drawn = next(each for each in figures if _is_drawn(each.system))
        report.draw(plot, drawn, workload.name, machine)
    if json_file == "-":
        return
    report.show(machine, figures, workload)
    name_files(figures=json_file, plot=plot)
