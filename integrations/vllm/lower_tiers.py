"""Moves chunks between rows of host memory and the stores below, on threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpager.storage.tiers.asking import found_in, is_bypassed, outcomes_of
from kvpager.storage.tiers.keyed import KeySlot
from kvpager.storage.tiers.protocol import BlockStore, Loaded, Saved

_FETCH_S, _SAVE_S, _CLOSE_S = 2.0, 30.0, 5.0
_MISSES_MAX = 64  # in a row: each may be a round trip to a server
_SAVING_MAX = 0.25  # part of all rows: a row cannot be evicted while it is saved


class Chunk(NamedTuple):
    """A chunk to load: vLLM's key, its reserved row, and the number of the store that has it."""

    key: bytes
    slot: int
    store: int


class LowerTiers:
    """The stores below host memory. Only `wait_a_moment`, `drain` and `close` wait for a store.

    The caller keeps the rows of a transfer as they are, until the transfer has called its `end`.

    Attributes:
        stores: in the order in which they are asked.
        is_open: False while no chunk may be looked for or saved.
    """

    def __init__(
        self,
        stores: Sequence[BlockStore],
        rows: NDArray[np.uint8],
        store_key: Callable[[bytes], bytes],
    ) -> None:
        """Move chunks between `stores` and `rows`, uint8 [slots, bytes of a chunk]."""
        self.stores, self.is_open = stores, True
        self._rows, self._store_key = rows, store_key
        self._fetchers = ThreadPoolExecutor(2, "kvpager-fetch")
        self._saver = ThreadPoolExecutor(1, "kvpager-save")
        self._fetches = set[Future[None]]()
        self._saves = dict[Future[None], int]()  # and the number of chunks

    @property
    def is_fetching(self) -> bool:
        """True while a look-up or a load has not ended. O(transfers)."""
        self._fetches = {each for each in self._fetches if not each.done()}
        return bool(self._fetches)

    @property
    def save_room(self) -> int:
        """The number of further chunks that may be saved now. O(transfers).

        At most a quarter of all rows is being saved at a time.
        """
        if not self.is_open:
            return 0
        self._saves = {each: count for each, count in self._saves.items() if not each.done()}
        most = max(int(len(self._rows) * _SAVING_MAX), 1)
        return max(most - sum(self._saves.values()), 0)

    def locate(
        self,
        keys: Sequence[bytes],
        answer: Callable[[dict[bytes, int]], None],
        *,
        absent: int,
        is_prefix: bool,
    ) -> None:
        """Look for chunks of one group in the stores, on a thread. O(1) for the caller.

        Calls `answer` with the number of a store for each key, or with `absent`. Of a prefix, the
        chunks after the first missing one count as absent.
        """
        self._start_fetch(self._locate, keys, answer, absent, is_prefix)

    def fetch(self, chunks: Sequence[Chunk], end: Callable[[set[bytes]], None]) -> None:
        """Load chunks into their rows, on a thread; then call `end` with the keys that arrived."""
        self._start_fetch(self._fetch, chunks, end)

    def save(self, pairs: Sequence[KeySlot], end: Callable[[bool], None]) -> None:
        """Offer chunks to each store, on a thread; then call `end`: True if all stores have all."""
        self._saves[self._saver.submit(self._save, pairs, end)] = len(pairs)

    def wait_a_moment(self, seconds: float) -> None:
        """Wait until a look-up or a load ends, for at most `seconds`."""
        wait(self._fetches, seconds, FIRST_COMPLETED)

    def drain(self, seconds: float | None = None) -> None:
        """Wait until all transfers have ended, for at most `seconds`."""
        wait([*self._fetches, *self._saves], seconds)

    def close(self) -> None:
        """Finish queued saves, for at most 5 seconds, and close the stores."""
        self.drain(_CLOSE_S)
        self._fetchers.shutdown(cancel_futures=True)
        self._saver.shutdown(cancel_futures=True)
        for store in self.stores:
            store.close()
        self._rows = self._rows[:0].copy()  # the caller may release the memory

    def _start_fetch(self, work: Callable[..., None], *args: object) -> None:
        self._fetches.add(self._fetchers.submit(work, *args))

    def _locate(
        self,
        keys: Sequence[bytes],
        answer: Callable[[dict[bytes, int]], None],
        absent: int,
        is_prefix: bool,
    ) -> None:
        places: dict[bytes, int] = {}
        present = self._leading if is_prefix else self._scattered
        try:
            for number, store in enumerate(self.stores if self.is_open else ()):
                missing = [key for key in keys if key not in places]
                places |= dict.fromkeys(present(store, missing), number)
        finally:
            answer({key: places.get(key, absent) for key in keys})

    def _leading(self, store: BlockStore, keys: Sequence[bytes]) -> Sequence[bytes]:
        return keys[: found_in(store, [self._store_key(key) for key in keys])]

    def _scattered(self, store: BlockStore, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Return the keys that a store has, until it lacks many in a row."""
        present, num_missing = list[bytes](), 0
        for key in keys:
            if found_in(store, [self._store_key(key)]):
                present.append(key)
                num_missing = 0
            elif (num_missing := num_missing + 1) == _MISSES_MAX:
                break
        return present

    def _fetch(self, chunks: Sequence[Chunk], end: Callable[[set[bytes]], None]) -> None:
        arrived = set[bytes]()
        try:
            deadline = time.monotonic() + _FETCH_S
            for number, store in enumerate(self.stores):
                asked = [chunk for chunk in chunks if chunk.store == number]
                if not asked:
                    continue
                names = [self._store_key(chunk.key) for chunk in asked]
                buffers = [memoryview(self._rows[chunk.slot]) for chunk in asked]
                outcomes = outcomes_of(store, "load", names, buffers, deadline)
                pairs = zip(asked, outcomes, strict=True)
                arrived |= {chunk.key for chunk, outcome in pairs if outcome == Loaded.HIT}
        finally:
            end(arrived)

    def _save(self, pairs: Sequence[KeySlot], end: Callable[[bool], None]) -> None:
        is_saved = False
        try:
            names = [self._store_key(key) for key, _ in pairs]
            blocks = [memoryview(self._rows[slot]) for _, slot in pairs]
            outcomes = [
                outcomes_of(store, "save", names, blocks, time.monotonic() + _SAVE_S)
                for store in self.stores
                if not is_bypassed(store)
            ]
            is_saved = len(outcomes) == len(self.stores) and all(
                outcome in (Saved.SAVED, Saved.KNOWN) for each in outcomes for outcome in each
            )
        finally:
            end(is_saved)
