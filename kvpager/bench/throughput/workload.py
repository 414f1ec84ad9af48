"""Requests to serve: generated, or read from a trace."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvpager import _validate as arguments
from kvpager.recording import textfile
from kvpager.simulate.replay import Recorded, read_records

FIRST_ID = 3  # special tokens usually have lower ids
_TOKENS_PER_HASH = 512  # prompt tokens per entry of a trace's `hash_ids`
_TOKENS_MAX = 50_000_000  # prompt tokens of a trace, as lists of Python ints
_COLUMNS = ("arrival", "prompt_length", "output_length")


class Item(NamedTuple):
    """A request: its arrival time, its prompt, and the length of its reply."""

    arrival: float  # seconds since the start
    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival. Token ids are below `vocabulary`."""

    name: str
    items: tuple[Item, ...]
    vocabulary: int

    @property
    def prompt_tokens(self) -> int:
        """Return the tokens of all prompts. O(requests)."""
        return sum(len(item.prompt) for item in self.items)

    @property
    def new_tokens(self) -> int:
        """Return the tokens of all replies. O(requests)."""
        return sum(item.new_tokens for item in self.items)

    @property
    def longest(self) -> int:
        """Return the tokens of the longest request, reply included. O(requests)."""
        return max(len(item.prompt) + item.new_tokens for item in self.items)

    def blocks(self, block_size: int) -> int:
        """Return the blocks of all requests together, without sharing. O(requests)."""
        lengths = (len(item.prompt) + item.new_tokens for item in self.items)
        return sum(-(-length // block_size) for length in lengths)

    def first(self, count: int) -> Workload:
        """Return the first `count` requests. O(count)."""
        return Workload(self.name, self.items[:count], self.vocabulary)

    def warm_up(self, count: int = 4, new_tokens: int = 8) -> Workload:
        """Return a few requests with other token ids, all at once. O(tokens).

        The longest prompts are among them, so buffers reach their final size.
        """
        chosen = sorted(self.items, key=lambda item: -len(item.prompt))[:count]
        random = np.random.default_rng(len(self.items))
        items = tuple(
            Item(0.0, _ids(random, len(each.prompt), self.vocabulary), new_tokens)
            for each in chosen
        )
        return Workload(f"{self.name}, warm-up", items, self.vocabulary)

    def check(self, max_length: int | None) -> None:
        """Check that every request fits `max_length` positions. Raises `ValueError`."""
        if max_length is None or self.longest <= max_length:
            return
        lengths = [len(item.prompt) + item.new_tokens for item in self.items]
        number = lengths.index(self.longest)
        item = self.items[number]
        raise ValueError(
            f"request {number}: {len(item.prompt)} + {item.new_tokens} tokens, but the model has "
            f"{max_length} positions. Shorten or leave out such requests."
        )


def synthetic(
    num_prompts: int,
    input_len: tuple[int, int],
    output_len: int,
    *,
    vocabulary: int,
    prefix_len: int = 0,
    request_rate: float | None = None,
    seed: int = 0,
) -> Workload:
    """Return random requests; the same arguments give the same requests. O(tokens).

    Args:
        num_prompts: number of requests.
        input_len: bounds of a prompt's own length, both included; lengths are uniform.
        output_len: generated tokens per request.
        vocabulary: token ids are below this number.
        prefix_len: length of a prefix that all prompts share, in addition to `input_len`.
        request_rate: requests per second, a Poisson process; None: all arrive at once.
        seed: seed of lengths, token ids and arrival times.

    Raises: `ValueError`, `TypeError` for an argument out of bounds.
    """
    num_prompts = arguments.count("num_prompts", num_prompts, at_least=1)
    low, high = input_len
    low = arguments.count("input_len", low, at_least=1)
    high = arguments.count("input_len", high)
    if high < low:
        raise ValueError(f"input_len={low}-{high}: expected the lower bound first.")
    output_len = arguments.count("output_len", output_len, at_least=1)
    prefix_len = arguments.count("prefix_len", prefix_len)
    random = np.random.default_rng(arguments.count("seed", seed))
    lengths = random.integers(low, high + 1, num_prompts)
    times = _arrival_times(random, num_prompts, request_rate)
    prefix = _ids(random, prefix_len, vocabulary)
    items = tuple(
        Item(float(time), prefix + _ids(random, int(length), vocabulary), output_len)
        for time, length in zip(times, lengths, strict=True)
    )
    name = f"{num_prompts} requests, prompts of {low}-{high} tokens, {output_len} new"
    if prefix_len:
        name += f", shared prefix of {prefix_len}"
    if request_rate is not None:
        name += f", {request_rate:g} a second"
    return Workload(name, items, vocabulary)


def _arrival_times(random: np.random.Generator, count: int, rate: float | None) -> Iterable[float]:
    if rate is None:
        return [0.0] * count
    if not 0 < rate < math.inf:
        raise ValueError(f"request_rate={rate}: expected a positive number of requests per second.")
    times = np.cumsum(random.exponential(1 / rate, count))
    return [float(time) for time in times - times[0]]


def _ids(random: np.random.Generator, count: int, vocabulary: int) -> list[int]:
    if vocabulary <= FIRST_ID:
        raise ValueError(f"vocabulary={vocabulary}: expected more than {FIRST_ID} ids.")
    ids: list[int] = random.integers(FIRST_ID, vocabulary, count).tolist()
    return ids


# -------------------------------------------------------------------- arrivals


@dataclass(frozen=True, slots=True)
class Clock:
    """A clock in seconds, and the function that waits."""

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], object] = time.sleep


