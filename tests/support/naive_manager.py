"""A block manager in plain Python: slow, and meant to be obviously right.

It keeps lists and dictionaries and recounts everything in each call. It is the specification of the
verbs; the checks of the kit are tested on it and on broken copies. It has the verbs of
`kvpager.BlockManager` for one sequence or a list, with the same results.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kvpager._text import counted
from kvpager.errors import BrokenInvariant, OutOfBlocks, SequenceSwapped, StaleSequence
from kvpager.plans import AppendPlan, CopyPlan, Int32, Int64, Tier

Pair = tuple[int, int]
Prefix = tuple[str | None, tuple[int, ...]]


class NaiveSequence:
    """A handle and the state of its sequence. A token of unknown id is None."""

    def __init__(self, namespace: str | None) -> None:
        self.namespace = namespace
        self.tokens: list[int | None] = []
        self.blocks: list[int] = []
        self.host_blocks: dict[int, int] = {}  # column -> host block, while swapped
        self.is_swapped = False
        self.num_committed = 0
        self.num_cached_tokens = 0
        self.copies: Int32 = pairs_array([])

    def __len__(self) -> int:
        return len(self.tokens)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<NaiveSequence: {counted(len(self), 'token')} in blocks {self.blocks}>"


Named = NaiveSequence | list[NaiveSequence]


@dataclass(frozen=True)
class NaiveStats:
    """The counts that the kit checks, named as in `kvpager.blocks.stats.Stats`."""

    num_blocks: int
    num_free: int
    num_held: int
    num_cached: int
    num_host_blocks: int
    num_host_free: int
    num_sequences: int
    total_evicted: int
    num_kept: int = 0  # there are no pins or fences


class NaiveManager:
    """The verbs of `BlockManager`, written as plainly as possible.

    Args:
        num_blocks: blocks on the device.
        block_size: token slots of a block.
        num_host_blocks: blocks of the host tier.
    """

    def __init__(self, num_blocks: int, block_size: int = 16, num_host_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_host_blocks = num_host_blocks
        self.live: list[NaiveSequence] = []
        # The tokens from the front to the end of a block -> the block. Oldest use first.
        self.cached: dict[Prefix, int] = {}
        self.num_evicted = 0

    # ---------------------------------------------------------------- the five verbs

    def allocate(
        self, prompt: int | Iterable[int], *, namespace: str | None = None
    ) -> NaiveSequence:
        """Begin a sequence; see `BlockManager.allocate`."""
        sequence = NaiveSequence(namespace)
        sequence.tokens = [None] * prompt if isinstance(prompt, int) else list(prompt)
        shared, partial, num_partial = self.match(namespace, sequence.tokens[:-1])
        need = self.blocks_for(len(sequence)) - len(shared)
        self.require(need, keep=shared)
        self.live.append(sequence)
        sequence.blocks = list(shared)
        fresh = [self.take(sequence) for _ in range(need)]
        sequence.num_cached_tokens = len(shared) * self.block_size + num_partial
        sequence.num_committed = sequence.num_cached_tokens
        if num_partial and partial != fresh[0]:
            sequence.copies = pairs_array([(partial, fresh[0])])
        return sequence

    def append(
        self,
        sequences: Named,
        tokens: int | list[int] | list[list[int]] = 1,
        *,
        counts: list[int] | None = None,
    ) -> AppendPlan:
        """Make room for further tokens; see `BlockManager.append`."""
        rows = self.named(sequences)
        self.refuse_swapped(rows)
        new = new_tokens(sequences, tokens, counts)
        self.require(self.num_needed(rows, new))
        copies: list[Pair] = []
        slots: list[int] = []
        for sequence, ids in zip(rows, new, strict=True):
            copies += self.own_tail(sequence) if ids else []
            first = len(sequence)
            sequence.tokens += ids
            while len(sequence.blocks) < self.blocks_for(len(sequence)):
                self.take(sequence)
            slots += self.slots(sequence, first).tolist()
        return AppendPlan(np.array(slots, np.int64), pairs_array(copies))

    def fork(
        self, sequence: NaiveSequence, count: int | None = None
    ) -> NaiveSequence | list[NaiveSequence]:
        """Return sequences that share every block; see `BlockManager.fork`."""
        [parent] = self.named(sequence)
        self.refuse_swapped([parent])
        children = []
        for _ in range(1 if count is None else count):
            child = NaiveSequence(parent.namespace)
            child.tokens = parent.tokens.copy()
            child.blocks = parent.blocks.copy()
            child.num_committed = child.num_cached_tokens = parent.num_committed
            children.append(child)
        self.live += children
        return children[0] if count is None else children

    def free(self, sequences: Named) -> None:
        """End sequences; see `BlockManager.free`."""
        for sequence in self.named(sequences):
            self.live = [other for other in self.live if other is not sequence]

    def swap(self, sequences: Named, to: Tier) -> CopyPlan:
        """Move unshared blocks between tiers; see `BlockManager.swap`."""
        if to not in ("device", "host"):
            raise ValueError(f'to={to!r}: expected "device" or "host"')
        rows = [row for row in self.named(sequences) if row.is_swapped == (to == "device")]
        copies = self.swap_out(rows) if to == "host" else self.swap_in(rows)
        return CopyPlan(pairs_array(copies), "host" if to == "device" else "device", to)

    # ---------------------------------------------------------------- commit, truncate, grow

    def commit(self, sequences: Named, length: int | None = None) -> None:
        """Record that the tokens' KV is written; see `BlockManager.commit`."""
        rows = self.named(sequences)
        self.refuse_swapped(rows)
        if length is not None and any(length > len(sequence) for sequence in rows):
            raise ValueError(f"length={length}: a sequence has fewer tokens")
        for sequence in rows:
            until = len(sequence) if length is None else length
            sequence.num_committed = max(sequence.num_committed, until)
            self.publish(sequence)

    def truncate(self, sequence: NaiveSequence, length: int) -> None:
        """Drop all tokens from `length` on; see `BlockManager.truncate`."""
        [row] = self.named(sequence)
        self.refuse_swapped([row])
        if not 0 <= length <= len(row):
            raise ValueError(f"length={length}: the sequence has {len(row)} tokens only")
        del row.tokens[length:]
        del row.blocks[self.blocks_for(length) :]
        row.num_committed = min(row.num_committed, length)

    def grow(self, num_blocks: int) -> None:
        """Raise the device pool to `num_blocks`."""
        if num_blocks < self.num_blocks:
            raise ValueError(f"num_blocks={num_blocks}: there are {self.num_blocks} already")
        self.num_blocks = num_blocks

    def clear_prefix_cache(self) -> int:
        """Evict all cached blocks that no sequence holds; return how many."""
        idle = [prefix for prefix, block in self.cached.items() if not self.holders(block)]
        for prefix in idle:
            del self.cached[prefix]
        return len(idle)

    # ---------------------------------------------------------------- reading

    def block_tables(self, sequences: Named) -> Int32:
        """Return block tables, int32 [n, most blocks]; -1: no device block."""
        rows = self.named(sequences)
        width = max((len(row.blocks) for row in rows), default=0)
        tables = [row.blocks + [-1] * (width - len(row.blocks)) for row in rows]
        return np.array(tables, np.int32).reshape(len(rows), width)

    def slots(self, sequence: NaiveSequence, start: int = 0, stop: int | None = None) -> Int64:
        """Return the flat slots of tokens `start` to `stop`, int64 [tokens]."""
        [row] = self.named(sequence)
        self.refuse_swapped([row])
        end = len(row) if stop is None else stop
        size = self.block_size
        return np.array(
            [row.blocks[at // size] * size + at % size for at in range(start, end)], np.int64
        )

    def owns(self, sequence: NaiveSequence) -> bool:
        """Return True if the handle is of this manager and not freed."""
        return any(other is sequence for other in self.live)

    @property
    def num_free_blocks(self) -> int:
        """Free device blocks."""
        return len(self.free_blocks())

    @property
    def num_held_blocks(self) -> int:
        """Device blocks that sequences hold; a shared block counts once."""
        return self.stats().num_held

    def stats(self) -> NaiveStats:
        """Return the current counts."""
        held = {block for row in self.live for block in row.blocks if block >= 0}
        return NaiveStats(
            num_blocks=self.num_blocks,
            num_free=self.num_free_blocks,
            num_held=len(held),
            num_cached=len(set(self.cached.values()) - held),
            num_host_blocks=self.num_host_blocks,
            num_host_free=len(self.free_host_blocks()),
            num_sequences=len(self.live),
            total_evicted=self.num_evicted,
        )

    def check(self) -> None:
        """Raise `BrokenInvariant` if a table does not fit its tokens."""
        for row in self.live:
            here = [block for block in row.blocks if block >= 0]
            if len(set(here)) != len(here):
                raise BrokenInvariant(f"{row}: a block is in its table twice")
            if len(row.blocks) != self.blocks_for(len(row)):
                raise BrokenInvariant(f"{row}: {self.blocks_for(len(row))} blocks expected")
            if any(not 0 <= block < self.num_blocks for block in here):
                raise BrokenInvariant(f"{row}: its table names a block that does not exist")
        if len(set(self.cached.values())) != len(self.cached):
            raise BrokenInvariant("prefix index: a block is there twice")

    # ---------------------------------------------------------------- the pool

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks of `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def holders(self, block: int) -> int:
        """Return the number of tables that hold the block."""
        return sum(block in row.blocks for row in self.live)

    def free_blocks(self) -> list[int]:
        """Return the blocks in no table and not in the prefix index."""
        used = {block for row in self.live for block in row.blocks} | set(self.cached.values())
        return [block for block in range(self.num_blocks) if block not in used]

    def free_host_blocks(self) -> list[int]:
        """Return the host blocks that no swapped sequence holds."""
        used = {block for row in self.live for block in row.host_blocks.values()}
        return [block for block in range(self.num_host_blocks) if block not in used]

    def require(self, need: int, keep: Iterable[int] = ()) -> None:
        """Raise `OutOfBlocks` unless `need` blocks are available while `keep` stay cached."""
        idle = [block for block in self.cached.values() if not self.holders(block)]
        evictable = len(set(idle) - set(keep))
        if need > self.num_free_blocks + evictable:
            raise OutOfBlocks(need, self.num_free_blocks, evictable, self.num_blocks)

    def take(self, sequence: NaiveSequence) -> int:
        """Append a block to the sequence's table."""
        if not self.free_blocks():
            self.evict()
        block = self.free_blocks()[0]
        sequence.blocks.append(block)
        return block

    def evict(self) -> None:
        """Evict a cached block that no table holds: from the tail, the oldest first."""
        idle = [prefix for prefix, block in self.cached.items() if not self.holders(block)]
        leaves = [prefix for prefix in idle if not self.is_extended(prefix)]
        del self.cached[(leaves or idle)[0]]
        self.num_evicted += 1

    def is_extended(self, prefix: Prefix) -> bool:
        """Return True if the index has a longer prefix that begins with this one."""
        space, tokens = prefix
        return any(
            other_space == space and len(other) > len(tokens) and other[: len(tokens)] == tokens
            for other_space, other in self.cached
        )

    # ---------------------------------------------------------------- prefixes and sharing

    def match(self, namespace: str | None, tokens: list[int | None]) -> tuple[list[int], int, int]:
        """Return the longest cached prefix: whole blocks, a partial block, and its tokens."""
        shared: list[int] = []
        end = self.block_size
        while end <= len(tokens) and (namespace, tuple(tokens[:end])) in self.cached:
            prefix = (namespace, known(tokens[:end]))
            self.cached[prefix] = self.cached.pop(prefix)  # the most recently used
            shared.append(self.cached[prefix])
            end += self.block_size
        best, most = -1, 0
        for (space, other), block in self.cached.items():
            if space == namespace and len(other) == end:
                common = num_common(other, tokens)
                if common - (end - self.block_size) > most:
                    best, most = block, common - (end - self.block_size)
        return shared, best, most

    def publish(self, sequence: NaiveSequence) -> None:
        """Publish the sequence's full committed blocks of known tokens."""
        for column in range(sequence.num_committed // self.block_size):
            ids = sequence.tokens[: (column + 1) * self.block_size]
            if None in ids:
                return
            self.cached.setdefault((sequence.namespace, known(ids)), sequence.blocks[column])

    def is_shared(self, block: int) -> bool:
        """Return True if a second table or the prefix index holds the block."""
        return self.holders(block) > 1 or block in self.cached.values()

    def own_tail(self, sequence: NaiveSequence) -> list[Pair]:
        """Copy the sequence's partly filled last block if it is shared."""
        if len(sequence) % self.block_size == 0 or not self.is_shared(sequence.blocks[-1]):
            return []
        source = sequence.blocks.pop()
        return [(source, self.take(sequence))]

    def num_needed(self, rows: list[NaiveSequence], new: list[list[int | None]]) -> int:
        """Return how many blocks it takes to append `new` to `rows`, in order."""
        need = 0
        leavers: dict[int, int] = {}  # block -> rows that replace it by a copy
        for sequence, ids in zip(rows, new, strict=True):
            need += self.blocks_for(len(sequence) + len(ids)) - len(sequence.blocks)
            if ids and len(sequence) % self.block_size:
                tail = sequence.blocks[-1]
                others = self.holders(tail) - leavers.get(tail, 0) - 1
                if others or tail in self.cached.values():
                    leavers[tail] = leavers.get(tail, 0) + 1
                    need += 1
        return need

    # ---------------------------------------------------------------- tiers

    def swap_out(self, rows: list[NaiveSequence]) -> list[Pair]:
        """Move unshared blocks to the host; return (device, host) pairs."""
        alone = {
            id(row): [at for at, block in enumerate(row.blocks) if self.holders(block) == 1]
            for row in rows
        }
        need, room = sum(map(len, alone.values())), len(self.free_host_blocks())
        if need > room:
            raise OutOfBlocks(need, room, 0, self.num_host_blocks, "host", "raise num_host_blocks")
        copies = []
        for row in rows:
            row.is_swapped = True
            for column in alone[id(row)]:
                row.host_blocks[column] = self.free_host_blocks()[0]
                copies.append((row.blocks[column], row.host_blocks[column]))
                row.blocks[column] = -1
        return copies

    def swap_in(self, rows: list[NaiveSequence]) -> list[Pair]:
        """Move the rows' host blocks back; return (host, device) pairs."""
        self.require(sum(len(row.host_blocks) for row in rows))
        copies = []
        for row in rows:
            for column, host in row.host_blocks.items():
                self.take(row)
                row.blocks[column] = row.blocks.pop()
                copies.append((host, row.blocks[column]))
            row.host_blocks = {}
            row.is_swapped = False
        return copies

    # ---------------------------------------------------------------- handles

    def named(self, sequences: Named) -> list[NaiveSequence]:
        """Return the sequences as a list. Raises for a stale or repeated one."""
        rows = [sequences] if isinstance(sequences, NaiveSequence) else list(sequences)
        for row in rows:
            if not self.owns(row):
                raise StaleSequence(f"{row} was freed, or belongs to another manager")
        if len({id(row) for row in rows}) != len(rows):
            raise ValueError("sequences: one is repeated. Pass each sequence once.")
        return rows

    def refuse_swapped(self, rows: list[NaiveSequence]) -> None:
        """Raise `SequenceSwapped` if one of the rows is on the host."""
        for row in rows:
            if row.is_swapped:
                raise SequenceSwapped(f'{row} is on the host. Call swap(sequence, "device") first.')


def pairs_array(pairs: list[Pair]) -> Int32:
    """Return pairs of blocks as int32 [n, 2]. O(pairs)."""
    return np.array(pairs, np.int32).reshape(-1, 2)


def new_tokens(
    sequences: Named, tokens: int | list[int] | list[list[int]], counts: list[int] | None
) -> list[list[int | None]]:
    """Return the tokens that `append` adds to each sequence; None for an unknown id. O(tokens)."""
    single = isinstance(sequences, NaiveSequence)
    num_rows = 1 if single else len(sequences)
    if counts is not None:
        return [[None] * count for count in counts]
    if isinstance(tokens, int):
        return [[None] * tokens for _ in range(num_rows)]
    if single:
        return [list(tokens)]  # type: ignore[arg-type]
    rows = [[ids] if isinstance(ids, int) else list(ids) for ids in tokens]
    if len(rows) != num_rows:
        raise ValueError(f"tokens: got ids for {len(rows)} sequences, expected {num_rows}")
    return rows  # type: ignore[return-value]


def known(tokens: list[int | None]) -> tuple[int, ...]:
    """Return the ids of tokens, all of them known. O(tokens)."""
    return tuple(token for token in tokens if token is not None)


def num_common(a: Iterable[int | None], b: Iterable[int | None]) -> int:
    """Return the number of equal leading tokens. O(tokens)."""
    count = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        count += 1
    return count
