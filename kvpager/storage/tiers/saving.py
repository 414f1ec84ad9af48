"""Saves staged blocks on a thread, and reports what became of them."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import numpy as np

from kvpager.storage.tiers.calls import GRACE_S
from kvpager.storage.tiers.checks import check_outcomes
from kvpager.storage.tiers.dropping import Dropper, News
from kvpager.storage.tiers.protocol import Saved
from kvpager.storage.tiers.slot_memory import SlotMemory
from kvpager.storage.tiers.workers import Workers

logger = logging.getLogger(__name__)

_BATCH = 16  # blocks of one call of a store
_KEPT = (Saved.SAVED, Saved.KNOWN)


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
    """Offers staged blocks to stores. One thread calls its methods.

    Attributes:
        ends_at: the time of `time.monotonic()` at which all saves end.
    """

    def __init__(
        self,
        staging: SlotMemory,
        dropper: Dropper,
        max_wait_s: float,
        on_end: Callable[[], None],
    ) -> None:
        """Call `on_end` on the thread after the blocks of a `submit` were offered."""
        self._stores = dropper.stores
        self._staging = staging
        self._dropper = dropper
        self._max_wait_s = max_wait_s
        self._on_end = on_end
        self.ends_at = math.inf
        self._calls = dropper.calls
        self._thread = Workers(1, "kvpager-save", self._calls)
        followed = [getattr(store, "losses", None) for store in self._stores]
        self._lost = [None if losses is None else losses.follow() for losses in followed]
        self._noting = Future[int]()  # done when losses without a save are noted
        self._noting.set_result(0)

    @property
    def has_news(self) -> bool:
        """True if `take_news` returns something, or stores lost keys. O(stores)."""
        return bool(self._dropper.news) or any(self._lost)

    def take_news(self) -> list[News]:
        """Return what became of keys since the last call, in order. O(calls of stores).

        Keys that stores lost without a save are news soon, after the saves before.
        """
        if any(self._lost) and self._noting.done():
            self._noting = self._later(self._note_all_losses)
            self._noting.add_done_callback(lambda _: self._on_end())
        news = self._dropper.news
        return [news.popleft() for _ in range(len(news))]

    def submit(self, blocks: Sequence[StagedBlock]) -> Future[None] | None:
        """Offer blocks to their stores soon; then give their slots back, also if this raises.

        A store that hangs keeps the slots of its call, at most 16. O(blocks).
        Returns a future that ends when all stores have answered, but for those that hang; None if
        they have already.
        """
        starts = range(0, len(blocks), _BATCH)
        waiting = deque(blocks[start : start + _BATCH] for start in starts)  # no thread has them
        until = list[float]()  # one deadline for all, once a thread takes the first
        work: Future[None] | None = None
        try:
            for _ in starts:
                work = self._thread.submit(self._save, waiting, until)
                work.add_done_callback(lambda _: self._on_end())
        except RuntimeError:  # the interpreter ends, or the system starts no thread
            while waiting:
                self._save(waiting, until)
            self._on_end()
            return None
        except BaseException:
            while waiting:
                self._staging.give(block.slot for block in waiting.popleft())
            raise
        return work

    def promote(
        self, keys: list[bytes], namespace: str | None, slots: list[int], sources: list[int]
    ) -> None:
        """Save loaded blocks in the stores before the one each came from, if staging has room."""
        blocks = [
            StagedBlock(key, namespace, slot, range(source))
            for key, slot, source in zip(keys, slots, sources, strict=True)
        ]
        if any(sources) and self._staging.num_free >= len(slots):
            self._staging.share(slots)
            self.submit(blocks)

    def forget(self, namespace: str) -> Future[int]:
        """Drop the known blocks of a namespace from all stores, after the saves before. O(1)."""
        return self._later(partial(self._dropper.drop_namespace, namespace))

    def drop(self, number: int, keys: list[bytes]) -> None:
        """Drop blocks from a store, after the saves before. O(1)."""
        self._later(partial(self._dropper.drop, number, keys))

    def wait(self, work: Future[int]) -> int:
        """Wait for the result of `forget`, even if the thread hangs in an earlier call."""
        while not work.done():
            futures.wait([work], timeout=GRACE_S)
            self._thread.replace_lost()
        return work.result()

    def _later(self, drop: Callable[[], int]) -> Future[int]:
        try:
            return self._thread.submit(drop)
        except RuntimeError:  # as in `submit`
            done = Future[int]()
            done.set_result(drop())
            return done

    def _save(self, waiting: deque[Sequence[StagedBlock]], until: list[float]) -> None:
        try:
            blocks = waiting.popleft()
        except IndexError:  # `submit` queued them although it raised
            return
        until[:] = until or [time.monotonic() + self._max_wait_s]
        try:
            for number, store in enumerate(self._stores):
                theirs = [block for block in blocks if number in block.stores]
                try:
                    if theirs and not self._calls.hangs(number):
                        self._save_batch(number, theirs, min(until[0], self.ends_at))
                    self._dropper.drop_surplus(number)
                except Exception:
                    logger.exception("the store %s failed to save", store.name)
        finally:
            self._staging.give(block.slot for block in blocks)

    def _save_batch(self, number: int, blocks: Sequence[StagedBlock], deadline: float) -> None:
        keys, slots = [block.key for block in blocks], [block.slot for block in blocks]
        shared = self._staging.store
        if shared is not None and shared is self._stores[number]:
            outcomes = shared.adopt(keys, slots)
        else:
            memory = [self._staging.slot(slot) for slot in slots]
            with self._calls.begin(number, deadline):
                outcomes = self._stores[number].save(keys, memory, deadline)
            check_outcomes(outcomes, len(keys))
        for block, outcome in zip(blocks, outcomes, strict=True):
            if outcome in _KEPT:
                is_new = bool(outcome == Saved.SAVED)
                self._dropper.tracked.add(number, block.namespace, [block.key], is_new=is_new)
        kept = np.flatnonzero(np.isin(outcomes, _KEPT)).tolist()
        self._dropper.tell(number, [keys[index] for index in kept], is_kept=True)
        self._note_losses(number)

    def _note_all_losses(self) -> int:
        for number, store in enumerate(self._stores):
            try:
                self._note_losses(number)
            except Exception:
                logger.exception("the store %s failed to look up what it lost", store.name)
        return len(self._stores)

    def _note_losses(self, number: int) -> None:
        """Note what a store lost, unless it was saved again. A save may push out its own blocks."""
        lost, gone = self._lost[number], list[bytes]()
        if lost and not self._calls.hangs(number):
            with contextlib.suppress(IndexError):  # a thread that hung may pop here, too
                while True:
                    gone.append(lost.popleft())
            with self._calls.begin(number):
                gone = [key for key in gone if not self._stores[number].find([key])]
            self._dropper.tracked.remove(number, gone)
            self._dropper.tell(number, gone, is_kept=False)

    def close(self) -> None:
        """Wait for the blocks that were submitted: until `ends_at`, or `max_wait_s` seconds.

        Does not wait for a store that hangs.
        """
        if self.ends_at == math.inf:
            self.ends_at = time.monotonic() + self._max_wait_s
        self._thread.shutdown()
