"""Block tables, lengths and generations of all sequences: a structure of arrays.

    row        0      1      2          a handle names (row, generation); `free` raises the row's
    lengths   33     16      -          generation, so every old handle of the row is refused
    tables    4 7 2  7       -          block ids in logical order, see `block_tables.py`

In a table, -1 is "no block" and -2 - h is block h of the host. One decode step for a whole batch
is then a handful of vector operations, whatever its size. The order of a row's counts is always

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
    """An object that a handle belongs to: it knows how long the sequence is."""

    def length(self, sequence: SequenceHandle, /) -> int:
        """Return the tokens in the sequence. O(1). Raises `StaleSequence`."""


class SequenceHandle:
    """A handle to one block table. Made by `BlockManager.allocate` and `fork`, ended by `free`.

    `num_cached_tokens`: how many leading tokens have their KV in the pool already.
    `copies`: int32 [n, 2], (source, destination) blocks to copy before anything is written,
    because the prompt matched part of a block; usually empty. `ticket`: as in `Plan`.
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
        """A handle is true, however short its sequence."""
        return True

    def __eq__(self, other: object) -> bool:
        """Handles of the same sequence are equal. O(1)."""
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
        return f"<{self.name}: {state}>"

    @property
    def name(self) -> str:
        """How errors call it. O(1), takes no lock."""
        return f"Sequence {self._row}.{self._generation}"


class Batch:
    """Sequences that step together. Made once by `BlockManager.batch`, good for many steps."""

    __slots__ = ("epoch", "generations", "owner", "rows")

    def __init__(self, owner: Owner, rows: Int64, generations: Int64, epoch: int) -> None:
        self.owner = owner
        self.rows = rows
        self.generations = generations
        self.epoch = epoch  # the table's when it was last found live and on the device
        rows.flags.writeable = generations.flags.writeable = False

    def __len__(self) -> int:
        return len(self.rows)


class KeyParts(TypedDict, total=False):
    """What tells prefixes of equal tokens apart, as `BlockManager.allocate` takes it."""

    namespace: str | None
    lora: str | None
    mm_hashes: Iterable[tuple[int, int, bytes]]


class PrefixMatch(NamedTuple):
    """What the pool has of a prompt. Advisory: blocks may be evicted before `allocate`.

    `blocks` is int32 [n], read-only; the last one may agree in part. Of a `GroupedManager`,
    [groups, n], -1 behind a window.
    """

    num_tokens: int
    blocks: Int32

    @classmethod
    def of(cls, num_tokens: int, blocks: Int32) -> PrefixMatch:
        """Return a match whose `blocks` are read-only. O(1)."""
        blocks.flags.writeable = False
        return cls(num_tokens, blocks)


class Prompt(NamedTuple):
    """What a sequence is, apart from its tokens: whose it is, and what its placeholders show."""

    namespace: str | None = None
    lora: str | None = None
    mm_hashes: MMHashes = NO_MM_HASHES
    group: int = 0  # of layers, see `groups`

    @property
    def tree(self) -> TreeKey:
        """Which tree of the prefix index it belongs to."""
        if self.group:
            return self.namespace, self.lora, self.group
        return self.namespace, self.lora

    def up_to(self, length: int) -> Prompt:
        """Return the same with nothing shown behind token `length`: other tokens may come there."""
        cut = self.mm_hashes.up_to(length)
        return self if cut is self.mm_hashes else self._replace(mm_hashes=cut)


