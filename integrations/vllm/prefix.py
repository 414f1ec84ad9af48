"""Finds the longest prefix of a request that all groups of layers can load."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvpager.integrations.vllm.chunks import ChunkGroup
from kvpager.integrations.vllm.interface import LookupResult

LookUp = Callable[[Any], LookupResult]


class _Found(NamedTuple):
    """Where a prefix of one group ends. `waits` is True if a store must answer first."""

    end: int
    waits: bool


def find_prefix(
    groups: Sequence[ChunkGroup],
    keys: Sequence[Sequence[Any]],
    look_up: LookUp,
    start: int,
    most: int,
) -> int | None:
    """Return the end of the longest prefix that can be loaded, in tokens. O(chunks).

    The prefix ends with a chunk of every group, at most at `most`. Returns `start` if nothing can
    be loaded, and None while stores are asked: call again later.
    """
    step = math.lcm(*(group.tokens for group in groups))
    end, waits = most // step * step, False
    for group, its_keys in zip(groups, keys, strict=True):
        if group.reach is None:
            found = _leading(group, its_keys, look_up, start, end)
            end, waits = found.end // step * step, waits or found.waits
            if end <= start:
                return start
    windows = [pair for pair in zip(groups, keys, strict=True) if pair[0].reach is not None]
    bound, window_waits = None, False
    while end != bound:  # a shorter prefix has other windows
        bound, window_waits = end, False
        for group, its_keys in windows:
            found = _last_window(group, its_keys, look_up, start, end, step)
            end, window_waits = found.end, window_waits or found.waits
            if end <= start:
                return start
    return None if waits or window_waits else end


def _leading(
    group: ChunkGroup, keys: Sequence[Any], look_up: LookUp, start: int, end: int
) -> _Found:
    waits = False
    for index in range(start // group.tokens, min(end // group.tokens, len(keys))):
        result = look_up(keys[index])
        if result is LookupResult.MISS:
            return _Found(index * group.tokens, waits)
        waits = waits or result is not LookupResult.HIT
    return _Found(min(end, len(keys) * group.tokens), waits)


def _last_window(
    group: ChunkGroup, keys: Sequence[Any], look_up: LookUp, start: int, end: int, step: int
) -> _Found:
    """Find the last window whose chunks can all be loaded."""
    first, every = start // group.tokens, step // group.tokens
    stop = min(end // group.tokens, len(keys)) // every * every
    unknown = coming = False
    for index in range(stop - 1, first - 1, -1):
        if index >= stop:
            continue  # no prefix ends in this chunk
        result = look_up(keys[index])
        if result in (LookupResult.MISS, LookupResult.RETRY):
            unknown = unknown or result is LookupResult.RETRY
            stop, coming = index // every * every, False
            continue
        coming = coming or result is LookupResult.HIT_PENDING
        if index <= max(first, group.first_chunk(stop * group.tokens)):
            waits = unknown or coming
            return _Found(end if waits else stop * group.tokens, waits)
    return _Found(end if unknown else start, unknown)
