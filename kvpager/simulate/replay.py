"""Replay of recorded traffic through eviction policies.

A trace is a list of prompts, each a list of prefix blocks. It is replayed through a real
`BlockManager` whose blocks hold one token, the number of a prefix block. Each request allocates,
commits and frees its blocks. The result is the hit ratio: the share of blocks found from the front
of each prompt. The offline optimum knows the future; no policy can exceed it at equal capacity.

Traces have the format of the Mooncake release (Qin et al., FAST 2025), one JSON object per line:
`timestamp`, `input_length`, `output_length`, and `hash_ids`, one id per prefix block.
"""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvpager import _validate as arguments
from kvpager.blocks.manager import BlockManager
from kvpager.plans import Int32
from kvpager.recording import textfile
from kvpager.simulate.policies import COMPARED
from kvpager.simulate.recording import TraceRecorder

_ID_END = 2**31
_BAD_LINES_SHOWN = 3
_BAD_LINES_MAX = 1000  # reading stops after this many bad lines
_SKIPPED_MAX = 100_000  # maximum bad lines to skip
_BLOCKS_MAX = 20_000_000  # of a trace; a distinct block takes about 200 bytes
_MILLISECONDS_MAX = 10**15
_NEVER = 2**62
OFFLINE = "offline optimum"


class Recorded(NamedTuple):
    """A request of a recorded trace."""

    seconds: float
    prompt_length: int
    output_length: int
    hash_ids: list[int]


@dataclass(frozen=True, slots=True)
class Trace:
    """Prompts by time of arrival, as numbers of prefix blocks. Equal numbers are equal prefixes.

    The numbers are 0 to `num_prefixes` - 1. A prefix has a higher number than its own prefixes.
    """

    name: str
    prompts: tuple[Int32, ...]
    num_prefixes: int
    skipped: tuple[str, ...] = ()  # the errors of skipped lines

    @property
    def num_blocks(self) -> int:
        """The number of blocks of all prompts. O(prompts)."""
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def unlimited(self) -> float:
        """The hit ratio of a cache that never evicts. O(prompts)."""
        return 1 - self.num_prefixes / max(self.num_blocks, 1)


