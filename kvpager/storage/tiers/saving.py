"""Saves staged blocks on a thread, and reports what became of them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from kvpager.storage.tiers.protocol import BlockStore, Saved
from kvpager.storage.tiers.slot_memory import SlotMemory

logger = logging.getLogger(__name__)

_BATCH = 16  # blocks of one call of a store
_KEPT = (Saved.SAVED, Saved.KNOWN)

Wanted = Mapping[int, Sequence[int]]  # by the number of a store, which blocks it is offered


class News(NamedTuple):
    """Keys that a store has from now on, or has no more."""

    store: int
    keys: list[bytes]
    is_kept: bool


class Saver:
    """Offers staged blocks to stores. One thread calls `submit`, `take_news` and `close`."""

    def __init__(
        self,
        stores: Sequence[BlockStore],
        staging: SlotMemory,
        max_wait_s: float,
        on_end: Callable[[], None],
    ) -> None:
        """Call `on_end` on the thread after the blocks of a `submit` were offered."""
        self._stores = stores
        self._staging = staging
        self._max_wait_s = max_wait_s
        self._on_end = on_end
        self._thread = ThreadPoolExecutor(1, "kvpager-save")
        self._news: deque[News] = deque()
        followed = [getattr(store, "losses", None) for store in stores]
        self._lost = [None if losses is None else losses.follow() for losses in followed]

    @property
    def has_news(self) -> bool:
        """True if `take_news` returns something. O(1)."""
        return bool(self._news)

    def take_news(self) -> list[News]:
        """Return what became of keys since the last call, in order. O(calls of stores)."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def submit(self, keys: list[bytes], slots: list[int], wanted: Wanted) -> None:
        """Offer staged blocks to stores soon; then give the slots back. O(1)."""
        work = self._thread.submit(self._save, keys, slots, wanted)
        work.add_done_callback(lambda _: self._on_end())

    def _save(self, keys: list[bytes], slots: list[int], wanted: Wanted) -> None:
        deadline = time.monotonic() + self._max_wait_s
        try:
            for number, indices in wanted.items():
                try:
                    for start in range(0, len(indices), _BATCH):
                        part = indices[start : start + _BATCH]
                        theirs = [keys[index] for index in part]
                        self._save_batch(number, theirs, [slots[index] for index in part], deadline)
                except Exception:
                    logger.exception("the store %s failed to save", self._stores[number].name)
        finally:
            self._staging.give(slots)

    def _save_batch(
        self, number: int, keys: list[bytes], slots: list[int], deadline: float
    ) -> None:
        blocks = [self._staging.slot(slot) for slot in slots]
        outcomes = self._stores[number].save(keys, blocks, deadline).tolist()
        kept = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome in _KEPT]
        if kept:
            self._news.append(News(number, kept, is_kept=True))
        # Later than what was kept: it may have made room for itself.
        if lost := self._lost[number]:
            self._news.append(
                News(number, [lost.popleft() for _ in range(len(lost))], is_kept=False)
            )

    def close(self) -> None:
        """Wait for the blocks that were submitted."""
        self._thread.shutdown()
