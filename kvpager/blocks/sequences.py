"""Block tables, lengths and generations of all sequences: a structure of arrays.

    row        0      1      2          a handle names (row, generation); `free` raises the row's
    lengths   33     16      -          generation, so every old handle of the row is refused
    tables    4 7 2  7       -          block ids in logical order, see `block_tables.py`

In a table, -1 is "no block" and -2 - h is block h of the host. One decode step is a handful of
vector operations for a batch of any size. The counts of a row are always ordered:

    published blocks * block_size <= min(committed, known) <= lengths - speculative <= lengths
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.block_tables import Ragged, ranks
from kvpager.blocks.mm_hashes import NO_MM_HASHES, MMHashes
from kvpager.blocks.radix import Node, TreeKey
from kvpager.errors import BrokenInvariant, StaleSequence
from kvpager.plans import NO_COPIES, Int32, Int64

NO_BLOCK = -1


class Owner(Protocol):
    """The owner of handles: it knows the lengths of sequences."""

    def length(self, sequence: SequenceHandle, /) -> int:
        """Return the tokens in the sequence. O(1). Raises `StaleSequence`."""


class SequenceHandle:
    """A handle to one block table. Made by `BlockManager.allocate` and `fork`, ended by `free`.

    `num_cached_tokens`: how many leading tokens have their KV in the pool already.
    `copies`: int32 [n, 2], (source, destination) blocks to copy before any write, if the prompt
    matched part of a block; usually empty. `ticket`: as in `CopyPlan`.
    """

    __slots__ = ("_generation", "_owner", "_row", "copies", "num_cached_tokens", "ticket")

    def __init__(
        self,
        owner: Owner,
        row: int,
        generation: int,
        num_cached_tokens: int = 0,
        copies: Int32 = NO_COPIES,
        ticket: int = 0,
    ) -> None:
        self._owner = owner
        self._row = row
        self._generation = generation
        self.num_cached_tokens = num_cached_tokens
        self.copies = copies
        self.ticket = ticket

    def __len__(self) -> int:
        """Tokens in the sequence. O(1). Raises `StaleSequence` after `free`."""
        return self._owner.length(self)

    def __bool__(self) -> bool:
        """Return True, also for an empty sequence."""
        return True

    def __eq__(self, other: object) -> bool:
        """Return True for handles of the same sequence. O(1)."""
        return isinstance(other, SequenceHandle) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[int, int, int]:
        return id(self._owner), self._row, self._generation

    def __repr__(self) -> str:
        try:
            state = f"{len(self)} tokens"
        except StaleSequence:
            state = "freed"
        return f"<SequenceHandle {self._row}.{self._generation}: {state}>"

    @property
    def name(self) -> str:
        """The name of the sequence in errors. O(1), takes no lock."""
        return f"SequenceHandle {self._row}.{self._generation}"


class Batch:
    """Sequences that step together. `BlockManager.batch` makes it once for many steps."""

    __slots__ = ("epoch", "generations", "owner", "rows")

    def __init__(self, owner: Owner, rows: Int64, generations: Int64, epoch: int) -> None:
        self.owner = owner
        self.rows = rows
        self.generations = generations
        self.epoch = epoch  # the table's epoch when all were last live and resident
        rows.flags.writeable = generations.flags.writeable = False

    def __len__(self) -> int:
        return len(self.rows)


class KeyParts(TypedDict, total=False):
    """Key parts that separate prefixes of equal tokens, see `BlockManager.allocate`."""

    namespace: str | None
    lora: str | None
    mm_hashes: Iterable[tuple[int, int, bytes]]


class PrefixMatch(NamedTuple):
    """The cached prefix of a prompt. Advisory: blocks may be evicted before `allocate`.

    `blocks` is int32 [n], read-only; the last block may match in part. From a `GroupedManager`:
    [groups, n], -1 behind a window.
    """

    num_tokens: int
    blocks: Int32

    def whole(self, block_size: int) -> Int32:
        """Return the blocks that match wholly, of all groups: int32 [n]. O(blocks)."""
        blocks = self.blocks[..., : self.num_tokens // block_size]
        return blocks[blocks >= 0]

    @classmethod
    def of(cls, num_tokens: int, blocks: Int32) -> PrefixMatch:
        """Return a match whose `blocks` are read-only. O(1)."""
        blocks.flags.writeable = False
        return cls(num_tokens, blocks)


class Prompt(NamedTuple):
    """The key parts of a sequence: all that determines its KV besides the tokens."""

    namespace: str | None = None
    lora: str | None = None
    mm_hashes: MMHashes = NO_MM_HASHES
    group: int = 0  # of layers, see `groups`

    @property
    def tree(self) -> TreeKey:
        """The key of the sequence's tree in the prefix index."""
        if self.group:
            return self.namespace, self.lora, self.group
        return self.namespace, self.lora

    def up_to(self, length: int) -> Prompt:
        """Return the same without hashes after token `length`, where other tokens may follow."""
        cut = self.mm_hashes.up_to(length)
        return self if cut is self.mm_hashes else self._replace(mm_hashes=cut)


