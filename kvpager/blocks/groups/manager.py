"""A model's layers in groups, each with its own block table, over one pool of equal blocks.

    manager = GroupedManager((None, 1024), num_blocks=4096, max_chunk=2048)
    seq = manager.allocate(prompt_ids)              # blocks of both groups, or none
    slots = manager.open_slots(seq, 0, 2048)        # int64 [groups, tokens]
    manager.commit(seq, 2048)                       # frees blocks behind the window
    tables = manager.block_tables([seq])            # int32 [groups, sequences, blocks]

All layers of a group have the same window, or full attention. A block holds tokens for the layers
of one group. All groups have equally many layers, so any block serves any group, and no memory is
reserved for one kind of layer. A sequence has a row of the sequence table for each group. The idea
is from vLLM's hybrid manager (Jenga, Zhang et al., 2025).

Each verb takes or releases the blocks of all groups, or changes nothing. Signals wait for its end,
as in `BlockManager`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike

from kvpager import _validate as arguments
from kvpager._text import counted
from kvpager.blocks import invariants
from kvpager.blocks.allocation import identity
from kvpager.blocks.copies import Copies
from kvpager.blocks.extension import Extension
from kvpager.blocks.groups.allocation import GroupAllocation
from kvpager.blocks.groups.commit import GroupCommit
from kvpager.blocks.groups.extension import GroupExtension
from kvpager.blocks.groups.prefix import WindowIndex
from kvpager.blocks.groups.queries import GroupQueries
from kvpager.blocks.groups.table import GroupTable
from kvpager.blocks.groups.windows import first_needed
from kvpager.blocks.policies.base import EvictionPolicy
from kvpager.blocks.quotas import Quotas
from kvpager.blocks.resize import Resize
from kvpager.blocks.sequences import (
    Batch,
    KeyParts,
    PrefixMatch,
    Prompt,
    SequenceHandle,
    Target,
    listed,
)
from kvpager.blocks.state import BlockState
from kvpager.blocks.stats import Stats
from kvpager.blocks.swap import Swap
from kvpager.blocks.truncation import Truncation
from kvpager.plans import Int32, Int64, Plan, Step, Tier


class GroupedManager:
    """Block tables of several groups of layers over one pool. A `CacheManager`; thread-safe.

    Args:
        windows: the sliding window of each group, in tokens, the token itself included; None for
            full attention.
        num_blocks: blocks on the device, each for `block_size` tokens of one group.
        block_size: token slots of a block, a power of two.
        num_host_blocks: blocks of the host tier, for `swap`.
        max_chunk: groups with a window take blocks for at most this many tokens at a time;
            `open_slots` takes the next ones. None: for all tokens at once.
        eviction: as for `BlockManager`.

    When tokens are committed, groups with a window release the blocks behind it; published blocks
    stay cached. A prompt reuses the longest prefix of whole blocks that every group can serve.
    """

    def __init__(
        self,
        windows: Iterable[int | None],
        num_blocks: int,
        block_size: int = 16,
        num_host_blocks: int = 0,
        *,
        max_chunk: int | None = None,
        eviction: str | EvictionPolicy = "lru",
    ) -> None:
        self.windows = tuple(
            None if window is None else arguments.count("window", window, at_least=1)
            for window in windows
        )
        if not self.windows:
            raise ValueError("windows=(): expected one for each group. Pass (None,) for one group.")
        if max_chunk is not None:
            max_chunk = arguments.count("max_chunk", max_chunk, at_least=1)
        self.max_chunk = max_chunk
        self._state = state = BlockState(
            num_blocks, block_size, num_host_blocks, eviction, False, False, 0
        )
        self.block_size: int = state.block_size
        self.num_host_blocks: int = state.host.num_blocks
        self.quotas = Quotas(state)
        self.copies = Copies(state)
        self._table = table = GroupTable(self, state, len(self.windows))
        self._index = WindowIndex(state, self.windows)
        self.queries = GroupQueries(state, table, self._index, self.windows, max_chunk)
        self._allocation = GroupAllocation(state, table)
        self._truncation = Truncation(state)
        self._speculation = Extension(state, self._truncation)
        self._extension = GroupExtension(state, table, self._speculation, self.windows, max_chunk)
        self._publication = GroupCommit(state, table, self._index, self._truncation, self.windows)
        self._swap = Swap(state)
        self._resize = Resize(state)

    def __repr__(self) -> str:
        with self._state.lock:
            pool = self._state.pool
            return (
                f"<GroupedManager of {counted(len(self.windows), 'group')}: {pool.num_held} held, "
                f"{pool.num_free} free of {counted(pool.num_blocks, 'block')} of {self.block_size}>"
            )

    def length(self, sequence: SequenceHandle, /) -> int:
        """Return the tokens in the sequence. O(1). Raises `StaleSequence`."""
        with self._state.lock:
            return int(self._table.lengths[self._table.sequence(sequence)])

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
        """Begin a sequence of `prompt` tokens, as `BlockManager.allocate`. O(tokens * groups).

        Groups with a window take blocks for `max_chunk` tokens after the cached ones.
        Raises: `OutOfBlocks` of the sum over all groups; `TypeError` / `ValueError` for
        invalid arguments.
        """
        length, ids = arguments.prompt(prompt)
        who = self._identities(namespace, lora, mm_hashes, length)
        reserve = arguments.count("reserve", reserve)
        with self._state.lock, self._state.change:
            hit = self._index.nothing()
            if ids is not None:
                hit = self._index.match(who, ids[: max(length - 1, 0)])
            rooms = self._extension.rooms(hit.num_blocks * self.block_size, length)
            return self._allocation.begin(who, length, rooms, ids, hit, reserve)

    def _identities(
        self,
        namespace: str | None,
        lora: str | None,
        mm_hashes: Iterable[tuple[int, int, bytes]],
        length: int,
    ) -> list[Prompt]:
        who = identity(namespace, lora, mm_hashes, length)
        return [who._replace(group=group) for group in range(len(self.windows))]

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
        """Return how many leading tokens every group has cached, as `BlockManager.match_prefix`.

        With `blocks`, those of all groups: int32 [groups, n], -1 behind a window.
        O(tokens * groups). Raises: as `allocate`.
        """
        ids = arguments.token_ids(prompt)
        who = self._identities(namespace, lora, mm_hashes, len(ids))
        return self.queries.match_prefix(who, ids, arguments.flag("blocks", blocks))

    @overload
    def fork(self, sequence: SequenceHandle) -> SequenceHandle: ...
    @overload
    def fork(self, sequence: SequenceHandle, count: int) -> list[SequenceHandle]: ...
    def fork(
        self, sequence: SequenceHandle, count: int | None = None
    ) -> SequenceHandle | list[SequenceHandle]:
        """Return a new sequence that shares all blocks of this one. O(blocks) each.

        With `count`, return a list of `count` new sequences (at most 65,536).
        Raises: `StaleSequence`, `SequenceSwapped`.
        """
        times = 1 if count is None else arguments.count("count", count, at_least=1, at_most=2**16)
        with self._state.lock, self._state.change:
            [parent] = self._table.resident(_one(sequence)).tolist()
            children = self._allocation.fork(parent, times)
        return children[0] if count is None else children

    def free(self, sequences: Target, *, publish: bool = False) -> None:
        """Release the blocks of all groups and end the handles. O(blocks).

        `publish` commits all tokens with slots first. Raises: `StaleSequence`; with `publish`,
        `SequenceSwapped`.
        """
        named = listed(sequences)
        arguments.flag("publish", publish)
        with self._state.lock, self._state.change:
            if publish:
                names = self._table.resident(named)
                self._publication.commit(names, self._publication.settled(names))
            else:
                names = self._table.resolve(named)
            self._allocation.end(names)

    # ---------------------------------------------------------------- append, open_slots, accept

    def append(
        self,
        sequences: Target,
        tokens: int | ArrayLike | Iterable[ArrayLike] = 1,
        *,
        counts: ArrayLike | None = None,
        speculative: bool = False,
    ) -> Step:
        """Make room for further tokens, as `BlockManager.append`. O(tokens * groups).

        `Step.slots` is int64 [groups, tokens], with -1 for tokens that have no slot yet in a group
        with a window: after `max_chunk` tokens. `open_slots` takes their blocks.
        Raises: `OutOfBlocks`, `StaleSequence`, `SequenceSwapped`, `ValueError`, `TypeError`.
        """
        named = listed(sequences)
        num_named = None if isinstance(named, SequenceHandle) else len(named)
        num_new, ids = arguments.new_tokens(num_named, tokens, counts)
        arguments.flag("speculative", speculative)
        state = self._state
        with state.lock, state.change:
            names = self._table.resident(named)
            if state.rows.num_speculating and not speculative:
                state.refuse_speculative(self._table.rows[0, names])
            return self._extension.append(names, num_new, ids, speculative)

    def open_slots(self, sequence: SequenceHandle, start: int, stop: int) -> Int64:
        """Return the slots of tokens about to be written, int64 [groups, tokens]. O(tokens).

        Groups with a window take their missing blocks up to token `stop`.
        Raises: `OutOfBlocks`, and as `slots`.
        """
        start, stop = arguments.count("start", start), arguments.count("stop", stop)
        with self._state.lock, self._state.change:
            [name] = self._table.resident(_one(sequence)).tolist()
            arguments.within_one("stop", stop, int(self._table.lengths[name]))
            self.queries.refuse_behind(name, start, stop)
            self._extension.open(name, stop)
            return self.queries.slots_of(name, start, stop)

    def accept(
        self,
        sequences: Target,
        counts: ArrayLike,
        tokens: ArrayLike | Iterable[ArrayLike] | None = None,
    ) -> None:
        """Keep the first `counts` speculative tokens of each sequence, as `BlockManager.accept`.

        O(tokens * groups).
        """
        named = listed(sequences)
        kept, ids = arguments.accepted(
            None if isinstance(named, SequenceHandle) else len(named), counts, tokens
        )
        state, table, groups = self._state, self._table, len(self.windows)
        with state.lock, state.change:
            names = table.resident(named)
            rows = table.rows[:, names]
            speculative = state.rows.speculative[rows[0]]
            arguments.within("counts", kept, speculative, "speculative token")
            theirs = None if ids is None else np.tile(ids, groups)
            self._speculation.accept(rows.ravel(), np.tile(kept, groups), theirs)
            # `rooms` may be less: some tokens have no slots yet.
            table.lengths[names] += kept - speculative

    # ---------------------------------------------------------------- commit, truncate

    def commit(self, sequences: Target, length: int | None = None) -> None:
        """Record that the KV of the first `length` tokens (default: all with slots) is written.

        Full blocks of known tokens become reusable, speculative tokens never. Groups with a window
        release the blocks that the next token does not attend to.
        O(sequences * groups), and of blocks that became full.
        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` for more tokens than have slots.
        """
        named = listed(sequences)
        length = None if length is None else arguments.count("length", length)
        with self._state.lock, self._state.change:
            names = self._table.resident(named)
            settled = self._publication.settled(names)
            if length is not None:
                arguments.within("length", length, settled)
                settled = np.full_like(settled, length)
            self._publication.commit(names, settled)

    def truncate(self, sequence: SequenceHandle, length: int) -> None:
        """Shorten the sequence to its first `length` tokens. O(blocks freed).

        Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` if the sequence is shorter, or
        the next token would attend to a released block.
        """
        length = arguments.count("length", length)
        state, table, rows = self._state, self._table, self._state.rows
        with state.lock, state.change:
            [name] = table.resident(_one(sequence)).tolist()
            arguments.within_one("length", length, int(table.lengths[name]))
            members = table.rows[:, name].tolist()
            for row, window in zip(members, self.windows, strict=True):
                if rows.first_blocks[row] > first_needed(length, window, self.block_size):
                    raise ValueError(
                        f"length={length}: blocks within the window of {window} tokens before it "
                        "were freed. Allocate a new sequence."
                    )
            state.change.begin()
            for row in members:
                if length < rows.lengths[row]:
                    self._truncation.shorten(row, length)
            self._extension.cut(name, length)

    # ---------------------------------------------------------------- swap

    def swap(
        self, sequences: Target, to: Tier, *, at_most: int | None = None, reserve: int = 0
    ) -> Plan:
        """Move the blocks of all groups between tiers, as `BlockManager.swap`. O(blocks).

        Raises: `OutOfBlocks` of the full tier, `StaleSequence`, `SequenceSwapped` for a sequence
        that is wholly on the host already, `ValueError`.
        """
        at_most, reserve = arguments.swap(to, at_most, reserve)
        named = listed(sequences)
        state, table = self._state, self._table
        with state.lock, state.change:
            names = table.resolve(named)
            if to == "device":
                return self._swap.back(table.rows[:, names].ravel().tolist(), at_most, reserve)
            return self._swap.out(table.swappable(names), at_most)

    # ---------------------------------------------------------------- handles and tables

    def batch(self, sequences: Iterable[SequenceHandle]) -> Batch:
        """Return a reusable argument for several handles. O(n).

        Raises: `StaleSequence`, `ValueError` for a repeated sequence.
        """
        return self.queries.batch(sequences)

    def lengths(self, sequences: Target) -> Int64:
        """Return the tokens in each sequence, int64 [n]. O(n). Raises `StaleSequence`."""
        return self.queries.lengths(sequences)

    def block_tables(self, sequences: Target, *, padding: int = -1) -> Int32:
        """Return block tables, int32 [groups, n, most blocks]. O(groups * n * most blocks).

        `padding` replaces missing blocks: those behind a window, and those in host memory. To
        compute, prefer `tables_and_lengths`, which refuses swapped sequences. Raises
        `StaleSequence`.
        """
        return self.queries.block_tables(sequences, padding)

    def tables_and_lengths(self, sequences: Target) -> tuple[Int32, Int64]:
        """Return `block_tables` and `lengths` of sequences on the device, read at one moment.

        O(groups * n * most blocks). Raises `StaleSequence`, `SequenceSwapped`.
        """
        return self.queries.tables_and_lengths(sequences)

    def slots(self, sequence: SequenceHandle, start: int = 0, stop: int | None = None) -> Int64:
        """Return flat slots of tokens `start` to `stop` (default: all), int64 [groups, tokens].

        O(tokens * groups). Raises: `StaleSequence`, `SequenceSwapped`, `ValueError` for tokens
        without slots.
        """
        return self.queries.slots(sequence, start, stop)

    # ---------------------------------------------------------------- the pool

    @property
    def num_blocks(self) -> int:
        """Blocks on the device. O(1)."""
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

    def clear_prefix_cache(self) -> int:
        """Evict all cached blocks that no sequence holds; return how many. O(cached)."""
        return self._resize.clear_prefix_cache()

    def stats(self) -> Stats:
        """Return current counts and totals, blocks of all groups. O(blocks + sequences)."""
        return self.queries.stats()

    def check(self) -> None:
        """Check all invariants. O(blocks + tokens).

        Raises: `BrokenInvariant`, which names the broken invariant.
        """
        with self._state.lock, self._state.change:
            invariants.check(self._state)
            self._table.check(self.windows)


def _one(sequence: SequenceHandle) -> SequenceHandle:
    if not isinstance(sequence, SequenceHandle):
        raise TypeError(f"expected a SequenceHandle, got {type(sequence).__name__}")
    return sequence
