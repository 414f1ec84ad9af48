"""The command `kvpager bench modes`: reserved, paged and virtual over the same requests."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpager.bench.options import option
from kvpager.cli.bench import bar, length_range
from kvpager.cli.errors import wrong_usage
from kvpager.cli.files import check_writable, name_files, write_text
from kvpager.cli.options import takes_options

if TYPE_CHECKING:
    from kvpager.bench.throughput.workload import Workload

_model = functools.partial(option, "Model and hardware")
_memory = functools.partial(option, "Memory and batching")
_requests = functools.partial(option, "Requests")
_output = functools.partial(option, "Output")


@dataclass(frozen=True, kw_only=True)
class ModeOptions:
    """The options of the command."""

    model: str | None = _model(
        "Folder written by save_pretrained.",
        "PATH",
        shown="random weights: a float32 Llama of 5 million parameters",
    )
    threads: int | None = _model("CPU threads.", "N", shown="torch's own choice")
    modes: str = _memory("Modes to compare.", "NAME,...", "reserved,paged,virtual")
    memory: str | None = _memory(
        "KV cache of each mode, such as 64MiB.", "SIZE", shown="room for 4 reserved requests"
    )
    max_model_len: int = _memory("Tokens that mode reserved keeps for a request.", "TOKENS", 2048)
    block_size: int = _memory("Tokens per block, a power of two.", "TOKENS", 16)
    num_prompts: int = _requests("Number of requests.", "N", 64)
    input_len: str = _requests("Tokens per prompt, uniformly distributed.", "LOW-HIGH", "32-512")
    output_len: int = _requests("Generated tokens per request.", "TOKENS", 128)
    prefix_len: int = _requests("Length of a prefix shared by all prompts.", "TOKENS", 0)
    rates: str = _requests(
        "Arrival rates for latency, as fractions of the requests/s of paged, such as 0.2,0.5,0.8.",
        "X,...",
        "",
        shown="none",
    )
    seed: int = _requests("Seed of lengths, token ids and arrival times.", "N", 0)
    repeats: int = _output("Runs per mode; figures are medians.", "N", 1)
    json_file: str | None = _output(
        "Write JSON lines; - prints only them.", "FILE|-", name="--json"
    )


@takes_options
def modes(options: ModeOptions) -> None:
    """Compare the modes of KV memory on the same requests and memory.

    Mode reserved keeps a region of --max-model-len tokens for each request, as before
    paging. Modes paged and virtual take blocks as needed. All requests arrive at once.
    With --rates, further runs measure latency with random arrivals.

    Exit status: 0, 1 if a mode fails, or 2 for wrong usage.
    """
    check_writable(options.json_file)
    with wrong_usage():
        fractions = _fractions(options.rates)

        # Imported here: torch and transformers take seconds to load.
        from kvpager import _validate as arguments
        from kvpager.bench import models
        from kvpager.bench.modes import comparison, report
        from kvpager.bench.throughput.comparison import describe

        model = models.small_model() if options.model is None else models.load(options.model)
        given = comparison.engine_options(
            model, options.memory, options.max_model_len, options.block_size, options.threads
        )
        names = comparison.check_modes(options.modes.split(","), fractions)
        arguments.count("repeats", options.repeats, at_least=1)
        arriving = functools.partial(_workload, options, models.vocabulary(model))
        workload = arriving(None)
        if workload.longest > options.max_model_len:
            raise ValueError(
                f"max_model_len={options.max_model_len}: the longest request has "
                f"{workload.longest} tokens. Raise it."
            )
    with contextlib.ExitStack() as bars:
        figures, limit = comparison.measure(
            model,
            arriving,
            given,
            modes=names,
            fractions=fractions,
            repeats=options.repeats,
            stage=functools.partial(bar, bars, options.repeats, options.json_file == "-"),
        )
    machine = describe(model, workload, given, repeats=options.repeats)
    if options.json_file is not None:
        write_text(options.json_file, report.lines(machine, figures, limit))
    if options.json_file != "-":
        memory = arguments.parse_memory(given.memory) or 0
        told = report.assumptions(workload, options.max_model_len, memory, limit)
        report.show(machine, figures, told)
        name_files(figures=options.json_file)


def _fractions(text: str) -> list[float]:
    try:
        found = [float(each) for each in text.split(",") if each.strip()]
    except ValueError:
        raise ValueError(f"rates={text!r}: expected numbers, such as 0.2,0.5,0.8.") from None
    if not all(0 < each <= 2 for each in found):
        raise ValueError(f"rates={text!r}: expected numbers above 0 and at most 2.")
    return found


def _workload(options: ModeOptions, vocabulary: int, rate: float | None) -> Workload:
    from kvpager.bench.throughput.workload import synthetic

    return synthetic(
        options.num_prompts,
        length_range(options.input_len),
        options.output_len,
        vocabulary=vocabulary,
        prefix_len=options.prefix_len,
        request_rate=rate,
        seed=options.seed,
    )