class SequenceTable:
    """The arrays. Rows are reused; generations are never."""

    COLUMNS: ClassVar[dict[str, type[np.generic]]] = {
        "lengths": np.int64,
        "known": np.int64,  # leading tokens whose ids are known
        "committed": np.int64,  # leading tokens whose KV is written
        "speculative": np.int64,  # trailing tokens that may be taken back, never published
        "published": np.int64,  # leading blocks that the prefix index offers
        "first_blocks": np.int64,  # blocks before it were given back
        "generations": np.int64,
        "swapped": np.bool_,
        "duplicates": np.bool_,  # the index offers somebody else's block in place of one of ours
        "keyed": np.bool_,  # each block is offered by itself: see `groups/windows.py`
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
    keyed: NDArray[np.bool_]

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.tables = Ragged(NO_BLOCK)
        for name, dtype in self.COLUMNS.items():
            setattr(self, name, np.zeros(0, dtype))
        self.list_columns()
        self.prompts: list[Prompt | None] = []
        self.nodes: list[Node | None] = []  # where `published` stands in the prefix index
        self.free_rows: list[int] = []
        self.epoch = 0  # changes whenever a handle goes stale or a sequence is swapped
        self.num_speculating = 0  # rows with speculative tokens

    def __len__(self) -> int:
        return len(self.prompts) - len(self.free_rows)

    # ---------------------------------------------------------------- rows come and go

    def reserve(self, num_columns: int, num_rows: int = 1) -> None:
        """Make room for `num_rows` more rows of `num_columns` blocks. Amortised O(blocks)."""
        missing = num_rows - len(self.free_rows)
        if missing > 0:
            self._add_rows(max(missing, 8, len(self.prompts)))
        if num_rows == 1:
            self.tables.reserve_row(self.free_rows[-1], num_columns)
        else:
            rows = np.array(self.free_rows[-num_rows:], np.int64)
            self.tables.reserve(rows, np.full(num_rows, num_columns))

    def _add_rows(self, more: int) -> None:
        rows = len(self.prompts)
        columns = {
            name: np.concatenate([getattr(self, name), np.zeros(more, dtype)])
            for name, dtype in self.COLUMNS.items()
        }
        self.tables.add_rows(rows + more - len(self.tables))
        vars(self).update(columns)  # all were made, so nothing can fail half-way
        self.list_columns()
        self.prompts.extend([None] * more)
        self.nodes.extend([None] * more)
        self.free_rows.extend(range(rows + more - 1, rows - 1, -1))

    def list_columns(self) -> None:
        """List the arrays in which a row begins with zeros, after they were replaced. O(1)."""
        # A memoryview writes one number in half the time that an array takes.
        names = [name for name in self.COLUMNS if name != "generations"]
        self._columns: list[memoryview[Any]] = [getattr(self, name).data for name in names]

    def add(
        self, prompt: Prompt, shared: Int32, fresh: Int32, length: int, committed: int, known: int
    ) -> None:
        """Begin the next free row, one reserved, with these blocks. O(blocks)."""
        row = self.free_rows.pop()
        self.prompts[row] = prompt
        self.tables.trim(row, len(shared) + len(fresh))  # a call that was refused may have had more
        table = self.tables.row(row)
        table[: len(shared)] = shared
        table[len(shared) : len(shared) + len(fresh)] = fresh
        self.lengths[row] = length
        self.committed[row] = committed
        self.known[row] = known

    def fork(self, parent: int) -> int:
        """A second row with the same everything; there is one reserved. O(blocks)."""
        row = self.free_rows.pop()
        self.prompts[row], self.nodes[row] = self.prompts[parent], self.nodes[parent]
        num_blocks = self.num_blocks(parent)
        self.tables.row(row)[:num_blocks] = self.tables.row(parent)[:num_blocks]
        for column in self._columns:
            column[row] = column[parent]
        self.num_speculating += bool(self.speculative[row])
        return row

    def drop(self, row: int) -> None:
        """End the row's life: its handles are stale from now on. O(row's blocks)."""
        self.num_speculating -= bool(self.speculative[row])
        self.tables.release(row)
        for column in self._columns:
            column[row] = 0
        self.generations[row] += 1
        self.prompts[row] = self.nodes[row] = None
        self.free_rows.append(row)
        self.epoch += 1

    def replace(self, rows: Int64, old: Int32, new: Int32) -> None:
        """Write table entry `new` wherever `rows` have `old`. O(blocks of `rows`)."""
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

    def num_blocks(self, row: int) -> int:
        """Blocks of the row's table, those given back included. O(1)."""
        return -(-int(self.lengths[row]) // self.block_size)

    def blocks(self, row: int) -> Int32:
        """The row's table, a view: device blocks, -1, or -2 - h for host block h."""
        return self.tables.part(row, 0, self.num_blocks(row))

    def places(self, rows: Int64) -> tuple[Int64, Int64]:
        """Return where in `tables.data` the rows' blocks are, and their columns. O(blocks)."""
        return self.tables.places(rows, -(-self.lengths[rows] // self.block_size))

    def device_blocks(self, row: int) -> Int32:
        """The row's blocks that are on the device."""
        blocks = self.blocks(row)
        if self.first_blocks[row] or self.swapped[row]:
            return blocks[blocks >= 0]
        return blocks

    def host_blocks(self, row: int) -> Int32:
        """The row's blocks that are on the host, by their ids there."""
        if not self.swapped[row]:
            return np.empty(0, np.int32)
        blocks = self.blocks(row)
        return np.asarray(-2 - blocks[blocks < NO_BLOCK], np.int32)

    def prompt(self, row: int) -> Prompt:
        """Whose row it is."""
        prompt = self.prompts[row]
        assert prompt is not None, f"row {row} is not live"
        return prompt

    def live_rows(self) -> list[int]:
        """The rows in use. O(rows)."""
        return [row for row, prompt in enumerate(self.prompts) if prompt is not None]

    def slots(self, rows: Int64, starts: Int64, counts: Int64) -> Int64:
        """Flat slots of `counts` tokens from `starts` on, row by row. O(tokens)."""
        owners = np.repeat(np.arange(len(rows)), counts)
        positions = starts[owners] + ranks(counts)
        places = self.tables.starts[rows][owners] + positions // self.block_size
        blocks = self.tables.data[places]
        slots: Int64 = blocks.astype(np.int64) * self.block_size + positions % self.block_size
        return slots

    def fill(self, num_blocks: int, counts: Int64) -> Int64:
        """How many slots of each block the first `counts` tokens of the rows take. O(blocks)."""
        filled = np.zeros(num_blocks, np.int64)
        for row in self.live_rows():
            blocks = self.blocks(row)
            ends = counts[row] - np.arange(len(blocks)) * self.block_size
            here = blocks >= 0
            ends = np.minimum(ends[here], self.block_size)
            filled[blocks[here]] = np.maximum(filled[blocks[here]], ends)
        return filled

    def check(self) -> None:
        """Raise `BrokenInvariant` unless each row's own books are right. O(blocks)."""
        live = self.live_rows()
        idle = np.setdiff1d(np.arange(len(self.prompts)), live)
        if sorted(self.free_rows) != idle.tolist():
            raise BrokenInvariant("sequences: the free rows are not those without a prompt")
        self.tables.check("sequences", -(-self.lengths // self.block_size))
        for row in live:
            first = int(self.first_blocks[row])
            if np.any(self.blocks(row)[:first] != NO_BLOCK):
                raise BrokenInvariant(f"sequence {row}: a block stands before its first one")
            if np.any(self.blocks(row)[first:] == NO_BLOCK):
                raise BrokenInvariant(f"sequence {row}: a block is missing")
            self._check_row(row)
        if any(getattr(self, name)[idle].any() for name in self.COLUMNS if name != "generations"):
            raise BrokenInvariant("sequences: a row that is not in use is not empty")
        speculating = np.count_nonzero(self.speculative)
        if speculating != self.num_speculating:
            raise BrokenInvariant(
                f"sequences: num_speculating {self.num_speculating}, but {speculating} rows have "
                "speculative tokens"
            )

    def _check_row(self, row: int) -> None:
        length, known = int(self.lengths[row]), int(self.known[row])
        settled, committed = length - int(self.speculative[row]), int(self.committed[row])
        lacks_front = bool(self.first_blocks[row]) and not self.keyed[row]
        if self.first_blocks[row] > self.num_blocks(row) or (lacks_front and known):
            raise BrokenInvariant(f"sequence {row}: offers what lacks its front")
        if not 0 <= settled <= length:
            raise BrokenInvariant(
                f"sequence {row}: {self.speculative[row]} of {length} tokens are speculative"
            )
        if not 0 <= committed <= settled:
            raise BrokenInvariant(f"sequence {row}: {committed} of {settled} tokens committed")
        if not 0 <= known <= length:
            raise BrokenInvariant(f"sequence {row}: knows {known} of {length} tokens")
        if np.any(self.blocks(row) < NO_BLOCK) and not self.swapped[row]:
            raise BrokenInvariant(f"sequence {row}: on the host, and not known as swapped")
        if self.published[row] * self.block_size > min(committed, known):
            raise BrokenInvariant(f"sequence {row}: published beyond what is committed and known")


Target = SequenceHandle | Batch | Iterable[SequenceHandle]


def listed(target: Target) -> SequenceHandle | Batch | list[SequenceHandle]:
    """The sequences named, once: whatever an iterable does, it does before anything is decided."""
    if isinstance(target, (SequenceHandle, Batch)):
        return target
    if not isinstance(target, Iterable):
        kind = type(target).__name__
        raise TypeError(f"expected a SequenceHandle, several of them, or a batch, got {kind}")
    return list(target)
