"""Events of cached blocks, for a router or a log. The reader polls; there are no callbacks.

`stored`: the prefix index published these blocks, in order, after block `parent` (-1: at the front
of the namespace's tree). `evicted`: they left the index to make room. `removed`: their prefixes are
no longer cached; always after the last copy left. `copied`: bytes are to be copied. `moved`: the
pool shrank, and a block has a new id. Otherwise a block's id is valid from `stored` to `removed`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from kvpager.plans import NO_BLOCKS, Int32

Kind = Literal["stored", "removed", "evicted", "copied", "moved", "lost"]


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """An event. `number` counts all events of a manager without gaps.

    Stored: `tokens` is int32 [blocks, block_size]. `position` counts the blocks before the first.
    `mm_hashes` is the blocks' tag, see `kvpager.blocks.mm_hashes`. `group` is the group of layers.
    If it has a window, the one block has no parent: `digest` names all tokens up to its end, and
    `digest_before` those before it, see `kvpager.blocks.groups.digests`. Copied and moved: `copies`
    is int32 [n, 2], from `tiers[0]` to `tiers[1]`. A `lost` event means that older events were
    dropped unread: start again from `manager.events.restart`.
    """

    number: int
    kind: Kind
    blocks: Int32 = field(default_factory=lambda: NO_BLOCKS)
    namespace: str | None = None
    lora: str | None = None
    parent: int = -1
    position: int = 0
    tokens: Int32 | None = None
    mm_hashes: tuple[tuple[int, int, bytes, int], ...] = ()
    copies: Int32 | None = None
    tiers: tuple[str, str] | None = None
    group: int = 0
    digest: bytes | None = None
    digest_before: bytes | None = None


class EventLog:
    """The events since the last fetch, at most `size`."""

    def __init__(self, size: int) -> None:
        self._events: deque[Event] = deque(maxlen=size)
        self._count = 0
        self._fetched = 0

    def add(self, kind: Kind, **facts: object) -> None:
        """Log an event; a full log drops its oldest. O(1)."""
        self._count += 1
        self._events.append(Event(self._count, kind, **facts))  # type: ignore[arg-type]

    def skip(self) -> None:
        """Drop the events since the last fetch; none counts as lost. O(events)."""
        self._events.clear()
        self._fetched = self._count

    def fetch(self) -> list[Event]:
        """Return the events since the last call, oldest first. O(events)."""
        events = list(self._events)
        self._events.clear()
        if self._count - self._fetched > len(events):
            events.insert(0, Event(self._fetched, "lost"))
        self._fetched = self._count
        return events
