"""Saves staged blocks on a thread, and reports what became of them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from kvpager.storage.tiers.namespaces import NamespaceKeys
from kvpager.storage.tiers.protocol import BlockStore, Saved
from kvpager.storage.tiers.slot_memory import SlotMemory

logger = logging.getLogger(__name__)

_BATCH = 16  # blocks of one call of a store
_KEPT = (Saved.SAVED, Saved.KNOWN)


class News(NamedTuple):
    """Keys that a store has from now on, or has no more."""

    store: int
    keys: list[bytes]
    is_kept: bool


class StagedBlock(NamedTuple):
    """A block in staging.

    Attributes:
        key: its content key.
        namespace: its namespace.
        slot: its slot.
        stores: the numbers of the stores that it is offered.
    """

    key: bytes
    namespace: str | None
    slot: int
    stores: Sequence[int]


class Saver:
    """Offers staged blocks to stores. One thread calls its methods."""

    def __init__(
        self,
        stores: Sequence[BlockStore],
        staging: SlotMemory,
        tracked: NamespaceKeys,
        max_wait_s: float,
        on_end: Callable[[], None],
    ) -> None:
        """Call `on_end` on the thread after the blocks of a `submit` were offered."""
        self._stores = stores
        self._staging = staging
        self._tracked = tracked
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

    def submit(self, blocks: Sequence[StagedBlock]) -> None:
        """Offer blocks to their stores soon; then give their slots back. O(1)."""
        try:
            work = self._thread.submit(self._save, blocks)
        except RuntimeError:  # the interpreter ends, and executors take no more work
            self._save(blocks)
            self._on_end()
        else:
            work.add_done_callback(lambda _: self._on_end())

    def forget(self, namespace: str) -> Future[int]:
        """Drop the known blocks of a namespace from all stores, after the saves before. O(1)."""
        return self._thread.submit(self._drop_namespace, namespace)

    def _save(self, blocks: Sequence[StagedBlock]) -> None:
        deadline = time.monotonic() + self._max_wait_s
        try:
            for number, store in enumerate(self._stores):
                theirs = [block for block in blocks if number in block.stores]
                try:
                    for start in range(0, len(theirs), _BATCH):
                        self._save_batch(number, theirs[start : start + _BATCH], deadline)
                    self._drop(number, self._tracked.surplus(number))
                except Exception:
                    logger.exception("the store %s failed to save", store.name)
        finally:
            self._staging.give(block.slot for block in blocks)

    def _save_batch(self, number: int, blocks: Sequence[StagedBlock], deadline: float) -> None:
        keys = [block.key for block in blocks]
        memory = [self._staging.slot(block.slot) for block in blocks]
        outcomes = self._stores[number].save(keys, memory, deadline)
        kept = [blocks[index] for index in np.flatnonzero(np.isin(outcomes, _KEPT)).tolist()]
        for block in kept:
            self._tracked.add(number, block.namespace, [block.key])
        self._tell(number, [block.key for block in kept], is_kept=True)
        # Later than what was kept: it may have made room for itself.
        if lost := self._lost[number]:
            gone = [lost.popleft() for _ in range(len(lost))]
            self._tracked.remove(number, gone)
            self._tell(number, gone, is_kept=False)

    def _drop_namespace(self, namespace: str) -> int:
        count = 0
        for number, store in enumerate(self._stores):
            try:
                count += self._drop(number, self._tracked.take(number, namespace))
            except Exception:
                logger.exception("the store %s failed to drop blocks", store.name)
        return count

    def _drop(self, number: int, keys: list[bytes]) -> int:
        if keys:
            self._stores[number].drop(keys)
            self._tell(number, keys, is_kept=False)
        return len(keys)

    def _tell(self, number: int, keys: list[bytes], *, is_kept: bool) -> None:
        if keys:
            self._news.append(News(number, keys, is_kept))

    def close(self) -> None:
        """Wait for the blocks that were submitted."""
        self._thread.shutdown()
