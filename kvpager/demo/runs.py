"""Run every scenario with transformers' cache and with kvpager, compare, print."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

import kvpager
from kvpager.bench import models
from kvpager.bench.modes.report import records
from kvpager.demo import measurement, report
from kvpager.demo.comparison import differences
from kvpager.demo.model import Engine, Generated
from kvpager.demo.modes import show_modes
from kvpager.demo.results import CallFigures, Contiguous, Paged, Plain, Result, Results, RowText
from kvpager.demo.scenarios import Row, Scenario, build
from kvpager.demo.settings import Settings
from kvpager.demo.traffic import NUM_REQUESTS, write_demo_report
from kvpager.errors import BadInput, KVPagerError, OutOfBlocks
from kvpager.integrations.huggingface.patching.handle import Patch
from kvpager.integrations.huggingface.patching.report import PatchStats

WARM_UP_TOKENS = 2


# -------------------------------------------------------------------- both sides


def generate_plain(engine: Engine, scenario: Scenario) -> tuple[list[Generated], Plain]:
    """Run the scenario with DynamicCache; return its calls and its memory."""
    done: list[Generated] = []
    for prompts in scenario.calls:
        if not scenario.keep_caches and done:
            done[-1] = replace(done[-1], cache=None)
        done.append(engine.generate(prompts, scenario, engine.settings.max_new_tokens))
    alive = [call for call in done if call.cache is not None]
    layers = measurement.layer_bytes(alive[-1].cache)
    longest = max(len(row) for call in alive for row in call.prompts)
    known, limit = longest + engine.settings.max_new_tokens, engine.max_positions
    size = partial(measurement.contiguous_bytes, layers, scenario.rows_alive, held=known - 1)
    plain = Plain(
        reserved_bytes=sum(measurement.reserved_bytes(call.cache) for call in alive),
        needed_bytes=measurement.needed_bytes(layers, _held_rows(scenario, alive)),
        seconds=sum(call.seconds for call in done),
        contiguous=Contiguous(known, size(known), limit, limit and size(limit)),
    )
    return [replace(call, cache=None) for call in done], plain


def _held_rows(scenario: Scenario, alive: Sequence[Generated]) -> list[measurement.HeldRow]:
    # The last token's key and value are never computed: nothing follows it.
    if scenario.num_beams > 1:
        (call,) = alive
        (prompt,) = call.prompts
        length = len(prompt) + len(call.rows[0]) - 1
        return measurement.rows_by_keys(call.cache, len(prompt), length)
    return measurement.rows_by_ids(
        [
            prompt + row[:-1]
            for call in alive
            for prompt, row in zip(call.prompts, call.rows, strict=True)
        ]
    )


def generate_paged(engine: Engine, scenario: Scenario) -> tuple[list[Generated], Paged]:
    """Run the scenario with kvpager; return its calls and its memory."""
    settings = engine.settings
    with _patched(engine, prefix_cache=scenario.prefix_cache) as patch:
        done: list[Generated] = []
        figures: list[CallFigures] = []
        for prompts in scenario.calls:
            if not scenario.keep_caches and done:
                done[-1] = replace(done[-1], cache=None)
            before = patch.stats()
            done.append(engine.generate(prompts, scenario, settings.max_new_tokens))
            figures.append(_call_figures(prompts, before, patch.stats()))
        stats = patch.stats()
        paged = Paged(
            stats=stats,
            block_bytes=stats.reserved_bytes // max(stats.num_blocks, 1),
            calls=tuple(figures),
            states=tuple(measurement.block_states([call.cache for call in done])),
            seconds=sum(call.seconds for call in done),
        )
        return [replace(call, cache=None) for call in done], paged


def _patched(engine: Engine, *, prefix_cache: bool) -> Patch:
    settings = engine.settings
    try:
        return kvpager.patch(
            engine.model,
            memory=settings.memory,
            block_size=settings.block_size,
            prefix_cache=prefix_cache,
        )
    except ValueError as error:
        raise BadInput(str(error)) from None


def _call_figures(prompts: tuple[Row, ...], before: PatchStats, after: PatchStats) -> CallFigures:
    def kept(stats: PatchStats) -> int:
        return stats.num_held_blocks + stats.num_cached_blocks + stats.evicted_blocks

    return CallFigures(
        prompt_tokens=sum(map(len, prompts)),
        prefix_hit_tokens=after.prefix_hit_tokens - before.prefix_hit_tokens,
        new_blocks=kept(after) - kept(before),
    )


# -------------------------------------------------------------------- comparing


def compare(engine: Engine, scenario: Scenario) -> Result:
    """Run one scenario with both caches."""
    expected, plain = generate_plain(engine, scenario)
    got, paged = generate_paged(engine, scenario)
    texts = tuple(
        RowText(len(prompt), engine.decode(prompt[-24:]), engine.decode(row))
        for call in got
        for prompt, row in zip(_repeated(call), call.rows, strict=True)
    )
    return Result(
        scenario=scenario,
        texts=texts,
        num_compared=sum(len(row) for call in expected for row in call.rows),
        differences=tuple(differences(engine, expected, got, beams=scenario.num_beams > 1)),
        plain=plain,
        paged=paged,
    )


def _repeated(call: Generated) -> list[Row]:
    times = len(call.rows) // len(call.prompts)
    return [prompt for prompt in call.prompts for _ in range(times)]


def run(
    settings: Settings, *, quiet: bool = False, page: Path | None = None
) -> tuple[Results, Console]:
    """Run all scenarios, and print each when it is done unless `quiet`. Then write the `page`.

    Raises: `BadInput`, also if `--memory` is too small.
    """
    console = Console(quiet=quiet)
    # The bundled model is too small to gain from threads. On a busy CPU, threads that wait for each
    # other make it ten times slower.
    threads = 1 if settings.model is None else None
    with models.quiet_transformers(), models.torch_threads(threads):
        return _run(settings, console, page), console


def _run(settings: Settings, console: Console, page: Path | None) -> Results:
    with _status(console, "loading the model"):
        engine = Engine(settings)
        scenarios = build(settings, engine.tokenize, engine.max_positions)
        _warm_up(engine, scenarios[0])
    report.show_heading(console, engine.name, engine.dtype, engine.place, settings)
    done = []
    for scenario in scenarios:
        with _status(console, f"({scenario.key}) {scenario.title}"):
            try:
                result = compare(engine, scenario)
            except OutOfBlocks as error:
                raise BadInput(f"scenario ({scenario.key}): {_in_options(error)}") from None
        report.show_result(console, result, settings)
        done.append(result)
    modes = _modes(console, engine)
    results = Results(settings, engine.name, str(engine.device), engine.dtype, tuple(done), modes)
    report.show_summary(console, results)
    if page is not None:
        with _status(console, f"{NUM_REQUESTS} requests at once, for the report"):
            _write_report(console, engine, done[0].paged.block_bytes, page)
    return results


def _modes(console: Console, engine: Engine) -> tuple[dict[str, Any], ...]:
    """Compare the modes with the bundled model, on a CPU: others may not fit in an engine."""
    if engine.settings.model is not None or engine.device.type != "cpu":
        return ()
    with _status(console, "requests in three modes"):
        return tuple(records(show_modes(console, engine)))


def _write_report(console: Console, engine: Engine, block_bytes: int, page: Path) -> None:
    try:
        write_demo_report(engine, block_bytes, page)
    except (KVPagerError, ValueError) as error:  # models that generate, but cannot be batched
        console.print(f"no report: {error}", markup=False, highlight=False, soft_wrap=True)
    else:
        requests = f"{NUM_REQUESTS} requests at once, as a page"
        console.print(f"{requests}: {page}", markup=False, highlight=False, soft_wrap=True)


def _in_options(error: OutOfBlocks) -> str:
    """Return the message with the command's option in place of arguments of `patch`."""
    message = str(error).replace(" or set host_memory= to offload", "")
    return re.sub(r"\bmemory(?==| to )", "--memory", message)


def _warm_up(engine: Engine, scenario: Scenario) -> None:
    """Compile kernels and start threads before the measurement."""
    prompts = scenario.calls[0][:1]
    engine.generate(prompts, scenario, WARM_UP_TOKENS)
    with _patched(engine, prefix_cache=False):
        engine.generate(prompts, scenario, WARM_UP_TOKENS)


@contextlib.contextmanager
def _status(console: Console, text: str) -> Iterator[None]:
    """Show a spinner if the output is a terminal."""
    if not console.is_terminal or console.quiet:
        yield
        return
    with console.status(f"{text} ..."):
        yield
