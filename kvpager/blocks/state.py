"""What a block manager knows, and how it takes and gives blocks.

Every verb goes through these few functions. A handle becomes a row in O(1), and a stale one is
refused. Blocks are taken in one place, after everything that can fail was done, and given back
in one place.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpager import _validate as arguments
from kvpager._atomic import Change, new_lock
from kvpager.blocks.events import EventLog, Kind
from kvpager.blocks.eviction import EvictionPolicy
from kvpager.blocks.pins import Fences
from kvpager.blocks.policies import POLICIES, make_policy
from kvpager.blocks.policies.failsafe import FailSafe
from kvpager.blocks.pool import BlockPool
from kvpager.blocks.prefix import PrefixIndex
from kvpager.blocks.quotas import Counts, Quota, Quotas, by_owner
from kvpager.blocks.sequences import Batch, Prompt, Sequence, SequenceTable
from kvpager.errors import OutOfBlocks, SequenceSwapped, StaleSequence
from kvpager.plans import Tier

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Target = Sequence | Batch | Iterable[Sequence]
NO_BLOCKS: Int32 = np.empty(0, np.int32)
TOTALS = ("copied", "evicted", "out", "in", "queries", "hits", "queried", "hit")


class Books:
    """The state of a `BlockManager`, which documents the arguments."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        num_host_blocks: int = 0,
        *,
        eviction: str | EvictionPolicy = "lru",
        null_block: bool = False,
        fences: bool = False,
        num_events: int = 0,
    ) -> None:
        arguments.flag("null_block", null_block)
        arguments.flag("fences", fences)
        num_blocks = arguments.count("num_blocks", num_blocks, at_least=1 + null_block)
        num_host_blocks = arguments.count("num_host_blocks", num_host_blocks)
        self.block_size = arguments.block_size(block_size)
        self._shift = self.block_size.bit_length() - 1
        self._pool = BlockPool(num_blocks, self.block_size, int(null_block))
        self._host = BlockPool(num_host_blocks, self.block_size)
        policy = make_policy(eviction, num_blocks) if isinstance(eviction, str) else eviction
        if getattr(policy, "num_blocks", num_blocks) != num_blocks:
            raise ValueError(f"eviction: this policy was not made for {num_blocks} blocks")
        if isinstance(policy, type) or not hasattr(policy, "needs_fingerprints"):
            raise TypeError(f"eviction {eviction!r}: expected a name or an EvictionPolicy")
        if type(policy) not in POLICIES.values():
            policy = FailSafe(policy, num_blocks)
        events = arguments.count("num_events", num_events)
        self._events = EventLog(events) if events else None
        self._index = PrefixIndex(self._pool, policy, self._events)
        self._rows = SequenceTable(self.block_size)
        self._fences = Fences(self._pool, self._host, is_on=fences)
        self._quotas = Quotas(num_blocks)
        self._lock: AbstractContextManager[Any] = new_lock()
        self._change = Change(self)
        self._totals = dict.fromkeys(TOTALS, 0)

    # ---------------------------------------------------------------- handles

    def _resolve(self, target: Sequence | Batch | list[Sequence]) -> Int64:
        """The rows behind one handle, several, or a batch; refuses every stale one."""
        table = self._rows
        if isinstance(target, Batch):
            if target.manager is not self:
                raise StaleSequence("the batch belongs to another manager")
            if target.epoch != table.epoch:
                stale = table.generations[target.rows] != target.generations
                if np.any(stale):
                    row = int(target.rows[stale][0])
                    raise StaleSequence(
                        f"sequence {row} of the batch was freed; make the batch anew"
                    )
            return target.rows
        if isinstance(target, Sequence):
            return np.array([self._row(target)], np.int64)
        rows = np.array([self._row(handle) for handle in target], np.int64)
        if len(rows) > 1 and len(np.unique(rows)) != len(rows):
            raise ValueError("a sequence stands twice in the batch; name each once")
        return rows

    def _row(self, handle: Sequence) -> int:
        """The row behind one handle; refuses a stale one."""
        # No message here takes another manager's lock, as a handle's own repr would.
        if not isinstance(handle, Sequence):
            raise TypeError(f"expected a Sequence, got {type(handle).__name__}")
        if handle._manager is not self:
            raise StaleSequence(f"{handle.name} belongs to another manager")
        if self._rows.generations[handle._row] != handle._generation:
            raise StaleSequence(f"{handle.name} was freed")
        return handle._row

    def _resident_row(self, handle: Sequence) -> int:
        """Like `_row`, and refuses a sequence that is swapped out."""
        row = self._row(handle)
        if self._rows.swapped[row]:
            raise SequenceSwapped(f'sequence {row} is on the host; swap(sequence, "device") first')
        return row

    def _resident(self, target: Sequence | Batch | list[Sequence]) -> Int64:
        """Like `_resolve`, and refuses sequences that are swapped out."""
        table = self._rows
        if isinstance(target, Batch) and target.epoch == table.epoch and target.manager is self:
            return target.rows
        if isinstance(target, Sequence):
            return np.array([self._resident_row(target)], np.int64)
        rows = self._resolve(target)
        away = table.swapped[rows]
        if away.any():
            row = int(rows[away][0])
            raise SequenceSwapped(f'sequence {row} is on the host; swap(sequence, "device") first')
        if isinstance(target, Batch):
            target.epoch = table.epoch
        return rows

    def _refuse_drafts(self, rows: Int64) -> None:
        drafting = rows[self._rows.drafts[rows] > 0]
        if len(drafting):
            raise ValueError(
                f"sequence {drafting[0]} has drafts; accept(sequence, counts) first (0: none)"
            )

    # ---------------------------------------------------------------- take and give back

    def _take(self, count: int, owners: Int64 | None, keep: Int32 = NO_BLOCKS) -> Int32:
        """Take `count` device blocks, evicting cached ones other than `keep` where needed.

        Raises `OutOfBlocks` if there are fewer; then nothing has changed. Otherwise the change has
        begun.
        """
        pool = self._pool
        if owners is None and count <= pool.num_free:
            return self._taken(pool, count)
        revived = keep[(pool.refs[keep] == 0) & (pool.holds[keep] == 0)] if len(keep) else keep
        need = self._require(count, owners, revived)
        blocks = pool.take(count, lambda: self._make_room(count, need, revived))
        if owners is not None:
            self._quotas.charge(blocks, owners)
        return blocks

    def _taken(self, pool: BlockPool, count: int) -> Int32:
        """Begin the change by taking `count` blocks that are free."""
        self._change.begin()
        try:
            if count != 1:
                return pool.take(count)
            blocks = np.empty(1, np.int32)
            blocks[0] = pool.take_one()
        except MemoryError:  # which comes before any block is taken
            self._change.end()
            raise
        return blocks

    def _make_room(self, count: int, need: Counts | None, revived: Int32) -> None:
        """Begin the change by evicting what `count` blocks lack, but none of `revived`."""
        self._change.begin()
        if len(revived):
            self._pool.hold(revived)
        self._evict_for(count, need)
        if len(revived):
            self._index.offer(self._pool.unhold(revived))

    def _reserve(self, num_columns: int, num_rows: int = 1) -> None:
        """Make room in the block tables, a change of its own. O(1) but when they grow."""
        self._change.begin()
        try:
            self._rows.reserve(num_columns, num_rows)
        except MemoryError:  # which comes before anything is replaced
            self._change.end()
            raise
        self._change.end()

    def _reserve_more(self, rows: Int64, num_columns: Int64) -> None:
        """Make room for longer tables of these rows, a change of its own."""
        if not np.count_nonzero(self._rows.tables.spans[rows] < num_columns):
            return
        self._change.begin()
        try:
            self._rows.tables.reserve(rows, num_columns)
        except MemoryError:  # which comes before anything is replaced
            self._change.end()
            raise
        self._change.end()

    def _refuse_beyond_pool(self, count: int) -> None:
        """Refuse what can never be had, before room is made to note it."""
        pool = self._pool
        if count > pool.num_free + pool.num_evictable:
            raise OutOfBlocks(count, pool.num_free, pool.num_evictable, pool.num_blocks)

    def _require(self, count: int, owners: Int64 | None, revived: Int32) -> Counts | None:
        """Refuse what cannot be had; otherwise return how many blocks each account takes."""
        pool = self._pool
        if owners is None:
            evictable = pool.num_evictable - len(revived)
            if count > pool.num_free + evictable:
                raise OutOfBlocks(count, pool.num_free, evictable, pool.num_blocks)
            return None
        quotas = self._quotas
        need = by_owner(owners)
        refusal = quotas.refusal(need, quotas.count(revived), pool)
        if refusal is not None:
            count, evictable, advice, missing = refusal
            raise OutOfBlocks(
                count, pool.num_free, evictable, pool.num_blocks, advice=advice, missing=missing
            )
        return need

    def _evict_for(self, count: int, need: Counts | None) -> None:
        """Free what `count` blocks lack, of each namespace no more than its floor leaves."""
        for number, forced in self._quotas.forced(need or {}):
            self._totals["evicted"] += self._index.evict_from(number, forced)
        self._evict(count - self._pool.num_free, need)

    def _evict(self, count: int, need: Counts | None) -> None:
        """Evict `count` blocks; with `need`, only what floors leave after that was taken."""
        if count <= 0:
            return
        quotas = self._quotas
        if need is None:
            self._totals["evicted"] += self._index.evict(count)
            return

        def allowance(number: int) -> int:
            return quotas.may_leave(number, need.get(number, 0))

        self._index.relist(quotas.opened | need.keys())
        quotas.opened.clear()
        self._totals["evicted"] += self._index.evict(count, allowance)

    def _release(self, blocks: Int32, times: int | Int32 = 1) -> None:
        if len(blocks) == 1 and isinstance(times, int):
            if self._pool.release_one(int(blocks[0])):
                self._index.retire(blocks)
            return
        evictable = self._pool.release(blocks, times)
        if len(evictable):
            self._index.retire(evictable)

    def _moved(
        self, copies: Int32, ticket: int, source: Tier, destination: Tier, kind: Kind = "copied"
    ) -> None:
        self._fences.begin(ticket, copies, source, destination)
        if self._events is not None and len(copies):
            self._events.add(kind, copies=copies.copy(), tiers=(source, destination))

    def _copied(self, copies: Int32, ticket: int) -> None:
        self._totals["copied"] += len(copies)
        self._moved(copies, ticket, "device", "device")

    # ---------------------------------------------------------------- whose blocks they are

    def _recount(
        self,
        limits: dict[str | None, Quota],
        parked: list[tuple[str | None, Int32]] | None = None,
    ) -> None:
        self._pool.watch(self._quotas if limits else None)
        self._quotas.recount(limits, self._pool, self._owned(parked))
        self._index.set_queues(self._quotas.numbers)

    def _owned(
        self, parked: list[tuple[str | None, Int32]] | None = None
    ) -> list[tuple[str | None, Int32]]:
        """Whose all blocks in use are: held, offered, or parked until a copy is made. O(blocks)."""
        rows = self._rows
        held = [(rows.prompt(row).namespace, rows.device_blocks(row)) for row in rows.live_rows()]
        if parked is None:
            parked = self._quotas.parked(self._pool)
        return [*held, *self._index.owned(), *parked]

    def _owned_by(self, namespace: str | None) -> Int32:
        """Return a namespace's blocks: held, or offered. O(sequences + its blocks)."""
        rows = self._rows
        mine = [row for row in rows.live_rows() if rows.prompt(row).namespace == namespace]
        held = [rows.device_blocks(row) for row in mine]
        return np.unique(np.concatenate([NO_BLOCKS, *held, *self._index.owned_by(namespace)]))

    def _owners(self, who: Iterable[Prompt], counts: Iterable[int]) -> Int64 | None:
        """Under whose number each block to take is counted; None where nobody has a quota."""
        if not self._quotas.limits:
            return None
        owners = [self._quotas.owner(prompt.namespace) for prompt in who]
        return np.repeat(np.array(owners, np.int64), np.array(list(counts), np.int64))

    def _owners_of_rows(self, rows: Int64, leaving: Int64, num_fresh: Int64) -> Int64 | None:
        if not self._quotas.limits:
            return None
        growing = num_fresh.nonzero()[0]
        who = [self._rows.prompt(row) for row in rows[[*leaving, *growing]].tolist()]
        return self._owners(who, [*[1] * len(leaving), *num_fresh[growing].tolist()])
