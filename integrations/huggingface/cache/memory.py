"""The memory of a patch: pools that share a bound, a lock and counters.

A pool lives as long as a cache uses it, so its memory is freed with its last cache. With prefix
caching it lives as long as its `PagedMemory`.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections import Counter
from typing import Any, NamedTuple, Protocol

import torch

from kvpager._atomic import Uninterrupted, new_lock
from kvpager._text import size
from kvpager.blocks.manager import BlockManager
from kvpager.blocks.policies import Eviction, check_eviction
from kvpager.blocks.protocol import Ceilings
from kvpager.blocks.quotas import NamespaceQuotas
from kvpager.integrations.huggingface.cache.budget import Budget, LayerKind
from kvpager.integrations.huggingface.cache.generate_calls import GenerateCall, GenerateCalls
from kvpager.integrations.huggingface.cache.host_share import HostShare
from kvpager.integrations.huggingface.cache.prompt import Namespaces
from kvpager.integrations.huggingface.cache.recording import PoolRecorder

logger = logging.getLogger("kvpager")


class PagedLayers(NamedTuple):
    """The kind and window of paged layers."""

    kind: LayerKind
    window: int | None


class Pool(Protocol):
    """The members of a `PagedPool` that its memory and its errors use."""

    manager: BlockManager
    memory: PagedMemory
    host: Any  # a pool, or None

    @property
    def quotas(self) -> Ceilings: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def held_bytes(self) -> int: ...
    @property
    def reserved_bytes(self) -> int: ...
    def settle(self) -> None: ...
    def trim(self) -> None: ...
    def minimise(self) -> bool: ...


class PagedMemory:
    """The pools of one patch: their common budget, lock and records.

    All pools share one lock, because a pool that needs room may take it from another pool.

    Args:
        budget: the bound of all pools together, and the format of their blocks.
        dtype: the required dtype of keys and values; None for any.
        eviction: which cached blocks are evicted first; host memory caches none.
        namespace: the default namespace of calls, in whose quota their blocks count.
        keep_pools: keep pools with published prompts, even while no cache uses them.
        device: if this is host memory, the memory of the device whose rows move here; else None.
    """

    def __init__(
        self,
        budget: Budget,
        dtype: torch.dtype | None = None,
        eviction: Eviction = "lru",
        namespace: str | None = None,
        *,
        keep_pools: bool = False,
        device: PagedMemory | None = None,
    ) -> None:
        if budget.mode == "reserved":
            raise ValueError(
                'mode="reserved": rows of a patched model have no regions, since their length is '
                'unknown. Take "paged" or "virtual", or an Engine.'
            )
        self.budget, self.counters = budget, budget.counters
        self.keep_pools = keep_pools
        self.dtype = dtype
        self.eviction = check_eviction(eviction)
        self.paged: dict[PagedLayers, int] = {}  # -> the most layers of a model
        self.unpaged_layers: dict[str, int] = {}  # class or reason -> the most layers of a model
        self.session_doubts: set[str] = set()  # reasons why sessions share no prompts
        self.fallbacks: Counter[str] = Counter()  # calls by why paging or reuse was skipped
        self._groups: weakref.WeakSet[Any] = weakref.WeakSet()  # `LayerGroup`s of live caches
        self.lock: Any = new_lock() if device is None else device.lock
        self.calls: GenerateCalls = GenerateCalls(self.lock) if device is None else device.calls
        _memories.add(self)
        self.uninterrupted = Uninterrupted(self.lock)
        self.by_layout: weakref.WeakValueDictionary[object, Any] = weakref.WeakValueDictionary()
        self._kept: set[Pool] = set()
        self.namespaces = Namespaces(namespace)
        self.quotas = NamespaceQuotas(self._ceilings, lambda: self.lock)
        self.host = None if budget.host is None else PagedMemory(budget.host, device=self)
        self.share: HostShare | None = None  # of a host memory
        self.recorder: PoolRecorder | None = None

    def options(self) -> str:
        """Return the options as arguments of `patch`, without defaults, for a `repr`. O(1)."""
        budget, host = self.budget, self.budget.host
        options: dict[str, object] = {
            "memory": None if budget.bound is None else size(budget.bound),
            "block_size": budget.block_size,
            "dtype": self.dtype,
            "kv_cache_dtype": budget.kv_cache_dtype,
            "host_memory": None if host is None or host.bound is None else size(host.bound),
            "prefix_cache": self.keep_pools or None,
            "in_place": None if budget.in_place else False,
            "mode": None if budget.mode == "paged" else budget.mode,
            "eviction": getattr(self.eviction, "__name__", self.eviction),
        }
        if self.eviction == "lru":
            del options["eviction"]
        return ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)

    def keep(self, pool: Pool) -> None:
        """Keep `pool`, which has published prompts, beyond its caches. O(1)."""
        with self.lock:
            if self.keep_pools:
                self._kept.add(pool)

    def pools(self) -> list[Pool]:
        """Return the live pools. O(pools)."""
        with self.lock:
            return list(self.by_layout.values())

    def _ceilings(self) -> list[tuple[Ceilings, int]]:
        self.settle()  # blocks of dropped caches do not count
        return [(pool.quotas, pool.block_bytes) for pool in self.pools()]

    def await_turn(self, kind: LayerKind) -> None:
        """Wait until all rows of this thread's `generate` fit beside other calls. O(layers).

        All layers are assumed to be of `kind`.
        """
        call = self.calls.current()
        if call is None or call.claimed_bytes is not None:
            return
        if self.budget.bound is None or self.host is not None:
            return
        num_bytes = sum(group.full_bytes(kind, call) for group in _groups(call))
        self.calls.await_turn(call, num_bytes, self.budget.bound)

    def call_bytes(self, kind: LayerKind) -> int:
        """Return the bytes of all blocks in use once this thread's call has all it may take.

        In host memory, these are all its rows, because any of them may move there. All its layers
        are assumed to be of `kind`. 0 outside of `generate`. O(blocks).
        """
        call = self.calls.current()
        if call is None:
            return 0
        groups, tier = _groups(call), self.budget.tier
        own_pools = {group.pool_in(tier) for group in groups}
        others = sum(
            pool.held_bytes if pool in own_pools else pool.reserved_bytes for pool in self.pools()
        )
        own: int = sum(
            group.num_blocks_in(tier) * pool.block_bytes
            for group in groups
            if (pool := group.pool_in(tier)) is not None
        )
        of_call: int = sum(group.full_bytes(kind, call) for group in groups)
        return max(others - own, 0) + of_call

    def call_growth(self, pool: object) -> int:
        """Return how many more blocks of `pool` this thread's call may take. O(blocks)."""
        call = self.calls.current()
        if call is None:
            return 0
        tier = self.budget.tier
        return sum(
            call.num_blocks(self.budget.block_size, group.window) - group.num_blocks_in(tier)
            for group in _groups(call)
            if group.pool_in(tier) is pool
        )

    def note_peak(self) -> None:
        """Update the peak of held bytes. O(pools)."""
        held = sum(pool.held_bytes for pool in self.pools())
        self.counters.peak_held_bytes = max(self.counters.peak_held_bytes, held)

    def note_group(self, group: Any) -> None:
        """Register the group of a new cache. O(1)."""
        # Locked, because another thread may iterate over the set.
        with self.lock:
            self._groups.add(group)

    def note_dense(self) -> None:
        """Update the peak of bytes that `DynamicCache` would hold after a step. O(live groups)."""
        with self.lock:
            dense = sum(group.dense_bytes for group in self._groups)
            self.counters.peak_dense_bytes = max(self.counters.peak_dense_bytes, dense)
            self.calls.note_step()

    def note_layers(self, layers: PagedLayers, count: int) -> None:
        """Record that a model has at least `count` of these layers. O(1)."""
        with self.lock:
            self.paged[layers] = max(count, self.paged.get(layers, 0))

    def note_unpaged(self, what: str, count: int) -> None:
        """Record that a model has `count` layers that are not paged; log it once. O(1).

        `what` is their class or the reason.
        """
        with self.lock:
            if what not in self.unpaged_layers:
                logger.info("kvpager: not paged, transformers' own: %s", what)
            self.unpaged_layers[what] = max(count, self.unpaged_layers.get(what, 0))

    def note_not_kept(self, reason: str | None, *, warns: bool = False) -> None:
        """Count a call whose prompts are not kept, by its reason. `warns` logs the first. O(1)."""
        why = f"prompts not kept: {reason}"
        if warns and why not in self.fallbacks:
            logger.warning("kvpager: %s", why)
        with self.lock:
            self.counters.prefix_unserved_calls += 1
        self.note_fallback(why)

    def note_fallback(self, why: str) -> None:
        """Count a call for which paging or prefix reuse was skipped, by its reason. O(1)."""
        with self.lock:
            self.fallbacks[why] += 1

    def note_session(self, *, sessions: int = 0, requests: int = 0, tokens: int = 0) -> None:
        """Count sessions, requests and tokens of continuous batching. O(1)."""
        with self.lock:
            self.counters.num_sessions += sessions
            self.counters.session_requests += requests
            self.counters.session_tokens += tokens

    @property
    def reserved_bytes(self) -> int:
        """Return the bytes of all storages. O(pools)."""
        return sum(pool.reserved_bytes for pool in self.pools())

    @property
    def room(self) -> int:
        """Return the bytes that the bound leaves; 0 without a bound. O(pools)."""
        bound = self.budget.bound
        return 0 if bound is None else max(bound - self.reserved_bytes, 0)

    def claim(self, num_bytes: int, claimant: object) -> bool:
        """Return True if the bound has room for `num_bytes` more. O(pools).

        To make room, drops pools that hold only cached prefixes, then frees unused blocks of other
        pools. Evicts blocks of `share` for the claimed bytes.
        """
        with self.lock:
            fits = self._claim(num_bytes, claimant)
            if fits:
                self.fit_share(besides=num_bytes)
            return fits

    def fit_share(self, besides: int = 0) -> None:
        """Let cached blocks use the bytes that pools do not, less `besides` bytes. O(pools)."""
        if self.share is not None:
            self.share.fit(max(self.room - besides, 0))

    def regain_share(self) -> None:
        """Let cached blocks use what pools without rows have reserved, too. O(pools)."""
        if self.share is not None:
            self.settle()  # rows of caches that were dropped
            for pool in self.pools():
                if not pool.held_bytes:
                    pool.trim()
            self.fit_share()

    def _claim(self, num_bytes: int, claimant: object) -> bool:
        bound = self.budget.bound
        with self.lock:
            if bound is None or self.reserved_bytes + num_bytes <= bound:
                return True
            self._drop_idle_pools(claimant)
            for pool in self.pools():
                if pool is not claimant and self.reserved_bytes + num_bytes > bound:
                    pool.trim()
            return self.reserved_bytes + num_bytes <= bound

    def _drop_idle_pools(self, claimant: object) -> None:
        for pool in list(self._kept):
            if pool is claimant:
                continue
            if pool.minimise():  # others may have a reference: a cache, or tiers
                self._kept.discard(pool)

    def settle(self) -> None:
        """Free blocks of dropped caches and of finished copies. O(blocks freed)."""
        with self.lock:
            for pool in self.pools():
                pool.settle()

    def clear_prefix_cache(self) -> None:
        """Let cached prefixes go, and the pools no cache uses. O(cached blocks)."""
        with self.lock:
            for pool in self.pools():
                pool.settle()
                pool.manager.clear_prefix_cache()
            self._kept.clear()


def _groups(call: GenerateCall) -> list[Any]:
    return [group for cache in call.caches for group in cache.groups]


def _leave_behind() -> None:
    for memory in list(_memories):
        memory.calls.leave_behind()


_memories: weakref.WeakSet[PagedMemory] = weakref.WeakSet()
os.register_at_fork(after_in_child=_leave_behind)  # after the locks were reset
