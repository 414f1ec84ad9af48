"""Block pools that size themselves.

A `PagedPool` is a manager and the storages it decides about. It starts with nothing, grows when
blocks run out, as far as its memory lets it, and gives cached prefixes up.
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
from numpy.typing import ArrayLike
from torch import Tensor

from kvpager import _validate as arguments
from kvpager._atomic import whole
from kvpager._text import counted, size
from kvpager.blocks.manager import BlockManager
from kvpager.blocks.policies import chosen_policy
from kvpager.blocks.sequences import Batch, SequenceHandle
from kvpager.blocks.stats import BlockStatus
from kvpager.errors import OutOfBlocks, OutOfQuota
from kvpager.integrations.huggingface.cache.budget import Budget
from kvpager.integrations.huggingface.cache.prompt import PrefixKey
from kvpager.ops import append_kv
from kvpager.plans import Int32, Int64, Step
from kvpager.storage.block_storage import BlockStorage, LayerShape
from kvpager.storage.free_memory import free_bytes

_T = TypeVar("_T")

# Without a bound, a pool grows to keep prefixes up to this multiple of the most blocks ever in use,
# and while the larger pool fits in this part of the memory that is free.
_MOST_KEPT = 5
_KEPT_OF_FREE = 0.5


def waiting_for_room(pool: PagedPool, operation: Callable[[], _T]) -> _T:
    """Return what `operation` returns, waiting for other calls to free blocks if it has to.

    Hold the pool's lock; while this waits, other threads have it. Raises: `OutOfBlocks` if no
    other call is running that could free some; `OutOfQuota` at once, since other namespaces do
    not wait for one that has its share.
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


class LayerKind(NamedTuple):
    """What makes layers storable side by side."""

    shape: LayerShape
    dtype: torch.dtype
    device: torch.device


class Place(NamedTuple):
    """Where a layer is kept in one tier."""

    storage: BlockStorage
    layer: int  # its number there


class Places(NamedTuple):
    """Where a layer is kept: on the device, and in host memory where there is some to swap to."""

    device: Place
    host: Place | None


@dataclass
class _Segment:
    """A storage for consecutive layers of one kind, and how many of them were ever asked for."""

    kind: LayerKind
    first_layer: int
    num_layers: int
    num_used: int
    storage: BlockStorage


