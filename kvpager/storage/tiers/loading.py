"""Loads blocks of prompts from stores into staging, in order, on threads."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np

from kvpager.blocks.sequences import KeyParts
from kvpager.plans import Int32
from kvpager.storage.tiers.asking import is_bypassed
from kvpager.storage.tiers.checks import check_outcomes
from kvpager.storage.tiers.costs import TransferCost
from kvpager.storage.tiers.dropping import Dropper
from kvpager.storage.tiers.group_blocks import GroupBlocks
from kvpager.storage.tiers.group_loading import Find, find_runs, find_windows, next_batch
from kvpager.storage.tiers.protocol import Loaded
from kvpager.storage.tiers.slot_memory import SlotMemory
from kvpager.storage.tiers.workers import Workers

logger = logging.getLogger(__name__)

_BATCH = 16  # blocks of one call of a store
_GONE = (Loaded.MISS, Loaded.BAD)


@dataclass(eq=False)
class Fetch:
    """Blocks of one prompt on their way from stores. `Tiering.begin` makes it.

    Attributes:
        first: leading blocks of the prompt that were cached when it began, or attached since.
        keys: the content keys of the prompt's full blocks.
        deadline: the time of `time.monotonic()` at which loading ends.
        num_waiting: the number of callers of `begin` that share it.
        wait_until: the time until which the last of them should wait, at most `deadline`.
        slots: the staging slots of blocks loaded, in order from block `first` on.
        sources: the number of the store that each of them came from.
        is_void: True if its blocks may not be used any more.
        is_asked_for: True if it loads also blocks that the model computes sooner.
        blocks: the places of the prompt's blocks if the layers form groups. Then `keys` is empty,
            and the slots hold the blocks `blocks.places`.
        ticket: its number among the fetches of followers.
        awaited: the followers that have not answered.
        stop: the first block of the prompt that a follower lacks, by its answer.
    """

    tokens: Int32
    identity: KeyParts
    first: int
    keys: list[bytes]
    deadline: float = 0.0
    num_waiting: int = 0
    wait_until: float = 0.0
    slots: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    is_void: bool = False
    is_asked_for: bool = False
    blocks: GroupBlocks | None = None
    work: Future[None] = field(default_factory=Future)
    ticket: int = 0
    awaited: set[int] = field(default_factory=set)
    stop: int = sys.maxsize
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_done(self) -> bool:
        """True if no thread works on it any more, and all followers have answered."""
        return self.work.done() and not self.awaited

    @property
    def name(self) -> bytes:
        """The key of the next block. Prompts with the same one share a fetch. O(1)."""
        if self.blocks is not None:
            return self.blocks.name
        return self.keys[self.first] if self.first < len(self.keys) else b""

    @property
    def num_missing(self) -> int:
        """The number of blocks that the whole prompt lacks. O(blocks)."""
        if self.blocks is not None:
            return len(self.blocks.to_load(self.blocks.cached.shape[1]))
        return len(self.keys) - self.first

    @property
    def missing(self) -> list[bytes]:
        """The keys of the blocks that are not loaded, in order. O(blocks)."""
        with self._lock:
            return self.keys[self.first + len(self.slots) :]

    def add(self, slots: list[int], source: int) -> None:
        """Add the next blocks, which were loaded from one store. O(slots)."""
        with self._lock:
            self.slots += slots
            self.sources += [source] * len(slots)

    def take(self, count: int) -> tuple[list[int], list[int]]:
        """Remove the first `count` loaded blocks. Returns their slots and sources. O(blocks)."""
        with self._lock:
            slots, self.slots = self.slots[:count], self.slots[count:]
            sources, self.sources = self.sources[:count], self.sources[count:]
            self.first += count
        return slots, sources

    def cut(self) -> list[int]:
        """Remove the blocks that not all ranks have; return their slots. O(blocks)."""
        count = max(self.stop - self.first, 0)
        slots, self.slots = self.slots[count:], self.slots[:count]
        self.sources = self.sources[:count]
        return slots


class Loader:
    """Carries out fetches. One thread calls `start`, `cancel` and `close`."""

    def __init__(
        self,
        staging: SlotMemory,
        dropper: Dropper,
        recompute_s: Callable[[int], float] | None,
        on_progress: Callable[[], None],
    ) -> None:
        """Call `on_progress` on a thread when blocks were loaded, and when a fetch is done.

        A store is left out if `recompute_s`, of a number of blocks, is less than its estimate.
        """
        self._stores = dropper.stores
        self._staging = staging
        self._dropper = dropper
        self._recompute_s = recompute_s
        self._on_progress = on_progress
        self.costs = [TransferCost() for _ in self._stores]
        self._calls = dropper.calls
        self._threads = Workers(2, "kvpager-load", self._calls)
        self._closing = threading.Event()

    def is_worth(self, num_blocks: int, num_loads: int) -> bool:
        """Return True if a store may load blocks faster than the model computes. O(stores).

        The model would compute `num_blocks`; stores would load `num_loads`. They differ if the
        layers form groups.
        """
        numbers = range(len(self._stores))
        return any(self._is_worth(number, num_blocks, num_loads) for number in numbers)

    def _is_worth(self, number: int, num_blocks: int, num_loads: int) -> bool:
        if self._calls.hangs(number):
            return False
        if self._recompute_s is None:
            return True
        num_bytes = num_loads * self._staging.block_bytes
        return self.costs[number].is_worth(num_bytes, self._recompute_s(num_blocks))

    def start(self, fetch: Fetch) -> None:
        """Load the blocks of a fetch soon, until one is missing, late, or has no slot. O(1)."""
        fetch.work.add_done_callback(lambda _: self._on_progress())
        try:
            self._threads.submit(self._run, fetch)
        except RuntimeError:  # the interpreter ends, and executors take no more work
            fetch.work.set_result(None)

    def _run(self, fetch: Fetch) -> None:
        # The future is the fetch's own: it ends also if an interrupt cuts `start` off.
        if fetch.work.set_running_or_notify_cancel():
            try:
                self._load(fetch)
            finally:
                fetch.work.set_result(None)

    def cancel(self, fetch: Fetch) -> None:
        """Give the slots of a fetch back, at once or when its thread has ended. O(slots)."""

        def give_back(_: Future[None]) -> None:
            slots, fetch.slots = fetch.slots, []
            self._staging.give(slots)
            self._on_progress()

        fetch.is_void = True  # its thread begins no more transfers
        fetch.work.cancel()  # if no thread has begun it
        fetch.work.add_done_callback(give_back)

    def _load(self, fetch: Fetch) -> None:
        if fetch.blocks is not None:
            self._load_groups(fetch, fetch.blocks)
            return
        for number, store in enumerate(self._stores):
            try:
                self._load_from(fetch, number)
            except Exception:
                logger.exception("the store %s failed to load", store.name)

    def _load_from(self, fetch: Fetch, number: int) -> None:
        """Load the next blocks from one store, as many as it has."""
        wanted = fetch.missing
        if not wanted or self._is_over(fetch) or self._calls.hangs(number):
            return
        surplus = self._dropper.drop_surplus(number)  # blocks that are too old are not served
        wanted = list(takewhile(lambda key: key not in surplus, wanted))
        count = self._find(fetch, number, wanted)
        if not count or not (fetch.is_asked_for or self._is_worth(number, count, count)):
            return
        self.costs[number].begin_load()
        for start in range(0, count, _BATCH):
            keys = wanted[start : min(start + _BATCH, count)]
            if self._is_over(fetch) or not self._load_batch(fetch, number, keys):
                return

    def _find(self, fetch: Fetch, number: int, wanted: list[bytes]) -> int:
        """Return how many leading keys a store seems to have.

        A store without `losses` is also asked for the cached block before them. If it lacks that
        one, the cached blocks are offered to it again.
        """
        store, cached = self._stores[number], list[bytes]()
        if not hasattr(store, "losses"):
            cached = fetch.keys[: fetch.first]
        begun = time.monotonic()
        with self._calls.begin(number, fetch.deadline):
            count = store.find([*cached[-1:], *wanted])
        self.costs[number].found(time.monotonic() - begun)
        if not cached or count:
            return count - bool(cached)
        if not is_bypassed(store):
            self._dropper.tell(number, cached, is_kept=False)
        if self._is_over(fetch):
            return 0
        with self._calls.begin(number, fetch.deadline):
            return store.find(wanted)

    def _load_groups(self, fetch: Fetch, blocks: GroupBlocks) -> None:
        """Load the blocks that the longest prefix needs to continue, from all stores."""
        unusable = [set(self._dropper.drop_surplus(number)) for number in range(len(self._stores))]
        while not self._is_over(fetch) and self._find_groups(fetch, blocks, unusable):
            while not self._is_over(fetch):
                batch = next_batch(blocks, self._staging.num_free, _BATCH)
                if batch is None:
                    return
                num_before = len(fetch.slots)
                with self._leaving_out(batch.store, blocks):
                    self.costs[batch.store].begin_load()
                    self._load_batch(fetch, batch.store, batch.keys)
                num_loaded = len(fetch.slots) - num_before
                blocks.add(batch.places[:num_loaded])
                if num_loaded < len(batch.keys):  # never ask a store twice for a block
                    unusable[batch.store].add(batch.keys[num_loaded])
                    break  # look up again: another prefix may continue

    def _find_groups(self, fetch: Fetch, blocks: GroupBlocks, unusable: list[set[bytes]]) -> bool:
        """Look up what the stores have. Return True if they add to the prefix."""
        blocks.stored[:] = False
        most, num_known = self._staging.num_free, -1
        while num_known != (num_known := int(blocks.known.sum())):
            self._ask_all(find_runs, blocks, unusable, most)
            if len(blocks.stores) < 2:
                break
        self._ask_all(find_windows, blocks, unusable, most)
        for number in [] if fetch.is_asked_for else list(blocks.stores):
            num_loads = blocks.num_from(number)
            if num_loads and not self._is_worth(number, blocks.num_new, num_loads):
                blocks.leave_out(number)
        return blocks.num_new > 0

    def _ask_all(
        self, find: Find, blocks: GroupBlocks, unusable: list[set[bytes]], most: int
    ) -> None:
        for number in list(blocks.stores):
            if self._calls.hangs(number):
                blocks.leave_out(number)
                continue
            begun = time.monotonic()
            with self._leaving_out(number, blocks), self._calls.begin(number):
                find(blocks, number, self._stores[number], unusable[number], most)
            self.costs[number].found(time.monotonic() - begun)

    @contextlib.contextmanager
    def _leaving_out(self, number: int, blocks: GroupBlocks) -> Iterator[None]:
        """If a store raises, log it and leave the store out."""
        try:
            yield
        except Exception:
            logger.exception("the store %s failed to load", self._stores[number].name)
            blocks.leave_out(number)

    def _is_over(self, fetch: Fetch) -> bool:
        return self._closing.is_set() or fetch.is_void or time.monotonic() >= fetch.deadline

    def _load_batch(self, fetch: Fetch, number: int, keys: list[bytes]) -> bool:
        """Load blocks from one store. Return True if all of them came."""
        shared = self._staging.store
        if shared is not None and shared is self._stores[number]:
            slots = shared.pin(keys)  # slots of staging: no copy
            self._add(fetch, number, keys, slots)
            return len(slots) == len(keys)
        if not (slots := self._staging.take(len(keys))):
            return False
        num_hits = 0
        try:
            into, begun = [self._staging.slot(slot) for slot in slots], time.monotonic()
            with self._calls.begin(number, fetch.deadline):
                outcomes = self._stores[number].load(keys[: len(slots)], into, fetch.deadline)
            check_outcomes(outcomes, len(slots))
            # The first late block took at least the rest of the time; others were not tried.
            num_moved = int((outcomes == Loaded.HIT).sum() + (outcomes == Loaded.LATE).any())
            if num_moved:
                num_bytes = num_moved * self._staging.block_bytes
                self.costs[number].loaded(num_bytes, time.monotonic() - begun)
            hits = outcomes == Loaded.HIT
            num_hits = len(hits) if hits.all() else int(hits.argmin())
        finally:
            self._staging.give(slots[num_hits:])
            self._add(fetch, number, keys, slots[:num_hits])
        gone = np.flatnonzero(np.isin(outcomes, _GONE)).tolist()
        self._dropper.tell(number, [keys[index] for index in gone], is_kept=False)
        self._on_progress()
        return num_hits == len(keys)

    def _add(self, fetch: Fetch, number: int, keys: list[bytes], slots: list[int]) -> None:
        """Note that slots hold the blocks of leading keys."""
        fetch.add(slots, number)
        self._dropper.tracked.add(number, fetch.identity["namespace"], keys[: len(slots)])

    def close(self) -> None:
        """Begin no more transfers, and wait for the threads that do not hang."""
        self._closing.set()
        self._threads.shutdown()
