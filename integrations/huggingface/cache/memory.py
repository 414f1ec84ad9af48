"""The memory of a patch: the pools that share one bound, one lock and their counters.

A pool lives as long as a cache uses it, so its memory goes back when the last cache dies; with
prefix caching it lives as long as its `PagedMemory`.
"""

from __future__ import annotations

import logging
import os
import weakref
from typing import NamedTuple, Protocol

import torch

from kvpager import _validate as arguments
from kvpager._atomic import Uninterrupted, new_lock
from kvpager._text import counted, size
from kvpager._validate import parse_memory
from kvpager.blocks.policies import Eviction, check_eviction
from kvpager.blocks.protocol import Ceilings
from kvpager.blocks.quotas import NamespaceQuotas
from kvpager.integrations.huggingface.cache.budget import Counters
from kvpager.integrations.huggingface.cache.generate_calls import GenerateCalls
from kvpager.integrations.huggingface.cache.namespaces import Namespaces
from kvpager.integrations.huggingface.cache.pools import LayerKind, PagedPool
from kvpager.kernels.quantisation import KV_CACHE_DTYPES
from kvpager.plans import Tier
from kvpager.storage.block_storage import KVCacheDtype

logger = logging.getLogger("kvpager")


class PagedLayers(NamedTuple):
    """Layers that were paged, of one kind and window."""

    kind: LayerKind
    window: int | None


class Group(Protocol):
    """Layers of a cache that share block tables."""

    @property
    def dense_bytes(self) -> int:
        """Bytes of the tensors that `DynamicCache` would hold in their place."""