class PagedPool:
    """A block manager and the storages that its decisions apply to, one per kind of layer."""

    def __init__(self, memory: Budget, host: PagedPool | None) -> None:
        self.memory = memory
        self.block_size = memory.block_size
        self.manager = BlockManager(
            1, memory.block_size, eviction=chosen_policy(memory.eviction, 1)
        )
        self.lock, self.uninterrupted = memory.lock, memory.uninterrupted
        self.host = host
        self._segments: list[_Segment] = []
        self._dropped: deque[SequenceHandle] = deque()
        self._leaving: deque[tuple[list[torch.cuda.Event], list[SequenceHandle]]] = deque()
        self._held = self._most_held = 0  # when blocks were last taken, and at the most

    @property
    def block_bytes(self) -> int:
        """Bytes of a block over all storages. O(storages)."""
        return sum(segment.storage.block_bytes for segment in self._segments)

    @property
    def held_bytes(self) -> int:
        """Bytes of the blocks that sequences hold, shared ones counted once. O(storages)."""
        return self.manager.num_held_blocks * self.block_bytes

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all storages. O(storages)."""
        return sum(segment.storage.nbytes for segment in self._segments)

    @property
    def num_spare_blocks(self) -> int:
        """Blocks that are free, or that the bound has room for. O(pools)."""
        return self.manager.num_free_blocks + self.num_room_blocks

    @property
    def num_room_blocks(self) -> int:
        """Blocks that the bound has room for; 0 without one. O(pools)."""
        return self.memory.room // max(self.block_bytes, 1)

    def places(self, kind: LayerKind, layer: int, num_layers: int) -> Places:
        """Return where layer `layer` of `num_layers` is kept, on the device and in host memory.

        O(storages). Raises: as `storage`.
        """
        with self.lock:
            host = self.host.storage(kind, layer, num_layers) if self.host is not None else None
            return Places(self.storage(kind, layer, num_layers), host)

    @whole
    def storage(self, kind: LayerKind, layer: int, num_layers: int) -> Place:
        """Return where layer `layer` of `num_layers` is kept in this pool.

        The first layer of a kind makes room for all layers from it on, which models nearly
        always shape alike; so one block is one run of bytes. O(storages).

        Raises: `OutOfBlocks` where a new storage does not fit in the memory; `ValueError` for
        another dtype than the one asked for.
        """
        if self.memory.dtype not in (None, kind.dtype):
            raise ValueError(
                f"keys and values are {kind.dtype}, but dtype={self.memory.dtype} was asked for"
            )
        for segment in self._segments:
            number = layer - segment.first_layer
            if segment.kind == kind and 0 <= number < segment.num_layers:
                segment.num_used = max(segment.num_used, number + 1)
                return Place(segment.storage, number)
        # This layer is of another kind than was guessed: give the room meant for it back.
        for segment in self._segments:
            if segment.first_layer + segment.num_used <= layer:
                self._reserve(partial(segment.storage.keep_layers, segment.num_used), 1)
                segment.num_layers = segment.num_used
        storage = self._new_storage(kind, num_layers - layer)
        self._segments.append(_Segment(kind, layer, num_layers - layer, 1, storage))
        return Place(storage, 0)

    def _new_storage(self, kind: LayerKind, num_layers: int) -> BlockStorage:
        shapes, num_blocks = [kind.shape] * num_layers, self.manager.num_blocks
        kv_cache_dtype = self.memory.kv_cache_dtype
        block_bytes = BlockStorage.bytes_of_a_block(
            self.block_size, shapes, dtype=kind.dtype, kv_cache_dtype=kv_cache_dtype
        )
        fits = self.memory.claim(num_blocks * block_bytes, self)
        # Another pool may have filled the bound: what then lives in host memory needs a block here.
        if not fits and (self.host is None or num_blocks > 1):
            raise self._out_of_blocks(num_blocks, self.block_bytes + block_bytes)
        on_host = self.memory.tier == "host"
        return self._reserve(
            lambda: BlockStorage(
                num_blocks,
                self.block_size,
                shapes,
                dtype=kind.dtype,
                kv_cache_dtype=kv_cache_dtype,
                device="cpu" if on_host else kind.device,
                pinned=on_host and kind.device.type == "cuda",
            ),
            num_blocks,
        )

    @whole
    def allocate(self, prompt: ArrayLike, key: PrefixKey | None) -> SequenceHandle:
        """Like `BlockManager.allocate`, growing where needed and carrying out its copies."""
        length, ids = arguments.prompt(prompt)
        need = -(-length // self.block_size)
        namespace, version = key or (None, None)
        self.enforce_quota(key)
        if ids is not None:
            need -= self.num_known(ids, key) // self.block_size
        allocate = partial(self.manager.allocate, prompt, namespace=namespace, lora=version)
        sequence = self._growing(need, allocate)
        self._copy(sequence.copies)
        return sequence

    @whole
    def enforce_quota(self, key: PrefixKey | None) -> None:
        """Bound the blocks of a namespace, which are as large as they are now. O(storages).

        Raises: as `NamespaceQuotas.enforce`.
        """
        self.settle()  # what was dropped counts in no quota
        namespace = None if key is None else key.namespace
        self.memory.quotas.enforce(self.manager.quotas, namespace, self.block_bytes)

    def num_known(self, ids: Int32, key: PrefixKey | None) -> int:
        """Return how many leading tokens are in the pool now. O(tokens)."""
        namespace, version = key or (None, None)
        return self.manager.match_prefix(ids, namespace=namespace, lora=version)

    @whole
    def append(self, batch: Batch, counts: Int64, ids: list[Int32]) -> Step:
        """Like `BlockManager.append`, growing where needed and carrying out its copies.

        `ids` are the new tokens' ids where they are known, else an empty list.
        """
        # Each sequence needs a copy of its tail at the worst, and its whole blocks.
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
        if held != self._held:  # in most steps no block is taken
            self._held, self._most_held = held, max(self._most_held, held)
            self.memory.note_peak()
        return step

    def write(self, place: Place, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Write keys and values [tokens, heads, dim] of a layer to `slots`. O(tokens)."""
        storage, layer = place
        # Growing copies the storage: a write to the old one after that copy would be lost.
        with self.lock:
            append_kv(key, value, *storage.layer(layer), slots, scales=storage.scales(layer))

    def copy_from(self, other: PagedPool, copies: Int32) -> list[torch.cuda.Event]:
        """Copy blocks of the other tier's pool for pairs (theirs, ours), int32 [n, 2]. O(bytes).

        Return the ends of the copies that may still read `other`, for its `free_after`.
        """
        # Both pools meet the same layers, so that their storages match; one that only one of them
        # has could not be had in the other, and nothing was written to it yet.
        theirs = {
            (segment.kind, segment.first_layer): segment.storage for segment in other._segments
        }
        events = [
            segment.storage.copy_from(theirs[segment.kind, segment.first_layer], copies)
            for segment in self._segments
            if (segment.kind, segment.first_layer) in theirs
        ]
        self.memory.counters.swapped_in_blocks += len(copies)
        return [event for event in events if event is not None]

    def free_after(self, events: list[torch.cuda.Event], sequences: list[SequenceHandle]) -> None:
        """Free `sequences` when all `events` are over: until then copies read their blocks. O(1).

        Until then nothing is written to the blocks. Other holders copy on write.
        """
        self._leaving.append((events, sequences))
        self.settle()

    def discard(self, sequences: list[SequenceHandle]) -> None:
        """Free `sequences` soon: safe to call from a finaliser, at any moment. O(1)."""
        # A finaliser may run inside any call of this thread, also one that is halfway through the
        # manager's books, so it only leaves word; the next operation acts on it.
        self._dropped.extend(sequences)

    @whole
    def settle(self) -> None:
        """Free what finalisers and finished copies left behind. O(blocks freed)."""
        while self._dropped:
            self.manager.free(self._dropped.popleft())
        while self._leaving and all(event.query() for event in self._leaving[0][0]):
            self.manager.free(self._leaving.popleft()[1])

    def _await_copies(self) -> int:
        """Wait for the copies that still read the pool; return how many blocks that freed."""
        free = self.manager.num_free_blocks
        for events, _ in self._leaving:
            for event in events:
                event.synchronize()
        self.settle()
        return self.manager.num_free_blocks - free

    def _growing(self, need: int, operation: Callable[[], _T]) -> _T:
        """Do `operation`, which takes `need` blocks at the most, with more blocks where it must."""
        self.settle()
        evicted = self.manager.queries.num_evicted_blocks
        shortage = need - self.manager.num_free_blocks
        if self.memory.keep_pools and shortage > 0:
            # Memory is there to be used: fill it before giving cached prefixes up.
            with contextlib.suppress(OutOfBlocks):  # of the device itself
                room = self._room()
                more = max(shortage, self.manager.num_blocks // 4)
                self._resize(self.manager.num_blocks + min(more, room), 1)
        try:
            result = operation()
        except OutOfQuota:
            raise
        except OutOfBlocks as error:
            missing = error.need - error.free - error.evictable - self._await_copies()
            if missing > 0:
                self._grow(missing, error.need)
            result = operation()
        self.memory.counters.evicted_blocks += self.manager.queries.num_evicted_blocks - evicted
        return result

    def _room(self) -> int:
        """Return how many more blocks the pool may have before it is short of any. O(pools)."""
        if self.memory.bound is not None:
            return self.num_room_blocks
        if not self.memory.keep_pools:
            return self.manager.num_blocks
        most = min(_MOST_KEPT * self._most_held, self._num_fitting())
        return max(most - self.manager.num_blocks, 0)

    def _num_fitting(self) -> int:
        """Count the blocks that the memory which is free has room for, beside those there are.

        Growing needs old and new storage at once. O(storages).
        """
        sizes: dict[torch.device, int] = {}
        for segment in self._segments:
            device = segment.storage.device
            sizes[device] = sizes.get(device, 0) + segment.storage.block_bytes
        return min(
            (int(free_bytes(device) * _KEPT_OF_FREE) // each for device, each in sizes.items()),
            default=0,
        )

    def _ahead(self, shortage: int) -> int:
        """`shortage` blocks, or more where there is room, so that growing stays rare."""
        return max(shortage, min(self.manager.num_blocks // 4, self._room()))

    def _grow(self, shortage: int, need: int) -> None:
        """Make `shortage` more blocks, and some more ahead. Raises `OutOfBlocks`."""
        current = self.manager.num_blocks
        for more in (self._ahead(shortage), shortage):
            # Another pool gives something up for what is really short, not for more.
            if self.memory.claim(more * self.block_bytes, self):
                try:
                    return self._resize(current + more, need)
                except OutOfBlocks:
                    if more == shortage:
                        raise
        raise self._out_of_blocks(need) from None

    def _resize(self, num_blocks: int, need: int) -> None:
        # Storages first: should one fail, the manager never learns of blocks without room.
        for segment in self._segments:
            if segment.storage.num_blocks < num_blocks:
                self._reserve(partial(segment.storage.grow, num_blocks), need)
        self.manager.grow(num_blocks)

    @whole
    def minimise(self) -> bool:
        """Give all blocks but one back. Returns False, and does nothing, if some are held. O(1)."""
        self.settle()
        if self.manager.num_held_blocks:
            return False
        self.manager.clear_prefix_cache()
        self.manager.shrink(1)
        for segment in self._segments:
            segment.storage.shrink(1)
        return True

    def trim(self) -> None:
        """Give the free blocks behind the last one in use back. O(bytes that stay)."""
        with self.lock:
            self.settle()
            used = np.flatnonzero(self.manager.queries.block_statuses() != BlockStatus.FREE)
            least = int(used[-1]) + 1 if len(used) else 1
            if least == self.manager.num_blocks:
                return
            self.manager.shrink(least)  # moves no block: none behind is in use
            for segment in self._segments:
                with contextlib.suppress(RuntimeError, MemoryError):  # then it stays as large
                    segment.storage.shrink(least)

    def _reserve(self, make: Callable[[], _T], need: int) -> _T:
        try:
            return make()
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            raise self._out_of_blocks(need) from error

    def _out_of_blocks(self, need: int, block_bytes: int = 0) -> OutOfBlocks:
        """Return the error of a pool that needs `need` blocks, in the words of `patch`."""
        stats, memory = self.manager.stats(), self.memory
        room = (stats.num_free, stats.num_cached, stats.num_blocks) if self._segments else (0, 0, 0)
        missing, num_bytes = max(need - room[0] - room[1], 1), block_bytes or self.block_bytes
        is_host = memory.tier == "host"
        message = f"KV cache out of {'host ' if is_host else ''}memory: "
        message += f"{counted(missing, 'more block')} ({size(missing * num_bytes)}) needed, "
        if memory.bound is None:
            message += "and the device has no room. Drop a cache that is no longer needed"
        else:
            others = memory.reserved_bytes - self.reserved_bytes
            blocks = max(stats.num_held + need, self._blocks_of_call())
            needed = max(others + blocks * num_bytes, (memory.bound // num_bytes + 1) * num_bytes)
            message += f"{memory.bound_as_given()} allows {memory.bound // num_bytes}"
            if stats.num_held:
                message += f", {stats.num_held} in use"
            name = "host_memory" if is_host else "memory"
            message += f". Raise {name} to {size(needed, round_up=True)}"
        if is_host:
            message += " or use a smaller batch."
        else:
            message += "." if self.host is not None else " or set host_memory= to offload."
        return OutOfBlocks(need, *room, tier=memory.tier, advice=message, message=message)

    def _blocks_of_call(self) -> int:
        """Return how many blocks this thread's call takes at full length; 0 if not known. O(1)."""
        call = self.memory.calls.current()
        if call is None:
            return 0
        return call.num_rows * -(-call.num_columns // self.memory.block_size)

    def _copy(self, copies: Int32) -> None:
        if len(copies):
            for segment in self._segments:
                segment.storage.copy(copies)
            self.memory.counters.copied_blocks += len(copies)