MONOTONIC = Clock(now=time.monotonic)  # the clock of `Output` times
PERFORMANCE = Clock()


def arrivals(workload: Workload, start: float, clock: Clock) -> Iterator[tuple[int, Item]]:
    """Yield number and request when each is due, late requests at once. O(requests)."""
    for number, item in enumerate(workload.items):
        left = start + item.arrival - clock.now()
        if left > 0:
            clock.sleep(left)
        yield number, item


# -------------------------------------------------------------------- traces


def from_trace(
    path: str | Path,
    *,
    vocabulary: int,
    num_prompts: int | None = None,
    max_request_len: int | None = None,
    speed: float = 1.0,
    seed: int = 0,
) -> Workload:
    """Read the requests of a trace; token ids are random. O(tokens).

    Formats: JSON lines of the Mooncake release, also gzipped, with `timestamp` (ms),
    `input_length`, `output_length` and `hash_ids`, where each id stands for 512 tokens. Or a `.csv`
    file whose header names `arrival` (seconds), `prompt_length` and `output_length`.

    Args:
        path: the file.
        vocabulary: ids are below it.
        num_prompts: take only the first n requests.
        max_request_len: leave out requests with more tokens, prompt and reply together.
        speed: replay speed; 2 halves the time between arrivals.
        seed: seed of the token ids.

    Raises: `OSError`; `ValueError` with the first lines that are not requests.
    """
    path = Path(path)
    if not 0 < speed < math.inf:
        raise ValueError(f"speed={speed}: expected a positive number.")
    if num_prompts is not None:
        num_prompts = arguments.count("num_prompts", num_prompts, at_least=1)
    prompts = _Prompts(vocabulary, seed)
    records = list(_csv_records(path)) if path.suffix == ".csv" else read_records(path)[0]
    chosen = _chosen(records, path, num_prompts, max_request_len)
    begin = chosen[0].seconds
    items = tuple(
        Item((record.seconds - begin) / speed, prompts(record), record.output_length)
        for record in chosen
    )
    return Workload(f"{path.name}, {len(items)} requests", items, vocabulary)


def _chosen(
    records: list[Recorded], path: Path, num_prompts: int | None, max_request_len: int | None
) -> list[Recorded]:
    """Return up to `num_prompts` requests by time, without empty and too long ones."""
    served = [
        record
        for record in sorted(records, key=lambda record: record.seconds)
        if record.prompt_length >= 1
        and record.output_length >= 1
        and (
            max_request_len is None
            or record.prompt_length + record.output_length <= max_request_len
        )
    ][:num_prompts]
    if not served:
        raise ValueError(
            f"{path}: none of {len(records)} requests is short enough. Raise max_request_len."
        )
    if sum(record.prompt_length for record in served) > _TOKENS_MAX:
        raise ValueError(
            f"{path}: more than {_TOKENS_MAX:,} prompt tokens. Lower num_prompts or "
            "max_request_len."
        )
    return served


class _Prompts:
    """Random token ids for recorded requests, equal for equal hash ids."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self._vocabulary, self._seed = vocabulary, arguments.count("seed", seed)
        self._random = np.random.default_rng(seed)

    def __call__(self, record: Recorded) -> list[int]:
        ids: list[int] = []
        for block in record.hash_ids:
            if len(ids) >= record.prompt_length:
                break
            own = np.random.default_rng([self._seed, block])
            ids += _ids(own, _TOKENS_PER_HASH, self._vocabulary)
        ids += _ids(self._random, max(record.prompt_length - len(ids), 0), self._vocabulary)
        return ids[: record.prompt_length]


def _csv_records(path: Path) -> Iterator[Recorded]:
    reader = csv.DictReader(line.decode(errors="replace") for line in textfile.lines(path))
    try:
        missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: line 1: no column {missing[0]!r}; expected {_COLUMNS}")
        for row in reader:
            yield _csv_record(row, f"{path}: line {reader.line_num}")
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}") from None


def _csv_record(row: dict[str, str], place: str) -> Recorded:
    try:
        seconds = float(row["arrival"])
        lengths = int(row["prompt_length"]), int(row["output_length"])
    except (TypeError, ValueError):
        raise ValueError(f"{place}: expected three numbers") from None
    most = arguments.COUNT_MAX
    if not 0 <= seconds < math.inf or not 0 <= min(lengths) <= max(lengths) <= most:
        raise ValueError(f"{place}: expected numbers, at least 0 and at most {most:,}")
    return Recorded(seconds, *lengths, hash_ids=[])
