"""Loads blocks of prompts from stores into staging, in order, on threads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from kvpager.blocks.sequences import KeyParts
from kvpager.plans import Int32
from kvpager.storage.tiers.protocol import BlockStore, Loaded
from kvpager.storage.tiers.slot_memory import SlotMemory

logger = logging.getLogger(__name__)

_BATCH = 16  # blocks of one call of a store


@dataclass(eq=False)
class Fetch:
    """Blocks of one prompt on their way from stores. `Tiering.begin` makes it.

    Attributes:
        first: leading blocks of the prompt that were cached when it began, or attached since.
        keys: the content keys of the prompt's full blocks.
        deadline: the time of `time.monotonic()` at which loading ends.
        num_waiting: how many callers of `begin` share it.
        slots: the staging slots of blocks loaded, in order from block `first` on.
        sources: the number of the store that each of them came from.
    """

    tokens: Int32
    identity: KeyParts
    first: int
    keys: list[bytes]
    deadline: float
    num_waiting: int = 0
    slots: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    work: Future[None] | None = None

    @property
    def is_done(self) -> bool:
        """True if no thread works on it any more."""
        return self.work is None or self.work.done()

    def take(self, count: int) -> tuple[list[int], list[int]]:
        """Remove the first `count` loaded blocks. Returns their slots and sources. O(blocks)."""
        slots, self.slots = self.slots[:count], self.slots[count:]
        sources, self.sources = self.sources[:count], self.sources[count:]
        self.first += count
        return slots, sources


class Loader:
    """Carries out fetches. One thread calls `start`, `cancel` and `close`."""

    def __init__(
        self, stores: Sequence[BlockStore], staging: SlotMemory, on_end: Callable[[], None]
    ) -> None:
        """Call `on_end` on a thread when a fetch is done."""
        self._stores = stores
        self._staging = staging
        self._on_end = on_end
        self._threads = ThreadPoolExecutor(2, "kvpager-load")
        self._closing = threading.Event()

    def start(self, fetch: Fetch) -> None:
        """Load the blocks of a fetch soon, until one is missing, late, or has no slot. O(1)."""
        fetch.work = self._threads.submit(self._load, fetch)
        fetch.work.add_done_callback(lambda _: self._on_end())

    def cancel(self, fetch: Fetch) -> None:
        """Give the slots of a fetch back, at once or when its thread has ended. O(slots)."""

        def give_back(_: Future[None]) -> None:
            slots, fetch.slots = fetch.slots, []
            self._staging.give(slots)
            self._on_end()

        assert fetch.work is not None
        fetch.work.cancel()  # if no thread has begun it
        fetch.work.add_done_callback(give_back)

    def _load(self, fetch: Fetch) -> None:
        for number, store in enumerate(self._stores):
            try:
                while self._load_batch(fetch, number, store):
                    pass
            except Exception:
                logger.exception("the store %s failed to load", store.name)

    def _load_batch(self, fetch: Fetch, number: int, store: BlockStore) -> bool:
        """Load the next blocks from one store. Return True if all of them came."""
        wanted = fetch.keys[fetch.first + len(fetch.slots) :][:_BATCH]
        if not wanted or self._closing.is_set() or time.monotonic() >= fetch.deadline:
            return False
        if not (count := store.find(wanted)):
            return False
        slots = self._staging.take(count)
        num_hits = 0
        try:
            if slots:
                into = [self._staging.slot(slot) for slot in slots]
                outcomes = store.load(wanted[: len(slots)], into, fetch.deadline)
                hits = outcomes == Loaded.HIT
                num_hits = len(hits) if hits.all() else int(hits.argmin())
        finally:
            fetch.slots += slots[:num_hits]
            fetch.sources += [number] * num_hits
            self._staging.give(slots[num_hits:])
        return 0 < num_hits == len(slots)

    def close(self) -> None:
        """Begin no more transfers, and wait for the threads."""
        self._closing.set()
        self._threads.shutdown()
