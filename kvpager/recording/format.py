"""The lines of a recording: a header, then a step per line, then the end.

    {"format":"kvpager-recording","version":1,...,"block_size":16,"num_blocks":4096,...}
    {"step":0,"t":0.012,"new":[[0,38,20,1]],"state":[[0,"running"]],"begin":[[0,0,0]],...}
    {"step":1,"t":0.019,"decode":[0]}
    {"step":2,"t":0.025}
    {"closed":3}

A step lists what changed since the step before. A missing key means no change of that kind. So a
step in which the same sequences grow by one token has only its number, time and counts.
`docs/guides/recordings.md` describes each key for programs in other languages.

Reading a line checks the type and bounds of every value. `replay` checks the rest, such as whether
a sequence is live or a block exists.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from kvpager import _validate as arguments
from kvpager.plans import Reason

FORMAT, VERSION = "kvpager-recording", 1
SOURCES = ("engine", "patch", "simulate", "manager")
MODES = ("paged", "virtual", "reserved")
LIVE_STATES = ("queued", "fetching", "running", "swapped", "dropped")
STATES = (*LIVE_STATES, *(reason.value for reason in Reason))
BLOCKS_MAX = 2**24  # of a pool, so that a reader may have an array of them
GROUPS_MAX = 64
_INT_MAX = arguments.COUNT_MAX
_BYTES_MAX = 2**62
_SECONDS_MAX = 10**11


class Header(NamedTuple):
    """The first line: what was recorded.

    Attributes:
        kvpager: the version that wrote the recording.
        source: one of `SOURCES`.
        mode: one of `MODES`.
        started: seconds since the epoch; the times of steps count from here.
        block_size: token slots of a block. In `simulate` a slot is a prefix block of the trace.
        num_blocks: blocks on the device.
        num_reserved: leading blocks that are never handed out: 1 with a null block.
        num_host_blocks: host blocks, for swap.
        block_bytes: bytes of a block, or None.
        windows: the sliding window of each group of layers; None for full attention.
        max_tokens: maximum tokens of a sequence, or None.
        policy: scheduling policy, or None.
        eviction: eviction policy, or None.
        model: class of the model, or None.
        tiers: the names of the stores, the fastest first.
    """

    kvpager: str
    source: str
    mode: str
    started: float
    block_size: int
    num_blocks: int
    num_reserved: int = 0
    num_host_blocks: int = 0
    block_bytes: int | None = None
    windows: tuple[int | None, ...] = (None,)
    max_tokens: int | None = None
    policy: str | None = None
    eviction: str | None = None
    model: str | None = None
    tiers: tuple[str, ...] = ()


class Counts(NamedTuple):
    """Blocks by state at one step. `held + cached + kept + free` are all usable device blocks.

    No sequence holds `cached` and `kept` blocks; `kept` ones are pinned or in an unfinished copy.
    `host` counts the host blocks of swapped sequences. `tokens` counts the slots in use of held
    blocks; a shared slot counts once.
    """

    held: int
    cached: int
    kept: int
    free: int
    host: int
    tokens: int


class Totals(NamedTuple):
    """Totals since the manager began: blocks, and tokens of prompts looked up and found."""

    copied: int
    evicted: int
    swapped_out: int
    swapped_in: int
    prefix_query_tokens: int
    prefix_hit_tokens: int


class TierCounts(NamedTuple):
    """The number of blocks in a store, None if unknown, and bytes moved since it was opened."""

    blocks: int | None
    loaded_bytes: int
    saved_bytes: int


class Step(NamedTuple):
    """What changed since the step before. Sequences and requests are numbers, never reused.

    An engine is recorded when a step is planned, before it is computed.

    Attributes:
        line: the number of the line.
        step: counts up from 0.
        t: seconds since `Header.started`.
        num_blocks: the pool was resized.
        uncached: blocks that left the prefix index.
        cached: lists of a parent and new cached blocks. Each block follows the one before it in
            the prefix tree. Parent -1 is the root. A block listed again has moved.
        end: sequences that ended.
        begin: (sequence, request or None, cached tokens) of new sequences, still without blocks.
        decode: sequences that grow by one token in every group, now and in each step until the
            next `decode`; None for the same as before.
        len: (sequence, tokens), or (sequence, tokens, group).
        blocks: (sequence, group, n, blocks): keep the first n entries of the table, then append
            these blocks. -1 is no block, -2 - h is host block h.
        new: (request, prompt tokens, maximum new tokens, samples) of requests that arrived.
        state: (request, one of `STATES`).
        prefill: (sequence, first token, tokens) of prompt chunks that the step computes.
        counts, totals, tiers: None for the same as before.
    """

    line: int
    step: int
    t: float
    num_blocks: int | None = None
    uncached: tuple[int, ...] = ()
    cached: tuple[tuple[int, ...], ...] = ()
    end: tuple[int, ...] = ()
    begin: tuple[tuple[int, int | None, int], ...] = ()
    decode: tuple[int, ...] | None = None
    len: tuple[tuple[int, ...], ...] = ()
    blocks: tuple[tuple[int, int, int, list[int]], ...] = ()
    new: tuple[tuple[int, int, int, int], ...] = ()
    state: tuple[tuple[int, str], ...] = ()
    prefill: tuple[tuple[int, int, int], ...] = ()
    counts: Counts | None = None
    totals: Totals | None = None
    tiers: tuple[TierCounts, ...] | None = None


class End(NamedTuple):
    """The last line of a run that was closed."""

    line: int
    closed: int  # steps


# -------------------------------------------------------------------- write


def encoded(fields: dict[str, Any]) -> bytes:
    """Return a line. O(fields)."""
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def encoded_header(header: Header) -> bytes:
    """Return the first line. O(1)."""
    return encoded({"format": FORMAT, "version": VERSION, **header._asdict()})


# -------------------------------------------------------------------- read


def parse_header(text: bytes) -> Header:
    """Return the header of a first line. O(line). Raises: `ValueError`."""
    fields = _object(text)
    if fields.pop("format", None) != FORMAT:
        raise ValueError(f'expected {{"format":"{FORMAT}",...}}. Is this a recording?')
    version = fields.pop("version", None)
    if version != VERSION:
        raise ValueError(
            f"version {arguments.shown(version)}: this kvpager reads version {VERSION}. "
            "Use the kvpager that wrote the recording."
        )
    values = _values(fields, _HEADER)
    missing = [name for name in Header._fields if name not in values]
    if missing:
        raise ValueError(f"the header lacks {', '.join(missing)}")
    return Header(**values)


def parse_line(text: bytes, line: int) -> Step | End:
    """Return the step or the end in a line that is not the first. O(line). Raises: `ValueError`."""
    fields = _object(text)
    if "closed" in fields:
        return End(line, **_values(fields, {"closed": _count}))
    if "format" in fields:
        raise ValueError("a second header. Is this more than one recording?")
    values = _values(fields, _STEP)
    if "step" not in values or "t" not in values:
        raise ValueError("a step lacks its number or its time")
    return Step(line, **values)


def _object(text: bytes) -> dict[str, Any]:
    try:
        fields = _DECODER.decode(text.decode())
    except RecursionError:
        raise ValueError("not JSON: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object, got {type(fields).__name__}")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _values(fields: dict[str, Any], checks: dict[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """Return the checked values. Raises: `ValueError`, which names the key."""
    values = {}
    for name, value in fields.items():
        check = checks.get(name)
        if check is None:
            raise ValueError(f"{arguments.shown(name)}: no key of version {VERSION}")
        try:
            values[name] = check(value)
        except (_Bad, TypeError, ValueError) as error:
            why = error.args[0] if isinstance(error, _Bad) else "a list of another shape"
            raise ValueError(f"{name}={arguments.shown(value)}: expected {why}") from None
    return values


class _Bad(Exception):
    """A value is not what its argument says."""


def _count(value: Any, most: int = _INT_MAX, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= most:
        raise _Bad(f"an int from {least} to {most:,}")
    return value


def _counts(values: Sequence[Any], most: int = _INT_MAX, least: int = 0) -> Sequence[int]:
    # Most of a recording is lists of numbers: a call for each would take a third of its reading.
    for value in values:
        if type(value) is not int or not least <= value <= most:
            raise _Bad(f"an int from {least} to {most:,}")
    return values


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


def _one_of(names: tuple[str, ...]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise _Bad(f"one of {', '.join(names)}")
        return value

    return check


def _name(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
        raise _Bad("a printable text of at most 200 characters")
    return value


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= _SECONDS_MAX:
        raise _Bad(f"seconds, 0 to {_SECONDS_MAX:,}")
    return float(value)


def _list(value: Any, most: int | None = None) -> list[Any]:
    if type(value) is not list or (most is not None and len(value) > most):
        raise _Bad("a list" if most is None else f"a list of at most {most}")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(_counts(_list(value)))


def _chain(value: Any) -> tuple[int, ...]:
    parent, *blocks = _list(value)
    if not blocks:
        raise _Bad("a parent and at least one block")
    return (_count(parent, least=-1), *_counts(blocks))


def _table(value: Any) -> tuple[int, int, int, list[int]]:
    sequence, group, kept, blocks = _list(value)
    _counts(_list(blocks), least=-_INT_MAX)
    _count(group, GROUPS_MAX - 1)
    _counts((sequence, kept))
    return sequence, group, kept, blocks


def _length(value: Any) -> tuple[int, ...]:
    if len(_list(value)) not in (2, 3):
        raise _Bad("[sequence, tokens] or [sequence, tokens, group]")
    return _numbers(value)


def _row(*checks: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def check(value: Any) -> tuple[Any, ...]:
        return tuple(each(item) for each, item in zip(checks, _list(value), strict=True))

    return check


def _rows(check: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    return lambda value: tuple([check(row) for row in _list(value)])


def _total(value: Any) -> int:
    return _count(value, _BYTES_MAX)


_HEADER: dict[str, Callable[[Any], Any]] = {
    "kvpager": _name,
    "source": _one_of(SOURCES),
    "mode": _one_of(MODES),
    "started": _seconds,
    "block_size": lambda value: _count(value, least=1),
    "num_blocks": lambda value: _count(value, BLOCKS_MAX, 1),
    "num_reserved": lambda value: _count(value, 1),
    "num_host_blocks": lambda value: _count(value, BLOCKS_MAX),
    "block_bytes": _optional(_total),
    "windows": lambda value: tuple(map(_optional(_count), _list(value, GROUPS_MAX))) or (None,),
    "max_tokens": _optional(_count),
    "policy": _optional(_name),
    "eviction": _optional(_name),
    "model": _optional(_name),
    "tiers": lambda value: tuple(map(_name, _list(value, 64))),
}
_STEP: dict[str, Callable[[Any], Any]] = {
    "step": _count,
    "t": _seconds,
    "num_blocks": _HEADER["num_blocks"],
    "uncached": _numbers,
    "cached": _rows(_chain),
    "end": _numbers,
    "begin": _rows(_row(_count, _optional(_count), _count)),
    "decode": _numbers,
    "len": _rows(_length),
    "blocks": _rows(_table),
    "new": _rows(_row(_count, _count, _count, _count)),
    "state": _rows(_row(_count, _one_of(STATES))),
    "prefill": _rows(_row(_count, _count, _count)),
    "counts": lambda value: Counts(*_counts(_list(value))),
    "totals": lambda value: Totals(*_counts(_list(value), _BYTES_MAX)),
    "tiers": _rows(lambda value: TierCounts(*_row(_optional(_count), _total, _total)(value))),
}