class SequenceTable:
    """The arrays. Rows are reused; generations are never.

    A sequence has a row for each group of layers, one after the other. Its first row names it.
    """

    COLUMNS: ClassVar[dict[str, type[np.generic]]] = {
        "lengths": np.int64,
        "known": np.int64,  # leading tokens whose ids are known
        "committed": np.int64,  # leading tokens whose KV is written
        "speculative": np.int64,  # trailing tokens that `accept` may drop; never published
        "published": np.int64,  # leading blocks in the prefix index
        "first_blocks": np.int64,  # the first block not dropped
        "generations": np.int64,
        "swapped": np.bool_,
        "duplicates": np.bool_,  # the index may have a duplicate in place of a block of this row
        "began": np.int64,  # tokens when it began, see `groups/continuations.py`
        "behind": np.int64,  # the block before the first one, plus 1; 0 if there is none
        "waiting": np.int64,  # tokens behind `lengths` without slots, see `groups/extension.py`
    }

    lengths: Int64
    known: Int64
    committed: Int64
    speculative: Int64
    published: Int64
    first_blocks: Int64
    generations: Int64
    swapped: NDArray[np.bool_]
    duplicates: NDArray[np.bool_]
    began: Int64
    behind: Int64
    waiting: Int64

    def __init__(self, block_size: int, windows: tuple[int | None, ...] = (None,)) -> None:
        self.block_size = block_size
        self.windows = windows  # of the groups, None for full attention
        self.num_groups = len(windows)
        self.tables = Ragged(NO_BLOCK)
        for name, dtype in self.COLUMNS.items():
            setattr(self, name, np.zeros(0, dtype))
        self._columns: list[memoryview[Any]] = []  # in which a row begins with zeros
        self.prompts: list[Prompt | None] = []
        self.nodes: list[Node | None] = []  # where `published` stands in the prefix index
        self.waiting_ids: dict[int, Int32] = {}  # known ids of sequences with waiting tokens
        self.digests: dict[int, list[bytes]] = {}  # of full blocks, see `groups/prefix.py`
        self.free_rows: list[int] = []  # first rows
        self.epoch = 0  # changes whenever a handle goes stale or a sequence is swapped
        self.num_speculating = 0  # rows with speculative tokens

    def __len__(self) -> int:
        return len(self.prompts) // self.num_groups - len(self.free_rows)

    def rows_of(self, first: int) -> range:
        """Return all rows of a sequence. O(1)."""
        return range(first, first + self.num_groups)

    def is_keyed(self, row: int) -> bool:
        """Return True if each block is published separately, see `groups/prefix.py`. O(1)."""
        return self.windows[row % self.num_groups] is not None

    def members(self, rows: Int64) -> Int64:
        """Return all rows of these sequences, group by group. O(n * groups)."""
        if self.num_groups == 1:
            return rows
        members: Int64 = (rows + np.arange(self.num_groups)[:, None]).ravel()
        return members

    # ---------------------------------------------------------------- begin and end sequences

    def reserve(self, num_columns: int, count: int = 1) -> None:
        """Make room for `count` sequences of `num_columns` blocks a row. Amortised O(blocks)."""
        missing = count - len(self.free_rows)
        if missing > 0:
            self._add_rows(max(missing, 8, len(self.prompts) // self.num_groups))
        if count == self.num_groups == 1:
            self.tables.reserve_row(self.free_rows[-1], num_columns)
        else:
            rows = self.members(np.array(self.free_rows[-count:], np.int64))
            self.tables.reserve(rows, np.full(len(rows), num_columns))

    def _add_rows(self, more: int) -> None:
        rows, more = len(self.prompts), more * self.num_groups
        columns = {
            name: np.concatenate([getattr(self, name), np.zeros(more, dtype)])
            for name, dtype in self.COLUMNS.items()
        }
        self.tables.add_rows(rows + more - len(self.tables))
        vars(self).update(columns)  # nothing can fail from here on
        # A memoryview writes one number in half the time that an array takes.
        self._columns = [columns[name].data for name in columns if name != "generations"]
        self.prompts.extend([None] * more)
        self.nodes.extend([None] * more)
        self.free_rows.extend(reversed(range(rows, rows + more, self.num_groups)))

    def add(
        self,
        row: int,
        prompt: Prompt,
        shared: Int32,
        fresh: Int32,
        length: int,
        committed: int,
        known: int,
    ) -> None:
        """Begin a reserved row with these blocks. O(blocks)."""
        self.prompts[row] = prompt
        self.tables.trim(row, len(shared) + len(fresh))  # a refused call may have reserved more
        table = self.tables.row(row)
        table[: len(shared)] = shared
        table[len(shared) : len(shared) + len(fresh)] = fresh
        self.lengths[row] = length
        self.committed[row] = committed
        self.known[row] = known

    def fork(self, parent: int) -> None:
        """Begin a copy of sequence `parent` in reserved rows. O(blocks)."""
        first = self.free_rows.pop()
        for group in range(self.num_groups):
            row, source = first + group, parent + group
            self.prompts[row], self.nodes[row] = self.prompts[source], self.nodes[source]
            num_blocks = self.num_blocks(source)
            self.tables.row(row)[:num_blocks] = self.tables.row(source)[:num_blocks]
            for column in self._columns:
                column[row] = column[source]
            self.num_speculating += bool(self.speculative[row])
        if parent in self.waiting_ids:
            self.waiting_ids[first] = self.waiting_ids[parent]
        if parent in self.digests:
            self.digests[first] = self.digests[parent].copy()

    def drop(self, first: int) -> None:
        """End a sequence and make its handles stale. O(its blocks)."""
        for row in self.rows_of(first):
            self.num_speculating -= bool(self.speculative[row])
            self.tables.release(row)
            for column in self._columns:
                column[row] = 0
            self.prompts[row] = self.nodes[row] = None
        self.waiting_ids.pop(first, None)
        self.digests.pop(first, None)
        self.generations[first] += 1
        self.free_rows.append(first)
        self.epoch += 1

    def replace(self, rows: Int64, old: Int32, new: Int32) -> None:
        """Replace table entries `old` of `rows` by `new`. O(blocks of `rows`)."""
        if not len(old) or not len(rows):
            return
        order = np.argsort(old)
        keys, values = old[order], new[order]
        places, _ = self.places(rows)
        entries = self.tables.data[places]
        at = np.minimum(np.searchsorted(keys, entries), len(keys) - 1)
        self.tables.data[places] = np.where(keys[at] == entries, values[at], entries)

    def set_speculative(self, rows: Int64, speculative: int | Int64) -> None:
        """Set how many trailing tokens of the rows are speculative. O(rows named)."""
        before = np.count_nonzero(self.speculative[rows])
        self.speculative[rows] = speculative
        self.num_speculating += int(np.count_nonzero(self.speculative[rows]) - before)

    # ---------------------------------------------------------------- reading

    def length(self, row: int) -> int:
        """Return the tokens in a sequence, those without slots included. O(1)."""
        return int(self.lengths[row]) + int(self.waiting[row])

    def lengths_of(self, sequences: Int64) -> Int64:
        """Return the tokens in each sequence, those without slots included. O(n)."""
        lengths = self.lengths[sequences]
        return lengths + self.waiting[sequences] if self.waiting_ids else lengths

    def num_blocks(self, row: int) -> int:
        """Return the length of the row's table, dropped blocks included. O(1)."""
        return -(-int(self.lengths[row]) // self.block_size)

    def blocks(self, row: int) -> Int32:
        """Return the row's table, a view: device blocks, -1, or -2 - h for host block h."""
        return self.tables.part(row, 0, self.num_blocks(row))

    def places(self, rows: Int64) -> tuple[Int64, Int64]:
        """Return where in `tables.data` the rows' blocks are, and their columns. O(blocks)."""
        return self.tables.places(rows, -(-self.lengths[rows] // self.block_size))

    def device_blocks(self, row: int) -> Int32:
        """Return the row's device blocks."""
        blocks = self.blocks(row)
        if self.first_blocks[row] or self.swapped[row]:
            return blocks[blocks >= 0]
        return blocks

    def host_blocks(self, row: int) -> Int32:
        """Return the row's host blocks."""
        if not self.swapped[row]:
            return np.empty(0, np.int32)
        blocks = self.blocks(row)
        return np.asarray(-2 - blocks[blocks < NO_BLOCK], np.int32)

    def prompt(self, row: int) -> Prompt:
        """Return the key parts of a live row."""
        prompt = self.prompts[row]
        assert prompt is not None, f"row {row} is not live"
        return prompt

    def live_rows(self) -> list[int]:
        """Return the rows in use. O(rows)."""
        return [row for row, prompt in enumerate(self.prompts) if prompt is not None]

    def slots(self, rows: Int64, starts: Int64, counts: Int64) -> Int64:
        """Return the flat slots of `counts` tokens from `starts` on, row by row. O(tokens)."""
        owners = np.repeat(np.arange(len(rows)), counts)
        positions = starts[owners] + ranks(counts)
        places = self.tables.starts[rows][owners] + positions // self.block_size
        blocks = self.tables.data[places]
        slots: Int64 = blocks.astype(np.int64) * self.block_size + positions % self.block_size
        return slots

    def fill(self, num_blocks: int, counts: Int64) -> Int64:
        """Return how many slots of each block the first `counts` tokens fill. O(blocks)."""
        filled = np.zeros(num_blocks, np.int64)
        for row in self.live_rows():
            blocks = self.blocks(row)
            ends = counts[row] - np.arange(len(blocks)) * self.block_size
            here = blocks >= 0
            ends = np.minimum(ends[here], self.block_size)
            filled[blocks[here]] = np.maximum(filled[blocks[here]], ends)
        return filled

    def check(self) -> None:
        """Raise `BrokenInvariant` unless each row is consistent. O(blocks)."""
        live = self.live_rows()
        idle = np.setdiff1d(np.arange(len(self.prompts)), live)
        if sorted(self.members(np.array(self.free_rows, np.int64))) != idle.tolist():
            raise BrokenInvariant("sequences: the free rows differ from the rows without a prompt")
        self.tables.check("sequences", -(-self.lengths // self.block_size))
        for row in live:
            first = int(self.first_blocks[row])
            if np.any(self.blocks(row)[:first] != NO_BLOCK):
                raise BrokenInvariant(f"sequence {row}: a block precedes `first_blocks`")
            if np.any(self.blocks(row)[first:] == NO_BLOCK):
                raise BrokenInvariant(f"sequence {row}: its table lacks a block")
            self._check_row(row)
        if any(getattr(self, name)[idle].any() for name in self.COLUMNS if name != "generations"):
            raise BrokenInvariant("sequences: a free row is not empty")
        speculating = np.count_nonzero(self.speculative)
        if speculating != self.num_speculating:
            raise BrokenInvariant(
                f"sequences: num_speculating {self.num_speculating}, but {speculating} rows have "
                "speculative tokens"
            )

    def _check_row(self, row: int) -> None:
        length, known = int(self.lengths[row]), int(self.known[row])
        settled, committed = length - int(self.speculative[row]), int(self.committed[row])
        lacks_front = bool(self.first_blocks[row]) and not self.is_keyed(row)
        if self.first_blocks[row] > self.num_blocks(row) or (lacks_front and known):
            raise BrokenInvariant(f"sequence {row}: token ids are known, but the front was dropped")
        if not 0 <= settled <= length:
            raise BrokenInvariant(
                f"sequence {row}: {self.speculative[row]} of {length} tokens are speculative"
            )
        if not 0 <= committed <= settled:
            raise BrokenInvariant(f"sequence {row}: {committed} of {settled} tokens committed")
        if not 0 <= known <= length:
            raise BrokenInvariant(f"sequence {row}: knows {known} of {length} tokens")
        if np.any(self.blocks(row) < NO_BLOCK) and not self.swapped[row]:
            raise BrokenInvariant(f"sequence {row}: it has host blocks, but is not swapped")
        if self.published[row] * self.block_size > min(committed, known):
            raise BrokenInvariant(f"sequence {row}: published beyond its committed, known tokens")


Target = SequenceHandle | Batch | Iterable[SequenceHandle]


def listed(target: Target) -> SequenceHandle | Batch | list[SequenceHandle]:
    """Return the target as a handle, a batch or a list. Reads an iterable once. O(n)."""
    if isinstance(target, (SequenceHandle, Batch)):
        return target
    if not isinstance(target, Iterable):
        kind = type(target).__name__
        raise TypeError(f"sequences: expected a SequenceHandle, several, or a batch, got {kind}")
    return list(target)
