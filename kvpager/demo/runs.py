"""Load the model, run every scenario with transformers' cache and with kvpager, compare."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import kvpager
from kvpager._text import counted
from kvpager.demo import measurement, report
from kvpager.demo.comparison import differences
from kvpager.demo.results import CallFigures, Paged, Plain, Result, Results, RowText
from kvpager.demo.scenarios import Row, Scenario, build
from kvpager.demo.settings import Settings
from kvpager.errors import BadInput, OutOfBlocks
from kvpager.integrations.huggingface.patching.handle import Patch
from kvpager.integrations.huggingface.patching.report import PatchStats
from kvpager.integrations.huggingface.releases import cache_of
from kvpager.testing import tiny_llama_path

WARM_UP_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Generated:
    """The result of one call of `generate`: its rows, on the CPU, and its cache."""

    prompts: tuple[Row, ...]
    rows: list[Row]  # new tokens only
    cache: Any
    seconds: float


class Engine:
    """A model, its tokenizer, and how to generate with them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = settings.found_device()
        self.name = settings.model or "the bundled tiny Llama"
        self.model, self.tokenizer = _load(settings, self.device)
        self.max_positions = _max_positions(self.model.config)
        eos = self.model.generation_config.eos_token_id
        self.eos = eos if eos is not None else self.tokenizer.eos_token_id
        first_eos = self.eos[0] if isinstance(self.eos, list) else self.eos
        pad = self.tokenizer.pad_token_id
        self.pad: int = next((token for token in (pad, first_eos) if token is not None), 0)

    @property
    def dtype(self) -> str:
        """Return the dtype of keys and values. O(1)."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def place(self) -> str:
        """Return the device, with the number of threads for a CPU. O(1)."""
        if self.device.type != "cpu":
            return str(self.device)
        threads = torch.get_num_threads()
        return f"{self.device} ({counted(threads, 'thread')})"

    def tokenize(self, text: str) -> Row:
        """Return token ids, without an end-of-text token. O(text)."""
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        while ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        return ids

    def decode(self, ids: Row) -> str:
        """Return the text of token ids. O(tokens)."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def generate(self, prompts: tuple[Row, ...], scenario: Scenario, num_tokens: int) -> Generated:
        """Call `generate`, greedy or with beams, for `num_tokens` new tokens in every row."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        ids, mask = ids.to(self.device), mask.to(self.device)
        measurement.synchronize(self.device)
        start = time.perf_counter()
        output = self.model.generate(
            ids,
            attention_mask=mask,
            generation_config=self._config(scenario, num_tokens),
        )
        measurement.synchronize(self.device)
        seconds = time.perf_counter() - start
        new = output.sequences[:, width:].tolist()
        return Generated(prompts, new, cache_of(output), seconds)

    def _config(self, scenario: Scenario, num_tokens: int) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,  # no row ends early, so that the figures compare
            do_sample=False,
            num_beams=scenario.num_beams,
            num_return_sequences=scenario.num_returned,
            pad_token_id=self.pad,
            eos_token_id=self.eos,
            return_dict_in_generate=True,
            use_cache=True,
        )

    @property
    def eps(self) -> float:
        """Return the distance from 1 to the next number of the model's dtype."""
        return torch.finfo(self.model.dtype).eps

    @torch.inference_mode()
    def logits(self, ids: Row, num_last: int) -> torch.Tensor:
        """Return float32 logits [num_last, vocabulary] at the last positions. O(tokens)."""
        output = self.model(torch.tensor([ids], device=self.device), use_cache=False)
        return output.logits[0, -num_last:].float()  # type: ignore[no-any-return]


def _load(settings: Settings, device: torch.device) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = settings.model or str(tiny_llama_path())
    dtype = settings.dtype or ("auto" if settings.model else "float32")
    if settings.model and _looks_like_path(name) and not Path(name).expanduser().is_dir():
        raise BadInput(f"model={name}: no such folder.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadInput(f"model={name}: cannot be loaded: {reason}") from None
    try:
        return model.to(device).eval(), tokenizer
    except torch.OutOfMemoryError:
        raise BadInput(f"model={name}: does not fit on {device}. Try --dtype bfloat16.") from None


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _max_positions(config: Any) -> int | None:
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


# -------------------------------------------------------------------- both sides


def generate_plain(engine: Engine, scenario: Scenario) -> tuple[list[Generated], Plain]:
    """Run the scenario with DynamicCache; return its calls and its memory."""
    done: list[Generated] = []
    for prompts in scenario.calls:
        if not scenario.keep_caches and done:
            done[-1] = _without_cache(done[-1])
        done.append(engine.generate(prompts, scenario, engine.settings.max_new_tokens))
    alive = [call for call in done if call.cache is not None]
    layers = measurement.layer_bytes(alive[-1].cache)
    longest = max(len(row) for call in alive for row in call.prompts)
    num_rows, known = scenario.rows_alive, longest + engine.settings.max_new_tokens
    limit = engine.max_positions
    held = known - 1
    plain = Plain(
        reserved_bytes=sum(measurement.reserved_bytes(call.cache) for call in alive),
        needed_bytes=measurement.needed_bytes(layers, _held_rows(scenario, alive)),
        seconds=sum(call.seconds for call in done),
        limit_tokens=limit,
        known_length_tokens=known,
        known_length_bytes=measurement.contiguous_bytes(layers, num_rows, known, held),
        limit_bytes=limit and measurement.contiguous_bytes(layers, num_rows, limit, held),
    )
    return [_without_cache(call) for call in done], plain


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


def _without_cache(call: Generated) -> Generated:
    return Generated(call.prompts, call.rows, None, call.seconds)


def generate_paged(engine: Engine, scenario: Scenario) -> tuple[list[Generated], Paged]:
    """Run the scenario with kvpager; return its calls and its memory."""
    settings = engine.settings
    with _patched(engine, prefix_cache=scenario.prefix_cache) as patch:
        done: list[Generated] = []
        figures: list[CallFigures] = []
        for prompts in scenario.calls:
            if not scenario.keep_caches and done:
                done[-1] = _without_cache(done[-1])
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
        return [_without_cache(call) for call in done], paged


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


def run(settings: Settings, *, quiet: bool = False) -> tuple[Results, Console]:
    """Run all scenarios, and print each when it is done unless `quiet`.

    Raises: `BadInput`, also if `--memory` is too small.
    """
    console = Console(quiet=quiet)
    with _quiet_transformers(), _few_threads(settings):
        return _run(settings, console), console


def _run(settings: Settings, console: Console) -> Results:
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
    results = Results(settings, engine.name, str(engine.device), engine.dtype, tuple(done))
    report.show_summary(console, results)
    return results


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
def _few_threads(settings: Settings) -> Iterator[None]:
    """Use one thread for the bundled model, then restore the setting."""
    # The bundled model is too small to gain from threads. On a busy CPU, threads that wait for each
    # other make it ten times slower.
    threads = torch.get_num_threads()
    if settings.model is None:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence hints and progress bars, then restore the settings."""
    from transformers.utils import logging

    hub = getLogger("huggingface_hub")
    level, hub_level, bars = logging.get_verbosity(), hub.level, logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub.setLevel(ERROR)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _status(console: Console, text: str) -> Iterator[None]:
    """Show a spinner if the output is a terminal."""
    if not console.is_terminal or console.quiet:
        yield
        return
    with console.status(f"{text} ..."):
        yield
