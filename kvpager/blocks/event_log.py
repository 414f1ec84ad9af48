"""What happened to blocks, for a router or a log: pulled by who wants to know, never called back.

`stored`: the prefix index offers these blocks, in order, after block `parent` (-1: at the front of
the namespace's tree). `evicted`: they left the index to make room. `removed`: what they held is
offered nowhere any more; always after the last copy left. `copied`: bytes are to be copied.
`moved`: the pool shrinks, and what a block holds is found under another id from now on. Otherwise a
block's id names what it holds from `stored` to `removed`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from kvpager.plans import Int32

Kind = Literal["stored", "removed", "evicted", "copied", "moved", "lost"]
_NONE: Int32 = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """One thing that happened. `number` counts all events of a manager; it never skips.

    `tokens` (stored) is int32 [blocks, block_size]; `mm_hashes` is the blocks' tag, see
    `kvpager.blocks.mm_hashes`; `copies` (copied, moved) is int32 [n, 2], from `tiers[0]` to
    `tiers[1]`. A `lost` event says that older ones were dropped because nobody fetched them: begin
    anew from `manager.events.published`.
    """

    number: int
    kind: Kind
    blocks: Int32 = field(default_factory=lambda: _NONE)
    namespace: str | None = None
    lora: str | None = None
    parent: int = -1
    tokens: Int32 | None = None
    mm_hashes: tuple[tuple[int, int, bytes, int], ...] = ()
    copies: Int32 | None = None
    tiers: tuple[str, str] | None = None


class EventLog:
    """The events since they were last fetched, at most `size` of them."""

    def __init__(self, size: int) -> None:
        self._events: deque[Event] = deque(maxlen=size)
        self._count = 0
        self._fetched = 0

    def add(self, kind: Kind, **facts: object) -> None:
        """Note one more. O(1), the oldest is dropped where there is no room."""
        self._count += 1
        self._events.append(Event(self._count, kind, **facts))  # type: ignore[arg-type]

    def fetch(self) -> list[Event]:
        """All since the last call, oldest first. O(events)."""
        events = list(self._events)
        self._events.clear()
        if self._count - self._fetched > len(events):
            events.insert(0, Event(self._fetched, "lost"))
        self._fetched = self._count
        return events
