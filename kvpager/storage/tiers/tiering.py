"""Moves cached blocks between a block manager and the stores below it.

    begin(prompt) ─▶ Fetch ─▶ a thread finds and loads blocks into staging, in order
    attach(fetch)             between steps: staging ─▶ blocks ─▶ the prefix cache
    clean(count)              between steps: the blocks that leave next ─▶ staging ─▶ stores

A request then begins as any other: `allocate` finds the prefix. `attach` and `clean` never wait for
a store. Staging is the only buffer: when it is full, loads end early and nothing is saved.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from numpy.typing import ArrayLike

from kvpager import _validate as arguments
from kvpager.blocks.manager import BlockManager
from kvpager.blocks.sequences import KeyParts
from kvpager.errors import OutOfBlocks
from kvpager.plans import Int32
from kvpager.storage.keys import ContentKeying, KeyContext, content_keys
from kvpager.storage.tiers.protocol import BlockStore, Loaded
from kvpager.storage.tiers.saving import Saver
from kvpager.storage.tiers.slot_memory import SlotMemory

logger = logging.getLogger(__name__)

_FETCHES_MAX = 256  # under way at once
_BATCH = 16  # blocks of one call of a store


@dataclass(eq=False)
class Fetch:
    """Blocks of one prompt on their way from stores. `Tiering.begin` makes it.

    Attributes:
        first: leading blocks of the prompt that were cached when it began.
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


