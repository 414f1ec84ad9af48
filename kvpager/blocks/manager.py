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
the books; a call that raises has changed nothing. A signal waits for the end of the call, see
`kvpager._atomic`: a call that it interrupts is complete, or has changed nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvpager import _validate as arguments
from kvpager.blocks import swap as moves
from kvpager.blocks.capacity import Capacity
from kvpager.blocks.contents import NO_CONTENTS
from kvpager.blocks.radix import Match
from kvpager.blocks.ragged import ranks
from kvpager.blocks.sequences import Prompt, Sequence, listed
from kvpager.blocks.state import NO_BLOCKS, Target
from kvpager.errors import OutOfBlocks, SequenceSwapped
from kvpager.plans import NO_COPIES, Plan, Step, Tier

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


class BlockManager(Capacity):
    """Block tables over a pool of `num_blocks` blocks of `block_size` token slots each.

    Five verbs - `allocate`, `append`, `fork`, `free`, `swap` - and what they need. Thread-safe:
    one lock per manager, under which nothing of the caller's runs. Block ids are 0 ..
    num_blocks - 1; -1 in a table means "no block".

    Args:
        num_blocks: blocks on the device, at least 1.
        block_size: token slots of a block, a power of two.
        num_host_blocks: blocks of the host tier, for `swap`.
        eviction: which cached blocks leave first: a name of `kvpager.blocks.policies.POLICIES`, or
            a policy of your own, see `kvpager.blocks.eviction`.
        null_block: never hand out block 0, so that padding may point there.
        fences: keep blocks that a plan names out of circulation until `complete(plan)`.
        num_events: how many events to remember for `events`; 0: none.
    """

    # ---------------------------------------------------------------- allocate, fork, free

    def allocate(
        self,
        prompt: int | ArrayLike,
        *,
        namespace: str | None = None,
        adapter: str | None = None,
        contents: Iterable[tuple[int, int, bytes]] = (),
        window: int | None = None,
        spare: int = 0,
    ) -> Sequence:
        """Begin a sequence of `prompt` tokens. O(tokens).

        Args:
            prompt: the token ids, or a count where the ids are unknown (no prefix reuse then).
            namespace: only prefixes committed under the same namespace and adapter are reused.
            adapter: which fine-tuned weights compute the KV.
            contents: what stands behind placeholder tokens, such as images: (first token, token
                after the last, digest). Blocks that overlap one are reused only where it is equal.
            window: how many tokens back the layers look; `append` gives back blocks behind it.
            spare: leave at least so many blocks that can be had afterwards, or raise.

        The handle's `num_cached_tokens` leading tokens need no computing; at least the last token
        always does, because its logits are what the caller is after. Where the match ends inside
        a block, `copies` names the block to copy first, so that the common tokens are kept.

        Raises: `OutOfBlocks`; `TypeError` / `ValueError` for a bad prompt or key part.
        """
        length, ids = arguments.prompt(prompt)
        who = _identity(namespace, adapter, contents, length)
        span = 0 if window is None else arguments.count("window", window, at_least=1)
        spare = arguments.count("spare", spare)
        with self._lock, self._change:
            match = _NO_MATCH
            if ids is not None:
                match = self._index.match(who.tree, ids[: max(length - 1, 0)], who.contents)
            if spare:
                self._refuse_without_spare(length, match.blocks, spare)
            sequence = self._begin(who, length, ids, match)
            if span:
                self._rows.windows[sequence._row] = span
                self._rows.num_special += 1
            return sequence

    def _begin(self, who: Prompt, length: int, ids: Int32 | None, match: Match) -> Sequence:
        rows, pool, shared, size = self._rows, self._pool, match.blocks, self.block_size
        num_cached = len(shared) * size + match.num_partial
        num_fresh = -(-length // size) - len(shared)
        self._refuse_beyond_pool(num_fresh)
        self._reserve(len(shared) + num_fresh)
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
            totals = self._totals
            totals["queries"] += 1
            totals["hits"] += num_cached > 0
            totals["queried"] += length
            totals["hit"] += num_cached
        return handle

    def _refuse_without_spare(self, length: int, shared: Int32, spare: int) -> None:
        """Refuse a prompt that would leave fewer than `spare` blocks that can be had."""
        pool = self._pool
        idle = int(np.count_nonzero((pool.refs[shared] == 0) & (pool.holds[shared] == 0)))
        need = -(-length // self.block_size) - len(shared) + idle + spare
        if need > pool.num_free + pool.num_evictable:
            raise OutOfBlocks(need, pool.num_free, pool.num_evictable, pool.num_blocks)

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

        No data moves; whoever first writes into a shared block gets a copy of it. O(blocks) each;
        at most 65,536 a call, since the pool does not bound them.
        Raises: `StaleSequence`, `SequenceSwapped`.
        """
        times = 1 if count is None else arguments.count("count", count, at_least=1, at_most=2**16)
        with self._lock, self._change:
            rows, parent = self._rows, self._resident_row(sequence)
            self._reserve(rows.num_blocks(parent), times)
            num_cached = int(rows.committed[parent])
            next_rows = rows.free_rows[: -times - 1 : -1]
            children = [
                Sequence(self, row, int(rows.generations[row]), num_cached) for row in next_rows
            ]
            self._change.begin()
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
        arguments.flag("publish", publish)
        with self._lock, self._change:
            if publish:
                rows = self._resident(named)
                self._change.begin()
                self._commit(rows, self._rows.lengths[rows] - self._rows.drafts[rows])
                self._index.settle()
                numbers = rows.tolist()
            else:
                # A plain number is faster than an array of one.
                one = self._row(named) if isinstance(named, Sequence) else None
                numbers = self._resolve(named).tolist() if one is None else [one]
                self._change.begin()
            for row in numbers:
                self._release(self._rows.device_blocks(row))
                if self._rows.swapped[row]:
                    self._host.release(self._rows.host_blocks(row))
                self._rows.drop(row)

    # ---------------------------------------------------------------- append

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
        arguments.flag("draft", draft)
        with self._lock, self._change:
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
        offsets, filled = starts & mask, (starts + mask) >> shift
        num_fresh = ((ends + mask) >> shift) - filled
        total_fresh = int(num_fresh.sum())
        growing = num_fresh.nonzero()[0]
        leaving, tails = self._shared_tails(rows, starts >> shift, (offsets > 0) & (num_new != 0))
        total = num_new * len(rows) if isinstance(num_new, int) else int(num_new.sum())
        num_taken = len(leaving) + total_fresh
        self._refuse_beyond_pool(num_taken)
        if len(growing):
            self._reserve_more(rows[growing], (ends[growing] + mask) >> shift)

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
                tables = table.tables
                tables.data[np.repeat(tables.starts[rows[growing]], many) + columns] = fresh
        if isinstance(num_new, int) and num_new == 1:
            tails[growing] = fresh if len(growing) else NO_BLOCKS
            np.multiply(tails, size, out=step.slots, dtype=np.int64)
            np.add(step.slots, offsets, out=step.slots)
        else:
            step.slots[:] = table.slots(rows, starts, ends - starts)
        self._change.begin()
        table.lengths[rows] = ends
        if ids is not None:
            self._learn(rows, starts, ends, ids, step.slots)
        if table.num_special:
            # Drafts may be taken back: the window moves with what is settled.
            self._slide_windows(rows, starts - table.drafts[rows])
        if draft:
            table.set_drafts(rows, table.drafts[rows] + num_new)
        return step

    def _shared_tails(
        self, rows: Int64, columns: Int64, writes: NDArray[np.bool_]
    ) -> tuple[Int64, Int32]:
        """Who is about to write into a block it does not own alone, and all rows' last blocks."""
        table, pool = self._rows.tables, self._pool
        tails = table.data.take(table.starts[rows] + columns, mode="clip")
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
        tables = self._rows.tables
        tables.data[tables.starts[rows] + columns] = step.copies[:, 1]
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
        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` for more than there are drafts, or
        for the ids of drafts that a fork shares.
        """
        named = listed(sequences)
        is_one = isinstance(named, Sequence)
        kept = arguments.counts("counts", counts, 1 if is_one else len(named))
        ids = None
        if tokens is not None:
            each, ids = arguments.new_tokens(None if is_one else len(named), tokens, None)
            if ids is None or np.any(kept != each):
                raise ValueError(f"counts {counts!r}: expected one token id for each draft kept")
        with self._lock, self._change:
            rows, table = self._resident(named), self._rows
            if np.any(kept > table.drafts[rows]):
                raise ValueError(
                    f"counts {counts!r}: the sequences have {table.drafts[rows]} drafts"
                )
            starts = table.lengths[rows] - table.drafts[rows]
            ends = starts + kept
            if ids is not None:
                slots = table.slots(rows, starts, kept)
                blocks = slots >> self._shift
                if np.any((self._pool.refs[blocks] > 1) | self._pool.cached[blocks]):
                    raise ValueError("a fork shares these drafts; accept them by counts alone")
            self._change.begin()
            if ids is not None:
                self._learn(rows, starts, ends, ids, slots)
            table.set_drafts(rows, 0)
            for row, end in zip(rows.tolist(), ends.tolist(), strict=True):
                self._shorten(row, end)

    # ---------------------------------------------------------------- commit, truncate, slide

    def commit(self, sequences: Target, length: int | None = None) -> None:
        """Say that the KV of the first `length` tokens (default: all) has really been written.

        Full blocks of known tokens become reusable, drafts never. O(blocks that became full).
        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` for more tokens than there are.
        """
        named = listed(sequences)
        length = None if length is None else arguments.count("length", length)
        with self._lock, self._change:
            table = self._rows
            if isinstance(named, Sequence):  # plain numbers are faster than arrays of one
                row = self._resident_row(named)
                settled = int(table.lengths[row]) - int(table.drafts[row])
                arguments.within_one("length", length, settled)
                self._change.begin()
                self._commit_row(row, settled if length is None else length)
            else:
                rows = self._resident(named)
                all_settled = table.lengths[rows] - table.drafts[rows]
                if length is not None:
                    arguments.within("length", length, all_settled)
                    all_settled = np.full_like(all_settled, length)
                self._change.begin()
                self._commit(rows, all_settled)
            self._index.settle()

    def _commit_row(self, row: int, length: int) -> None:
        table = self._rows
        if length > table.committed[row]:
            table.committed[row] = length
        full = min(int(table.committed[row]), int(table.known[row])) >> self._shift
        if full > table.published[row] or table.twins[row]:
            self._publish(row, full)

    def _commit(self, rows: Int64, lengths: Int64) -> None:
        table = self._rows
        committed = np.maximum(table.committed[rows], lengths)
        table.committed[rows] = committed
        full = np.minimum(committed, table.known[rows]) >> self._shift
        news = ((full > table.published[rows]) | table.twins[rows]).nonzero()[0]
        for row, end in zip(rows[news].tolist(), full[news].tolist(), strict=True):
            self._publish(row, end)

    def _publish(self, row: int, end: int) -> None:
        table, index = self._rows, self._index
        who, position = table.prompt(row), int(table.published[row])
        node = index.locate(table.nodes[row], position) if position else None
        if node is None:
            # Nothing is published yet; or somebody else's blocks, which stood for ours, were
            # evicted, and the chain is broken: begin from the front, with our own blocks.
            node, position = index.root(who.tree) if end else None, 0
            table.twins[row] = False
        if position < end and node is not None:
            node, is_twin = index.publish(
                node, position, table.tables.part(row, position, end), who.contents
            )
            table.twins[row] |= is_twin
        table.nodes[row], table.published[row] = node, end

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Shorten the sequence to its first `length` tokens. O(blocks given back).

        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` where `length` is more than there
        is, or reaches before a window's first kept token.
        """
        length = arguments.count("length", length)
        with self._lock, self._change:
            row, rows = self._resident_row(sequence), self._rows
            arguments.within("length", length, rows.lengths[[row]])
            first = int(rows.first_blocks[row]) * self.block_size
            if length < first:
                raise ValueError(
                    f"length {length} is before token {first}, the first one "
                    "this sequence kept; allocate it anew"
                )
            self._change.begin()
            self._shorten(row, length)

    def _shorten(self, row: int, length: int) -> None:
        rows = self._rows
        keep = -(-length // self.block_size)
        dropped = rows.blocks(row)[keep:].copy()
        rows.blocks(row)[keep:] = -1
        rows.tables.trim(row, keep)
        gone = int(rows.lengths[row]) - length
        rows.lengths[row] = length
        for column in (rows.known, rows.committed):
            column[row] = min(int(column[row]), length)
        rows.published[row] = min(int(rows.published[row]), length // self.block_size)
        rows.prompts[row] = rows.prompt(row).up_to(length)
        if rows.drafts[row]:
            rows.set_drafts(np.array([row]), max(0, int(rows.drafts[row]) - gone))
        self._release(dropped)

    def slide(self, sequences: Target, start: int | ArrayLike) -> None:
        """Give back the blocks that lie wholly before token `start`. O(blocks given back).

        For layers that look back over a window only. Table entries before it become -1; such a
        sequence is not offered for prefix reuse from then on.
        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` for a start beyond the end, or
        beyond the first draft.
        """
        named = listed(sequences)
        num_named = 1 if isinstance(named, Sequence) else len(named)
        starts = arguments.counts("start", start, num_named)
        with self._lock, self._change:
            rows = self._resident(named)
            # Drafts may be taken back, and then the tokens before them are the last ones.
            arguments.within("start", starts, self._rows.lengths[rows] - self._rows.drafts[rows])
            self._change.begin()
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
            blocks = table.blocks(row)[behind].copy()
            table.blocks(row)[behind] = -1
            table.first_blocks[row] = first
            # What lacks its front cannot be offered, nor go on where it was.
            table.known[row] = table.published[row] = 0
            table.nodes[row] = None
            self._release(blocks)

    # ---------------------------------------------------------------- swap

    def swap(
        self, sequences: Target, to: Tier, *, at_most: int | None = None, spare: int = 0
    ) -> Plan:
        """Move blocks to the `"host"` tier, or back to the `"device"`. O(blocks of swapped ones).

        Blocks that sequences on the device hold too stay, until the last of them is swapped as
        well; forks that are swapped share on the host, and again when they are back. A swapped
        sequence can be swapped back or freed, nothing else, or swapped again as long as some of it
        is left on the device.

        Args:
            at_most: move no more blocks than this: out, the furthest from the front first; in, the
                nearest. The sequence counts as swapped until it has all its blocks back.
            spare: in, leave at least so many blocks that can be had afterwards, or raise.

        Raises: `OutOfBlocks` of the tier that is full, `StaleSequence`, `SequenceSwapped` for one
        that is wholly on the host already, `ValueError`.
        """
        if not isinstance(to, str) or to not in ("device", "host"):
            raise ValueError(f'swap to {to!r}: expected "device" or "host"')
        at_most = None if at_most is None else arguments.count("at_most", at_most)
        spare = arguments.count("spare", spare)
        named = listed(sequences)
        with self._lock, self._change:
            rows = self._resolve(named).tolist()
            if to == "host":
                return self._swap_out(rows, at_most)
            return self._swap_in(rows, at_most, spare)

    def _swap_out(self, rows: list[int], at_most: int | None) -> Plan:
        table, host = self._rows, self._host
        for row in rows:
            if len(table.host_blocks(row)) and not len(table.device_blocks(row)):
                raise SequenceSwapped(f"sequence {row} is on the host already, all of it")
        leaving = moves.leaving_device(table, self._pool, rows, at_most)
        need = len(leaving.blocks)
        if need > host.num_free:
            raise OutOfBlocks(
                need, host.num_free, 0, host.num_blocks, "host", "raise num_host_blocks"
            )
        copies = np.empty((need, 2), np.int32)
        plan = Plan(copies, "device", "host", self._fences.ticket(copies))
        copies[:, 0], copies[:, 1] = leaving.blocks, self._taken(host, need)
        moves.hand_over(self._pool, host, leaving, copies[:, 1])
        table.swapped[rows] = True
        everyone = table.swapped.nonzero()[0]
        moves.replace(table, everyone, leaving.blocks, -2 - copies[:, 1])
        # What the index offers stays behind as its own copy.
        table.twins[everyone] |= table.published[everyone] > 0
        table.epoch += 1
        self._moved(plan.copies, plan.ticket, "device", "host")
        self._release(leaving.blocks, leaving.holders)
        self._totals["out"] += need
        return plan

    def _swap_in(self, rows: list[int], at_most: int | None, spare: int) -> Plan:
        table = self._rows
        rows = [row for row in rows if table.swapped[row]]
        leaving = moves.leaving_host(table, self._host, rows, at_most)
        need = len(leaving.blocks)
        self._refuse_beyond_pool(need + spare)
        copies = np.empty((need, 2), np.int32)
        plan = Plan(copies, "host", "device", self._fences.ticket(copies))
        owners = moves.owners(table, rows, leaving, self._quotas) if self._quotas.limits else None
        copies[:, 0], copies[:, 1] = leaving.blocks, self._take(need, owners)
        moves.hand_over(self._host, self._pool, leaving, copies[:, 1])
        moves.replace(table, table.swapped.nonzero()[0], -2 - leaving.blocks, copies[:, 1])
        for row in rows:
            table.swapped[row] = bool((table.blocks(row) < -1).any())
        self._moved(plan.copies, plan.ticket, "host", "device")
        self._host.release(leaving.blocks, leaving.holders)
        self._totals["in"] += need
        return plan


def _identity(
    namespace: str | None,
    adapter: str | None,
    contents: Iterable[tuple[int, int, bytes]],
    length: int,
) -> Prompt:
    if namespace is None and adapter is None and not contents:
        return _ANYBODY
    arguments.label("namespace", namespace)
    arguments.label("adapter", adapter)
    shown = arguments.contents(contents, length) if contents else NO_CONTENTS
    return Prompt(namespace, adapter, shown)


_NO_MATCH = Match(None, NO_BLOCKS)
_ANYBODY = Prompt()
