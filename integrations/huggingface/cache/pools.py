"""Block pools that grow on demand.

A `PagedPool` is a block manager with its storages. It starts with one block and grows when blocks
run out, within the bound of its memory. Beyond that it evicts cached prefixes.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from kvpager._atomic import whole
from kvpager.blocks.manager import BlockManager
from kvpager.blocks.policies import chosen_policy
from kvpager.blocks.sequences import Batch, SequenceHandle
from kvpager.blocks.stats import BlockStatus
from kvpager.errors import OutOfBlocks, OutOfQuota
from kvpager.integrations.huggingface.cache.budget import LayerKind
from kvpager.integrations.huggingface.cache.memory import PagedMemory
from kvpager.integrations.huggingface.cache.out_of_memory import PoolQuotas, out_of_memory
from kvpager.integrations.huggingface.cache.prompt import PrefixKey
from kvpager.ops import append
from kvpager.plans import AppendPlan, Int32, Int64
from kvpager.storage.block_storage import BlockStorage
from kvpager.storage.free_memory import free_bytes

_T = TypeVar("_T")

# Without a bound, a pool grows for cached prefixes up to this multiple of the peak of held blocks,
# while the larger pool fits into this part of the free memory.
_MOST_KEPT = 5
_KEPT_OF_FREE = 0.5


def waiting_for_room(pool: PagedPool, operation: Callable[[], _T]) -> _T:
    """Return the result of `operation`; if it is out of blocks, wait for other calls to free some.

    The caller holds the pool's lock; waiting releases it. Raises: `OutOfBlocks` if no other running
    call could free blocks; `OutOfQuota` at once, since other calls free no blocks of the quota.
    """
    try:
        return operation()
    except OutOfQuota:
        raise
    except OutOfBlocks:
        found = pool.memory.calls.wait_for(lambda: _if_there_is_room(operation))
        if found is None:
            raise
        return found


def _if_there_is_room(operation: Callable[[], _T]) -> _T | None:
    with contextlib.suppress(OutOfBlocks):
        return operation()
    return None


class Place(NamedTuple):
    """The storage of a layer in one tier."""

    storage: BlockStorage
    layer: int  # its index in the storage


class Places(NamedTuple):
    """The storages of a layer: on the device, and in host memory if there is any."""

    device: Place
    host: Place | None

    def on(self, on_host: bool) -> Place:
        """Return the storage of one tier."""
        place = self.host if on_host else self.device
        assert place is not None
        return place


@dataclass
class _Segment:
    """A storage for consecutive layers of one kind, and the number of layers in use."""

    kind: LayerKind
    first_layer: int
    num_layers: int
    num_used: int
    storage: BlockStorage


class PagedPool:
    """A block manager and the storages that its decisions apply to, one per kind of layer."""

    def __init__(self, memory: PagedMemory, host: PagedPool | None) -> None:
        self.memory, self.budget = memory, memory.budget
        self.block_size = self.budget.block_size
        policy = chosen_policy(memory.eviction, 1)
        self.manager = BlockManager(1, self.block_size, eviction=policy)
        self.lock, self.uninterrupted = memory.lock, memory.uninterrupted
        self.host = host
        self._segments: list[_Segment] = []
        self._dropped: deque[SequenceHandle] = deque()
        self._leaving: deque[tuple[list[torch.cuda.Event], list[SequenceHandle]]] = deque()
        self._held = self._most_held = 0  # held blocks after the last `append`, and their peak

    @property
    def quotas(self) -> PoolQuotas:
        """Return the ceilings of the namespaces in this pool."""
        return PoolQuotas(self)  # not kept: a reference cycle would delay freeing the memory

    @property
    def block_bytes(self) -> int:
        """Return the bytes of a block over all storages. O(storages)."""
        return sum(segment.storage.block_bytes for segment in self._segments)

    @property
    def held_bytes(self) -> int:
        """Return the bytes of blocks that sequences hold; shared blocks count once. O(storages)."""
        return self.manager.num_held_blocks * self.block_bytes

    @property
    def reserved_bytes(self) -> int:
        """Return the bytes of all storages. O(storages)."""
        return sum(segment.storage.nbytes for segment in self._segments)

    @property
    def num_room_blocks(self) -> int:
        """Return how many more blocks fit into the bound; 0 without a bound. O(pools)."""
        return self.memory.room // max(self.block_bytes, 1)

    @whole
    def storage(self, kind: LayerKind, layer: int, num_layers: int) -> Place:
        """Return the storage of layer `layer` of `num_layers` in this pool. O(storages).

        The first layer of a kind reserves room for all later layers, since models nearly always
        have layers of one shape. So a block is one run of bytes.

        Raises: `OutOfBlocks` if a new storage does not fit into memory; `ValueError` if the patch
        requires another dtype.
        """
        if self.memory.dtype not in (None, kind.dtype):
            raise ValueError(
                f"dtype={self.memory.dtype}: the model's keys and values are {kind.dtype}. "
                "Leave dtype out, or load the model in that dtype."
            )
        for segment in self._segments:
            number = layer - segment.first_layer
            if segment.kind == kind and 0 <= number < segment.num_layers:
                segment.num_used = max(segment.num_used, number + 1)
                return Place(segment.storage, number)
        # This layer is of another kind than the layers before: free the room reserved for it.
        for segment in self._segments:
            if segment.first_layer + segment.num_used <= layer:
                self._reserve(partial(segment.storage.keep_layers, segment.num_used), 1, kind)
                segment.num_layers = segment.num_used
        storage = self._new_storage(kind, num_layers - layer)
        self._segments.append(_Segment(kind, layer, num_layers - layer, 1, storage))
        return Place(storage, 0)

    def _new_storage(self, kind: LayerKind, num_layers: int) -> BlockStorage:
        shapes, num_blocks = [kind.shape] * num_layers, self.manager.num_blocks
        block_bytes = self.budget.block_bytes(shapes, kind.dtype, kind.device)
        fits = self.memory.claim(num_blocks * block_bytes, self)
        # If other pools fill the bound, rows live in host memory and still need one block here.
        if not fits and (self.host is None or num_blocks > 1):
            raise out_of_memory(self, num_blocks, kind, larger_bytes=self.block_bytes + block_bytes)
        make = partial(self.budget.new_storage, num_blocks, shapes, kind.dtype, kind.device)
        return self._reserve(make, num_blocks, kind, self.block_bytes + block_bytes)

    @whole
    def allocate(self, ids: Int32, key: PrefixKey | None) -> SequenceHandle:
        """Call `BlockManager.allocate`; grow the pool if needed, and carry out the copies."""
        self.enforce_quota(key)
        need = -(-len(ids) // self.block_size) - self.num_known(ids, key) // self.block_size
        namespace, version = key or (None, None)
        allocate = partial(self.manager.allocate, ids, namespace=namespace, lora=version)
        sequence = self._growing(need, allocate)
        self._copy(sequence.copies)
        return sequence

    @whole
    def enforce_quota(self, key: PrefixKey | None) -> None:
        """Apply the namespace's quota at the current size of blocks. O(storages).

        Raises: as `NamespaceQuotas.enforce`.
        """
        self.settle()  # blocks of dropped caches do not count
        namespace = None if key is None else key.namespace
        self.memory.quotas.enforce(self.quotas, namespace, self.block_bytes)

    def num_known(self, ids: Int32, key: PrefixKey | None) -> int:
        """Return the number of leading tokens that are cached in the pool. O(tokens)."""
        namespace, version = key or (None, None)
        return self.manager.match_prefix(ids, namespace=namespace, lora=version)

    @whole
    def append(self, batch: Batch, counts: Int64, ids: list[Int32]) -> AppendPlan:
        """Call `BlockManager.append`; grow the pool if needed, and carry out the copies.

        `ids` has the new tokens' ids, or is empty if they are unknown.
        """
        # At worst, each sequence needs a copy of its last block besides its new blocks.
        need = int((-(-counts // self.block_size)).sum()) + len(batch)
        most = int(counts.max(initial=0))
        if ids:
            step = self._growing(need, lambda: self.manager.append(batch, ids))
        elif most and int(counts.min()) == most:  # the usual case, and quicker
            step = self._growing(need, lambda: self.manager.append(batch, most))
        else:
            step = self._growing(need, lambda: self.manager.append(batch, counts=counts))
        self._copy(step.copies)
        held = self.manager.num_held_blocks
        if held != self._held:  # most steps take no block
            self._held, self._most_held = held, max(self._most_held, held)
            self.memory.note_peak()
        return step

    def note_step(self) -> None:
        """Record that rows of the pool got slots for a step, if the patch has a recorder."""
        if self.memory.recorder is not None:
            self.memory.recorder.step(self.manager)

    def write(self, place: Place, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Write keys and values [tokens, heads, dim] of a layer to `slots`. O(tokens)."""
        storage, layer = place
        # Locked, because growing copies the storage: a later write to the old one would be lost.
        with self.lock:
            append(key, value, storage.caches(layer), slots)

    def copy_from(self, other: PagedPool, copies: Int32) -> list[torch.cuda.Event]:
        """Copy blocks of the other tier's pool for pairs (source, target), int32 [n, 2]. O(bytes).

        Returns the events of copies that may still read `other`, for its `free_after`.
        """
        # Both pools have the same layers, so their storages match. A storage that the other pool
        # lacks, because it was out of memory, holds nothing yet.
        sources = {
            (segment.kind, segment.first_layer): segment.storage for segment in other._segments
        }
        events = [
            segment.storage.copy_from(sources[segment.kind, segment.first_layer], copies)
            for segment in self._segments
            if (segment.kind, segment.first_layer) in sources
        ]
        self.budget.counters.swapped_in_blocks += len(copies)
        return [event for event in events if event is not None]

    def free_after(self, events: list[torch.cuda.Event], sequences: list[SequenceHandle]) -> None:
        """Free `sequences` after all `events`, since copies read their blocks until then. O(1).

        Nothing is written to the blocks before, since other holders copy on write.
        """
        self._leaving.append((events, sequences))
        self.settle()

    def discard(self, sequences: list[SequenceHandle]) -> None:
        """Free `sequences` at the next operation. Safe to call from a finaliser. O(1)."""
        # A finaliser may run inside any call of this thread, even halfway through a change of the
        # manager's state. So it only queues the sequences.
        self._dropped.extend(sequences)

    @whole
    def settle(self) -> None:
        """Free queued sequences, and those whose copies are finished. O(blocks freed)."""
        while self._dropped:
            self.manager.free(self._dropped.popleft())
        while self._leaving and all(event.query() for event in self._leaving[0][0]):
            self.manager.free(self._leaving.popleft()[1])

    def _await_copies(self) -> int:
        """Wait for the copies that still read the pool. Return the number of blocks freed."""
        free = self.manager.num_free_blocks
        for events, _ in self._leaving:
            for event in events:
                event.synchronize()
        self.settle()
        return self.manager.num_free_blocks - free

    def _growing(self, need: int, operation: Callable[[], _T]) -> _T:
        """Call `operation`, which takes at most `need` blocks; grow the pool if needed."""
        self.settle()
        evicted = self.manager.queries.num_evicted_blocks
        shortage = need - self.manager.num_free_blocks
        if self.memory.keep_pools and shortage > 0:
            # Grow before evicting cached prefixes.
            with contextlib.suppress(OutOfBlocks):  # the device itself may be full
                room = self._room()
                more = max(shortage, self.manager.num_blocks // 4)
                self._resize(self.manager.num_blocks + min(more, room), 1)
        try:
            result = operation()
        except OutOfQuota as error:
            raise self.quotas.out_of_quota(error) from None
        except OutOfBlocks as error:
            missing = error.need - error.free - error.evictable - self._await_copies()
            if missing > 0:
                self._grow(missing, error.need)
            result = operation()
        self.budget.counters.evicted_blocks += self.manager.queries.num_evicted_blocks - evicted
        return result

    def _room(self) -> int:
        """Return how many more blocks the pool may have without need for them. O(pools)."""
        if self.budget.bound is not None:
            return self.num_room_blocks
        if not self.memory.keep_pools:
            return self.manager.num_blocks
        most = min(_MOST_KEPT * self._most_held, self._num_fitting())
        return max(most - self.manager.num_blocks, 0)

    def _num_fitting(self) -> int:
        """Return how many blocks fit into free memory beside the pool. O(storages).

        Growing needs the old and the new storage at once.
        """
        sizes: dict[torch.device, int] = {}
        for segment in self._segments:
            device = segment.storage.device
            sizes[device] = sizes.get(device, 0) + segment.storage.block_bytes
        return min(
            (int(free_bytes(device) * _KEPT_OF_FREE) // each for device, each in sizes.items()),
            default=0,
        )

    def _grow(self, shortage: int, need: int) -> None:
        """Grow by at least `shortage` blocks, and more ahead of need. Raises: `OutOfBlocks`."""
        current = self.manager.num_blocks
        # Room is within the bound, so other pools give up `shortage` at most.
        ahead = max(shortage, min(current // 4, self._room()))
        for more in (ahead, shortage):
            if self.memory.claim(more * self.block_bytes, self):
                try:
                    return self._resize(current + more, need)
                except OutOfBlocks:
                    if more == shortage:
                        raise
        raise out_of_memory(self, need, self._segments[0].kind) from None

    def _resize(self, num_blocks: int, need: int) -> None:
        # Storages first: if one fails, the manager must not have blocks without storage.
        for segment in self._segments:
            if segment.storage.num_blocks < num_blocks:
                self._reserve(partial(segment.storage.grow, num_blocks), need, segment.kind)
        self.manager.grow(num_blocks)

    @whole
    def make_room(self, num_blocks: int, key: PrefixKey) -> None:
        """Grow until blocks can be taken under `key`, as far as memory and quota allow. O(blocks).

        Grows before cached prefixes are evicted, as `allocate` does.
        """
        with contextlib.suppress(OutOfBlocks):
            self.enforce_quota(key)
            self._growing(num_blocks, lambda: None)
            missing = num_blocks - self.manager.num_available_blocks
            if missing > 0:
                self._grow(missing, num_blocks)

    @whole
    def minimise(self) -> bool:
        """Free all blocks but one. Returns False without effect if blocks are held. O(blocks)."""
        self.settle()
        if self.manager.num_held_blocks:
            return False
        self.manager.clear_prefix_cache()
        self.trim()
        return True

    def trim(self) -> None:
        """Free the storage of unused blocks after the last used block. O(bytes that stay)."""
        with self.lock:
            self.settle()
            used = np.flatnonzero(self.manager.queries.block_statuses() != BlockStatus.FREE)
            least = int(used[-1]) + 1 if len(used) else 1
            if least == self.manager.num_blocks:
                return
            self.manager.shrink(least)  # moves no block, since no later block is in use
            for segment in self._segments:
                with contextlib.suppress(RuntimeError, MemoryError):  # it keeps its size then
                    segment.storage.shrink(least)

    def _reserve(
        self, make: Callable[[], _T], need: int, kind: LayerKind, larger_bytes: int = 0
    ) -> _T:
        try:
            return make()
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            raise out_of_memory(
                self, need, kind, larger_bytes=larger_bytes, is_device_full=True
            ) from error

    def _copy(self, copies: Int32) -> None:
        if len(copies):
            for segment in self._segments:
                segment.storage.copy(copies)
            self.budget.counters.copied_blocks += len(copies)


def pool_for(memory: PagedMemory, layout: object) -> PagedPool:
    """Return the pool for caches of this layout; make it at the first use. O(1)."""
    with memory.lock:
        pool: PagedPool | None = memory.by_layout.get(layout)
        if pool is None:
            host = None if memory.host is None else pool_for(memory.host, object())
            pool = memory.by_layout[layout] = PagedPool(memory, host)
        return pool