class PagedMemory:
    """The pools of one patch: their common block size, bound, counters and lock.

    One lock serves them all, because a pool that needs room may take it from another.

    Args:
        memory: the most bytes all pools together may reserve; None for no bound.
        block_size: token slots of a block.
        keep_pools: keep pools that prompts are published in when no cache uses them.
        in_place: let attention functions read blocks in place; else every read gathers.
        dtype: what keys and values must be; None for anything.
        kv_cache_dtype: "int8" or "fp8_e4m3" to store them in eight bits; None as they are.
        host_memory: bytes of host memory for sequences the pools have no room for.
        eviction: which cached blocks leave first; host memory caches none.
        namespace: whose quota the blocks of a call count in, unless another is chosen around it.
    """

    tier: Tier = "device"
    host: PagedMemory | None = None

    def __init__(
        self,
        memory: int | str | None,
        block_size: int,
        *,
        keep_pools: bool = False,
        in_place: bool = True,
        dtype: torch.dtype | None = None,
        kv_cache_dtype: KVCacheDtype | None = None,
        host_memory: int | str | None = None,
        eviction: Eviction = "lru",
        namespace: str | None = None,
    ) -> None:
        self.bound = parse_memory(memory)
        self._given = memory if isinstance(memory, str) else None
        self.block_size = arguments.block_size(block_size)
        self.keep_pools = keep_pools
        self.in_place = in_place
        self.dtype = dtype
        if kv_cache_dtype is not None and kv_cache_dtype not in list(KV_CACHE_DTYPES):
            raise ValueError(
                f"kv_cache_dtype={kv_cache_dtype!r}: must be None or one of {list(KV_CACHE_DTYPES)}"
            )
        self.kv_cache_dtype = kv_cache_dtype
        self.eviction = check_eviction(eviction)
        self.counters = Counters()
        self.paged: dict[PagedLayers, int] = {}  # layers of a model, at the most
        self.unpaged_layers: dict[str, int] = {}  # what they are -> layers of a model, at the most
        self.session_doubts: set[str] = set()  # why sessions could not share prompts
        self.fallbacks: dict[str, int] = {}  # what kept caches or prompts out -> calls
        self._groups: weakref.WeakSet[Group] = weakref.WeakSet()  # of the caches alive now
        self.lock = new_lock()
        self.calls = GenerateCalls(self.lock)
        _memories.add(self)
        self.uninterrupted = Uninterrupted(self.lock)
        self._pools: weakref.WeakValueDictionary[object, PagedPool] = weakref.WeakValueDictionary()
        self._kept: set[PagedPool] = set()
        self.namespaces = Namespaces(namespace)
        self.quotas = NamespaceQuotas(self._ceilings, lambda: self.lock)
        if host_memory is not None:
            bound = parse_memory(host_memory, "host_memory")
            self.host = PagedMemory(bound, block_size, kv_cache_dtype=kv_cache_dtype)
            self.host._given = host_memory if isinstance(host_memory, str) else None
            self.host.tier, self.host.lock = "host", self.lock
            self.host.uninterrupted = self.uninterrupted

    def bound_as_given(self) -> str:
        """Return the bound as an argument, such as `memory='4GiB'`. O(1)."""
        name = "memory" if self.tier == "device" else "host_memory"
        given = size(self.bound or 0) if self._given is None else repr(self._given)
        return f"{name}={given}"

    def refuse_below(self, block_bytes: int, *, on_device: bool = False) -> None:
        """Refuse bounds in which not one block fits. O(1). Raises: `ValueError`.

        Rows in host memory need one block on the device, which the bound need not have room for,
        unless `on_device` says that rows compute there alone.
        """
        tiers = (self, self.host) if on_device or self.host is None else (self.host,)
        for tier in tiers:
            if tier is not None and tier.bound is not None and tier.bound < block_bytes:
                given = tier.bound_as_given()
                name, _, _ = given.partition("=")
                raise ValueError(
                    f"{given}: one block of {counted(self.block_size, 'token')} takes "
                    f"{size(block_bytes)} in all layers. Raise {name} to at least "
                    f"{size(block_bytes, round_up=True)}."
                )

    def options(self) -> str:
        """Return the options as `patch` takes them, for a `repr`; defaults are left out. O(1)."""
        host = None if self.host is None or self.host.bound is None else size(self.host.bound)
        options: dict[str, object] = {
            "memory": None if self.bound is None else size(self.bound),
            "block_size": self.block_size,
            "dtype": self.dtype,
            "kv_cache_dtype": self.kv_cache_dtype,
            "host_memory": host,
            "prefix_cache": self.keep_pools or None,
            "in_place": None if self.in_place else False,
            "eviction": None
            if self.eviction == "lru"
            else getattr(self.eviction, "__name__", self.eviction),
        }
        return ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)

    def pool(self, layout: object) -> PagedPool:
        """The pool for caches of this layout; made on first use. O(1)."""
        with self.lock:
            pool = self._pools.get(layout)
            if pool is None:
                pool = self._pools[layout] = PagedPool(self, self._host_pool())
            return pool

    def keep(self, pool: PagedPool) -> None:
        """Prompts were published in `pool`: it outlives its caches. O(1)."""
        with self.lock:
            if self.keep_pools:
                self._kept.add(pool)

    def find_pool(self, layout: object) -> PagedPool | None:
        """The pool for this layout, if there is one. O(1)."""
        with self.lock:
            return self._pools.get(layout)

    def new_pool(self) -> PagedPool:
        """A pool of a cache's own, for one whose layout is not known beforehand. O(1)."""
        with self.lock:
            pool = PagedPool(self, self._host_pool())
            self._pools[object()] = pool
            return pool

    def _host_pool(self) -> PagedPool | None:
        return None if self.host is None else self.host.new_pool()

    def pools(self) -> list[PagedPool]:
        """The pools alive now."""
        with self.lock:
            return list(self._pools.values())

    def _ceilings(self) -> list[tuple[Ceilings, int]]:
        """Return the quotas of each pool, and the bytes of its blocks. O(pools + blocks freed)."""
        self.settle()  # what was dropped counts in no quota
        return [(pool.manager.quotas, pool.block_bytes) for pool in self.pools()]

    def await_turn(self, kind: LayerKind) -> None:
        """Let this thread's call of `generate` wait until all its rows fit beside other calls.

        `kind`: of a layer that is known; the others are taken to be alike. O(layers).
        """
        call = self.calls.current()
        if call is None or call.claimed_bytes is not None:
            return
        if self.bound is None or self.host is not None:
            return
        groups = [group for cache in call.caches for group in cache.groups]
        sizes = [group.full_bytes(kind, call.num_rows, call.num_columns) for group in groups]
        self.calls.await_turn(call, sum(sizes), self.bound)

    def note_peak(self) -> None:
        """More blocks are held now. O(pools)."""
        held = sum(pool.held_bytes for pool in self.pools())
        self.counters.peak_held_bytes = max(self.counters.peak_held_bytes, held)

    def note_group(self, group: Group) -> None:
        """A cache begins. O(1)."""
        # Locked: another thread may be adding the groups up, and a set must not grow meanwhile.
        with self.lock:
            self._groups.add(group)

    def note_dense(self) -> None:
        """A step is done: what would `DynamicCache` hold now? O(groups of layers alive)."""
        with self.lock:
            dense = sum(group.dense_bytes for group in self._groups)
            self.counters.peak_dense_bytes = max(self.counters.peak_dense_bytes, dense)
            self.calls.note_step()

    def note_layers(self, layers: PagedLayers, count: int) -> None:
        """A model has `count` such layers, or more. O(1)."""
        with self.lock:
            self.paged[layers] = max(count, self.paged.get(layers, 0))

    def note_unpaged(self, what: str, count: int) -> None:
        """A model has `count` layers that are not paged, of a class or for a reason that `what`
        names; says so once. O(1)."""
        with self.lock:
            if what not in self.unpaged_layers:
                logger.info("kvpager: not paged, transformers' own: %s", what)
            self.unpaged_layers[what] = max(count, self.unpaged_layers.get(what, 0))

    def note_not_kept(self, reason: str | None) -> None:
        """Count a call whose prompts are not kept. No `reason`: it was noted before. O(1)."""
        with self.lock:
            self.counters.prefix_unserved_calls += 1
        if reason is not None:
            self.note_fallback(f"prompts not kept: {reason}")

    def note_obstacle(self, obstacle: str) -> None:
        """Count a call whose prompt is not kept because of its model; log it once. O(1)."""
        why = f"prompts not kept: {obstacle}"
        if why not in self.fallbacks:
            logger.warning("kvpager: %s", why)
        self.note_fallback(why)

    def note_fallback(self, why: str) -> None:
        """Count a call whose cache stays transformers' own, or whose prompt is not kept. O(1)."""
        with self.lock:
            self.fallbacks[why] = self.fallbacks.get(why, 0) + 1

    def note_session(self, *, sessions: int = 0, requests: int = 0, tokens: int = 0) -> None:
        """Count what continuous batching served. O(1)."""
        with self.lock:
            self.counters.num_sessions += sessions
            self.counters.session_requests += requests
            self.counters.session_tokens += tokens

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all storages. O(pools)."""
        return sum(pool.reserved_bytes for pool in self.pools())

    @property
    def room(self) -> int:
        """Bytes that the bound leaves; 0 without a bound. O(pools)."""
        return max(self.bound - self.reserved_bytes, 0) if self.bound is not None else 0

    def claim(self, num_bytes: int, claimant: object) -> bool:
        """True if the bound leaves room for `num_bytes` more. O(pools).

        Pools that hold nothing but cached prefixes go first, then free blocks of other pools.
        """
        with self.lock:
            if self.bound is None or self.reserved_bytes + num_bytes <= self.bound:
                return True
            self._drop_idle_pools(claimant)
            for pool in self.pools():
                if pool is not claimant and self.reserved_bytes + num_bytes > self.bound:
                    pool.trim()
            return self.reserved_bytes + num_bytes <= self.bound

    def _drop_idle_pools(self, claimant: object) -> None:
        for pool in list(self._kept):
            if pool is claimant:
                continue
            pool.settle()
            if not pool.manager.num_held_blocks:
                self._kept.discard(pool)  # the last reference, unless a cache still has one

    def settle(self) -> None:
        """Free what finalisers and finished copies left behind. O(blocks freed)."""
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


def _leave_behind() -> None:
    """Let calls in a forked process wait for none of the parent's threads."""
    for memory in list(_memories):
        memory.calls.leave_behind()


_memories: weakref.WeakSet[PagedMemory] = weakref.WeakSet()
os.register_at_fork(after_in_child=_leave_behind)  # after the locks are free again