@dataclass(frozen=True, slots=True)
class TierResult:
    """What one tier below the pool served and took, in blocks."""

    name: str
    capacity: int
    hits: int
    written: int


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one policy on one trace."""

    policy: str
    capacity: int
    hits: int  # in the pool
    blocks: int
    evicted: int
    too_long: int  # requests longer than the pool
    seconds: float
    tiers: tuple[TierResult, ...] = ()

    @property
    def hit_ratio(self) -> float:
        """The share of requested blocks that were found in the pool. O(1)."""
        return self.hits / max(self.blocks, 1)


# -------------------------------------------------------------------- traces


def read_trace(path: str | Path, skip_bad: bool = False) -> Trace:
    """Read a trace, which may be gzipped. O(blocks).

    Raises: `OSError` if the file cannot be read. `ValueError` for lines that are not requests; it
    names the first ones. With `skip_bad`, `ValueError` only if too many lines or all are bad.
    """
    path = Path(path)
    records, bad = read_records(path, skip_bad)
    return number_prefixes(path.name, (record.hash_ids for record in records), tuple(bad))


def read_records(path: Path, skip_bad: bool = False) -> tuple[list[Recorded], list[str]]:
    """Return the requests of a trace, and the errors of skipped lines. O(blocks).

    Raises: as `read_trace`.
    """
    records: list[Recorded] = []
    bad: list[str] = []
    num_blocks, most_bad = 0, _SKIPPED_MAX if skip_bad else _BAD_LINES_MAX
    for number, line in enumerate(textfile.lines(path), 1):
        if not line.strip():
            continue
        try:
            records.append(_request(line))
        except ValueError as error:
            bad.append(f"line {number}: {error}")
            if len(bad) > most_bad:
                break
        else:
            num_blocks += len(records[-1].hash_ids)
            if num_blocks > _BLOCKS_MAX:
                raise ValueError(f"{path}: more than {_BLOCKS_MAX:,} blocks. Use a part of it.")
    if bad and (not skip_bad or len(bad) > most_bad):
        more = len(bad) - _BAD_LINES_SHOWN
        what = f"; and {'at least ' * (len(bad) > most_bad)}{more:,} more" if more > 0 else ""
        raise ValueError(f"{path}: {'; '.join(bad[:_BAD_LINES_SHOWN])}{what}")
    if not records:
        raise ValueError(f"{path}: no request in it. Pass a trace in the Mooncake format.")
    return records, bad


def _request(line: bytes) -> Recorded:
    """Parse one line. Raises: `ValueError`, which names the bad field. O(line)."""
    try:
        fields = json.loads(line)
    except RecursionError:
        raise ValueError("not JSON: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object, got {type(fields).__name__}")
    for name in ("timestamp", "input_length", "output_length"):
        value: Any = fields.get(name)
        most = _MILLISECONDS_MAX if name == "timestamp" else arguments.COUNT_MAX
        if type(value) not in (int, float) or not 0 <= value <= most:
            got = f"{name} {arguments.shown(value)}"
            raise ValueError(f"{got}: expected a number, at least 0 and at most {most:,}")
    ids = fields.get("hash_ids")
    if not isinstance(ids, list):
        raise ValueError(f"hash_ids {arguments.shown(ids)}: expected a list")
    for value in ids:
        if type(value) is not int or not 0 <= value < _ID_END:
            got = f"hash_ids holds {arguments.shown(value)}"
            raise ValueError(f"{got}: expected ints from 0 to 2**31 - 1")
    lengths = int(fields["input_length"]), int(fields["output_length"])
    return Recorded(fields["timestamp"] / 1000, *lengths, ids)


def number_prefixes(
    name: str, prompts: Iterable[list[int]], skipped: tuple[str, ...] = ()
) -> Trace:
    """Return a trace with a number for each prefix: equal ids may continue different prefixes.

    O(blocks).
    """
    numbers: dict[tuple[int, int], int] = {}
    numbered = []
    for ids in prompts:
        before, path = -1, np.empty(len(ids), np.int32)
        for at, value in enumerate(ids):
            before = path[at] = numbers.setdefault((before, value), len(numbers))
        numbered.append(path)
    return Trace(name, tuple(numbered), len(numbers), skipped)


# -------------------------------------------------------------------- replay


def replay(
    trace: Trace,
    capacity: int,
    policy: str,
    progress: Callable[[int], object] = lambda count: None,
    record: str | PathLike[str] | None = None,
) -> Result:
    """Replay `trace` with `policy` in a pool of `capacity` blocks. O(blocks * log capacity).

    A prompt longer than the pool counts its hits, but is not cached. `progress` is called with 1
    after each request. `record` is a file to record in, where a slot is a block of the trace.
    Raises: `TypeError`, `ValueError`; `OSError` if the file cannot be written.
    """
    capacity = arguments.count("capacity", capacity, at_least=1)
    # `allocate` never reuses the last token. So each prompt gets one more token, which is never
    # committed, and the pool one more block for it. Then all blocks of the trace are looked up, and
    # exactly `capacity` of them can be cached. More blocks than prefixes would only cost memory.
    num_blocks = min(capacity, trace.num_prefixes) + 1
    manager = BlockManager(num_blocks, 1, eviction=COMPARED[policy](num_blocks))
    recorder = None if record is None else TraceRecorder(record, manager, policy)
    hits = too_long = 0
    start = time.perf_counter()
    for number, prompt in enumerate(trace.prompts):
        if len(prompt) > capacity:
            hits += manager.match_prefix(prompt)
            too_long += 1
        else:
            sequence = manager.allocate(np.append(prompt, np.int32(trace.num_prefixes)))
            hits += sequence.num_cached_tokens
            if recorder is not None:
                recorder.step(number, len(prompt), sequence)
            manager.commit(sequence, len(prompt))
            manager.free(sequence)
        progress(1)
    seconds = time.perf_counter() - start
    if recorder is not None:
        recorder.close()
    evicted = manager.queries.num_evicted_blocks
    return Result(policy, capacity, hits, trace.num_blocks, evicted, too_long, seconds)


def offline_optimum(trace: Trace, capacity: int) -> Result:
    """Replay `trace` with the best possible policy. O(blocks * log blocks).

    Belady's rule (1966) evicts the block whose next use is furthest away. A prefix is used whenever
    a longer prefix is, so with ties resolved by depth that block is always a leaf of the tree. The
    optimum may cache the front of a prompt that is longer than the pool. Policies may not, but
    without that it would be no upper bound.
    """
    capacity = arguments.count("capacity", capacity, at_least=1)
    start = time.perf_counter()
    coming = _next_uses(trace)
    next_use = [_NEVER] * trace.num_prefixes
    is_cached = bytearray(trace.num_prefixes)
    furthest: list[tuple[int, int]] = []  # (-next use, -number), some outdated
    num_cached = hits = evicted = too_long = 0
    for prompt, uses in zip(trace.prompts, coming, strict=True):
        numbers = prompt.tolist()
        found = 0
        while found < len(numbers) and is_cached[numbers[found]]:
            found += 1
        hits += found
        num_cached += len(numbers) - found
        entries = []
        for number, use in zip(numbers, uses, strict=True):
            is_cached[number] = True
            next_use[number] = use
            entries.append((-use, -number))
        if len(numbers) > capacity:
            too_long += 1
            while entries:
                heapq.heappush(furthest, entries.pop())
        while num_cached > capacity:
            use, number = heapq.heappop(furthest)
            if is_cached[-number] and next_use[-number] == -use:
                is_cached[-number] = False
                num_cached -= 1
                evicted += 1
        # Pushed only now: blocks that the request holds must not be evicted.
        for entry in entries:
            heapq.heappush(furthest, entry)
    seconds = time.perf_counter() - start
    return Result(OFFLINE, capacity, hits, trace.num_blocks, evicted, too_long, seconds)


def _next_uses(trace: Trace) -> list[list[int]]:
    """Return the request that uses each block of each prompt next."""
    later = np.full(trace.num_prefixes, _NEVER, np.int64)
    coming = []
    for request in range(len(trace.prompts) - 1, -1, -1):
        prompt = trace.prompts[request]
        coming.append(later[prompt].tolist())
        later[prompt] = request
    return coming[::-1]


# -------------------------------------------------------------------- figures


def summary(trace: Trace, results: Iterable[Result]) -> dict[str, Any]:
    """Return trace and results as plain data, for JSON. O(results)."""
    return {
        "trace": {
            "name": trace.name,
            "requests": len(trace.prompts),
            "blocks": trace.num_blocks,
            "prefixes": trace.num_prefixes,
            "unlimited": trace.unlimited,
            "skipped": list(trace.skipped),
        },
        "results": [{**asdict(result), "hit_ratio": result.hit_ratio} for result in results],
    }
