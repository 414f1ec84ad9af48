"""The sequences of a batch: each row in the device's pool or, if that is full, in host memory.

    row 0   row 1   row 2   row 3           the pool is full, and row 3 needs a block:
    device  device  device  host            its blocks move to the host's pool, all layers at once

A row that has moved continues there: new tokens are written to host memory, and attention reads
them from there. So a batch may be larger than the device's pool, as in FlexGen (Sheng et al.,
2023). Rows that shared blocks still share them after the move. A row returns when the device has
room for it.

While every row's last block has room, a decoding step takes no block. Then block tables do not
change, and slots are known in advance.
"""

from __future__ import annotations

import contextlib
import copy
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpager._atomic import whole
from kvpager.blocks.sequences import Batch, SequenceHandle
from kvpager.errors import KVPagerError, OutOfBlocks, OutOfQuota
from kvpager.integrations.huggingface.cache.budget import LayerKind
from kvpager.integrations.huggingface.cache.memory import PagedMemory
from kvpager.integrations.huggingface.cache.pools import PagedPool, Places, waiting_for_room
from kvpager.integrations.huggingface.cache.prompt import PrefixKey
from kvpager.plans import Int32, Int64

# The part of the device's blocks that must stay free when a row returns, or it would soon leave.
_RESERVE = 1 / 8


class Holding(NamedTuple):
    """The blocks of one pool that the rows of a group hold."""

    num_blocks: int
    num_shared_blocks: int  # held by several rows
    held_bytes: int
    on_host: bool


class Partition(NamedTuple):
    """Rows of a batch that are in one pool."""

    pool: PagedPool
    rows: Int64  # indices in the batch, ascending
    sequences: list[SequenceHandle]
    batch: Batch  # the same sequences, for operations on all of them
    on_host: bool

    def holding(self) -> Holding:
        """Count the blocks of the rows. O(blocks)."""
        tables = self.pool.manager.block_tables(self.batch)
        blocks, holders = np.unique(tables[tables >= 0], return_counts=True)
        num_bytes = len(blocks) * self.pool.block_bytes
        return Holding(len(blocks), int(np.count_nonzero(holders > 1)), num_bytes, self.on_host)


