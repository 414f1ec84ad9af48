"""The block manager decides which sequence owns which block, and returns plain arrays.

    manager = BlockManager(num_blocks=4096, block_size=16)
    seq = manager.allocate(prompt_ids)      # its known prefix is shared, not recomputed
    step = manager.append(seq, 1)           # copy step.copies, write KV to step.slots, then
    manager.commit(seq)                     # full blocks become reusable
    child = manager.fork(seq)               # shares every block; copied on write
    manager.free(child)

The manager (the control plane) never touches a tensor: the framework keeps its tensors and applies
the plans. Paging and copy-on-write follow vLLM's PagedAttention (Kwon et al., 2023). Every call is
all or nothing: it validates, makes its result, takes blocks (which may evict cached blocks), and
only then changes the state. A call that raises changes nothing. Python's signal handlers run after
the call, so Ctrl-C never leaves a call half done.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Unpack, overload

from numpy.typing import ArrayLike

from kvpager import _validate as arguments
from kvpager._text import counted
from kvpager.blocks import invariants
from kvpager.blocks.allocation import Allocation, identity
from kvpager.blocks.cached import CachedBlocks
from kvpager.blocks.copies import Copies
from kvpager.blocks.events import Events
from kvpager.blocks.extension import Extension
from kvpager.blocks.host import HostBlocks
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
from kvpager.plans import AppendPlan, CopyPlan, Int32, Int64, Tier


class BlockManager:
    """Block tables over a pool of `num_blocks` blocks of `block_size` token slots each.

    Main methods: `allocate`, `append`, `commit` (without it no prefix is reused), `fork`, `free`
    and `swap`. Thread-safe: one lock per manager, under which no code of the caller runs. Block ids
    are 0 .. num_blocks - 1; -1 in a table means "no block".

    Rarer operations: `quotas` bounds the blocks of namespaces, `pins` keeps prefixes cached,
    `copies` tracks asynchronous copies, `events` logs cached blocks, `cached` helps to copy cached
    blocks elsewhere, `host` lends free host blocks, and `queries` reads the pool.

    Args:
        num_blocks: blocks on the device, at least 1.
        block_size: token slots of a block, a power of two.
        num_host_blocks: blocks of the host tier, for `swap`.
        eviction: the policy for cached blocks: a name of `kvpager.blocks.policies.POLICIES`, or an
            `EvictionPolicy`, see `kvpager.blocks.policies.base`.
        null_block: never hand out block 0, so that padding may point there.
        fences: do not reuse the blocks of a plan before `copies.complete(plan)`.
        num_events: how many events to keep for `events.fetch`; 0: none.
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
        state = BlockState(
            num_blocks, block_size, num_host_blocks, eviction, null_block, fences, num_events
        )
        self.pins = Pins(state)
        self.events = Events(state)
        self.cached = CachedBlocks(state)
        self._assemble(state, Allocation(state), Extension(state), Publication(state))

    def _assemble(
        self,
        state: BlockState,
        allocation: Allocation,
        extension: Extension,
        publication: Publication,
    ) -> None:
        self._state = state
        self.windows: tuple[int | None, ...] = state.windows
        self.block_size: int = state.block_size
        self.num_host_blocks: int = state.host.num_blocks
        self.quotas, self.copies, self.host = Quotas(state), Copies(state), HostBlocks(state)
        self.queries = Queries(state, allocation)
        self._allocation, self._extension, self._publication = allocation, extension, publication
        self._truncation, self._swap, self._resize = Truncation(state), Swap(state), Resize(state)

    def __repr__(self) -> str:
        with self._state.lock:
            pool = self._state.pool
            return (
                f"<{type(self).__name__}: {pool.num_held} held, {pool.num_free} free of "
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
            prompt: the token ids, any 32-bit integers (negative ones may be placeholders), or the
                number of tokens (then no prefix is reused). [] or 0 begins an empty sequence.
            namespace: only prefixes committed under the same namespace and `lora` are reused.
            lora: the name of the LoRA adapter, or of other weights, with which the KV is computed.
            mm_hashes: (start, stop, hash) of each image or other input behind the placeholder
                tokens `start` to `stop`. A block that overlaps one is reused only if its hash and
                position are equal.
            reserve: raise unless at least this many blocks stay available afterwards.

        The handle's `num_cached_tokens` leading tokens need no computing. The last token always
        does, because the caller needs its logits. If the match ends inside a block, `copies` names
        the block to copy first.

        Raises: `OutOfBlocks`; `TypeError`, `ValueError` for invalid arguments.
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
        """Return how many leading tokens of `prompt` are cached; with `blocks`, a `PrefixMatch`.

        Advisory only: blocks may be evicted before `allocate`. O(tokens). Raises: as `allocate`.
        """
        return self.queries.match_prefix(prompt, namespace, lora, mm_hashes, blocks)

    @overload
    def fork(self, sequence: SequenceHandle) -> SequenceHandle: ...
    @overload
    def fork(self, sequence: SequenceHandle, count: int) -> list[SequenceHandle]: ...
    def fork(
        self, sequence: SequenceHandle, count: int | None = None
    ) -> SequenceHandle | list[SequenceHandle]:
        """Return a new sequence that shares all blocks of this one. O(blocks) each.

        With `count`, return a list of `count` new sequences (at most 65,536). No data moves: the
        first sequence to write into a shared block gets a copy of it.
        Raises: `StaleSequence`, `SequenceSwapped`.
        """
        times = 1 if count is None else arguments.count("count", count, at_least=1, at_most=2**16)
        state = self._state
        with state.lock, state.change:
            children = self._allocation.fork(state.resident_row(sequence), times)
        return children[0] if count is None else children

    def free(self, sequences: Target, *, publish: bool = False) -> None:
        """Release the blocks and end the handles. O(blocks).

        Committed full blocks of known tokens stay cached until they are evicted. `publish` commits
        all tokens first, as preemption by recompute does: `allocate` with the same tokens then
        finds the blocks that are still cached.
        Raises: `StaleSequence` for a handle that was freed, or is of another manager; with
        `publish`, `SequenceSwapped`.
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
                # An int is faster than an array of one item.
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
    ) -> AppendPlan:
        """Make room for further tokens of one sequence or of a whole batch. O(tokens).

        Args:
            sequences: one handle, several, or a `batch`; no sequence twice.
            tokens: the number for each sequence, 0 for none; or their ids, so that committed blocks
                can be reused: a list for one sequence, an id or a list of ids each for several.
            counts: the number for each sequence, if numbers differ and ids are unknown.
            speculative: reserve look-ahead slots for speculative decoding. They stay unpublished
                until `accept` keeps some and drops the rest.

        Apply `copies`, then write the new tokens' KV to `slots`. If several sequences of the batch
        share a partly filled block and no other sequence holds it, the last one keeps the block.
        The others write to copies.

        Raises: `OutOfBlocks`, `StaleSequence`, `SequenceSwapped`, `ValueError`, `TypeError`.
        """
        named = listed(sequences)
        # Read the caller's iterables before taking the lock: they may run any code.
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
            arguments.within("counts", kept, speculative, "speculative token")
            self._extension.accept(rows, kept, ids)

    # ---------------------------------------------------------------- commit, truncate, drop_before

    def commit(self, sequences: Target, length: int | None = None) -> None:
        """Record that the KV of the first `length` tokens (default: all) is written.

        Full blocks of known tokens become reusable, speculative tokens never. O(newly full blocks).
        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` if the sequence is shorter.
        """
        named = listed(sequences)
        length = None if length is None else arguments.count("length", length)
        state = self._state
        with state.lock, state.change:
            if isinstance(named, SequenceHandle):  # ints are faster than arrays of one item
                self._publication.commit_row(state.resident_row(named), length)
            else:
                self._publication.commit(state.resident(named), length)

    def truncate(self, sequence: SequenceHandle, length: int) -> None:
        """Shorten the sequence to its first `length` tokens. O(blocks released).

        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` if the sequence is shorter, or
        `drop_before` released the block where it would end.
        """
        length = arguments.count("length", length)
        state = self._state
        with state.lock, state.change:
            self._truncation.truncate(state.resident_row(sequence), length)

    def drop_before(self, sequences: Target, start: int | ArrayLike) -> None:
        """Release the blocks that lie wholly before token `start`. O(blocks released).

        For layers with a sliding window. The table entries become -1. The sequence publishes no
        further blocks; blocks that it published before stay reusable.
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
    ) -> CopyPlan:
        """Move sequences to the `"host"` tier or back to the `"device"`.

        A block stays on the device while a resident sequence holds it. Swapped forks share blocks
        on the host, and share them again on the device. A swapped sequence can only be swapped or
        freed. O(blocks of these sequences and of all swapped sequences).

        Args:
            at_most: move at most this many blocks: to the host the last ones first, to the device
                the first ones. The sequence counts as swapped until all its blocks are on the
                device.
            reserve: with `to="device"`, raise unless this many blocks stay available afterwards.

        Raises: `OutOfBlocks` of the full tier, `StaleSequence`, `SequenceSwapped` for a sequence
        that is wholly on the host already, `ValueError`.
        """
        at_most, reserve = arguments.swap(to, at_most, reserve)
        named = listed(sequences)
        state = self._state
        with state.lock, state.change:
            rows = state.resolve(named)
            swap = self._swap
            return swap.out(rows, at_most) if to == "host" else swap.back(rows, at_most, reserve)

    def victims(self, sequences: Target, need: int) -> list[SequenceHandle]:
        """Return the first sequences that together would free `need` blocks, as few as possible.

        For preemption: order the sequences, least important first; then swap the victims, or free
        them with `publish`. `need` is `OutOfBlocks.missing`. A block counts if only victims hold
        it. Quotas are ignored: after `OutOfQuota`, pass sequences of that namespace only.
        O(blocks of the victims). Raises: `OutOfBlocks` if even all sequences together would free
        fewer, `StaleSequence`.
        """
        return self.queries.victims(sequences, need)

    # ---------------------------------------------------------------- handles and tables

    def batch(self, sequences: Iterable[SequenceHandle]) -> Batch:
        """Return a reusable argument for several handles, which saves time in each step. O(n).

        Raises: `StaleSequence`, `ValueError` for a repeated sequence.
        """
        return self.queries.batch(sequences)

    def lengths(self, sequences: Target) -> Int64:
        """Return the tokens in each sequence, int64 [n]. O(n). Raises `StaleSequence`."""
        return self.queries.lengths(sequences)

    def block_tables(self, sequences: Target, *, padding: int = -1) -> Int32:
        """Return block tables, int32 [n, most blocks], with `padding` in place of missing blocks.

        Blocks in host memory are missing, as are those behind a window. To compute, prefer
        `tables_and_lengths`, which refuses swapped sequences. O(n * most blocks).
        Raises `StaleSequence`. Other forms: `kvpager.storage.table_formats`.
        """
        return self.queries.block_tables(sequences, padding)

    def tables_and_lengths(self, sequences: Target) -> tuple[Int32, Int64]:
        """Return `block_tables` and `lengths` of sequences on the device, read at one moment.

        O(n * most blocks). Raises `StaleSequence`, `SequenceSwapped`.
        """
        return self.queries.tables_and_lengths(sequences)

    def slots(self, sequence: SequenceHandle, start: int = 0, stop: int | None = None) -> Int64:
        """Return flat slots of tokens `start` to `stop` (default: all), int64 [tokens]. O(tokens).

        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` for tokens without a block.
        """
        return self.queries.slots(sequence, start, stop)

    def open_slots(self, sequence: SequenceHandle, start: int, stop: int) -> Int64:
        """Return the same as `slots`; only `GroupedManager.open_slots` takes blocks. O(tokens)."""
        return self.queries.slots(sequence, start, stop)

    # ---------------------------------------------------------------- the pool

    @property
    def num_blocks(self) -> int:
        """Blocks on the device. O(1)."""
        with self._state.lock:
            return self._state.pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Free device blocks: `append` takes them without eviction. O(1)."""
        with self._state.lock:
            return self._state.pool.num_free

    @property
    def num_available_blocks(self) -> int:
        """Available device blocks: free, or cached and evictable. O(1)."""
        with self._state.lock:
            return self._state.pool.num_free + self._state.pool.num_evictable

    @property
    def num_held_blocks(self) -> int:
        """Device blocks that sequences hold; a shared block counts once. O(1)."""
        with self._state.lock:
            return self._state.pool.num_held

    def grow(self, num_blocks: int) -> None:
        """Raise the device pool to `num_blocks`; no block moves. O(num_blocks).

        Raises: `ValueError` if the pool is larger, or a plan of `shrink` is not completed.
        """
        self._resize.grow(num_blocks)

    def shrink(self, num_blocks: int) -> CopyPlan:
        """Lower the device pool to `num_blocks`. O(num_blocks).

        Held blocks with an id of at least `num_blocks` move to free blocks below it. Cached blocks
        are evicted if necessary. Apply the plan, device to device, before the storage shrinks.
        Raises: `OutOfBlocks` if sequences hold more, `ValueError` if the pool is smaller, or a
        higher block is pinned or in an unfinished copy.
        """
        return self._resize.shrink(num_blocks)

    def clear_prefix_cache(self) -> int:
        """Evict all cached blocks that no sequence holds; return how many. O(cached)."""
        return self._resize.clear_prefix_cache()

    def stats(self) -> Stats:
        """Return current counts, and totals since the manager began. O(blocks + sequences)."""
        return self.queries.stats()

    def check(self) -> None:
        """Raise `BrokenInvariant` if an invariant is broken: a bug. O(blocks + tokens)."""
        with self._state.lock, self._state.change:
            invariants.check(self._state)