class Tiering:
    """Fetches prompts' blocks from stores, and saves the blocks that leave next.

    `context_of(namespace, lora)` returns what keys cover besides tokens; it must always return the
    same. Stores are asked in order. `recompute_s(num_blocks)` estimates how long the model takes
    to compute blocks: a fetch gives up after half of that. Without it, a fetch takes at most
    `max_wait_s` seconds.

    One thread, between steps, calls `begin`, `attach`, `cancel` and `clean`.

    Attributes:
        on_progress: called by the threads when a load or a save has ended.
        is_clean: True if the last `clean` found no block to save.

    A block that was offered counts as saved when a store has said so: see `manager.cached`.
    """

    def __init__(
        self,
        manager: BlockManager,
        staging: SlotMemory,
        stores: Sequence[BlockStore],
        context_of: Callable[[str | None, str | None], KeyContext],
        *,
        max_wait_s: float = 2.0,
        recompute_s: Callable[[int], float] | None = None,
    ) -> None:
        self.stores = tuple(stores)
        self._manager = manager
        self._staging = staging
        self._context_of = context_of
        self._keying = ContentKeying(manager.block_size, context_of)
        self._max_wait_s = arguments.seconds("max_wait_s", max_wait_s)
        self._recompute_s = recompute_s
        self._loads = ThreadPoolExecutor(2, "kvpager-load")
        self._saver = Saver(
            self.stores, staging, self._max_wait_s, on_end=lambda: self.on_progress()
        )
        self._fetching: dict[bytes, Fetch] = {}  # by the key of the first missing block
        self._closing = threading.Event()
        self.on_progress: Callable[[], None] = lambda: None
        self.is_clean = False

    # ---------------------------------------------------------------- fetch

    def begin(
        self,
        prompt: ArrayLike,
        *,
        namespace: str | None = None,
        lora: str | None = None,
        mm_hashes: Iterable[tuple[int, int, bytes]] = (),
    ) -> Fetch | None:
        """Begin to load the blocks of `prompt` that are not cached. O(tokens).

        Returns None if all are cached, or if 256 fetches are under way. Two prompts with the same
        first missing block share one fetch: the second returns when the first does, and its other
        blocks are not loaded.
        """
        tokens, shown = arguments.token_ids(prompt), list(mm_hashes)
        manager, size = self._manager, self._manager.block_size
        # The last token is always computed, so its block need not be complete.
        num_blocks = (len(tokens) - 1) // size
        identity: KeyParts = {"namespace": namespace, "lora": lora, "mm_hashes": shown}
        first = manager.match_prefix(tokens, **identity) // size
        if first >= num_blocks:
            return None
        keys = content_keys(tokens, size, self._context_of(namespace, lora), shown)[:num_blocks]
        fetch = self._fetching.get(keys[first])
        if fetch is None:
            wait_s = self._max_wait_s
            if self._recompute_s is not None:
                wait_s = min(wait_s, self._recompute_s(num_blocks - first) / 2)
            if len(self._fetching) >= _FETCHES_MAX or self._closing.is_set():
                return None
            fetch = Fetch(tokens, identity, first, keys, time.monotonic() + wait_s)
            fetch.work = self._loads.submit(self._load, fetch)
            fetch.work.add_done_callback(lambda _: self.on_progress())
            self._fetching[keys[first]] = fetch
        fetch.num_waiting += 1
        return fetch

    def _load(self, fetch: Fetch) -> None:
        """Load blocks in order until one is missing, late, or has no slot. Runs in a thread."""
        for number, store in enumerate(self.stores):
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

    @property
    def has_room(self) -> bool:
        """True if a block can be saved now. O(1)."""
        return self._staging.num_free > 0

    def attach(self, fetch: Fetch) -> dict[str, int]:
        """Put the loaded blocks of a finished fetch into the prefix cache. O(bytes).

        Returns the number of tokens that it added from each store, by name: fewer than were loaded
        if the pool has no room, or if cached blocks before them left meanwhile. A fetch that was
        attached already adds none.
        """
        if not fetch.is_done:
            raise ValueError("fetch: it is not done. Attach it later, or cancel it.")
        self._forget(fetch)
        slots, fetch.slots = fetch.slots, []
        try:
            return self._attach(fetch, slots) if slots else {}
        finally:
            self._staging.give(slots)

    def _attach(self, fetch: Fetch, slots: list[int]) -> dict[str, int]:
        manager, size = self._manager, self._manager.block_size
        stop, identity = fetch.first + len(slots), fetch.identity
        # An image that begins in these blocks may end behind them.
        shown = [each for each in identity["mm_hashes"] if each[0] < stop * size]
        length = max([stop * size, *(end for _, end, _ in shown)])
        loader: KeyParts = {**identity, "mm_hashes": shown}
        try:
            sequence = manager.allocate(fetch.tokens[:length], **loader)
        except OutOfBlocks:
            return {}
        try:
            if sequence.ticket:
                manager.copies.complete(sequence)  # its copy would be overwritten
            start = sequence.num_cached_tokens // size
            if start < fetch.first:
                return {}
            blocks = manager.block_tables([sequence])[0][start:stop]
            skipped = start - fetch.first
            written = slots[skipped:]
            del slots[skipped:]  # `write` gives them back when they were read
            self._staging.write(written, blocks.tolist())
            manager.commit(sequence, stop * size)
            found = manager.match_prefix(fetch.tokens[: length + 1], blocks=True, **loader)
            keys = manager.cached.keys(found.blocks[start:stop], self._keying)
            return self._mark_loaded(keys, fetch.sources[skipped:])
        finally:
            manager.free(sequence)

    def _mark_loaded(self, keys: list[bytes], sources: list[int]) -> dict[str, int]:
        """Mark blocks clean in the stores they came from. Return the tokens of each store."""
        added = dict[str, int]()
        for number, store in enumerate(self.stores):
            theirs = [key for key, source in zip(keys, sources, strict=True) if source == number]
            if theirs:
                self._manager.cached.mark_clean(theirs, number)
                tokens = len(theirs) * self._manager.block_size
                added[store.name] = added.get(store.name, 0) + tokens
        return added

    def cancel(self, fetch: Fetch) -> None:
        """Stop waiting for a fetch. If no other caller waits, its slots become free. O(1)."""
        fetch.num_waiting -= 1
        if fetch.num_waiting > 0:
            return
        self._forget(fetch)

        def give_back(work: Future[None]) -> None:
            slots, fetch.slots = fetch.slots, []
            self._staging.give(slots)
            self.on_progress()

        assert fetch.work is not None
        fetch.work.cancel()  # if no thread has begun it
        fetch.work.add_done_callback(give_back)

    def _forget(self, fetch: Fetch) -> None:
        first = fetch.keys[fetch.first]
        if self._fetching.get(first) is fetch:
            del self._fetching[first]

    # ---------------------------------------------------------------- save

    @property
    def has_news(self) -> bool:
        """True if stores have answered since the last `clean`. O(1)."""
        return self._saver.has_news

    def clean(self, count: int = 64) -> int:
        """Offer the next blocks to be evicted, at most `count`, to the stores that lack them.

        A block is offered once each time it becomes idle, and needs a free slot. Returns the number
        of blocks copied; a thread saves them then. Call it between steps.
        O(count log blocks + bytes copied).
        """
        cached = self._manager.cached
        self._read_news()
        blocks = cached.leaving(count)
        self.is_clean = not len(blocks)
        slots = self._staging.take(len(blocks))
        blocks = blocks[: len(slots)]
        if not len(blocks) or self._closing.is_set():
            self._staging.give(slots)
            return 0
        try:
            keys = cached.keys(blocks, self._keying)
            try:
                ticket = cached.hold(blocks)
            except ValueError:  # floors of namespaces need the blocks: try again later
                self.is_clean = True
                self._staging.give(slots)
                return 0
            try:
                self._staging.read(blocks.tolist(), slots)
                cached.mark_offered(blocks)
            finally:
                cached.release(ticket)
        except BaseException:
            self._staging.give(slots)
            raise
        self._saver.submit(keys, slots)
        return len(blocks)

    def _read_news(self) -> None:
        cached = self._manager.cached
        for store, keys, is_kept in self._saver.take_news():
            (cached.mark_clean if is_kept else cached.mark_dirty)(keys, store)

    # ---------------------------------------------------------------- end

    def close(self) -> None:
        """Wait for the threads, and close the stores. Twice is the same as once."""
        self._closing.set()
        self._loads.shutdown()
        self._saver.close()
        for fetch in list(self._fetching.values()):
            fetch.num_waiting = 1
            self.cancel(fetch)
        with contextlib.ExitStack() as stores:  # closes all, whichever raises
            for store in self.stores:
                stores.callback(store.close)
