"""The arrays of a block manager, its lock, and the only functions that take or release blocks.

    manager ──▶ allocation · extension · truncation · publication · swap · resize
                quotas · pins · copies · events · queries ──▶ BlockState

Every verb uses these functions. They resolve handles to rows in O(1) and refuse stale handles. Only
`take` and `release` change the owners of blocks; a verb calls `take` after all that can fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from kvpager import _validate as arguments
from kvpager._atomic import Change, new_lock
from kvpager.blocks.accounts import Accounts, Counts, Quota, by_owner
from kvpager.blocks.event_log import EventLog, Kind
from kvpager.blocks.eviction import Evictor
from kvpager.blocks.fences import Fences
from kvpager.blocks.policies import POLICIES, make_policy
from kvpager.blocks.policies.base import EvictionPolicy
from kvpager.blocks.policies.failsafe import FailSafe
from kvpager.blocks.pool import OFFERED, BlockPool
from kvpager.blocks.prefix import PrefixIndex
from kvpager.blocks.radix import Forest
from kvpager.blocks.sequences import Batch, Prompt, SequenceHandle, SequenceTable
from kvpager.errors import OutOfBlocks, SequenceSwapped, StaleSequence
from kvpager.plans import NO_BLOCKS, Int32, Int64, Tier

TOTALS = (  # of `Stats`
    "total_copied", "total_evicted", "total_swapped_out", "total_swapped_in",
    "total_prefix_queries", "total_prefix_hits", "prefix_query_tokens", "prefix_hit_tokens",
)  # fmt: skip


class BlockState:
    """The state of a `BlockManager`, which documents the arguments.

    Only this class and its parts (prefix index, evictor, fences) write the arrays of the pools,
    the accounts and the event log. The verbs write the columns of `rows`; each states which.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_host_blocks: int,
        eviction: str | EvictionPolicy,
        null_block: bool = False,
        fences: bool = False,
        num_events: int = 0,
        windows: tuple[int | None, ...] | None = None,
        max_chunk: int | None = None,
    ) -> None:
        arguments.flag("null_block", null_block)
        arguments.flag("fences", fences)
        num_blocks = arguments.count("num_blocks", num_blocks, at_least=1 + null_block)
        num_host_blocks = arguments.count("num_host_blocks", num_host_blocks)
        self.block_size = arguments.block_size(block_size)
        self.shift = self.block_size.bit_length() - 1
        self.pool = BlockPool(num_blocks, self.block_size, int(null_block))
        self.host = BlockPool(num_host_blocks, self.block_size)
        policy = make_policy(eviction, num_blocks) if isinstance(eviction, str) else eviction
        if getattr(policy, "num_blocks", num_blocks) != num_blocks:
            raise ValueError(f"eviction: this policy was not made for {num_blocks} blocks")
        if isinstance(policy, type) or not hasattr(policy, "needs_fingerprints"):
            raise TypeError(f"eviction={eviction!r}: expected a name or an EvictionPolicy")
        if type(policy) not in POLICIES.values():
            policy = FailSafe(policy, num_blocks)
        events = arguments.count("num_events", num_events)
        self.log = EventLog(events) if events else None
        self.forest = Forest(self.pool)
        self.evictor = Evictor(self.forest, policy, self.log)
        self.index = PrefixIndex(self.forest, self.evictor, self.log)
        self.windows, self.max_chunk = windows or (None,), max_chunk
        self.axes = () if windows is None else (len(windows),)  # before those of tables and slots
        self.rows = SequenceTable(self.block_size, self.windows)
        self.fences = Fences(self.pool, self.host, is_on=fences)
        self.accounts = Accounts(num_blocks)
        self._lock: AbstractContextManager[Any] = new_lock()
        self.change = Change(self, "BlockManager")
        self.totals = dict.fromkeys(TOTALS, 0)

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """The lock around each call. It refuses calls after an interrupted change. O(1)."""
        return self._lock

    # ---------------------------------------------------------------- handles

    def length(self, sequence: SequenceHandle, /) -> int:
        """Return the tokens in the sequence. O(1). Raises `StaleSequence`."""
        with self._lock:
            return self.rows.length(self.row(sequence))

    def handle(self, row: int) -> SequenceHandle:
        """Return a handle for a live row. O(1)."""
        rows = self.rows
        return SequenceHandle(self, row, int(rows.generations[row]), int(rows.committed[row]))

    def resolve(self, target: SequenceHandle | Batch | list[SequenceHandle]) -> Int64:
        """Return the rows of a handle, several, or a batch. O(n). Raises `StaleSequence`."""
        table = self.rows
        if isinstance(target, Batch):
            if target.owner is not self:
                raise StaleSequence("the batch belongs to another manager")
            if target.epoch != table.epoch:
                stale = table.generations[target.rows] != target.generations
                if np.any(stale):
                    row = int(target.rows[stale][0])
                    name = f"SequenceHandle {row}.{target.generations[stale][0]}"
                    raise StaleSequence(f"{name} of the batch was freed. Make a new batch.")
            return target.rows
        if isinstance(target, SequenceHandle):
            return np.array([self.row(target)], np.int64)
        rows = np.array([self.row(handle) for handle in target], np.int64)
        if len(rows) > 1 and len(np.unique(rows)) != len(rows):
            raise ValueError("sequences: one is repeated. Pass each sequence once.")
        return rows

    def row(self, handle: SequenceHandle) -> int:
        """Return the row of a handle. O(1). Raises `StaleSequence`."""
        # Use `handle.name`: the repr of a foreign handle would take another manager's lock.
        if not isinstance(handle, SequenceHandle):
            raise TypeError(f"expected a SequenceHandle, got {type(handle).__name__}")
        if handle._owner is not self:
            raise StaleSequence(f"{handle.name} belongs to another manager")
        if self.rows.generations[handle._row] != handle._generation:
            raise StaleSequence(f"{handle.name} was freed")
        return handle._row

    def resident_row(self, handle: SequenceHandle) -> int:
        """Return the row of a handle. O(1). Raises `StaleSequence`, `SequenceSwapped`."""
        row = self.row(handle)
        if self.rows.swapped[row]:
            raise SequenceSwapped(f'{handle.name} is on the host. Call swap(seq, "device").')
        return row

    def resident(self, target: SequenceHandle | Batch | list[SequenceHandle]) -> Int64:
        """Return the rows of handles. O(n). Raises `StaleSequence`, `SequenceSwapped`."""
        table = self.rows
        if isinstance(target, Batch) and target.epoch == table.epoch and target.owner is self:
            return target.rows
        if isinstance(target, SequenceHandle):
            return np.array([self.resident_row(target)], np.int64)
        rows = self.resolve(target)
        away = table.swapped[rows]
        if away.any():
            name = self.handle(int(rows[away][0])).name
            raise SequenceSwapped(f'{name} is on the host. Call swap(seq, "device").')
        if isinstance(target, Batch):
            target.epoch = table.epoch
        return rows

    def refuse_speculative(self, rows: Int64) -> None:
        """Raise `ValueError` if one of these rows has speculative tokens. O(rows)."""
        if (self.rows.speculative[rows] > 0).any():
            raise ValueError(
                "sequences: one has speculative tokens. Call accept(sequence, counts) first; "
                "0 drops them."
            )

    # ---------------------------------------------------------------- take and release

    def take(self, count: int, owners: Int64 | None, keep: Int32 = NO_BLOCKS) -> Int32:
        """Take `count` device blocks; evict cached blocks other than `keep` if necessary.

        Raises `OutOfBlocks` before any change; otherwise the change has begun.
        O(count + evicted blocks).
        """
        pool = self.pool
        if owners is None and count <= pool.num_free:
            return self.take_free(pool, count)
        revived = keep[(pool.refs[keep] == 0) & (pool.holds[keep] == 0)] if len(keep) else keep
        need = self._require(count, owners, revived)
        blocks = pool.take(count, lambda: self._make_room(count, need, revived))
        if owners is not None:
            self.accounts.charge(blocks, owners)
        return blocks

    def take_free(self, pool: BlockPool, count: int) -> Int32:
        """Begin the change by taking `count` blocks that are free. O(count)."""
        self.change.begin()
        try:
            if count != 1:
                return pool.take(count)
            blocks = np.empty(1, np.int32)
            blocks[0] = pool.take_one()
        except MemoryError:  # raised before any block is taken
            self.change.end()
            raise
        return blocks

    def call_back_host(self, count: int) -> None:
        """Call lent host blocks back, in a separate change. O(1), O(count) if some are needed."""
        if count > self.host.num_free and self.host.num_lent:
            self.change.begin()
            self.host.call_back(count)
            self.change.end()

    def _make_room(self, count: int, need: Counts | None, revived: Int32) -> None:
        """Begin the change; evict until `count` blocks are free, but none of `revived`."""
        self.change.begin()
        if len(revived):
            self.pool.hold(revived)
        self.evict_for(count, need)
        if len(revived):
            self.evictor.enqueue(self.pool.unhold(revived))

    def reserve(self, num_columns: int, num_rows: int = 1) -> None:
        """Make room in the block tables, in a separate change. Amortised O(1)."""
        self._enlarge(self.rows.reserve, num_columns, num_rows)

    def reserve_more(self, rows: Int64, num_columns: Int64) -> None:
        """Make room for longer tables of these rows, in a separate change. O(rows)."""
        if np.count_nonzero(self.rows.tables.spans[rows] < num_columns):
            self._enlarge(self.rows.tables.reserve, rows, num_columns)

    def _enlarge(self, reserve: Callable[..., None], *sizes: Any) -> None:
        self.change.begin()
        try:
            reserve(*sizes)
        except MemoryError:  # raised before anything is replaced
            self.change.end()
            raise
        self.change.end()

    def refuse(
        self, count: int, owners: Int64 | None, revived: Int32 = NO_BLOCKS, reserve: int = 0
    ) -> None:
        """Raise `OutOfBlocks` if the pool lacks `count` available blocks. O(owners + revived).

        So that `reserve` blocks stay available after `revived` cached ones are held. Raise
        `OutOfQuota` first: a namespace at its ceiling gets the error of its quota.
        """
        pool = self.pool
        if owners is not None:
            self.accounts.refuse_over_ceiling(by_owner(owners), {}, pool)
        if reserve:
            idle = (pool.refs[revived] == 0) & (pool.holds[revived] == 0)
            count += reserve + int(np.count_nonzero(idle))
        if count > pool.num_free + pool.num_evictable:
            raise OutOfBlocks(count, pool.num_free, pool.num_evictable, pool.num_blocks)

    def _require(self, count: int, owners: Int64 | None, revived: Int32) -> Counts | None:
        """Return how many blocks each account takes. Raises `OutOfBlocks`."""
        pool = self.pool
        if owners is None:
            evictable = pool.num_evictable - len(revived)
            if count > pool.num_free + evictable:
                raise OutOfBlocks(count, pool.num_free, evictable, pool.num_blocks)
            return None
        need = by_owner(owners)
        self.accounts.refuse(need, self.accounts.count(revived), pool)
        return need

    def evict_for(self, count: int, need: Counts | None) -> None:
        """Evict until `count` blocks are free, within the floors. O(evicted blocks)."""
        for number, forced in self.accounts.forced(need or {}):
            self.totals["total_evicted"] += self.evictor.evict_from(number, forced)
        self.evict(count - self.pool.num_free, need)

    def evict(self, count: int, need: Counts | None) -> None:
        """Evict `count` blocks, in favour of the accounts in `need`. O(evicted blocks)."""
        if count <= 0:
            return
        accounts = self.accounts
        if need is None:
            self.totals["total_evicted"] += self.evictor.evict(count)
            return

        def allowance(number: int) -> int:
            return accounts.may_leave(number, need.get(number, 0))

        self.evictor.relist(accounts.opened | need.keys())
        accounts.opened.clear()
        self.totals["total_evicted"] += self.evictor.evict(count, allowance)

    def release(self, blocks: Int32, times: int | Int32 = 1) -> None:
        """Drop `times` references to each of the distinct device blocks. O(blocks)."""
        if len(blocks) == 1 and isinstance(times, int):
            if self.pool.release_one(int(blocks[0])):
                self.evictor.release(blocks)
            return
        evictable = self.pool.release(blocks, times)
        if len(evictable):
            self.evictor.release(evictable)

    def resize(self, num_blocks: int, copies: Int32) -> None:
        """Resize the device pool; `copies` are the blocks that move. O(blocks)."""
        places = np.arange(self.pool.num_blocks, dtype=np.int32)
        places[copies[:, 0]] = copies[:, 1]
        self.rows.replace(np.array(self.rows.live_rows(), np.int64), *copies.T)
        behind: Int32 = np.zeros(len(places) + 1, np.int32)  # blocks plus 1, by blocks plus 1
        behind[1:] = np.where(places < num_blocks, places + 1, 0)
        self.rows.behind[:] = behind[self.rows.behind]
        self.pool.resize(num_blocks, copies)
        self.index.resize(num_blocks, places)
        self.recount(self.accounts.limits)

    # ---------------------------------------------------------------- pins

    def pin(self, blocks: Int32, refusal: str) -> int:
        """Pin published blocks, in a change of its own; return the ticket. O(blocks).

        Raises: `ValueError(refusal)` if other namespaces' floors need the blocks.
        """
        idle = int(np.count_nonzero(self.evictor.idle(blocks)))
        if self.accounts.shortfall(self.pool, fewer=idle) > 0:
            raise ValueError(refusal)
        self.change.begin()
        return self.fences.pin(blocks)

    def unpin(self, ticket: int, *, keep_rank: bool = False) -> None:
        """End a pin, in a change of its own. O(blocks). Raises: `ValueError` for no open pin.

        The pin counts as a use of its blocks, unless `keep_rank`.
        """
        self.fences.refuse_no_pin(ticket)
        self.change.begin()
        blocks = self.fences.unpin(ticket)
        if not keep_rank:
            self.pool.marks[blocks] &= ~np.uint16(OFFERED)
            self.evictor.release(blocks)
        elif len(blocks):
            self.evictor.enqueue(blocks)

    # ---------------------------------------------------------------- token ids

    def learn(self, rows: Int64, starts: Int64, ends: Int64, ids: Int32, slots: Int64) -> None:
        """Store the ids of new tokens, if all ids before them are known. O(tokens)."""
        table = self.rows
        whole = table.known[rows] == starts
        if whole.all():
            self.pool.write_slots(slots, ids)
            table.known[rows] = ends
        else:
            named = np.repeat(whole, ends - starts)
            self.pool.write_slots(slots[named], ids[named])
            table.known[rows[whole]] = ends[whole]

    # ---------------------------------------------------------------- copies

    def moved(
        self, copies: Int32, ticket: int, source: Tier, destination: Tier, kind: Kind = "copied"
    ) -> None:
        """Fence the blocks of these copies, and log them. O(copies)."""
        self.fences.begin(ticket, copies, source, destination)
        if self.log is not None and len(copies):
            self.log.add(kind, copies=copies.copy(), tiers=(source, destination))

    def copied(self, copies: Int32, ticket: int) -> None:
        """Fence, log and count copies on the device. O(copies)."""
        self.totals["total_copied"] += len(copies)
        self.moved(copies, ticket, "device", "device")

    # ---------------------------------------------------------------- owners of blocks

    def recount(self, limits: dict[str | None, Quota]) -> None:
        """Recount all blocks under these quotas. O(blocks)."""
        self.pool.watch(self.accounts if limits else None)
        self.accounts.recount(limits, self.pool, self.owned())
        self.evictor.set_queues(self.accounts.numbers)

    def owned(self) -> list[tuple[str | None, Int32]]:
        """Return all blocks held, published, or in an unfinished copy, by owner. O(blocks)."""
        rows = self.rows
        held = [(rows.prompt(row).namespace, rows.device_blocks(row)) for row in rows.live_rows()]
        return [*held, *self.forest.owned(), *self.accounts.parked(self.pool)]

    def owned_by(self, namespace: str | None) -> Int32:
        """Return a namespace's held and published blocks. O(sequences + its blocks)."""
        rows = self.rows
        mine = [row for row in rows.live_rows() if rows.prompt(row).namespace == namespace]
        held = [rows.device_blocks(row) for row in mine]
        return np.unique(np.concatenate([NO_BLOCKS, *held, *self.forest.owned_by(namespace)]))

    def owners(self, who: Iterable[Prompt], counts: Iterable[int]) -> Int64 | None:
        """Return the account of each block to take; None without quotas. O(blocks)."""
        if not self.accounts.limits:
            return None
        owners = [self.accounts.owner(prompt.namespace) for prompt in who]
        return np.repeat(np.array(owners, np.int64), np.array(list(counts), np.int64))

    def owners_of_rows(self, rows: Int64, leaving: Int64, num_fresh: Int64) -> Int64 | None:
        """Return `owners` of the blocks that an append takes. O(rows)."""
        if not self.accounts.limits:
            return None
        growing = num_fresh.nonzero()[0]
        who = [self.rows.prompt(row) for row in rows[[*leaving, *growing]].tolist()]
        return self.owners(who, [*[1] * len(leaving), *num_fresh[growing].tolist()])
