"""Moves cached blocks between a block manager and the stores below it.

    begin(prompt) ─▶ Fetch ─▶ a thread finds and loads blocks into staging, in order
    attach(fetch)             between steps: staging ─▶ blocks ─▶ the prefix cache, as they arrive
                                                └─▶ the stores above the one they came from
    clean(count)              between steps: the blocks that leave next ─▶ staging ─▶ stores

A request then begins as any other: `allocate` finds the prefix. `attach` and `clean` never wait for
a store. Staging is the only buffer: when it is full, loads end early and nothing is saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from typing import Unpack

from numpy.typing import ArrayLike

from kvpager import _validate as arguments
from kvpager._atomic import Uninterrupted, new_lock, whole
from kvpager.blocks.groups.manager import GroupedManager
from kvpager.blocks.manager import BlockManager
from kvpager.blocks.sequences import KeyParts
from kvpager.plans import Int32
from kvpager.storage.keys import ContentKeying, KeyContext
from kvpager.storage.tiers.admission import Admissions, Admit
from kvpager.storage.tiers.attaching import PrefixAttacher
from kvpager.storage.tiers.calls import GRACE_S
from kvpager.storage.tiers.dropping import Dropper
from kvpager.storage.tiers.followers import Followers, refuse_windows
from kvpager.storage.tiers.group_attaching import GroupAttacher
from kvpager.storage.tiers.loading import Fetch, Loader
from kvpager.storage.tiers.namespaces import Limit, NamespaceKeys, checked_name
from kvpager.storage.tiers.prompt_saving import PromptSaver
from kvpager.storage.tiers.protocol import BlockStore
from kvpager.storage.tiers.retaining import Retained, Retentions
from kvpager.storage.tiers.saving import Saver, StagedBlock
from kvpager.storage.tiers.slot_memory import Lease, SlotMemory
from kvpager.storage.tiers.tiering_stats import TieringStats, TierStats

_FETCHES_MAX = 256  # under way at once
_AHEAD_PART = 8  # the part of the device's blocks that is saved before it leaves: an eighth
_AHEAD_MIN = 512  # blocks: enough for a long prompt on a small device


class Tiering:
    """Fetches prompts' blocks from stores, and saves the blocks that leave next.

    `context_of(namespace, lora)` returns what keys cover besides tokens, always the same.
    Stores are asked in order, the fastest first. `recompute_s(num_blocks)` estimates how long the
    model takes to compute blocks: a fetch gives up after half of that, and stores that are slower
    by their own measurements are left out. Without it, a fetch takes at most `max_wait_s` seconds.
    A step should copy at most `step_bytes_max` bytes.

    `admit` chooses the blocks that stores are offered, see `Admission`. "auto" is "always" for a
    store without a bound, or with at least four times the device's blocks. A store with an
    attribute `admit`, such as `DiskStore`, chooses by itself.

    A block that was offered counts as saved when a store has said so: see `manager.cached`. Blocks
    that came from a store are also saved in the stores before it, while as many slots are free.

    Blocks are saved as soon as they are idle, so that a restart and other machines find them. If
    every store is private to this process, only the blocks that leave next are saved: the next
    eighth of the device, at least 512 blocks. The stores then hold more blocks that the device
    does not, and take fewer writes.

    One thread, between steps, calls `begin`, `attach`, `cancel` and `clean`. Signals wait for the
    end of such a call. Ctrl-C in `begin` cancels the fetch that it began.

    With `num_followers`, other ranks have shards of each block. `followers.take()` returns their
    transfers for the next step; each rank passes them to its `TierFollower`. A fetch is done when
    all ranks have staged their shards, and has the blocks that all of them have.

    Attributes:
        followers: the transfers of other ranks, and their answers.
        on_progress: called by the threads when blocks were loaded or saved.
        is_clean: True if the last `clean` found no block to save.
        prompts: saves the blocks of a prompt that other processes wait for.
        context_of: as the argument.
        retentions: the prompts that stay on the device.
        step_blocks_max: how many blocks `attach` and `clean` should copy in one step together.
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
        step_bytes_max: int = 64 << 20,
        admit: Admit = "auto",
        num_followers: int = 0,
    ) -> None:
        """Use `stores` from now on; `close` closes them. Raises: `ValueError`, `TypeError`."""
        refuse_windows(manager, num_followers)
        self.lock = new_lock()
        self.uninterrupted = Uninterrupted(self.lock)
        self.stores = tuple(stores)
        self._manager, self._staging = manager, staging
        self.context_of = context_of
        self._keying = ContentKeying(manager.block_size, context_of, manager.windows)
        self._max_wait_s = arguments.seconds("max_wait_s", max_wait_s)
        self._recompute_s = recompute_s
        step_bytes_max = arguments.count("step_bytes_max", step_bytes_max, at_least=1)
        self.step_blocks_max = max(1, step_bytes_max // staging.block_bytes)
        self._fetching: dict[bytes, Fetch] = {}  # by the key of the first missing block, to share
        self._live = set[Fetch]()  # whose blocks may still be attached
        self.on_progress: Callable[[], None] = lambda: None
        self._tracked = NamespaceKeys(len(self.stores))
        dropper = Dropper(self.stores, self._tracked)
        self._calls = dropper.calls
        self._admissions = Admissions(
            self.stores, admit, manager.num_blocks, staging.store, self._calls.hangs
        )
        self._loader = Loader(staging, dropper, recompute_s, lambda: self.on_progress())
        self._saver = Saver(staging, dropper, self._max_wait_s, lambda: self.on_progress())
        self.followers = Followers(num_followers, lambda: self.on_progress())
        dropper.on_drop = self.followers.drop
        parts = manager, staging, self.stores, self._keying, self._saver, self.followers
        self.prompts = PromptSaver(*parts)
        self._attacher = self._made_attacher()
        self.retentions = Retentions(manager, self.lock, self._note_release)
        self._has_released = False
        self._num_declined = 0
        self._is_open = True
        is_private = all(getattr(store, "is_private", False) for store in self.stores)
        self._ahead = max(manager.num_blocks // _AHEAD_PART, _AHEAD_MIN) if is_private else None
        self._num_evicted = 0  # at the last `clean`
        self.is_clean = False

    def _made_attacher(self) -> GroupAttacher | PrefixAttacher:
        mover = self._staging, self._saver, self._keying
        if isinstance(self._manager, GroupedManager):
            return GroupAttacher(self._manager, *mover, len(self.stores))
        return PrefixAttacher(self._manager, *mover, self.followers)

    # ---------------------------------------------------------------- fetch

    def begin(
        self,
        prompt: ArrayLike,
        *,
        namespace: str | None = None,
        lora: str | None = None,
        mm_hashes: Iterable[tuple[int, int, bytes]] = (),
        wait_s: float | None = None,
    ) -> Fetch | None:
        """Begin to load the blocks of `prompt` that are not cached. O(tokens).

        Returns None if all are cached, if 256 fetches are under way, or if every store would take
        longer than the model. With `wait_s`, loads for up to `wait_s` seconds, even if computing is
        faster.
        Two prompts with the same first missing block get the same `Fetch`, which does not load the
        other blocks of the second. Each caller waits until its own `fetch.wait_until`, read before
        the next call of `begin`, and then calls `cancel`.
        """
        identity: KeyParts = {"namespace": namespace, "lora": lora, "mm_hashes": list(mm_hashes)}
        fetch = None
        try:
            with self.lock, self.uninterrupted:
                fetch = self._begin(prompt, identity, wait_s)
        except BaseException:
            if fetch is not None:  # an interrupt at the end: the caller does not get it
                self.cancel(fetch)
            raise
        return fetch

    def _wait_s(self, num_blocks: int, num_loads: int) -> float | None:
        """Return how long to wait for blocks; None if they are computed sooner."""
        if not self._loader.is_worth(num_blocks, num_loads):
            self._num_declined += 1
            return None
        if self._recompute_s is None:
            return self._max_wait_s
        return min(self._max_wait_s, self._recompute_s(num_blocks) / 2)

    def _begin(self, prompt: ArrayLike, identity: KeyParts, wait_s: float | None) -> Fetch | None:
        tokens, manager, size = arguments.token_ids(prompt), self._manager, self._manager.block_size
        # The last token is always computed, so its block need not be complete.
        num_blocks = (len(tokens) - 1) // size
        first = manager.match_prefix(tokens, **identity) // size
        if first >= num_blocks:
            return None
        context = self.context_of(identity["namespace"], identity["lora"])
        new = self._attacher.new_fetch(tokens, identity, context, first, num_blocks)
        fetch = self._fetching.get(new.name)
        if fetch is None:
            if len(self._live) >= _FETCHES_MAX or not self._is_open:
                return None
            new.is_asked_for = wait_s is not None
        if wait_s is None:
            wait_s = self._wait_s(num_blocks - first, new.num_missing)
        if wait_s is None:
            return None
        wait_until = time.monotonic() + wait_s
        if fetch is None:
            fetch, new.deadline = new, wait_until
            self._live.add(fetch)  # first: an interrupt loses no slots
            self._fetching[fetch.name] = fetch
            try:
                self.followers.begin(fetch)
                self._loader.start(fetch)
            except BaseException:
                self.cancel(fetch)
                raise
        fetch.num_waiting += 1
        fetch.wait_until = min(wait_until, fetch.deadline)
        return fetch

    @property
    def has_room(self) -> bool:
        """True if a block can be saved now. O(1)."""
        return self._staging.num_free > 0

    @whole
    def attach(
        self, fetch: Fetch, most: int | None = None, *, early: bool = False
    ) -> dict[str, int]:
        """Put loaded blocks of a fetch into the prefix cache, at most `most`. O(bytes).

        Call it when the fetch is done. With `early`, the fetch may still load: call it again later.
        `fetch.slots` are the slots left for another call. Returns the number of tokens that
        it added from each store, by name. If the pool has no room, or earlier blocks of the
        prompt left meanwhile, the fetch is void: it drops its blocks and adds none.
        """
        is_done = fetch.is_done  # first: blocks that a thread adds later are for the next call
        if not (is_done or early):
            raise ValueError("fetch: it is not done. Attach it later, or cancel it.")
        self._manager.host.lend()
        if is_done:
            self._staging.give(fetch.cut())
        elif self.followers.count or fetch.blocks is not None:
            return {}  # only the end shows what followers lack and which blocks windows need
        num_loaded = len(fetch.slots)
        most = num_loaded if most is None else arguments.count("most", most)
        if not min(most, num_loaded) and (num_loaded or not is_done):
            return {}
        self._unlist(fetch)
        added = None
        try:
            if fetch.slots and not fetch.is_void:
                added = self._attach(fetch, most)
        finally:
            if added is None:
                fetch.is_void = True
                self._attacher.drop(fetch)
                self._staging.give(fetch.take(len(fetch.slots))[0])
        if is_done and not fetch.slots:
            self._live.discard(fetch)
            self.followers.end(fetch)
        elif not fetch.is_void and (name := fetch.name):
            self._fetching.setdefault(name, fetch)
        return added or {}

    def _attach(self, fetch: Fetch, count: int) -> dict[str, int] | None:
        attached = self._attacher.attach(fetch, count)
        if attached is None:
            return None
        for number, keys in enumerate(attached.by_store(self.stores)):
            self._manager.cached.mark_clean(keys, number)
        return attached.num_tokens(self.stores, self._manager.block_size)

    @whole
    def cancel(self, fetch: Fetch) -> None:
        """Stop waiting for a fetch. If no other caller waits, its slots become free. O(slots)."""
        fetch.num_waiting -= 1
        if fetch.num_waiting <= 0:
            self._unlist(fetch)
            self._live.discard(fetch)
            self._attacher.drop(fetch)
            self._loader.cancel(fetch)
            self.followers.end(fetch)

    def _unlist(self, fetch: Fetch) -> None:
        if self._fetching.get(fetch.name) is fetch:
            del self._fetching[fetch.name]

    # ---------------------------------------------------------------- save

    @property
    def has_news(self) -> bool:
        """True if `clean` may find more than at the last call, without a block that became idle.

        That is when stores have answered, retained prompts were released, or blocks left and
        others leave next. O(1).
        """
        num_evicted = self._manager.queries.num_evicted_blocks
        has_moved = self._ahead is not None and self._num_evicted != num_evicted
        return has_moved or self._has_released or self._saver.has_news

    def _note_release(self) -> None:
        self._has_released = True
        self.on_progress()

    def has_dirty(self) -> bool:
        """Return True if `clean` would find a block to offer. As `CachedBlocks.leaving`."""
        return len(self._leaving(1)) > 0

    def _leaving(self, count: int) -> Int32:
        cached, self._has_released = self._manager.cached, False
        for store, keys, is_kept in self._saver.take_news():
            (cached.mark_clean if is_kept else cached.mark_dirty)(keys, store)
        self._num_evicted = self._manager.queries.num_evicted_blocks
        return cached.leaving(count, self._ahead)

    @whole
    def clean(self, count: int = 64) -> int:
        """Offer the next blocks to be evicted, at most `count`, to the stores.

        Blocks that a store has are left out. A block is offered once each time it becomes idle, and
        needs a free slot. Returns the number of blocks copied; a thread saves them then. Call it
        between steps. O(count log blocks + bytes copied).
        """
        self._manager.host.lend()
        cached, blocks = self._manager.cached, self._leaving(count)
        self.is_clean = not len(blocks)
        if not len(blocks) or not self._is_open:
            return 0
        blocks = blocks[: self._staging.num_free]
        try:
            ticket = cached.hold(blocks)
        except ValueError:  # floors of namespaces need the blocks: try again later
            self.is_clean = True
            return 0
        with Lease(self._staging) as lease:
            try:
                keys = cached.keys(blocks, self._keying)
                wanted = self._admissions.wanted(keys)
                chosen = [number for number, stores in enumerate(wanted) if stores]
                slots = lease.take(len(chosen))
                if len(slots) < len(chosen):  # a thread took some meanwhile
                    blocks, chosen = blocks[: chosen[len(slots)]], chosen[: len(slots)]
                namespaces = cached.namespaces(blocks[chosen])
                if chosen:
                    self._staging.read(blocks[chosen].tolist(), slots)
                cached.mark_offered(blocks)
                # Not blocks without a slot: their next offer is the same one.
                self._admissions.note(keys[: len(blocks)], wanted)
            finally:
                cached.release(ticket, keep_rank=True)
            if chosen:
                parts = zip(chosen, namespaces, slots, strict=True)
                staged = [StagedBlock(keys[n], space, slot, wanted[n]) for n, space, slot in parts]
                self.followers.save(blocks[chosen], staged)  # before stores may drop some again
                lease.slots = []
                self._saver.submit(staged)
        return len(chosen)

    # ---------------------------------------------------------------- for callers

    def warm(
        self,
        prompts: Iterable[ArrayLike],
        *,
        namespace: str | None = None,
        lora: str | None = None,
        wait_s: float = 60.0,
    ) -> int:
        """Fetch prompts and wait for them, each at most `wait_s` seconds. O(bytes).

        Returns how many tokens were added to the prefix cache. Raises: `ValueError` with followers.
        """
        if self.followers.count:
            raise ValueError("warm: followers fetch between steps. Call it on the engine's tiers.")
        wait_s = arguments.seconds("wait_s", wait_s)
        count = 0
        for prompt in prompts:
            fetch = self.begin(prompt, namespace=namespace, lora=lora, wait_s=wait_s)
            if fetch is not None:
                try:
                    wait([fetch.work], timeout=wait_s + GRACE_S)  # a store may hang
                    count += sum(self.attach(fetch, early=True).values())
                finally:
                    self.cancel(fetch)
        return count

    def retain(self, prompt: ArrayLike, **key: Unpack[KeyParts]) -> Retained:
        """Keep the cached blocks of a prompt on the device until it is released. O(tokens).

        Stores may drop their copies meanwhile: blocks are offered again after the release. `forget`
        and `close` release, too. Raises: `ValueError` if floors of namespaces need the blocks.
        """
        return self.retentions.begin(prompt, lambda: None, **key)

    def limit(
        self, namespace: str, *, capacity: int | str | None = None, ttl_s: float | None = None
    ) -> None:
        """Bound what each store keeps of a namespace: bytes such as "4GiB", and seconds.

        This counts the blocks that this process saved or loaded. The oldest are dropped when others
        are saved, and those that are too old before others are loaded. Raises: `ValueError`,
        `TypeError` for a bad argument.
        """
        limit = Limit.parsed(capacity, ttl_s, self._staging.block_bytes)
        self._tracked.set_limit(checked_name(namespace), limit)

    def forget(self, namespace: str) -> Future[int]:
        """Drop the blocks of a namespace from the prefix cache, and soon from all stores.

        Fetches under way add nothing. Blocks that a sequence holds stay cached; retained prompts
        are released. Returns how many blocks left the stores: call it again if a store failed.
        Blocks that other processes saved may stay: only another secret in `context_of` makes sure
        that none is found. O(cached blocks of the namespace).
        """
        self.retentions.end_namespace(checked_name(namespace))
        self._manager.cached.evict(namespace)
        for fetch in self._live:
            fetch.is_void = fetch.is_void or fetch.identity["namespace"] == namespace
        return self._saver.forget(namespace)

    def wait_for(self, dropped: Future[int]) -> int:
        """Wait for the result of `forget`. A store that hangs keeps its blocks."""
        return self._saver.wait(dropped)

    def stats(self) -> TieringStats:
        """Return counts since the tiering began. O(stores)."""
        return TieringStats(
            tiers=tuple(map(TierStats.of, self.stores, self._loader.costs, self._calls.hanging)),
            num_fetching=len(self._live),
            num_free_slots=self._staging.num_free,
            total_declined=self._num_declined,
            total_dropped_dirty=self._manager.cached.num_dropped_dirty,
        )

    # ---------------------------------------------------------------- end

    def finish_by(self, deadline: float) -> None:
        """Let all saves end at a time of `time.monotonic()`. Call it before `close`. O(1)."""
        self._saver.ends_at = deadline

    def close(self) -> None:
        """Wait for saves, at most `max_wait_s` seconds, and close the stores. Idempotent."""
        self._is_open = False
        self.retentions.end_all()
        self._loader.close()
        self._saver.close()
        for fetch in list(self._live):
            fetch.num_waiting = 1
            self.cancel(fetch)
        self._calls.close_all(self.stores)
