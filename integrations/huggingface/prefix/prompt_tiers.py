"""Find prompts in the stores of a patch before they are looked up, and save them after a call.

prefill     fetch(prompt)  stores ─▶ the pool's prefix cache, in which the prompt is then found
call ends   save()         idle blocks of the pool ─▶ stores
undo        close()        the last idle blocks ─▶ stores
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from concurrent.futures import wait
from contextlib import AbstractContextManager
from typing import Any

from numpy.typing import ArrayLike

from kvpager import _validate as arguments
from kvpager._text import counted
from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.cache.pools import PagedPool
from kvpager.integrations.huggingface.cache.prompt import PrefixKey, Prompt
from kvpager.integrations.huggingface.model_state.fingerprint import ModelWatch
from kvpager.plans import Int32
from kvpager.storage.tiers.loading import Fetch
from kvpager.storage.tiers.retaining import Retained
from kvpager.storage.tiers.tiering import Tiering
from kvpager.storage.tiers.tiering_stats import TieringStats

logger = logging.getLogger("kvpager")

_CLEANED_AT_ONCE = 64  # blocks, while other threads wait for the pool
_LAST_SAVES_S = 5.0
_GRACE_S = 0.05  # for stores to end a load after its deadline


class NamedModel:
    """A model as it was when tiers named it. Keeps the model alive no longer than its watch."""

    def __init__(self, watch: ModelWatch) -> None:
        """Take the model as it is now. O(modules + weights)."""
        self._watch = watch
        self.state = watch.look()

    def is_unchanged(self) -> bool:
        """Return True if the model is as it was, as far as its watch sees. O(modules + weights)."""
        return self._watch.look() == self.state

    def renew(self) -> None:
        """Take the model as it is now. O(modules + weights)."""
        self.state = self._watch.look()

    def look(self) -> str:
        """Return the version of `PrefixKey` for the model as it is now. O(modules + weights)."""
        return str(self._watch.look().version)

    def made(self, version: str | None) -> bool:
        """Return True if the model made blocks of this version of `PrefixKey`. O(1)."""
        return version == str(self.state.version)

    def adapter(self, version: str | None) -> None:
        """Return the adapter in the content keys of blocks: None, as the name covers it.

        Raises: `KVPagerError` for blocks that another version of the model made.
        """
        if not self.made(version):
            raise KVPagerError("tiers: a block was made by a model that was not named")


class PromptTiers:
    """The stores below the pool of one model's prompts.

    Any thread may call its methods. Each takes the pool's lock, but never while it waits for a
    store. After the model changed, the prefix cache was cleared, or anything failed, nothing is
    fetched or saved any more. A forked process uses no tiers.
    """

    def __init__(self, pool: PagedPool, tiering: Tiering, model: NamedModel) -> None:
        self._pool, self._tiering, self._model = pool, tiering, model
        self._lock, self._uninterrupted = pool.lock, pool.uninterrupted
        self._process = os.getpid()
        self._off: str | None = None  # why nothing is fetched or saved any more
        self._stats = tiering.stats
        self._fetched = Counter[str]()  # tokens by the name of their store

    @property
    def _is_on(self) -> bool:
        return self._off is None and self._process == os.getpid()

    def locked(self) -> AbstractContextManager[Any]:
        """Return the pool's lock."""
        lock: AbstractContextManager[Any] = self._lock
        return lock

    def tiering(self) -> Tiering:
        """Return the tiering. Call under the lock. Raises: `KVPagerError` after `close`."""
        if self._is_closed or self._process != os.getpid():
            raise KVPagerError("tiers: this patch was undone, or is that of another process.")
        return self._tiering

    def refuse_change(self) -> None:
        """Raise `KVPagerError` if the model changed since it was named. O(modules + weights)."""
        if not self._model.is_unchanged():
            raise KVPagerError("tiers: the model changed while it was patched. Patch it again.")

    def renew(self) -> None:
        """Serve the model as it is now, since kvpager itself changed it. O(modules + weights)."""
        self._model.renew()

    def fetch(self, prompt: Prompt) -> None:
        """Put what the stores have of a batch's prompts into the prefix cache. O(tokens + bytes).

        Waits until all blocks are there, or until the deadline: half of the time that computing
        them takes. Uses those that came in order.
        """
        self._fetch(prompt.rows, prompt.key)

    def warm(self, prompt: ArrayLike, namespace: str | None, wait_s: float) -> int:
        """Put a prompt into the prefix cache, even if computing is faster. O(tokens + bytes).

        If `namespace` is None, uses that of current calls. Returns how many tokens were added.
        Raises: as `tiering`.
        """
        self.tiering()
        if namespace is None:
            namespace = self._pool.memory.namespaces.current
        key = PrefixKey(namespace, self._model.look())
        return self._fetch([arguments.token_ids(prompt)], key, wait_s)

    def retain(self, prompt: ArrayLike, namespace: str | None) -> Retained:
        """Keep the cached blocks of a prompt on the device. O(tokens). Raises: as `tiering`.

        If `namespace` is None, uses that of current calls.
        """
        self.tiering()
        if namespace is None:
            namespace = self._pool.memory.namespaces.current
        version = self._model.look()
        with self._lock, self._uninterrupted:
            if self._is_on and not self._model.made(version):
                self.turn_off("the model changed")
            if not self._is_on:
                return Retained()
            return self._tiering.retain(prompt, namespace=namespace, lora=version)

    def _fetch(self, rows: list[Int32], key: PrefixKey, wait_s: float | None = None) -> int:
        """Fetch rows under a key; return how many tokens were added."""
        fetches, count = list[Fetch](), 0
        try:
            with self._lock, self._uninterrupted:
                if self._is_on and not self._model.made(key.version):
                    self.turn_off("the model changed")
                self._begin(rows, key, wait_s, fetches)
                # Before others join: the deadline is that of this call.
                ends = max((fetch.wait_until for fetch in fetches), default=0.0) + _GRACE_S
            wait([fetch.work for fetch in fetches], max(ends - time.monotonic(), 0))
        finally:
            if fetches:
                with self._lock, self._uninterrupted:
                    count = self._end(fetches, rows, key)
        return count

    def _begin(
        self, rows: list[Int32], key: PrefixKey, wait_s: float | None, fetches: list[Fetch]
    ) -> None:
        """Begin to fetch each row, and add it to `fetches`."""
        if not self._is_on:
            return
        self._fit_share()
        try:
            for row in rows:
                fetch = self._tiering.begin(
                    row, namespace=key.namespace, lora=key.version, wait_s=wait_s
                )
                if fetch is not None:
                    fetches.append(fetch)
        except Exception:
            self._give_up()

    def _end(self, fetches: list[Fetch], rows: list[Int32], key: PrefixKey) -> int:
        """Attach what fetches have loaded, and cancel those that are late. Return their tokens."""
        before = self._fetched.total()
        if self._is_closed:  # which cancelled them
            return 0
        try:
            if self._is_on and any(fetch.slots for fetch in fetches):
                # For all rows, or a row's blocks would evict those of the row before.
                size = self._pool.block_size
                self._pool.make_room(sum(-(-len(row) // size) for row in rows), key)
            for fetch in fetches:
                if self._is_on:
                    self._fetched.update(self._tiering.attach(fetch, early=True))
        except Exception:
            self._give_up()
        finally:
            for fetch in fetches:
                self._tiering.cancel(fetch)  # no effect on those that were attached
        return self._fetched.total() - before

    @property
    def _is_closed(self) -> bool:
        return not hasattr(self, "_tiering")

    def save(self) -> bool:
        """Offer idle blocks to the stores, until staging is full. O(blocks + bytes copied).

        Threads save the copies. Blocks that do not fit into staging are offered after a later call.
        Return False if there was no block to save.
        """
        is_dirty = self._find_dirty()
        while is_dirty and self._clean():
            pass
        return is_dirty

    def _fit_share(self) -> None:
        """Let cached blocks use what rows leave of host memory. O(pools + slots that change)."""
        if self._pool.memory.host is not None:
            self._pool.memory.host.regain_share()

    def _find_dirty(self) -> bool:
        """Return True if there is a block to save. Turns off if the model changed."""
        with self._lock, self._uninterrupted:
            if not self._is_on:
                return False
            self._pool.settle()  # rows of caches that were dropped
            self._fit_share()
            try:
                if not self._tiering.has_dirty():
                    return False
            except Exception:
                self._give_up()
                return False
        if not self._model.is_unchanged():  # a changed model may have computed them
            self.turn_off("the model changed")
        return self._is_on

    def _clean(self) -> bool:
        """Copy some blocks; return True if more can be copied now."""
        with self._lock, self._uninterrupted:
            if not self._is_on:
                return False
            try:
                self._tiering.clean(_CLEANED_AT_ONCE)
            except Exception:
                self._give_up()
            return self._is_on and not self._tiering.is_clean and self._tiering.has_room

    def turn_off(self, reason: str) -> None:
        """Fetch, save and retain nothing any more. O(retained blocks)."""
        if self._is_on:
            logger.warning("kvpager: tiers are not used any more, because %s", reason)
            self._off = reason
            self._tiering.retentions.end_all()

    def _give_up(self) -> None:
        logger.exception("kvpager: tiers failed")
        self.turn_off("they failed")

    def stats(self) -> TieringStats:
        """Return current counts. O(stores)."""
        return self._stats()

    def report(self) -> list[str]:
        """Return lines on what the tiers saved. O(stores)."""
        stores = ", ".join(f"{count} from {name}" for name, count in self._fetched.items())
        saved = sum(tier.store.saved for tier in self.stats().tiers)
        lines = [
            f"tiers: {counted(self._fetched.total(), 'token')} fetched, not computed"
            f"{f' ({stores})' if stores else ''}; {counted(saved, 'block')} saved"
        ]
        if self._off is not None:
            lines.append(f"tiers: not used any more, because {self._off}")
        return lines

    def save_last(self) -> None:
        """Release retained prompts, and save the idle blocks, for at most 5 seconds."""
        with self._lock:
            if not self._is_closed:
                self._tiering.retentions.end_all()
        progress = threading.Event()
        ends = time.monotonic() + _LAST_SAVES_S
        while (left_s := ends - time.monotonic()) > 0:
            progress.clear()
            with self._lock:
                if not self._is_on:
                    return
                self._tiering.on_progress = progress.set
            if not self.save():
                return
            with self._lock:
                if not self._is_on or self._tiering.is_clean:
                    return
            progress.wait(left_s)

    def close(self) -> None:
        """Wait for the saves under way, and close the stores. Twice is the same as once."""
        if self._process != os.getpid():
            return
        with self._lock:  # threads that wait for a fetch find it cancelled
            if self._is_closed:
                return
            self._off = self._off or "the patch was undone"
            try:
                self._tiering.close()
            finally:
                if self._pool.memory.host is not None:
                    self._pool.memory.host.share = None
                final = self._tiering.stats()
                self._stats = lambda: final
                del self._tiering, self._pool  # a handle that is kept holds no memory
