"""The control plane: who owns which block, decided here and written down as plain arrays.

    manager = BlockManager(num_blocks=4096, block_size=16)
    seq = manager.allocate(prompt_ids)      # its known prefix is shared, not recomputed
    step = manager.append(seq, 1)           # copy step.copies, write KV to step.slots, then
    manager.commit(seq)                     # full blocks become reusable
    child = manager.fork(seq)               # shares every block; copied on write
    manager.free(child)

It never touches a tensor: a framework author keeps its own and obeys the plans. Paging and
copy-on-write follow vLLM's PagedAttention (Kwon et al., 2023). Every call is all or nothing: one
that raises has changed nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvpager import arguments, invariants
from kvpager.errors import OutOfBlocks, SequenceSwapped, StaleSequence
from kvpager.plan import NO_COPIES, Plan, Step, Tier
from kvpager.pool import BlockPool
from kvpager.prefix import PrefixIndex
from kvpager.sequences import Batch, Content, Sequence, SequenceTable
from kvpager.stats import BlockState, Stats

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Target = Sequence | Batch | Iterable[Sequence]
NO_BLOCKS: Int32 = np.empty(0, np.int32)


class BlockManager:
    """Block tables over a pool of `num_blocks` blocks of `block_size` token slots each.

    Five verbs - `allocate`, `append`, `fork`, `free`, `swap` - and what they need. Thread-safe:
    one lock per manager. Block ids are 0 .. num_blocks - 1; -1 in a table means "no block".

    Args:
        num_blocks: blocks on the device, at least 1.
        block_size: token slots of a block, a power of two.
        num_host_blocks: blocks of the host tier, for `swap`.
    """

    def __init__(self, num_blocks: int, block_size: int = 16, num_host_blocks: int = 0) -> None:
        self._pool = BlockPool(arguments.count("num_blocks", num_blocks, at_least=1))
        self.block_size = arguments.block_size(block_size)
        self._host = BlockPool(arguments.count("num_host_blocks", num_host_blocks))
        self._index = PrefixIndex(self.block_size)
        self._rows = SequenceTable()
        self._lock = threading.RLock()
        self._totals = dict.fromkeys(("copied", "evicted", "out", "in", "queried", "hit"), 0)

    def __repr__(self) -> str:
        return (
            f"<BlockManager: {self.num_held_blocks} held, {self.num_free_blocks} free of "
            f"{self.num_blocks} blocks of {self.block_size}>"
        )

    @property
    def num_blocks(self) -> int:
        """Blocks on the device. O(1)."""
        return self._pool.num_blocks

    @property
    def num_host_blocks(self) -> int:
        """Blocks of the host tier. O(1)."""
        return self._host.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Device blocks that can be had without evicting anything. O(1)."""
        return self._pool.num_free

    @property
    def num_held_blocks(self) -> int:
        """Device blocks that sequences hold, shared ones counted once. O(1)."""
        return self._pool.num_held

    @property
    def num_evicted_blocks(self) -> int:
        """Cached blocks given up since the manager began. O(1)."""
        return self._totals["evicted"]

    # ---------------------------------------------------------------- allocate, fork, free

    def allocate(self, prompt: int | ArrayLike, *, namespace: str | None = None) -> Sequence:
        """Begin a sequence of `prompt` tokens. O(tokens).

        Args:
            prompt: the token ids, or a count where the ids are unknown (no prefix reuse then).
            namespace: only prefixes committed under the same namespace are reused.

        The handle's `num_cached_tokens` leading tokens need no computing; at least the last token
        always does, because its logits are what the caller is after. Where the match ends inside
        a block, `copies` names the block to copy first, so that the common tokens are kept.

        Raises: `OutOfBlocks`; `TypeError` / `ValueError` for a bad prompt or namespace.
        """
        arguments.namespace(namespace)
        length, ids = arguments.prompt(prompt)
        with self._lock:
            content = Content(namespace)
            if ids is None:
                return self._begin(content, length, NO_BLOCKS, [], 0)
            match = self._index.match(namespace, ids[: max(length - 1, 0)])
            shared = np.array(match.blocks, np.int32)
            num_cached = len(shared) * self.block_size + match.num_partial
            # Copies come before all writes, so the block to copy from may be evicted meanwhile,
            # and even be handed to this very sequence.
            source = [match.partial_block] if match.num_partial else []
            sequence = self._begin(content, length, shared, source, num_cached)
            content.extend(ids)
            content.node = match.node if shared.size else None
            self._totals["queried"] += length
            self._totals["hit"] += num_cached
            return sequence

    def _begin(
        self,
        content: Content,
        length: int,
        shared: Int32,
        copy_from: list[int],
        num_cached: int,
    ) -> Sequence:
        num_blocks = -(-length // self.block_size)
        self._require(num_blocks - len(shared), reviving=shared)
        rows = self._rows
        rows.widen(num_blocks)
        row = rows.add(content)
        if len(shared):
            self._pool.share(shared)
        fresh = self._take(num_blocks - len(shared))
        rows.tables[row, : len(shared)] = shared
        rows.tables[row, len(shared) : num_blocks] = fresh
        rows.num_blocks[row] = num_blocks
        rows.lengths[row] = length
        rows.committed[row] = num_cached
        pairs = [(block, fresh[0]) for block in copy_from if block != fresh[0]]
        copies = np.array(pairs, np.int32) if pairs else NO_COPIES
        self._totals["copied"] += len(copies)
        return Sequence(self, row, int(rows.generations[row]), num_cached, copies)

    @overload
    def fork(self, sequence: Sequence) -> Sequence: ...
    @overload
    def fork(self, sequence: Sequence, count: int) -> list[Sequence]: ...
    def fork(self, sequence: Sequence, count: int | None = None) -> Sequence | list[Sequence]:
        """A second sequence - with `count`, a list of so many - that shares every block.

        No data moves; whoever first writes into a shared block gets a copy of it. O(tokens) each.
        Raises: `StaleSequence`, `SequenceSwapped`.
        """
        times = 1 if count is None else arguments.count("count", count)
        with self._lock:
            parent = self._resident_row(sequence)
            children = [self._fork_row(parent) for _ in range(times)]
        return children[0] if count is None else children

    def _fork_row(self, parent: int) -> Sequence:
        rows = self._rows
        row = rows.add(rows.content(parent).copy())
        self._pool.share(rows.device_blocks(parent))
        num_blocks = rows.num_blocks[parent]
        rows.tables[row, :num_blocks] = rows.tables[parent, :num_blocks]
        for column in (rows.num_blocks, rows.first_blocks, rows.lengths, rows.committed):
            column[row] = column[parent]
        return Sequence(self, row, int(rows.generations[row]), int(rows.committed[parent]))

    def free(self, sequences: Target) -> None:
        """Give the blocks back and end the handles. O(blocks).

        Committed full blocks of known tokens stay cached until their room is needed.
        Raises: `StaleSequence` for a handle that was freed already or is not of this manager.
        """
        named = _listed(sequences)
        with self._lock:
            for row in self._resolve(named).rows.tolist():
                self._release(self._rows.device_blocks(row))
                self._release_host(row)
                self._rows.drop(row)

    # ---------------------------------------------------------------- append, commit, truncate

    def append(
        self,
        sequences: Target,
        tokens: int | ArrayLike | Iterable[ArrayLike] = 1,
        *,
        counts: ArrayLike | None = None,
    ) -> Step:
        """Make room for further tokens of one sequence or of a whole batch. O(tokens).

        Args:
            sequences: one handle, several, or a `batch`; no sequence twice.
            tokens: how many for each; or their ids, so that they can be reused once committed:
                for one sequence a list of ids, for several one id (or list of ids) each.
            counts: how many for each sequence, where they differ and the ids are unknown.

        Apply `copies`, then write the new tokens' KV to `slots`. Of several holders of a partly
        filled block the last one in the batch keeps it, if nobody outside the batch holds it.

        Raises: `OutOfBlocks`, `StaleSequence`, `SequenceSwapped`, `ValueError`, `TypeError`.
        """
        named = _listed(sequences)
        # Before the lock: whatever the caller's iterables do, they do it now.
        num_named = None if isinstance(named, Sequence) else len(named)
        ids, num_new = arguments.new_tokens(num_named, tokens, counts)
        with self._lock:
            rows, table = self._resident(named).rows, self._rows
            lengths = table.lengths[rows]
            longest = int((lengths + num_new).max(initial=0))
            arguments.count("tokens of a sequence", longest)
            ends = -(-(lengths + num_new) // self.block_size)
            num_fresh = ends - table.num_blocks[rows]
            writers, tails = self._shared_tails(rows, lengths, num_new)
            self._require(len(writers) + int(num_fresh.sum()))
            table.widen(int(ends.max(initial=0)))
            taken = self._take(len(writers) + int(num_fresh.sum()))

            copies = np.stack([tails, taken[: len(writers)]], axis=1)
            table.tables[rows[writers], lengths[writers] // self.block_size] = copies[:, 1]
            for tail in tails:  # one by one: several writers may leave the same block
                self._release(tail[None])
            owners = np.repeat(np.arange(len(rows)), num_fresh)
            columns = table.num_blocks[rows][owners] + _ranks(num_fresh)
            table.tables[rows[owners], columns] = taken[len(writers) :]
            table.num_blocks[rows] = ends
            table.lengths[rows] = lengths + num_new
            self._totals["copied"] += len(copies)
            for row, length, row_ids in zip(rows.tolist(), lengths.tolist(), ids, strict=False):
                content = table.content(row)
                if content.known == length:
                    content.extend(row_ids)
            return Step(self._slots(rows, lengths, num_new), copies)

    def _shared_tails(self, rows: Int64, lengths: Int64, num_new: Int64) -> tuple[Int64, Int32]:
        """Who is about to write into a block it does not own alone, and which block that is."""
        writers = np.flatnonzero((lengths % self.block_size != 0) & (num_new > 0))
        tails = self._rows.tables[rows[writers], lengths[writers] // self.block_size]
        shared = (self._pool.refs[tails] > 1) | self._pool.cached[tails]
        writers, tails = writers[shared], tails[shared]
        if not len(tails):
            return writers, tails
        _, first_from_end, holders = np.unique(tails[::-1], return_index=True, return_counts=True)
        last = len(tails) - 1 - first_from_end
        keeps = (holders == self._pool.refs[tails[last]]) & ~self._pool.cached[tails[last]]
        leaves = np.ones(len(tails), np.bool_)
        leaves[last[keeps]] = False
        return writers[leaves], tails[leaves]

    def commit(self, sequences: Target, length: int | None = None) -> None:
        """Say that the KV of the first `length` tokens (default: all) has really been written.

        Full blocks of known tokens become reusable. O(blocks that became full).
        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` for more tokens than there are.
        """
        named = _listed(sequences)
        length = None if length is None else arguments.count("length", length)
        with self._lock:
            batch = self._resident(named)
            lengths = self._rows.lengths[batch.rows]
            if length is not None:
                arguments.within("length", length, lengths)
                lengths = np.full_like(lengths, length)
            committed = np.maximum(self._rows.committed[batch.rows], lengths)
            self._rows.committed[batch.rows] = committed
            for row, num_tokens in zip(batch.rows.tolist(), committed.tolist(), strict=True):
                self._publish(row, num_tokens)

    def _publish(self, row: int, num_committed: int) -> None:
        content = self._rows.content(row)
        end = min(num_committed, content.known) // self.block_size
        is_attached = content.node is not None and content.node.attached
        if not content.publishable or (content.num_published >= end and is_attached) or not end:
            return
        if content.node is None or not is_attached:
            # Where a twin's block was published in place of ours and is evicted by now, the
            # chain is broken: begin again from the front, with our own blocks.
            content.node = self._index.root(content.namespace)
        for column in range(content.num_published, end):
            start = column * self.block_size
            block = int(self._rows.tables[row, column])
            tokens = content.tokens[start : start + self.block_size]
            content.node, is_new = self._index.publish(content.node, tokens, block)
            if is_new:
                self._pool.cache(block)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Shorten the sequence to its first `length` tokens. O(blocks given back).

        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` where `length` is more than there
        is, or reaches before a window's first kept token.
        """
        length = arguments.count("length", length)
        with self._lock:
            row, rows = self._resident_row(sequence), self._rows
            arguments.within("length", length, rows.lengths[[row]])
            first = int(rows.first_blocks[row])
            keep = -(-length // self.block_size)
            if length < first * self.block_size:
                raise ValueError(
                    f"length {length} is before token {first * self.block_size}, the first one "
                    "this sequence kept; allocate it anew"
                )
            dropped = rows.blocks(row)[keep:].copy()
            rows.tables[row, keep : rows.num_blocks[row]] = -1
            rows.num_blocks[row] = keep
            rows.lengths[row] = length
            rows.committed[row] = min(int(rows.committed[row]), length)
            rows.content(row).truncate(length, length // self.block_size)
            self._release(dropped)

    def slide(self, sequences: Target, start: int | ArrayLike) -> None:
        """Give back the blocks that lie wholly before token `start`. O(blocks given back).

        For layers that look back over a window only. Table entries before it become -1; such a
        sequence is not offered for prefix reuse from then on.
        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` for a start beyond the end.
        """
        named = _listed(sequences)
        with self._lock:
            batch = self._resident(named)
            starts = arguments.counts("start", start, len(batch))
            arguments.within("start", starts, self._rows.lengths[batch.rows])
            rows = self._rows
            firsts = starts // self.block_size
            moved = np.flatnonzero(firsts > rows.first_blocks[batch.rows])
            for row, first in zip(batch.rows[moved].tolist(), firsts[moved].tolist(), strict=True):
                behind = slice(int(rows.first_blocks[row]), first)
                self._release(rows.tables[row, behind].copy())
                rows.tables[row, behind] = -1
                rows.first_blocks[row] = first
                rows.content(row).publishable = False

    # ---------------------------------------------------------------- swap, grow

    def swap(self, sequences: Target, to: Tier) -> Plan:
        """Move blocks to the `"host"` tier, or back to the `"device"`. O(blocks).

        Only blocks that one sequence alone holds move; shared ones stay, and keep counting as
        held, also when all their holders are swapped. A sequence on the host can be swapped back
        or freed, nothing else. A second swap to the same tier moves nothing.

        Raises: `OutOfBlocks` of the tier that is full, `StaleSequence`, `ValueError`.
        """
        if not isinstance(to, str) or to not in ("device", "host"):
            raise ValueError(f'swap to {to!r}: expected "device" or "host"')
        named = _listed(sequences)
        with self._lock:
            rows = self._resolve(named).rows.tolist()
            if to == "host":
                return self._swap_out([row for row in rows if row not in self._rows.host_blocks])
            return self._swap_in([row for row in rows if row in self._rows.host_blocks])

    def _swap_out(self, rows: list[int]) -> Plan:
        leaving = []
        for row in rows:
            blocks = self._rows.blocks(row)
            alone = (blocks >= 0) & (self._pool.refs[blocks] == 1)
            leaving.append(np.flatnonzero(alone))
        need = sum(map(len, leaving))
        if need > self._host.num_free:
            raise OutOfBlocks(
                need, self._host.num_free, 0, self._host.num_blocks, "host", "raise num_host_blocks"
            )
        copies = [NO_COPIES]
        for row, columns in zip(rows, leaving, strict=True):
            device = self._rows.tables[row, columns]
            host = self._host.take(len(columns))
            self._rows.host_blocks[row] = np.full(self._rows.num_blocks[row], -1, np.int32)
            self._rows.host_blocks[row][columns] = host
            self._rows.tables[row, columns] = -1
            self._release(device)
            copies.append(np.stack([device, host], axis=1))
        self._totals["out"] += need
        return Plan(np.concatenate(copies), "device", "host")

    def _swap_in(self, rows: list[int]) -> Plan:
        away = [np.flatnonzero(self._rows.host_blocks[row] >= 0) for row in rows]
        self._require(sum(map(len, away)))
        device = self._take(sum(map(len, away)))
        copies, start = [NO_COPIES], 0
        for row, columns in zip(rows, away, strict=True):
            blocks = device[start : start + len(columns)]
            start += len(columns)
            copies.append(np.stack([self._rows.host_blocks[row][columns], blocks], axis=1))
            self._release_host(row)
            del self._rows.host_blocks[row]
            self._rows.tables[row, columns] = blocks
        self._totals["in"] += len(device)
        return Plan(np.concatenate(copies), "host", "device")

    def grow(self, num_blocks: int) -> None:
        """Raise the device pool to `num_blocks`; no block moves. O(num_blocks).

        Raises: `ValueError` where that is less than there are.
        """
        with self._lock:
            least = self._pool.num_blocks
            self._pool.grow(arguments.count("num_blocks", num_blocks, at_least=least))

    def drop_cached(self) -> int:
        """Evict all that only the prefix index keeps; how many blocks that freed. O(cached)."""
        with self._lock:
            count = self._pool.num_cached_only
            self._evict(count)
            return count

    # ---------------------------------------------------------------- reading

    def batch(self, sequences: Iterable[Sequence]) -> Batch:
        """Several handles as one reusable argument: repeated steps then skip its making. O(n).

        Raises: `StaleSequence`, `ValueError` where a sequence stands twice.
        """
        named = _listed(sequences)
        with self._lock:
            return self._resolve(named)

    def owns(self, sequence: Sequence) -> bool:
        """Whether the handle is of this manager and not freed. O(1)."""
        return sequence._manager is self and bool(
            self._rows.generations[sequence._row] == sequence._generation
        )

    def length(self, sequence: Sequence) -> int:
        """Tokens in the sequence. O(1). Raises `StaleSequence`."""
        with self._lock:
            return int(self._rows.lengths[self._row(sequence)])

    def lengths(self, sequences: Target) -> Int64:
        """Tokens in each sequence, int64 [n]. O(n). Raises `StaleSequence`."""
        named = _listed(sequences)
        with self._lock:
            return self._rows.lengths[self._resolve(named).rows]

    def block_table(self, sequence: Sequence) -> Int32:
        """The sequence's blocks in logical order, int32 [blocks], a copy; -1: not on the device.

        O(blocks). Raises `StaleSequence`.
        """
        with self._lock:
            return self._rows.blocks(self._row(sequence)).copy()

    def block_tables(self, sequences: Target) -> Int32:
        """The block tables of several sequences, int32 [n, most blocks], -1 behind the shorter.

        O(n * most blocks). Raises `StaleSequence`.
        """
        named = _listed(sequences)
        with self._lock:
            rows = self._resolve(named).rows
            width = int(self._rows.num_blocks[rows].max(initial=0))
            return self._rows.tables[rows, :width]

    def slots(self, sequence: Sequence, start: int = 0, stop: int | None = None) -> Int64:
        """Flat slots of tokens `start` to `stop` (default: all), int64 [tokens]. O(tokens).

        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` for tokens it does not hold.
        """
        start = arguments.count("start", start)
        with self._lock:
            row = self._resident_row(sequence)
            length = int(self._rows.lengths[row])
            end = length if stop is None else arguments.count("stop", stop)
            arguments.within("stop", end, self._rows.lengths[[row]])
            first = int(self._rows.first_blocks[row]) * self.block_size
            if not first <= start <= end:
                raise ValueError(f"start {start}: expected {first} <= start <= stop = {end}")
            return self._slots(np.array([row]), np.array([start]), np.array([end - start]))

    def _slots(self, rows: Int64, starts: Int64, num_tokens: Int64) -> Int64:
        owners = np.repeat(np.arange(len(rows)), num_tokens)
        positions = starts[owners] + _ranks(num_tokens)
        blocks = self._rows.tables[rows[owners], positions // self.block_size]
        slots: Int64 = blocks.astype(np.int64) * self.block_size + positions % self.block_size
        return slots

    def block_states(self) -> NDArray[np.uint8]:
        """A `BlockState` for every device block, uint8 [num_blocks]. O(num_blocks)."""
        with self._lock:
            pool = self._pool
            states = np.where(pool.cached, BlockState.CACHED, BlockState.FREE).astype(np.uint8)
            states[pool.refs == 1] = BlockState.HELD
            states[pool.refs > 1] = BlockState.SHARED
            return states

    def stats(self) -> Stats:
        """Counts of now and totals since the manager began. O(blocks + sequences)."""
        with self._lock:
            return Stats(
                block_size=self.block_size,
                num_blocks=self._pool.num_blocks,
                num_free=self._pool.num_free,
                num_held=self._pool.num_held,
                num_cached=self._pool.num_cached_only,
                num_never_used=self._pool.num_never_used,
                num_shared=int(np.count_nonzero(self._pool.refs > 1)),
                num_host_blocks=self._host.num_blocks,
                num_host_free=self._host.num_free,
                num_sequences=len(self._rows),
                num_tokens=self._num_tokens_held(),
                total_copied=self._totals["copied"],
                total_evicted=self._totals["evicted"],
                total_swapped_out=self._totals["out"],
                total_swapped_in=self._totals["in"],
                prefix_query_tokens=self._totals["queried"],
                prefix_hit_tokens=self._totals["hit"],
            )

    def _num_tokens_held(self) -> int:
        filled = np.zeros(self._pool.num_blocks, np.int64)
        for row in self._rows.live_rows():
            blocks = self._rows.blocks(row)
            ends = self._rows.lengths[row] - np.arange(len(blocks)) * self.block_size
            here = blocks >= 0
            blocks, ends = blocks[here], np.minimum(ends[here], self.block_size)
            filled[blocks] = np.maximum(filled[blocks], ends)
        return int(filled.sum())

    def check(self) -> None:
        """Recount everything from the block tables, see `kvpager.invariants`. O(blocks + tokens).

        Raises: `BrokenInvariant`, naming the broken law. That is a bug, never a full pool.
        """
        with self._lock:
            invariants.check(self._pool, self._host, self._rows, self._index)

    # ---------------------------------------------------------------- inside

    def _resolve(self, target: Sequence | Batch | list[Sequence]) -> Batch:
        """The rows behind one handle, several, or a batch; refuses every stale one."""
        if isinstance(target, Batch):
            if target.manager is not self:
                raise StaleSequence("the batch belongs to another manager")
            stale = self._rows.generations[target.rows] != target.generations
            if np.any(stale):
                row = int(target.rows[stale][0])
                raise StaleSequence(f"sequence {row} of the batch was freed; make the batch anew")
            return target
        handles = [target] if isinstance(target, Sequence) else target
        rows = np.array([self._row(handle) for handle in handles], np.int64)
        if len(rows) > 1 and len(np.unique(rows)) != len(rows):
            raise ValueError("a sequence stands twice in the batch; name each once")
        return Batch(self, rows, self._rows.generations[rows])

    def _row(self, handle: Sequence) -> int:
        """The row behind one handle; refuses a stale one."""
        # No message here takes another manager's lock, as a handle's own repr would.
        if not isinstance(handle, Sequence):
            raise TypeError(f"expected a Sequence, got {type(handle).__name__}")
        if handle._manager is not self:
            raise StaleSequence(f"{handle.name} belongs to another manager")
        if not self.owns(handle):
            raise StaleSequence(f"{handle.name} was freed")
        return handle._row

    def _resident_row(self, handle: Sequence) -> int:
        """Like `_row`, and refuses a sequence that is swapped out."""
        row = self._row(handle)
        self._refuse_swapped([row])
        return row

    def _resident(self, target: Sequence | Batch | list[Sequence]) -> Batch:
        """Like `_resolve`, and refuses sequences that are swapped out."""
        batch = self._resolve(target)
        if self._rows.host_blocks:
            self._refuse_swapped(batch.rows.tolist())
        return batch

    def _refuse_swapped(self, rows: list[int]) -> None:
        away = self._rows.host_blocks
        for row in rows:
            if row in away:
                raise SequenceSwapped(
                    f'sequence {row} is on the host; swap(sequence, "device") first'
                )

    def _require(self, count: int, reviving: Int32 = NO_BLOCKS) -> None:
        """Raise `OutOfBlocks` unless `count` device blocks can be had, without changing anything.

        The cached blocks among `reviving` are about to be held, so they cannot make room.
        """
        pool, evictable = self._pool, self._pool.num_cached_only
        if len(reviving):
            evictable -= int(np.count_nonzero(pool.refs[reviving] == 0))
        if count > pool.num_free + evictable:
            raise OutOfBlocks(count, pool.num_free, evictable, pool.num_blocks)

    def _take(self, count: int) -> Int32:
        """Take `count` device blocks that `_require` found, evicting cached ones where needed."""
        shortage = count - self._pool.num_free
        if shortage > 0:
            self._evict(shortage)
        return self._pool.take(count)

    def _evict(self, count: int) -> None:
        blocks = self._index.evict(count, self._pool.refs)
        self._pool.uncache(np.array(blocks, np.int32))
        self._totals["evicted"] += len(blocks)

    def _release(self, blocks: Int32) -> None:
        self._index.retire(self._pool.release(blocks).tolist())

    def _release_host(self, row: int) -> None:
        host = self._rows.host_blocks.get(row)
        if host is not None:
            self._host.release(host[host >= 0])


def _listed(target: Target) -> Sequence | Batch | list[Sequence]:
    """The sequences named, once: whatever an iterable does, it does before anything is decided."""
    return target if isinstance(target, Sequence | Batch) else list(target)


def _ranks(counts: Int64) -> Int64:
    """[2, 0, 3] -> [0, 1, 0, 1, 2]: each item's place in its own run."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - counts, counts)
