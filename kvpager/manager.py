"""The control plane: who owns which block, decided here and written down as plain arrays.

    manager = BlockManager(num_blocks=4096, block_size=16)
    seq = manager.allocate(prompt_ids)      # its known prefix is shared, not recomputed
    step = manager.append(seq, 1)           # copy step.copies, write KV to step.slots, then
    manager.commit(seq)                     # full blocks become reusable
    child = manager.fork(seq)               # shares every block; copied on write
    manager.free(child)

It never touches a tensor: a framework author keeps its own and obeys the plans. Paging and
copy-on-write follow vLLM's PagedAttention (Kwon et al., 2023). Every call is all or nothing: it
validates, makes what it returns, takes blocks (which may evict cached ones), and only then changes
the books; a call that raises has changed nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvpager import arguments, invariants, moves, snapshot
from kvpager.errors import OutOfBlocks, SequenceSwapped, StaleSequence
from kvpager.events import Event, EventLog
from kvpager.eviction import PRIORITY_MAX, EvictionPolicy, make_policy
from kvpager.fences import Fences
from kvpager.plan import NO_COPIES, Plan, Step, Tier
from kvpager.pool import BlockPool
from kvpager.prefix import Match, PrefixIndex
from kvpager.quotas import Quota, Quotas
from kvpager.sequences import Batch, Prompt, Sequence, SequenceTable, listed, ranks
from kvpager.stats import BlockState, Stats

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Target = Sequence | Batch | Iterable[Sequence]
NO_BLOCKS: Int32 = np.empty(0, np.int32)
TOTALS = ("copied", "evicted", "out", "in", "queries", "hits", "queried", "hit")


class BlockManager:
    """Block tables over a pool of `num_blocks` blocks of `block_size` token slots each.

    Five verbs - `allocate`, `append`, `fork`, `free`, `swap` - and what they need. Thread-safe: one
    lock per manager, under which nothing of the caller's runs. Block ids are 0 .. num_blocks - 1; -1
    in a table means "no block".

    Args:
        num_blocks: blocks on the device, at least 1.
        block_size: token slots of a block, a power of two.
        num_host_blocks: blocks of the host tier, for `swap`.
        eviction: which cached blocks leave first: a name of `kvpager.eviction.POLICIES`, or a policy.
        null_block: never hand out block 0, so that padding may point there.
        fences: keep blocks that a plan names out of circulation until `complete(plan)`.
        num_events: how many events to remember for `events`; 0: none.
    """

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
        num_blocks = arguments.count("num_blocks", num_blocks, at_least=1 + bool(null_block))
        num_host_blocks = arguments.count("num_host_blocks", num_host_blocks)
        self.block_size = arguments.block_size(block_size)
        self._shift = self.block_size.bit_length() - 1
        self._pool = BlockPool(num_blocks, self.block_size, int(null_block))
        self._host = BlockPool(num_host_blocks, self.block_size)
        policy = make_policy(eviction, num_blocks) if isinstance(eviction, str) else eviction
        events = arguments.count("num_events", num_events)
        self._events = EventLog(events) if events else None
        self._index = PrefixIndex(self._pool, policy, self._events)
        self._rows = SequenceTable(self.block_size)
        self._fences = Fences(self._pool, self._host, is_on=fences)
        self._quotas = Quotas(num_blocks)
        self._lock = threading.RLock()
        self._totals = dict.fromkeys(TOTALS, 0)

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

    def allocate(
        self,
        prompt: int | ArrayLike,
        *,
        namespace: str | None = None,
        adapter: str | None = None,
        contents: Iterable[tuple[int, int, bytes]] = (),
        window: int | None = None,
    ) -> Sequence:
        """Begin a sequence of `prompt` tokens. O(tokens).

        Args:
            prompt: the token ids, or a count where the ids are unknown (no prefix reuse then).
            namespace: only prefixes committed under the same namespace and adapter are reused.
            adapter: which fine-tuned weights compute the KV.
            contents: what stands behind placeholder tokens, such as images: (first token, token
                after the last, digest). Blocks that overlap one are reused only where it is equal.
            window: how many tokens back the layers look; `append` gives back blocks behind it.

        The handle's `num_cached_tokens` leading tokens need no computing; at least the last token
        always does, because its logits are what the caller is after. Where the match ends inside
        a block, `copies` names the block to copy first, so that the common tokens are kept.

        Raises: `OutOfBlocks`; `TypeError` / `ValueError` for a bad prompt or key part.
        """
        length, ids = arguments.prompt(prompt)
        who = _identity(namespace, adapter, contents, length)
        span = 0 if window is None else arguments.count("window", window, at_least=1)
        with self._lock:
            if ids is None:
                sequence = self._begin(who, length, None, _NO_MATCH)
            else:
                match = self._index.match(who.tree, ids[: max(length - 1, 0)], who.contents)
                sequence = self._begin(who, length, ids, match)
            if span:
                self._rows.windows[sequence._row] = span
                self._rows.num_special += 1
            return sequence

    def _begin(self, who: Prompt, length: int, ids: Int32 | None, match: Match) -> Sequence:
        rows, pool, shared, size = self._rows, self._pool, match.blocks, self.block_size
        num_cached = len(shared) * size + match.num_partial
        num_fresh = -(-length // size) - len(shared)
        rows.reserve(len(shared) + num_fresh)
        row = rows.free_rows[-1]
        copies = np.array([[match.partial_block, -1]], np.int32) if match.num_partial else NO_COPIES
        handle = Sequence(
            self, row, int(rows.generations[row]), num_cached, copies, self._fences.ticket(copies)
        )
        # Copies come before all writes, so without fences the block to copy from may be evicted
        # meanwhile, and even be handed to this very sequence.
        keep = copies[:, 0] if handle.ticket else NO_BLOCKS
        owners = self._owners([who], [num_fresh])
        fresh = self._take(
            num_fresh, owners, np.concatenate([shared, keep]) if len(keep) else shared
        )
        if len(shared):
            pool.share(shared)
        rows.add(who, shared, fresh, length, num_cached, 0 if ids is None else length)
        if len(copies):
            copies[0, 1] = fresh[0]
            if copies[0, 0] == fresh[0]:
                handle.copies, handle.ticket = NO_COPIES, 0
            self._copied(handle.copies, handle.ticket)
        if ids is not None:
            pool.write_ids(fresh, ids[len(shared) * size :])
            if len(shared):
                rows.nodes[row], rows.published[row] = match.node, len(shared)
                self._index.policy.touch(shared)
            for name, count in zip(
                TOTALS[4:], (1, num_cached > 0, length, num_cached), strict=True
            ):
                self._totals[name] += count
        return handle

    def cached_tokens(
        self,
        prompt: ArrayLike,
        *,
        namespace: str | None = None,
        adapter: str | None = None,
        contents: Iterable[tuple[int, int, bytes]] = (),
    ) -> int:
        """How many leading tokens of `prompt` are in the pool now; changes nothing. O(tokens).

        A promise to nobody: they may be gone when it is allocated. Raises: as `allocate`.
        """
        ids = arguments.token_ids(prompt)
        who = _identity(namespace, adapter, contents, len(ids))
        with self._lock:
            match = self._index.match(who.tree, ids, who.contents)
            return len(match.blocks) * self.block_size + match.num_partial

    @overload
    def fork(self, sequence: Sequence) -> Sequence: ...
    @overload
    def fork(self, sequence: Sequence, count: int) -> list[Sequence]: ...
    def fork(self, sequence: Sequence, count: int | None = None) -> Sequence | list[Sequence]:
        """A second sequence - with `count`, a list of so many - that shares every block.

        No data moves; whoever first writes into a shared block gets a copy of it. O(blocks) each.
        Raises: `StaleSequence`, `SequenceSwapped`.
        """
        times = 1 if count is None else arguments.count("count", count)
        with self._lock:
            rows, parent = self._rows, self._resident_row(sequence)
            rows.reserve(0, times)
            num_cached = int(rows.committed[parent])
            next_rows = rows.free_rows[: -times - 1 : -1] if times else []
            children = [
                Sequence(self, row, int(rows.generations[row]), num_cached) for row in next_rows
            ]
            self._pool.share(rows.device_blocks(parent), times)
            for _ in children:
                rows.fork(parent)
        return children[0] if count is None else children

    def free(self, sequences: Target, *, publish: bool = False) -> None:
        """Give the blocks back and end the handles. O(blocks).

        Committed full blocks of known tokens stay cached until their room is needed. `publish`
        commits all tokens first: preemption by recompute in one call, since `allocate` with the
        same tokens then finds what is still there.
        Raises: `StaleSequence` for a handle that was freed already or is not of this manager;
        with `publish`, `SequenceSwapped`.
        """
        named = listed(sequences)
        with self._lock:
            rows = self._resident(named) if publish else self._resolve(named)
            if publish:
                self._commit(rows, self._rows.lengths[rows] - self._rows.drafts[rows])
            for row in rows.tolist():
                self._release(self._rows.device_blocks(row))
                self._host.release(self._rows.host_blocks(row))
                self._rows.drop(row)

    # ---------------------------------------------------------------- append, commit, truncate

    def append(
        self,
        sequences: Target,
        tokens: int | ArrayLike | Iterable[ArrayLike] = 1,
        *,
        counts: ArrayLike | None = None,
        draft: bool = False,
    ) -> Step:
        """Make room for further tokens of one sequence or of a whole batch. O(tokens).

        Args:
            sequences: one handle, several, or a `batch`; no sequence twice.
            tokens: how many for each; or their ids, so that they can be reused once committed:
                for one sequence a list of ids, for several one id (or list of ids) each.
            counts: how many for each sequence, where they differ and the ids are unknown.
            draft: look-ahead slots for speculative decoding. They are not published before
                `accept` keeps some and takes the rest back.

        Apply `copies`, then write the new tokens' KV to `slots`. Of several holders of a partly
        filled block the last one in the batch keeps it, if nobody outside the batch holds it.

        Raises: `OutOfBlocks`, `StaleSequence`, `SequenceSwapped`, `ValueError`, `TypeError`.
        """
        named = listed(sequences)
        # Before the lock: whatever the caller's iterables do, they do it now.
        num_named = None if isinstance(named, Sequence) else len(named)
        num_new, ids = arguments.new_tokens(num_named, tokens, counts)
        with self._lock:
            rows = self._resident(named)
            if self._rows.num_special and not draft:
                self._refuse_drafts(rows)
            return self._append(rows, num_new, ids, draft)

    def _append(self, rows: Int64, num_new: int | Int64, ids: Int32 | None, draft: bool) -> Step:
        table, size, shift, mask = self._rows, self.block_size, self._shift, self.block_size - 1
        starts = table.lengths[rows]
        ends = starts + num_new
        longest = int(ends.max(initial=0))
        arguments.count("tokens of a sequence", longest)
        table.reserve((longest + mask) >> shift, 0)
        offsets, filled = starts & mask, (starts + mask) >> shift
        num_fresh = ((ends + mask) >> shift) - filled
        growing = num_fresh.nonzero()[0]
        leaving, tails = self._shared_tails(rows, starts >> shift, (offsets > 0) & (num_new != 0))
        total = num_new * len(rows) if isinstance(num_new, int) else int(num_new.sum())
        num_taken = len(leaving) + int(num_fresh.sum())

        copies = np.empty((len(leaving), 2), np.int32) if len(leaving) else NO_COPIES
        step = Step(np.empty(total, np.int64), copies, self._fences.ticket(copies))
        if num_taken:
            owners = self._owners_of_rows(rows, leaving, num_fresh)
            taken = self._take(num_taken, owners)
            if len(leaving):
                self._leave(rows[leaving], starts[leaving] >> shift, tails[leaving], taken, step)
                tails[leaving] = step.copies[:, 1]
            fresh = taken[len(leaving) :]
            if len(growing):
                many = num_fresh[growing]
                columns = np.repeat(filled[growing], many) + ranks(many)
                table.tables[np.repeat(rows[growing], many), columns] = fresh
        if isinstance(num_new, int) and num_new == 1:
            tails[growing] = fresh if len(growing) else NO_BLOCKS
            np.multiply(tails, size, out=step.slots, dtype=np.int64)
            step.slots.__iadd__(offsets)
        else:
            step.slots[:] = table.slots(rows, starts, ends - starts)
        table.lengths[rows] = ends
        if ids is not None:
            self._learn(rows, starts, ends, ids, step.slots)
        if draft:
            table.drafts[rows] += num_new
            table.count_special()
        if table.num_special:
            self._slide_windows(rows, starts)
        return step

    def _shared_tails(
        self, rows: Int64, columns: Int64, writes: NDArray[np.bool_]
    ) -> tuple[Int64, Int32]:
        """Who is about to write into a block it does not own alone, and all rows' last blocks."""
        table, pool = self._rows.tables, self._pool
        tails = table.ravel().take(rows * table.shape[1] + columns, mode="clip")
        index = tails.astype(np.intp)
        shared = pool.refs.take(index, mode="clip") > 1
        shared |= pool.cached.take(index, mode="clip")
        shared &= writes
        writers = shared.nonzero()[0]
        if not len(writers):
            return writers, tails
        theirs = tails[writers]
        _, first_from_end, holders = np.unique(theirs[::-1], return_index=True, return_counts=True)
        last = len(theirs) - 1 - first_from_end
        keeps = (holders == pool.refs[theirs[last]]) & ~pool.cached[theirs[last]]
        leaves = np.ones(len(theirs), np.bool_)
        leaves[last[keeps]] = False
        return writers[leaves], tails

    def _leave(self, rows: Int64, columns: Int64, tails: Int32, taken: Int32, step: Step) -> None:
        """Give each row its own copy of the shared block it is about to write into."""
        step.copies[:, 0], step.copies[:, 1] = tails, taken[: len(tails)]
        self._rows.tables[rows, columns] = step.copies[:, 1]
        self._pool.ids[step.copies[:, 1]] = self._pool.ids[tails]
        blocks, times = np.unique(tails, return_counts=True)
        self._copied(step.copies, step.ticket)
        self._release(blocks, times.astype(np.int32))

    def _learn(self, rows: Int64, starts: Int64, ends: Int64, ids: Int32, slots: Int64) -> None:
        """Note the ids of new tokens, where all before them are known."""
        table = self._rows
        whole = table.known[rows] == starts
        flat = self._pool.ids.reshape(-1)
        if whole.all():
            flat[slots] = ids
            table.known[rows] = ends
        else:
            named = np.repeat(whole, ends - starts)
            flat[slots[named]] = ids[named]
            table.known[rows[whole]] = ends[whole]

    def accept(
        self,
        sequences: Target,
        counts: ArrayLike,
        tokens: ArrayLike | Iterable[ArrayLike] | None = None,
    ) -> None:
        """Keep the first `counts` drafts of each sequence and take the others back. O(drafts).

        `tokens`: the ids of those kept, in one list for each sequence, where `append` was not told.
        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` for more than there are drafts.
        """
        named = listed(sequences)
        is_one = isinstance(named, Sequence)
        kept = arguments.counts("counts", counts, 1 if is_one else len(named))
        ids = None
        if tokens is not None:
            each, ids = arguments.new_tokens(None if is_one else len(named), tokens, None)
            if ids is None or np.any(kept != each):
                raise ValueError(f"counts {counts!r}: expected one token id for each draft kept")
        with self._lock:
            rows, table = self._resident(named), self._rows
            if np.any(kept > table.drafts[rows]):
                raise ValueError(
                    f"counts {counts!r}: the sequences have {table.drafts[rows]} drafts"
                )
            starts = table.lengths[rows] - table.drafts[rows]
            ends = starts + kept
            if ids is not None:
                self._learn(rows, starts, ends, ids, table.slots(rows, starts, kept))
            table.drafts[rows] = kept  # those beyond go with `_shorten`
            for row, end in zip(rows.tolist(), ends.tolist(), strict=True):
                self._shorten(row, end)
            table.drafts[rows] = 0
            table.count_special()

    def commit(self, sequences: Target, length: int | None = None) -> None:
        """Say that the KV of the first `length` tokens (default: all) has really been written.

        Full blocks of known tokens become reusable, drafts never. O(blocks that became full).
        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` for more tokens than there are.
        """
        named = listed(sequences)
        length = None if length is None else arguments.count("length", length)
        with self._lock:
            rows = self._resident(named)
            settled = self._rows.lengths[rows] - self._rows.drafts[rows]
            if length is not None:
                arguments.within("length", length, settled)
                settled = np.full_like(settled, length)
            self._commit(rows, settled)

    def _commit(self, rows: Int64, lengths: Int64) -> None:
        table = self._rows
        committed = np.maximum(table.committed[rows], lengths)
        table.committed[rows] = committed
        full = np.minimum(committed, table.known[rows]) >> self._shift
        news = ((full > table.published[rows]) | table.twins[rows]).nonzero()[0]
        for row, end in zip(rows[news].tolist(), full[news].tolist(), strict=True):
            self._publish(row, end)
        self._index.settle()

    def _publish(self, row: int, end: int) -> None:
        table, index = self._rows, self._index
        who, position = table.prompt(row), int(table.published[row])
        node = index.locate(table.nodes[row], position) if position else None
        if node is None:
            # Nothing is published yet; or somebody else's blocks, which stood for ours, were
            # evicted, and the chain is broken: begin from the front, with our own blocks.
            node, position = index.root(who.tree) if end else None, 0
        if position < end and node is not None:
            node, is_twin = index.publish(
                node, position, table.tables[row, position:end], who.contents
            )
            table.twins[row] |= is_twin
        table.nodes[row], table.published[row] = node, end

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Shorten the sequence to its first `length` tokens. O(blocks given back).

        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` where `length` is more than there
        is, or reaches before a window's first kept token.
        """
        length = arguments.count("length", length)
        with self._lock:
            row, rows = self._resident_row(sequence), self._rows
            arguments.within("length", length, rows.lengths[[row]])
            first = int(rows.first_blocks[row]) * self.block_size
            if length < first:
                raise ValueError(
                    f"length {length} is before token {first}, the first one "
                    "this sequence kept; allocate it anew"
                )
            self._shorten(row, length)

    def _shorten(self, row: int, length: int) -> None:
        rows = self._rows
        keep = -(-length // self.block_size)
        dropped = rows.blocks(row)[keep:].copy()
        rows.tables[row, keep : rows.num_blocks(row)] = -1
        gone = int(rows.lengths[row]) - length
        rows.lengths[row] = length
        for column in (rows.known, rows.committed):
            column[row] = min(int(column[row]), length)
        rows.published[row] = min(int(rows.published[row]), length // self.block_size)
        if rows.drafts[row]:
            rows.drafts[row] = max(0, int(rows.drafts[row]) - gone)
            rows.count_special()
        self._release(dropped)

    def slide(self, sequences: Target, start: int | ArrayLike) -> None:
        """Give back the blocks that lie wholly before token `start`. O(blocks given back).

        For layers that look back over a window only. Table entries before it become -1; such a
        sequence is not offered for prefix reuse from then on.
        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` for a start beyond the end.
        """
        named = listed(sequences)
        num_named = 1 if isinstance(named, Sequence) else len(named)
        starts = arguments.counts("start", start, num_named)
        with self._lock:
            rows = self._resident(named)
            arguments.within("start", starts, self._rows.lengths[rows])
            self._slide(rows, starts)

    def _slide_windows(self, rows: Int64, starts: Int64) -> None:
        # The first new token, at `starts`, still looks back over `window` tokens, itself included.
        windows = self._rows.windows[rows]
        self._slide(rows, np.where(windows > 0, np.maximum(starts - windows + 1, 0), 0))

    def _slide(self, rows: Int64, starts: Int64) -> None:
        table, firsts = self._rows, starts >> self._shift
        moved = (firsts > table.first_blocks[rows]).nonzero()[0]
        for row, first in zip(rows[moved].tolist(), firsts[moved].tolist(), strict=True):
            behind = slice(int(table.first_blocks[row]), first)
            blocks = table.tables[row, behind].copy()
            table.tables[row, behind] = -1
            table.first_blocks[row] = first
            table.known[row] = 0  # what lacks its front cannot be offered
            self._release(blocks)

    # ---------------------------------------------------------------- swap, grow, shrink

    def swap(self, sequences: Target, to: Tier, *, at_most: int | None = None) -> Plan:
        """Move blocks to the `"host"` tier, or back to the `"device"`. O(blocks of swapped ones).

        Blocks that sequences on the device hold too stay, until the last of them is swapped as
        well; forks that are swapped share on the host, and again when they are back. A swapped
        sequence can be swapped back or freed, nothing else. A second swap moves what is left.

        Args:
            at_most: move no more blocks than this: out, the furthest from the front first; in, the
                nearest. The sequence counts as swapped until it has all its blocks back.

        Raises: `OutOfBlocks` of the tier that is full, `StaleSequence`, `ValueError`.
        """
        if not isinstance(to, str) or to not in ("device", "host"):
            raise ValueError(f'swap to {to!r}: expected "device" or "host"')
        at_most = None if at_most is None else arguments.count("at_most", at_most)
        named = listed(sequences)
        with self._lock:
            rows = self._resolve(named).tolist()
            return self._swap_out(rows, at_most) if to == "host" else self._swap_in(rows, at_most)

    def _swap_out(self, rows: list[int], at_most: int | None) -> Plan:
        table, host = self._rows, self._host
        leaving = moves.leaving_device(table, self._pool, rows, at_most)
        need = len(leaving.blocks)
        if need > host.num_free:
            raise OutOfBlocks(
                need, host.num_free, 0, host.num_blocks, "host", "raise num_host_blocks"
            )
        copies = np.empty((need, 2), np.int32)
        plan = Plan(copies, "device", "host", self._fences.ticket(copies))
        copies[:, 0], copies[:, 1] = leaving.blocks, host.take(need)
        moves.hand_over(self._pool, host, leaving, copies[:, 1])
        table.swapped[rows] = True
        everyone = table.swapped.nonzero()[0]
        moves.replace(table, everyone, leaving.blocks, -2 - copies[:, 1])
        # What the index offers stays behind as its own copy.
        table.twins[everyone] |= table.published[everyone] > 0
        table.epoch += 1
        self._moved(plan)
        self._release(leaving.blocks, leaving.holders)
        self._totals["out"] += need
        return plan

    def _swap_in(self, rows: list[int], at_most: int | None) -> Plan:
        table = self._rows
        rows = [row for row in rows if table.swapped[row]]
        leaving = moves.leaving_host(table, self._host, rows, at_most)
        need = len(leaving.blocks)
        copies = np.empty((need, 2), np.int32)
        plan = Plan(copies, "host", "device", self._fences.ticket(copies))
        owners = moves.owners(table, rows, leaving, self._quotas) if self._quotas.limits else None
        copies[:, 0], copies[:, 1] = leaving.blocks, self._take(need, owners)
        moves.hand_over(self._host, self._pool, leaving, copies[:, 1])
        moves.replace(table, table.swapped.nonzero()[0], -2 - leaving.blocks, copies[:, 1])
        for row in rows:
            table.swapped[row] = bool((table.blocks(row) < -1).any())
        self._moved(plan)
        self._host.release(leaving.blocks, leaving.holders)
        self._totals["in"] += need
        return plan

    def reclaimable(self, sequences: Target) -> Int64:
        """Device blocks that freeing each sequence alone would give back, int64 [n]. O(blocks)."""
        named = listed(sequences)
        with self._lock:
            rows = self._resolve(named).tolist()
            return np.array([self._num_alone([row]) for row in rows], np.int64)

    def victims(self, sequences: Target, need: int) -> list[Sequence]:
        """The first of `sequences`, least important first, whose leaving frees `need` blocks.

        Counts blocks that only those chosen hold, so a family of forks counts when all of it goes.
        For preemption: swap them, or free them with `publish`. O(blocks * chosen).
        Raises: `OutOfBlocks` where even all are not enough, `StaleSequence`.
        """
        need = arguments.count("need", need)
        named = listed(sequences)
        with self._lock:
            rows, found = self._resolve(named).tolist(), 0
            chosen: list[int] = []
            while found < need and len(chosen) < len(rows):
                chosen.append(rows[len(chosen)])
                found = self._num_alone(chosen)
            if found < need:
                raise OutOfBlocks(
                    need, found, 0, self.num_blocks, advice="name more sequences, or need fewer"
                )
            return [self._handle(row) for row in chosen]

    def _num_alone(self, rows: list[int]) -> int:
        return len(moves.leaving_device(self._rows, self._pool, rows, None).blocks)

    def complete(self, work: Plan | Step | Sequence) -> None:
        """The copies of a plan, step or new sequence have been made: let their blocks go. O(copies).

        Needed with `fences=True` only; without it, or without copies, there is nothing to do.
        Raises: `ValueError` where they were completed already, or are of another manager.
        """
        with self._lock:
            if work.ticket:
                self._index.offer(self._fences.complete(work.ticket))

    def pin(self, sequence: Sequence) -> int:
        """Keep what the index offers of this sequence, also when it is freed. O(blocks).

        Returns the ticket for `unpin`. Raises: `StaleSequence`, `SequenceSwapped`.
        """
        with self._lock:
            row = self._resident_row(sequence)
            return self._fences.pin(self._offered_blocks(row))

    def unpin(self, ticket: int) -> None:
        """End a pin. O(blocks). Raises: `ValueError` for a ticket that is not one, or was used."""
        with self._lock:
            self._index.offer(self._fences.unpin(ticket))

    def retain(self, sequence: Sequence, priority: int, ttl_s: float | None = None) -> None:
        """Rank what the index offers of this sequence by `priority`, 0 (leaves first) to 100.

        `ttl_s`: for so many seconds; then it is the first to leave. O(blocks).
        Raises: `ValueError` where the manager was not made with `eviction="priority"`.
        """
        priority = arguments.count("priority", priority, at_most=PRIORITY_MAX)
        if ttl_s is not None and not 0 <= ttl_s < np.inf:
            raise ValueError(f"ttl_s {ttl_s!r}: expected seconds, at least 0")
        with self._lock:
            blocks = self._offered_blocks(self._resident_row(sequence))
            if not self._index.policy.retain(blocks, priority, ttl_s):
                raise ValueError('this policy knows no priorities; use eviction="priority"')

    def _offered_blocks(self, row: int) -> Int32:
        blocks = self._rows.device_blocks(row)
        return blocks[self._pool.cached[blocks]]

    def grow(self, num_blocks: int) -> None:
        """Raise the device pool to `num_blocks`; no block moves. O(num_blocks).

        Raises: `ValueError` where that is less than there are.
        """
        with self._lock:
            least = self._pool.num_blocks
            self._resize(arguments.count("num_blocks", num_blocks, at_least=least), NO_COPIES)

    def shrink(self, num_blocks: int) -> Plan:
        """Lower the device pool to `num_blocks`; blocks beyond move to free ones. O(num_blocks).

        Cached blocks are evicted where there is not enough room. Apply the plan, device to device,
        before the storage shrinks.
        Raises: `OutOfBlocks` where more are held, `ValueError` for more than there are, or where a
        block beyond is pinned or in an unfinished copy.
        """
        with self._lock:
            pool = self._pool
            least = pool.num_reserved + 1
            num_blocks = arguments.count(
                "num_blocks", num_blocks, at_least=least, at_most=pool.num_blocks
            )
            if pool.holds[num_blocks:].any():
                raise ValueError(
                    f"num_blocks {num_blocks}: a block beyond is pinned or in an unfinished copy"
                )
            staying = pool.num_held + pool.num_kept
            if staying > num_blocks - pool.num_reserved:
                raise OutOfBlocks(
                    staying, num_blocks - pool.num_reserved, 0, pool.num_blocks, "remaining device"
                )
            num_beyond = int(np.count_nonzero(pool.in_use()[num_blocks:]))
            copies = np.empty((num_beyond, 2), np.int32)
            plan = Plan(copies, "device", "device")
            excess = staying + pool.num_evictable - (num_blocks - pool.num_reserved)
            self._evict(excess)
            in_use = pool.in_use()
            old = in_use[num_blocks:].nonzero()[0] + num_blocks
            room = (~in_use[:num_blocks]).nonzero()[0]
            copies.resize((len(old), 2), refcheck=False)  # in place: some were evicted
            copies[:, 0], copies[:, 1] = old, room[room >= pool.num_reserved][: len(old)]
            self._resize(num_blocks, copies)
            self._moved(plan)
            return plan

    def _resize(self, num_blocks: int, copies: Int32) -> None:
        places = np.arange(self._pool.num_blocks, dtype=np.int32)
        places[copies[:, 0]] = copies[:, 1]
        moves.replace(self._rows, np.array(self._rows.live_rows(), np.int64), *copies.T)
        self._pool.resize(num_blocks, copies)
        self._index.resize(num_blocks, places)
        self._recount(self._quotas.limits)

    def drop_cached(self) -> int:
        """Evict all that only the prefix index keeps; how many blocks that freed. O(cached)."""
        with self._lock:
            free = self._pool.num_free
            self._evict(self._pool.num_evictable)
            return self._pool.num_free - free

    # ---------------------------------------------------------------- quotas

    def set_quota(
        self, namespace: str | None, *, floor: int = 0, ceiling: int | None = None
    ) -> None:
        """Bound the device blocks of a namespace, and keep some for it. O(blocks).

        Args:
            floor: blocks its sequences can always get; what is cached within it nobody else evicts.
            ceiling: the most blocks it may have, held and cached; beyond, it evicts its own.

        Raises: `ValueError` where the floors exceed the pool, or the namespace has more than
        `ceiling` blocks held already.
        """
        arguments.label("namespace", namespace)
        floor = arguments.count("floor", floor)
        if ceiling is not None:
            ceiling = arguments.count("ceiling", ceiling, at_least=max(floor, 1))
        with self._lock:
            before = self._quotas.limits
            limits = {**before, namespace: Quota(floor, ceiling)}
            room = self.num_blocks - self._pool.num_reserved
            if sum(quota.floor for quota in limits.values()) > room:
                raise ValueError(f"floor {floor}: with the other floors, more than {room} blocks")
            self._recount(limits)
            excess = self._quotas.excess(namespace)
            if excess > self._quotas.num_evictable(namespace):
                self._recount(before)
                raise ValueError(
                    f"ceiling {ceiling}: namespace {namespace!r} holds more; free some of it first"
                )
            self._evict(excess, {self._quotas.owner(namespace): excess})

    def quota(self, namespace: str | None) -> Quota:
        """The quota of a namespace. O(1). Raises: `ValueError` where it has none."""
        with self._lock:
            if namespace not in self._quotas.limits:
                raise ValueError(f"namespace {namespace!r} has no quota; give it one by set_quota")
            return self._quotas.limits[namespace]

    def drop_quota(self, namespace: str | None) -> None:
        """Let a namespace share what is left with the others. O(blocks). Raises: as `quota`."""
        with self._lock:
            self.quota(namespace)
            limits = {name: q for name, q in self._quotas.limits.items() if name != namespace}
            self._recount(limits)

    def namespace_blocks(self, namespace: str | None) -> int:
        """Device blocks held by and cached for a namespace with a quota. O(1). Raises: `ValueError`."""
        with self._lock:
            self.quota(namespace)
            return self._quotas.used(namespace)

    def _recount(self, limits: dict[str | None, Quota]) -> None:
        self._pool.ledger = self._quotas if limits else None
        rows = self._rows
        held = ((rows.prompt(row).namespace, rows.device_blocks(row)) for row in rows.live_rows())
        self._quotas.recount(limits, self._pool, [*held, *self._index.owned()])
        self._index.set_queues(limits)

    def _owners(self, who: Iterable[Prompt], counts: Iterable[int]) -> Int64 | None:
        """Under whose number each block to take is counted; None where nobody has a quota."""
        if not self._quotas.limits:
            return None
        owners = [self._quotas.owner(prompt.namespace) for prompt in who]
        return np.repeat(np.array(owners, np.int64), np.array(list(counts), np.int64))

    def _owners_of_rows(self, rows: Int64, leaving: Int64, num_fresh: Int64) -> Int64 | None:
        if not self._quotas.limits:
            return None
        who = [self._rows.prompt(row) for row in rows.tolist()]
        leavers = [who[at] for at in leaving.tolist()]
        return self._owners([*leavers, *who], [*[1] * len(leavers), *num_fresh.tolist()])

    # ---------------------------------------------------------------- reading

    def batch(self, sequences: Iterable[Sequence]) -> Batch:
        """Several handles as one reusable argument: repeated steps then skip its making. O(n).

        Raises: `StaleSequence`, `ValueError` where a sequence stands twice.
        """
        named = listed(sequences)
        with self._lock:
            rows = self._resolve(named)
            return Batch(self, rows, self._rows.generations[rows], -1)

    def sequences(self) -> dict[str, Sequence]:
        """A handle for every live sequence, by its `name`: after a restore, say. O(sequences)."""
        with self._lock:
            handles = [self._handle(row) for row in self._rows.live_rows()]
            return {handle.name: handle for handle in handles}

    def _handle(self, row: int) -> Sequence:
        rows = self._rows
        return Sequence(self, row, int(rows.generations[row]), int(rows.committed[row]))

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
        named = listed(sequences)
        with self._lock:
            return self._rows.lengths[self._resolve(named)]

    def block_table(self, sequence: Sequence) -> Int32:
        """The sequence's blocks in logical order, int32 [blocks], a copy; -1: not on the device.

        O(blocks). Raises `StaleSequence`.
        """
        with self._lock:
            return np.maximum(self._rows.blocks(self._row(sequence)), -1)

    def block_tables(self, sequences: Target, *, padding: int = -1) -> Int32:
        """The block tables of several sequences, int32 [n, most blocks], `padding` where none is.

        O(n * most blocks). Raises `StaleSequence`. See `kvpager.tables` for what kernels take.
        """
        named = listed(sequences)
        with self._lock:
            rows, table = self._resolve(named), self._rows
            width = -(-int(table.lengths[rows].max(initial=0)) // self.block_size)
            tables = table.tables[rows, :width]
            if padding != -1 or table.swapped.any():
                tables[tables < 0] = padding
            return tables

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
            return self._rows.slots(np.array([row]), np.array([start]), np.array([end - start]))

    def events(self) -> list[Event]:
        """What happened since the last call, oldest first, see `kvpager.events`. O(events).

        Raises: `ValueError` where the manager was made without `num_events`.
        """
        with self._lock:
            if self._events is None:
                raise ValueError("no events are kept; make the manager with num_events=10_000, say")
            return self._events.fetch()

    def offered(self) -> list[Event]:
        """What the index offers now, as `stored` events: where a router begins. O(tokens)."""
        with self._lock:
            return list(self._index.offered())

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """Everything the manager knows, as plain arrays, see `kvpager.snapshot`. O(blocks + tokens)."""
        with self._lock:
            return snapshot.take(self)

    @classmethod
    def restore(
        cls, arrays: Mapping[str, NDArray[Any]], *, eviction: EvictionPolicy | None = None
    ) -> BlockManager:
        """A manager equal to the one that `snapshot` was taken of. O(blocks + tokens).

        `eviction`: an empty policy of the same kind, where it is not one of kvpager's.
        Raises: `ValueError` where `arrays` are not a whole, lawful snapshot.
        """
        return snapshot.restore(cls, arrays, eviction)

    def block_states(self) -> NDArray[np.uint8]:
        """A `BlockState` for every device block, uint8 [num_blocks]. O(num_blocks)."""
        with self._lock:
            pool = self._pool
            states = np.where(pool.cached, BlockState.CACHED, BlockState.FREE).astype(np.uint8)
            states[pool.holds > 0] = BlockState.KEPT
            states[pool.refs == 1] = BlockState.HELD
            states[pool.refs > 1] = BlockState.SHARED
            states[: pool.num_reserved] = BlockState.RESERVED
            return states

    def stats(self) -> Stats:
        """Counts of now and totals since the manager began. O(blocks + sequences)."""
        with self._lock:
            pool, totals = self._pool, self._totals
            return Stats(
                block_size=self.block_size,
                num_blocks=pool.num_blocks,
                num_free=pool.num_free,
                num_held=pool.num_held,
                num_cached=pool.num_evictable,
                num_kept=pool.num_kept,
                num_never_used=pool.num_never_used,
                num_shared=int(np.count_nonzero(pool.refs > 1)),
                num_host_blocks=self._host.num_blocks,
                num_host_free=self._host.num_free,
                num_sequences=len(self._rows),
                num_swapped=int(np.count_nonzero(self._rows.swapped)),
                num_tokens=self._rows.num_tokens_on(pool.num_blocks),
                total_copied=totals["copied"],
                total_evicted=totals["evicted"],
                total_swapped_out=totals["out"],
                total_swapped_in=totals["in"],
                total_prefix_queries=totals["queries"],
                total_prefix_hits=totals["hits"],
                prefix_query_tokens=totals["queried"],
                prefix_hit_tokens=totals["hit"],
            )

    def check(self) -> None:
        """Recount everything from the block tables, see `kvpager.invariants`. O(blocks + tokens).

        Raises: `BrokenInvariant`, naming the broken law. That is a bug, never a full pool.
        """
        with self._lock:
            invariants.check(
                self._pool, self._host, self._rows, self._index, self._fences, self._quotas
            )

    # ---------------------------------------------------------------- inside

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
        handles = [target] if isinstance(target, Sequence) else target
        rows = np.array([self._row(handle) for handle in handles], np.int64)
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
        if not self.owns(handle):
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
            raise ValueError(f"sequence {drafting[0]} has drafts; accept or reject them first")

    def _take(self, count: int, owners: Int64 | None, keep: Int32 = NO_BLOCKS) -> Int32:
        """Take `count` device blocks, evicting cached ones other than `keep` where needed.

        Raises `OutOfBlocks` where there are not so many; then nothing has changed.
        """
        pool = self._pool
        if owners is None and count <= pool.num_free:
            return pool.take(count)
        revived = keep[(pool.refs[keep] == 0) & (pool.holds[keep] == 0)] if len(keep) else keep
        need = self._require(count, owners, revived)
        if len(revived):
            pool.hold(revived)
        try:
            blocks = pool.take(count, lambda: self._evict_for(count, need))
        finally:
            if len(revived):
                self._index.offer(pool.unhold(revived))
        if owners is not None:
            self._quotas.charge(blocks, owners)
        return blocks

    def _require(self, count: int, owners: Int64 | None, revived: Int32) -> Int64 | None:
        """Refuse what cannot be had; otherwise how many blocks each owner takes."""
        pool = self._pool
        if owners is None:
            evictable = pool.num_evictable - len(revived)
            if count > pool.num_free + evictable:
                raise OutOfBlocks(count, pool.num_free, evictable, pool.num_blocks)
            return None
        quotas = self._quotas
        need = quotas.by_owner(owners)
        refusal = quotas.refusal(need, quotas.count(revived), pool)
        if refusal is not None:
            count, evictable, advice = refusal
            raise OutOfBlocks(count, pool.num_free, evictable, pool.num_blocks, advice=advice)
        return need

    def _evict_for(self, count: int, need: Int64 | None) -> None:
        """Free what `count` blocks lack, of each namespace no more than its floor leaves."""
        if need is not None:
            for owner, forced in enumerate(self._quotas.forced(need).tolist()):
                self._evict(forced, {owner: forced})
        allowances = None if need is None else self._quotas.allowances(need)
        self._evict(count - self._pool.num_free, allowances)

    def _evict(self, count: int, allowances: dict[int, int] | None = None) -> None:
        if count > 0:
            self._totals["evicted"] += self._index.evict(count, allowances)

    def _release(self, blocks: Int32, times: int | Int32 = 1) -> None:
        evictable = self._pool.release(blocks, times)
        if len(evictable):
            self._index.retire(evictable)

    def _moved(self, plan: Plan) -> None:
        self._fences.begin(plan.ticket, plan.copies, plan.source, plan.destination)
        if self._events is not None and len(plan):
            tiers = (plan.source, plan.destination)
            self._events.add("copied", copies=plan.copies.copy(), tiers=tiers)

    def _copied(self, copies: Int32, ticket: int) -> None:
        self._totals["copied"] += len(copies)
        self._moved(Plan(copies, "device", "device", ticket))


def _identity(
    namespace: str | None,
    adapter: str | None,
    contents: Iterable[tuple[int, int, bytes]],
    length: int,
) -> Prompt:
    arguments.label("namespace", namespace)
    arguments.label("adapter", adapter)
    shown = arguments.contents(contents, length) if contents else ()
    return Prompt(namespace, adapter, shown)


_NO_MATCH = Match(None, NO_BLOCKS)