class BatchRows:
    """A batch's sequences, over a pool and the host memory behind it."""

    pool: PagedPool  # set before the first row
    _key: PrefixKey | None  # of all rows; its namespace's quota counts the blocks
    _partitions: list[Partition] | None  # None if the rows have changed

    def __init__(self, memory: PagedMemory) -> None:
        self.lock, self.uninterrupted = memory.lock, memory.uninterrupted
        self._last_slots: Int64 = np.zeros(0, np.int64)  # of each row
        self.adopt([])

    def __len__(self) -> int:
        return len(self._sequences)

    def partitions(self) -> list[Partition]:
        """Return the rows by pool, the device's pool first. O(1) until the rows change.

        Raises: `StaleSequence` if other code has freed a row.
        """
        if self._partitions is None:
            self._partitions = []
            for pool, here in ((self.pool, ~self._on_host), (self.pool.host, self._on_host)):
                rows = np.flatnonzero(here)
                if pool is not None and len(rows):
                    sequences = [self._sequences[row] for row in rows]
                    batch = pool.manager.batch(sequences)
                    self._partitions.append(
                        Partition(pool, rows, sequences, batch, pool is not self.pool)
                    )
        return self._partitions

    def _become(self, sequences: list[SequenceHandle], on_host: NDArray[np.bool_]) -> None:
        self._sequences, self._on_host = sequences, on_host
        self.any_on_host = bool(on_host.any())
        self._partitions = None if sequences else []
        self._room = 0  # tokens that fit into every row's last block, which no other row shares

    @whole
    def join(self, parts: list[BatchRows], order: Int64) -> None:
        """Take over the rows of `parts` in `order`; the parts are empty afterwards. O(rows)."""
        sequences = [sequence for part in parts for sequence in part._sequences]
        on_host = np.concatenate([part._on_host for part in parts])[order]
        self._become([sequences[row] for row in order], on_host)
        self._key = parts[0]._key
        for part in parts:
            part.adopt([])

    def places(self, kind: LayerKind, layer: int, num_layers: int) -> Places:
        """Return the storages of layer `layer` of `num_layers` in both tiers. O(storages).

        Raises: as `PagedPool.storage`; `OutOfQuota` if the larger blocks exceed the rows' quota.
        """
        asked, host = (kind, layer, num_layers), self.pool.host
        on_host = None if host is None else host.storage(*asked)
        places = Places(self.pool.storage(*asked), on_host)
        if len(self):
            self.pool.enforce_quota(self._key)
        return places

    # ---------------------------------------------------------------- growing

    @whole
    def begin(self, num_rows: int, key: PrefixKey) -> None:
        """Begin with `num_rows` empty rows. O(rows)."""
        nothing = np.empty(0, np.int32)
        self.adopt([self.pool.allocate(nothing, key) for _ in range(num_rows)], key)

    def adopt(self, sequences: list[SequenceHandle], key: PrefixKey | None = None) -> None:
        """Begin with sequences of the device's pool. O(rows)."""
        self._key = key
        self._become(sequences, np.zeros(len(sequences), np.bool_))

    @whole
    def append(self, counts: Int64, ids: list[Int32]) -> list[Int64]:
        """Make room for `counts` [rows] more tokens; move rows to the host if needed. O(tokens).

        `ids` has the new tokens' ids, or is empty if they are unknown. Returns, for each of the
        `partitions`, the slots of its rows' new tokens, row by row.
        Raises: `OutOfBlocks`; every row then has its old length.
        """
        self._room = 0
        if self.any_on_host:
            self._return_some()
        slots = waiting_for_room(self.pool, lambda: self._append_moving(counts, ids))
        self._note_room(counts, slots)
        self.pool.note_step()
        return slots

    def _append_moving(self, counts: Int64, ids: list[Int32]) -> list[Int64]:
        while True:
            try:
                return self._append(counts, ids)
            except OutOfBlocks as error:
                # If the host is full, another attempt fails as well.
                if self.pool.host is None or error.tier == "host":
                    raise
                # Room in the pool does not help a namespace that has reached its quota.
                room = 0 if isinstance(error, OutOfQuota) else self.pool.num_room_blocks
                self._make_room(max(error.missing - room, 1), counts)

    def _append(self, counts: Int64, ids: list[Int32]) -> list[Int64]:
        slots: list[Int64] = []
        try:
            for partition in self.partitions():
                known = [ids[row] for row in partition.rows] if ids else []
                slots.append(
                    partition.pool.append(partition.batch, counts[partition.rows], known).slots
                )
        except KVPagerError:
            for partition, _ in zip(self.partitions(), slots, strict=False):
                for row, sequence in zip(partition.rows, partition.sequences, strict=True):
                    partition.pool.manager.truncate(sequence, len(sequence) - int(counts[row]))
            raise
        return slots

    def _note_room(self, counts: Int64, slots: list[Int64]) -> None:
        if self.any_on_host or not counts.all():  # rows may return, and empty rows have no block
            return
        size = self.pool.block_size
        self._last_slots = slots[0][np.cumsum(counts) - 1]
        self._room = size - 1 - int((self._last_slots % size).max())

    def ahead(self) -> Int64:
        """Return the slots of the tokens that `fill` may add, int64 [tokens, rows]. O(tokens)."""
        with self.pool.lock:
            return self._last_slots + np.arange(1, self._room + 1)[:, None]

    @whole
    def fill(self) -> bool:
        """Append an unknown token to each row unless a table has to change. O(rows)."""
        if not self._room:
            return False
        self._room -= 1
        self._last_slots = self.pool.manager.append(self.partitions()[0].batch).slots
        self.pool.note_step()
        return True

    # ---------------------------------------------------------------- moving

    def _make_room(self, missing: int, counts: Int64) -> None:
        """Move the device's last rows to the host until `missing` blocks are free. O(bytes).

        Rows that share most of their blocks move together.
        """
        device, size = self.partitions()[0], self.pool.block_size
        tables = device.pool.manager.block_tables(device.batch)
        lengths = device.pool.manager.lengths(device.batch)
        ends = lengths + counts[device.rows]
        fresh = -(-ends // size) - -(-lengths // size)
        staying = np.ones(len(device.rows), np.bool_)
        while missing > 0 and staying.any():
            group = _fork_group(tables, int(np.flatnonzero(staying)[-1])) & staying
            staying &= ~group
            missing -= _num_blocks(tables[group]) + int(fresh[group].sum())
            self._move(device.rows[group], to_host=True)

    def _return_some(self) -> None:
        """Return the host's first row with its fork group, if the device has room to spare."""
        host = self.partitions()[-1]
        tables = host.pool.manager.block_tables(host.batch)
        group = _fork_group(tables, 0)
        reserve = len(self) + int(_RESERVE * self.pool.manager.num_blocks)
        spare = self.pool.manager.num_free_blocks + self.pool.num_room_blocks
        if spare >= _num_blocks(tables[group]) + reserve:
            with contextlib.suppress(OutOfBlocks):  # the device may be full within the bound
                self._move(host.rows[group], to_host=False)

    @whole
    def leave_device(self) -> None:
        """Move all rows to the host. O(bytes). Raises: `OutOfBlocks`."""
        self._move(np.flatnonzero(~self._on_host), to_host=True)

    def _move(self, rows: Int64, *, to_host: bool) -> None:
        """Move rows and their bytes. All or nothing. O(bytes)."""
        assert self.pool.host is not None
        source, target = self.pool, self.pool.host
        if not to_host:
            source, target = target, source
        leaving = [self._sequences[row] for row in rows]
        tables, lengths = source.manager.block_tables(leaving), [len(each) for each in leaving]
        arrived: list[SequenceHandle] = []
        try:
            for number in range(len(leaving)):
                arrived.append(_arriving(number, tables, lengths, arrived, target, self._key))
        except KVPagerError:
            target.manager.free(arrived)
            raise
        places = target.manager.block_tables(arrived)
        pairs = np.stack([tables[places >= 0], places[places >= 0]], axis=1)
        source.free_after(target.copy_from(source, np.unique(pairs, axis=0)), leaving)
        sequences, on_host = list(self._sequences), self._on_host.copy()
        for row, sequence in zip(rows, arrived, strict=True):
            sequences[row] = sequence
        on_host[rows] = to_host
        self._become(sequences, on_host)

    # ---------------------------------------------------------------- changing the batch

    @whole
    def select(self, rows: list[int]) -> None:
        """Make row i what row `rows[i]` was; rows may repeat. O(rows + blocks)."""
        unused = dict(enumerate(self._sequences))
        on_host = self._on_host[np.asarray(rows, np.int64)]
        # The first use of a row takes it over, further uses fork it.
        chosen = [
            unused.pop(row)
            if row in unused
            else self._pool_of(row).manager.fork(self._sequences[row])
            for row in rows
        ]
        for row, sequence in unused.items():
            self._pool_of(row).manager.free(sequence)
        self._become(chosen, on_host)

    def _pool_of(self, row: int) -> PagedPool:
        if not self._on_host[row]:
            return self.pool
        assert self.pool.host is not None
        return self.pool.host

    @whole
    def truncate(self, lengths: Int64) -> None:
        """Keep the first `lengths` [rows] tokens of each row. O(rows + blocks)."""
        self._room = 0
        for row, length in enumerate(lengths.tolist()):
            self._pool_of(row).manager.truncate(self._sequences[row], length)

    @whole
    def drop_before(self, starts: Int64) -> None:
        """Free blocks wholly before token `starts` [rows] of each row. O(rows + blocks)."""
        self._room = 0  # tables change
        for partition in self.partitions():
            partition.pool.manager.drop_before(partition.batch, starts[partition.rows])

    @whole
    def commit(self) -> None:
        """Publish full blocks of known tokens, on the device only. O(blocks)."""
        for partition in self.partitions():
            if not partition.on_host:
                partition.pool.manager.commit(partition.batch)

    @whole
    def fork(self) -> BatchRows:
        """Return a second batch that shares every block of this one. O(rows + blocks)."""
        self._room = 0
        sequences = [
            self._pool_of(row).manager.fork(sequence)
            for row, sequence in enumerate(self._sequences)
        ]
        fork = copy.copy(self)
        fork._become(sequences, self._on_host.copy())
        return fork

    @whole
    def free(self) -> None:
        """Free all rows. O(blocks)."""
        for partition in self.partitions():
            partition.pool.manager.free(partition.batch)
        self.adopt([])

    def discard(self) -> None:
        """Free the rows at the pool's next operation. Safe to call from a finaliser. O(rows)."""
        # `partitions` must not be used here: it takes a lock and calls the manager.
        for row, sequence in enumerate(self._sequences):
            self._pool_of(row).discard([sequence])


def _fork_group(tables: Int32, number: int) -> NDArray[np.bool_]:
    """Return the rows that share most blocks of row `number`, bool [rows]. It is included."""
    own = tables[number]
    common = ((tables == own) & (own >= 0)).sum(axis=1)
    members: NDArray[np.bool_] = 2 * common > np.count_nonzero(own >= 0)
    members[number] = True
    return members


def _num_blocks(tables: Int32) -> int:
    return len(np.unique(tables[tables >= 0]))


def _arriving(
    number: int,
    tables: Int32,
    lengths: list[int],
    arrived: list[SequenceHandle],
    target: PagedPool,
    key: PrefixKey | None,
) -> SequenceHandle:
    """Make a sequence in `target` for the leaving row `number`. O(rows + blocks).

    It shares a prefix with the `arrived` sequence with which it had most blocks in common.
    """
    manager, size = target.manager, target.block_size
    common = [_common(tables, lengths, earlier, number, size) for earlier in range(number)]
    closest = int(np.argmax(common)) if common else 0
    if common and common[closest]:
        sequence = manager.fork(arrived[closest])
        manager.truncate(sequence, common[closest])
    else:
        sequence = target.allocate(np.empty(0, np.int32), key)
    try:
        _lengthen(target, sequence, lengths[number], _num_missing(tables[number]) * size)
    except KVPagerError:
        manager.free(sequence)
        raise
    return sequence


def _common(tables: Int32, lengths: list[int], earlier: int, number: int, size: int) -> int:
    """Return how many tokens of sequence `number` lie in blocks shared with `earlier`."""
    if _num_missing(tables[earlier]) != _num_missing(tables[number]):
        return 0
    num_blocks = int((tables[earlier] == tables[number]).cumprod().sum())
    shared = min(num_blocks * size, lengths[earlier], lengths[number])
    # Within a shared block, the longer sequence may have other tokens after the end of the shorter.
    return shared if shared == lengths[number] else shared // size * size


def _num_missing(table: Int32) -> int:
    """Return the number of leading blocks that were freed behind a window."""
    return int(np.argmax(np.append(table, 0) >= 0))


def _lengthen(pool: PagedPool, sequence: SequenceHandle, length: int, start: int) -> None:
    """Extend `sequence` to `length` tokens, without blocks wholly before token `start`."""
    while len(sequence) < length:
        # In steps, so that blocks behind a window never exist all at once.
        step = min(length - len(sequence), max(pool.block_size, length - start))
        pool.append(pool.manager.batch([sequence]), np.array([step]), [])
        pool.manager.drop_before([sequence], np.array([min(start, len(sequence))]))
