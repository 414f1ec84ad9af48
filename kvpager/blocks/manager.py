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
from typing import Literal, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike

from kvpager import _validate as arguments
from kvpager._text import counted
from kvpager.blocks import invariants
from kvpager.blocks.allocation import Allocation, identity
from kvpager.blocks.copies import Copies
from kvpager.blocks.events import Events
from kvpager.blocks.extension import Extension
from kvpager.blocks.pins import Pins
from kvpager.blocks.policies.base import EvictionPolicy
from kvpager.blocks.publication import Publication
from kvpager.blocks.queries import Queries
from kvpager.blocks.quotas import Quotas
from kvpager.blocks.resize import Resize
from kvpager.blocks.sequences import Batch, KeyParts, PrefixMatch, SequenceHandle, Target, listed
from kvpager.blocks.state import BlockState
from kvpager.blocks.stats import Stats
from kvpager.blocks.swap import Swap
from kvpager.blocks.truncation import Truncation
from kvpager.plans import Int32, Int64, Plan, Step, Tier


class BlockManager:
    """Block tables over a pool of `num_blocks` blocks of `block_size` token slots each.

    Five verbs - `allocate`, `append`, `fork`, `free`, `swap` - and what they need. Thread-safe:
    one lock per manager, under which nothing of the caller's runs. Block ids are 0 ..
    num_blocks - 1; -1 in a table means "no block".

    `quotas`, `pins`, `copies`, `events` and `queries` have what is asked for more rarely.

    Args:
        num_blocks: blocks on the device, at least 1.
        block_size: token slots of a block, a power of two.
        num_host_blocks: blocks of the host tier, for `swap`.
        eviction: which cached blocks leave first: a name of `kvpager.blocks.policies.POLICIES`, or
            a policy of your own, see `kvpager.blocks.policies.base`.
        null_block: never hand out block 0, so that padding may point there.
        fences: keep blocks that a plan names out of circulation until `copies.complete(plan)`.
        num_events: how many events to remember for `events.fetch`; 0: none.
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
        self._state = state = BlockState(
            num_blocks, block_size, num_host_blocks, eviction, null_block, fences, num_events
        )
        self.windows: tuple[int | None, ...] = (None,)
        self.block_size: int = state.block_size
        self.num_host_blocks: int = state.host.num_blocks
        self.quotas = Quotas(state)
        self.pins = Pins(state)
        self.copies = Copies(state)
        self.events = Events(state)
        self.queries = Queries(state)
        self._allocation = Allocation(state)
        self._truncation = Truncation(state)
        self._extension = Extension(state, self._truncation)
        self._publication = Publication(state)
        self._swap = Swap(state)
        self._resize = Resize(state)

    def __repr__(self) -> str:
        with self._state.lock:
            pool = self._state.pool
            return (
                f"<BlockManager: {pool.num_held} held, {pool.num_free} free of "
                f"{counted(pool.num_blocks, 'block')} of {self.block_size}>"
            )

    # ---------------------------------------------------------------- allocate, fork, free

    def allocate(
        self,
        prompt: int | ArrayLike,
        *,
        namespace: str | None = None,
        lora: str | None = None,
        mm_hashes: Iterable[tuple[int, int, bytes]] = (),
        reserve: int = 0,
    ) -> SequenceHandle:
        """Begin a sequence of `prompt` tokens. O(tokens).

        Args:
            prompt: the token ids, or a count where the ids are unknown (no prefix reuse then).
            namespace: only prefixes committed under the same namespace and `lora` are reused.
            lora: the LoRA adapter, or other fine-tuned weights, that compute the KV.
            mm_hashes: (start, stop, hash) of each image or other input behind the placeholder
                tokens `start` to `stop`. A block that overlaps one is reused only if its hash and
                position are equal.
            reserve: leave at least so many blocks that can be had afterwards, or raise.

        The handle's `num_cached_tokens` leading tokens need no computing; at least the last token
        always does, because its logits are what the caller is after. Where the match ends inside
        a block, `copies` names the block to copy first, so that the common tokens are kept.

        Raises: `OutOfBlocks`; `TypeError` / `ValueError` for a bad prompt or key part.
        """
        length, ids = arguments.prompt(prompt)
        who = identity(namespace, lora, mm_hashes, length)
        reserve = arguments.count("reserve", reserve)
        state = self._state
        with state.lock, state.change:
            return self._allocation.begin(who, length, ids, reserve)

    @overload
    def match_prefix(
        self, prompt: ArrayLike, *, blocks: Literal[True], **key: Unpack[KeyParts]
    ) -> PrefixMatch: ...
    @overload
    def match_prefix(
        self, prompt: ArrayLike, *, blocks: Literal[False] = False, **key: Unpack[KeyParts]
    ) -> int: ...
    def match_prefix(
        self,
        prompt: ArrayLike,
        *,
        blocks: bool = False,
        namespace: str | None = None,
        lora: str | None = None,
        mm_hashes: Iterable[tuple[int, int, bytes]] = (),
    ) -> int | PrefixMatch:
        """Return how many leading tokens of `prompt` are cached now, with `blocks` a `PrefixMatch`.

        Advisory: blocks may be evicted before `allocate`. O(tokens). Raises: as `allocate`.
        """
        return self.queries.match_prefix(prompt, namespace, lora, mm_hashes, blocks)

    @overload
    def fork(self, sequence: SequenceHandle) -> SequenceHandle: ...
    @overload
    def fork(self, sequence: SequenceHandle, count: int) -> list[SequenceHandle]: ...
    def fork(
        self, sequence: SequenceHandle, count: int | None = None
    ) -> SequenceHandle | list[SequenceHandle]:
        """A second sequence - with `count`, a list of so many - that shares every block.

        No data moves; whoever first writes into a shared block gets a copy of it. O(blocks) each;
        at most 65,536 a call, since the pool does not bound them.
        Raises: `StaleSequence`, `SequenceSwapped`.
        """
        times = 1 if count is None else arguments.count("count", count, at_least=1, at_most=2**16)
        state = self._state
        with state.lock, state.change:
            children = self._allocation.fork(state.resident_row(sequence), times)
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
        state = self._state
        with state.lock, state.change:
            if publish:
                rows = state.resident(named)
                self._publication.commit(rows, None)
                numbers = rows.tolist()
            else:
                # A plain number is faster than an array of one.
                one = state.row(named) if isinstance(named, SequenceHandle) else None
                numbers = state.resolve(named).tolist() if one is None else [one]
                state.change.begin()
            self._allocation.end(numbers)

    # ---------------------------------------------------------------- append, accept

    def append(
        self,
        sequences: Target,
        tokens: int | ArrayLike | Iterable[ArrayLike] = 1,
        *,
        counts: ArrayLike | None = None,
        speculative: bool = False,
    ) -> Step:
        """Make room for further tokens of one sequence or of a whole batch. O(tokens).

        Args:
            sequences: one handle, several, or a `batch`; no sequence twice.
            tokens: how many for each; or their ids, so that they can be reused once committed:
                for one sequence a list of ids, for several one id (or list of ids) each.
            counts: how many for each sequence, where they differ and the ids are unknown.
            speculative: reserve look-ahead slots for speculative decoding. They stay unpublished
                until `accept` keeps some and drops the rest.

        Apply `copies`, then write the new tokens' KV to `slots`. Of several holders of a partly
        filled block the last one in the batch keeps it, if nobody outside the batch holds it.

        Raises: `OutOfBlocks`, `StaleSequence`, `SequenceSwapped`, `ValueError`, `TypeError`.
        """
        named = listed(sequences)
        # Before the lock: whatever the caller's iterables do, they do it now.
        num_named = None if isinstance(named, SequenceHandle) else len(named)
        num_new, ids = arguments.new_tokens(num_named, tokens, counts)
        arguments.flag("speculative", speculative)
        state = self._state
        with state.lock, state.change:
            rows = state.resident(named)
            if state.rows.num_speculating and not speculative:
                state.refuse_speculative(rows)
            return self._extension.append(rows, num_new, ids, speculative)

    def accept(
        self,
        sequences: Target,
        counts: ArrayLike,
        tokens: ArrayLike | Iterable[ArrayLike] | None = None,
    ) -> None:
        """Keep the first `counts` speculative tokens of each sequence, drop the rest. O(tokens).

        `tokens`: the ids of the kept tokens, a list for each sequence, if `append` got counts.
        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` if a count exceeds the speculative
        tokens, or for ids of tokens that a fork shares.
        """
        named = listed(sequences)
        num_named = None if isinstance(named, SequenceHandle) else len(named)
        kept, ids = arguments.accepted(num_named, counts, tokens)
        state = self._state
        with state.lock, state.change:
            rows = state.resident(named)
            speculative = state.rows.speculative[rows]
            if np.any(kept > speculative):
                raise ValueError(
                    f"counts={counts!r}: the sequences have {speculative} speculative tokens"
                )
            self._extension.accept(rows, kept, ids)

    # ---------------------------------------------------------------- commit, truncate, drop_before

    def commit(self, sequences: Target, length: int | None = None) -> None:
        """Say that the KV of the first `length` tokens (default: all) has really been written.

        Full blocks of known tokens become reusable, speculative tokens never. O(newly full blocks).
        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` for more tokens than there are.
        """
        named = listed(sequences)
        length = None if length is None else arguments.count("length", length)
        state = self._state
        with state.lock, state.change:
            if isinstance(named, SequenceHandle):  # plain numbers are faster than arrays of one
                self._publication.commit_row(state.resident_row(named), length)
            else:
                self._publication.commit(state.resident(named), length)

    def truncate(self, sequence: SequenceHandle, length: int) -> None:
        """Shorten the sequence to its first `length` tokens. O(blocks given back).

        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` where `length` is more than there
        is, or reaches before the first block that `drop_before` kept.
        """
        length = arguments.count("length", length)
        state = self._state
        with state.lock, state.change:
            self._truncation.truncate(state.resident_row(sequence), length)

    def drop_before(self, sequences: Target, start: int | ArrayLike) -> None:
        """Give back the blocks that lie wholly before token `start`. O(blocks given back).

        For layers that look back over a window only. Table entries before it become -1; such a
        sequence is not offered for prefix reuse from then on.
        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` for a start beyond the end, or
        beyond the first speculative token.
        """
        named = listed(sequences)
        num_named = 1 if isinstance(named, SequenceHandle) else len(named)
        starts = arguments.counts("start", start, num_named)
        state = self._state
        with state.lock, state.change:
            self._truncation.drop_before(state.resident(named), starts)

    # ---------------------------------------------------------------- swap

    def swap(
        self, sequences: Target, to: Tier, *, at_most: int | None = None, reserve: int = 0
    ) -> Plan:
        """Move blocks to the `"host"` tier, or back to the `"device"`. O(blocks of swapped ones).

        Blocks that sequences on the device hold too stay, until the last of them is swapped as
        well; forks that are swapped share on the host, and again when they are back. A swapped
        sequence can be swapped back or freed, nothing else, or swapped again as long as some of it
        is left on the device.

        Args:
            at_most: move no more blocks than this: out, the furthest from the front first; in, the
                nearest. The sequence counts as swapped until it has all its blocks back.
            reserve: in, leave at least so many blocks that can be had afterwards, or raise.

        Raises: `OutOfBlocks` of the tier that is full, `StaleSequence`, `SequenceSwapped` for one
        that is wholly on the host already, `ValueError`.
        """
        at_most, reserve = arguments.swap(to, at_most, reserve)
        named = listed(sequences)
        state = self._state
        with state.lock, state.change:
            rows = state.resolve(named).tolist()
            swap = self._swap
            return swap.out(rows, at_most) if to == "host" else swap.back(rows, at_most, reserve)

    def victims(self, sequences: Target, need: int) -> list[SequenceHandle]:
        """Return the first of `sequences`, least important first, that free `need` blocks.

        For preemption: swap them, or free them with `publish`. `OutOfBlocks.missing` says how many
        to ask for. Counts blocks that only those chosen hold, so a family of forks counts when all
        of it goes. Quotas are not looked at: at a ceiling, name sequences of that namespace only.
        O(blocks of those chosen).
        Raises: `OutOfBlocks` where even all are not enough, `StaleSequence`.
        """
        return self.queries.victims(sequences, need)

    # ---------------------------------------------------------------- handles and tables

    def batch(self, sequences: Iterable[SequenceHandle]) -> Batch:
        """Return one reusable argument for several handles: steps then skip its making. O(n).

        Raises: `StaleSequence`, `ValueError` where a sequence stands twice.
        """
        return self.queries.batch(sequences)

    def lengths(self, sequences: Target) -> Int64:
        """Return the tokens in each sequence, int64 [n]. O(n). Raises `StaleSequence`."""
        return self.queries.lengths(sequences)

    def block_tables(self, sequences: Target, *, padding: int = -1) -> Int32:
        """Return block tables, int32 [n, most blocks], `padding` where no block of the device is.

        O(n * most blocks). Raises `StaleSequence`. Other forms: `kvpager.storage.table_formats`.
        """
        return self.queries.block_tables(sequences, padding)

    def tables_and_lengths(self, sequences: Target) -> tuple[Int32, Int64]:
        """Return `block_tables` and `lengths` of sequences on the device, read at one moment.

        O(n * most blocks). Raises `StaleSequence`, `SequenceSwapped`.
        """
        return self.queries.tables_and_lengths(sequences)

    def slots(self, sequence: SequenceHandle, start: int = 0, stop: int | None = None) -> Int64:
        """Return flat slots of tokens `start` to `stop` (default: all), int64 [tokens]. O(tokens).

        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` for tokens it does not hold.
        """
        return self.queries.slots(sequence, start, stop)

    def open_slots(self, sequence: SequenceHandle, start: int, stop: int) -> Int64:
        """Return `slots` of tokens about to be written: they have their blocks. O(tokens)."""
        return self.queries.slots(sequence, start, stop)

    # ---------------------------------------------------------------- the pool

    @property
    def num_blocks(self) -> int:
        """Blocks on the device. O(1)."""
        with self._state.lock:
            return self._state.pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Device blocks that can be had without evicting anything. O(1)."""
        with self._state.lock:
            return self._state.pool.num_free

    @property
    def num_available_blocks(self) -> int:
        """Device blocks that can be had: free ones, and cached ones that may be evicted. O(1)."""
        with self._state.lock:
            return self._state.pool.num_free + self._state.pool.num_evictable

    @property
    def num_held_blocks(self) -> int:
        """Device blocks that sequences hold, shared ones counted once. O(1)."""
        with self._state.lock:
            return self._state.pool.num_held

    def grow(self, num_blocks: int) -> None:
        """Raise the device pool to `num_blocks`; no block moves. O(num_blocks).

        Raises: `ValueError` where that is less than there are, or a plan of `shrink` is not
        completed.
        """
        self._resize.grow(num_blocks)

    def shrink(self, num_blocks: int) -> Plan:
        """Lower the device pool to `num_blocks`; blocks beyond move to free ones. O(num_blocks).

        Cached blocks are evicted where there is not enough room. Apply the plan, device to device,
        before the storage shrinks.
        Raises: `OutOfBlocks` where more are held, `ValueError` for more than there are, or where a
        block beyond is pinned or in an unfinished copy.
        """
        return self._resize.shrink(num_blocks)

    def clear_prefix_cache(self) -> int:
        """Evict all that is cached only. Return how many blocks came free. O(cached)."""
        return self._resize.clear_prefix_cache()

    def stats(self) -> Stats:
        """Return counts of now and totals since the manager began. O(blocks + sequences)."""
        return self.queries.stats()

    def check(self) -> None:
        """Recount everything from the block tables: see `invariants.py`. O(blocks + tokens).

        Raises: `BrokenInvariant`, naming the broken law. That is a bug, never a full pool.
        """
        with self._state.lock, self._state.change:
            invariants.check(self._state)
