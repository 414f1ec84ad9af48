"""Requests to be replayed: made up, or read from a trace."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvpager import _validate as arguments
from kvpager.simulate import textfile
from kvpager.simulate.replay import Recorded, read_records

FIRST_ID = 3  # lower ids are what special tokens usually have
_TOKENS_PER_HASH = 512  # of a prompt, behind each of a trace's `hash_ids`
_TOKENS_MAX = 50_000_000  # of a trace's prompts, which are lists of Python ints
_COLUMNS = ("arrival", "prompt_length", "output_length")


class Item(NamedTuple):
    """A request: when it comes, what it says, and how many tokens it wants."""

    arrival: float  # seconds after the beginning
    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order in which they come. `vocabulary`: ids are below it."""

    name: str
    items: tuple[Item, ...]
    vocabulary: int

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts. O(requests)."""
        return sum(len(item.prompt) for item in self.items)

    @property
    def new_tokens(self) -> int:
        """Of all replies. O(requests)."""
        return sum(item.new_tokens for item in self.items)

    @property
    def longest(self) -> int:
        """Tokens of the longest request with its reply. O(requests)."""
        return max(len(item.prompt) + item.new_tokens for item in self.items)

    def blocks(self, block_size: int) -> int:
        """Blocks that all requests take together, none shared. O(requests)."""
        lengths = (len(item.prompt) + item.new_tokens for item in self.items)
        return sum(-(-length // block_size) for length in lengths)

    def first(self, count: int) -> Workload:
        """The first `count` requests alone. O(count)."""
        return Workload(self.name, self.items[:count], self.vocabulary)

    def warm_up(self, count: int = 4, new_tokens: int = 8) -> Workload:
        """Some requests at once, of other ids, so that nothing of them is known later. O(tokens).

        The longest prompt is among them: what is made for the greatest sizes is made now.
        """
        chosen = sorted(self.items, key=lambda item: -len(item.prompt))[:count]
        random = np.random.default_rng(len(self.items))
        items = tuple(
            Item(0.0, _ids(random, len(each.prompt), self.vocabulary), new_tokens)
            for each in chosen
        )
        return Workload(f"{self.name}, warm-up", items, self.vocabulary)

    def check(self, max_length: int | None) -> None:
        """Refuse what a model of `max_length` positions cannot serve. Raises `ValueError`."""
        if max_length is None or self.longest <= max_length:
            return
        number, item = max(enumerate(self.items), key=_length_of_numbered)
        raise ValueError(
            f"request {number}: {len(item.prompt)} + {item.new_tokens} tokens, but the model has "
            f"{max_length} positions; leave such requests out"
        )


def _length_of_numbered(numbered: tuple[int, Item]) -> int:
    return len(numbered[1].prompt) + numbered[1].new_tokens


def synthetic(
    num_requests: int,
    prompt_tokens: tuple[int, int],
    new_tokens: int,
    *,
    vocabulary: int,
    shared: int = 0,
    rate: float | None = None,
    seed: int = 0,
) -> Workload:
    """Made-up requests; the same arguments give the same. O(tokens).

    Args:
        num_requests: how many.
        prompt_tokens: the least and the most tokens of a prompt's own, all lengths as likely.
        new_tokens: of each reply.
        vocabulary: ids are below it.
        shared: tokens that all prompts begin with, besides their own.
        rate: requests a second, at random moments (a Poisson process); None: all at once.
        seed: of lengths, ids and moments.

    Raises: `ValueError`, `TypeError` for what makes no sense.
    """
    num_requests = arguments.count("requests", num_requests, at_least=1)
    low, high = prompt_tokens
    low = arguments.count("prompt tokens", low, at_least=1)
    high = arguments.count("prompt tokens", high)
    if high < low:
        raise ValueError(f"prompt tokens {low}-{high}: expected the lower number first")
    new_tokens = arguments.count("new tokens", new_tokens, at_least=1)
    shared = arguments.count("shared prefix", shared)
    random = np.random.default_rng(arguments.count("seed", seed))
    lengths = random.integers(low, high + 1, num_requests)
    moments = _moments(random, num_requests, rate)
    beginning = _ids(random, shared, vocabulary)
    items = tuple(
        Item(float(moment), beginning + _ids(random, int(length), vocabulary), new_tokens)
        for moment, length in zip(moments, lengths, strict=True)
    )
    name = f"{num_requests} requests, prompts of {low}-{high} tokens, {new_tokens} new"
    if shared:
        name += f", {shared} shared"
    if rate is not None:
        name += f", {rate:g} a second"
    return Workload(name, items, vocabulary)


def _moments(random: np.random.Generator, num_requests: int, rate: float | None) -> Iterable[float]:
    if rate is None:
        return [0.0] * num_requests
    if not 0 < rate < math.inf:
        raise ValueError(f"rate {rate}: expected requests a second, above 0")
    moments = np.cumsum(random.exponential(1 / rate, num_requests))
    return [float(moment) for moment in moments - moments[0]]


def _ids(random: np.random.Generator, count: int, vocabulary: int) -> list[int]:
    if vocabulary <= FIRST_ID:
        raise ValueError(f"vocabulary {vocabulary}: expected more than {FIRST_ID} ids")
    ids: list[int] = random.integers(FIRST_ID, vocabulary, count).tolist()
    return ids


# -------------------------------------------------------------------- traces


def from_trace(
    path: str | Path,
    *,
    vocabulary: int,
    limit: int | None = None,
    longest: int | None = None,
    speed: float = 1.0,
    seed: int = 0,
) -> Workload:
    """The requests of a trace; their tokens are made up. O(tokens).

    Two forms are read. JSON lines of the Mooncake release, also gzipped: `timestamp` (ms),
    `input_length`, `output_length` and `hash_ids`, where prompts whose ids begin alike begin with
    the same tokens, 512 behind each id. Or a `.csv` file whose header names `arrival` (seconds),
    `prompt_length` and `output_length`.

    Args:
        path: the file.
        vocabulary: ids are below it.
        limit: the first so many requests alone.
        longest: leave out requests that have more tokens, prompt and reply together.
        speed: how many times as quickly requests come as they did.
        seed: of the tokens.

    Raises: `OSError`; `ValueError` naming the first lines that are not requests.
    """
    path = Path(path)
    if not 0 < speed < math.inf:
        raise ValueError(f"speed {speed}: expected a number above 0")
    if limit is not None:
        limit = arguments.count("requests", limit, at_least=1)
    prompts = _Prompts(vocabulary, seed)
    records = list(_csv_records(path)) if path.suffix == ".csv" else read_records(path)
    chosen = _chosen(records, path, limit, longest)
    begin = chosen[0].seconds
    items = tuple(
        Item((record.seconds - begin) / speed, prompts(record), record.output_length)
        for record in chosen
    )
    return Workload(f"{path.name}, {len(items)} requests", items, vocabulary)


def _chosen(
    records: list[Recorded], path: Path, limit: int | None, longest: int | None
) -> list[Recorded]:
    """Return the requests that are neither empty nor too long, by time, up to `limit` of them."""
    served = [
        record
        for record in sorted(records, key=lambda record: record.seconds)
        if record.prompt_length >= 1
        and record.output_length >= 1
        and (longest is None or record.prompt_length + record.output_length <= longest)
    ][:limit]
    if not served:
        raise ValueError(f"{path}: no request is left of {len(records)}")
    if sum(record.prompt_length for record in served) > _TOKENS_MAX:
        raise ValueError(
            f"{path}: prompts of more than {_TOKENS_MAX:,} tokens. Take fewer requests, or "
            "leave out the longest."
        )
    return served


class _Prompts:
    """Token ids for recorded requests."""

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
