"""Block tables, lengths and generations of all sequences: a structure of arrays.

    row        0      1      2          a handle names (row, generation); `free` raises the row's
    lengths   33     16      -          generation, so every old handle of the row is refused
    tables    4 7 2  7       -          block ids in logical order; -1 where there is none

One decode step for a whole batch is then a handful of vector operations, whatever its size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvpager.errors import BrokenInvariant, StaleSequence
from kvpager.plan import NO_COPIES
from kvpager.prefix import Node, Root

if TYPE_CHECKING:
    from kvpager.manager import BlockManager

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


class Sequence:
    """A handle to one block table. Made by `BlockManager.allocate` and `fork`, ended by `free`.

    `num_cached_tokens`: how many leading tokens have their KV in the pool already.
    `copies`: int32 [n, 2], (source, destination) blocks to copy before anything is written,
    because the prompt matched part of a block; usually empty.
    """

    __slots__ = ("_generation", "_manager", "_row", "copies", "num_cached_tokens")

    def __init__(
        self,
        manager: BlockManager,
        row: int,
        generation: int,
        num_cached_tokens: int = 0,
        copies: Int32 = NO_COPIES,
    ) -> None:
        self._manager = manager
        self._row = row
        self._generation = generation
        self.num_cached_tokens = num_cached_tokens
        self.copies = copies

    def __len__(self) -> int:
        """Tokens in the sequence. O(1). Raises `StaleSequence` after `free`."""
        return self._manager.length(self)

    def __bool__(self) -> bool:
        """A handle is true, however short its sequence."""
        return True

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

    __slots__ = ("generations", "manager", "rows")

    def __init__(self, manager: BlockManager, rows: Int64, generations: Int64) -> None:
        self.manager = manager
        self.rows = rows
        self.generations = generations
        rows.flags.writeable = generations.flags.writeable = False

    def __len__(self) -> int:
        return len(self.rows)


class Content:
    """What a sequence's tokens are, as far as they are known, and how much is published."""

    __slots__ = ("buffer", "known", "namespace", "node", "publishable")

    def __init__(self, namespace: str | None) -> None:
        self.namespace = namespace
        self.buffer: Int32 = np.empty(0, np.int32)
        self.known = 0  # leading tokens whose ids are known
        self.node: Node | Root | None = None  # the last published block; its depth says how many
        self.publishable = True

    @property
    def num_published(self) -> int:
        """Leading blocks that the prefix index knows. O(1)."""
        return 0 if self.node is None else self.node.depth

    @property
    def tokens(self) -> Int32:
        """The known token ids. O(1), a view."""
        return self.buffer[: self.known]

    def extend(self, ids: Int32) -> None:
        """Add `ids` after the known tokens. Amortised O(ids)."""
        end = self.known + len(ids)
        if end > len(self.buffer):
            grown = np.empty(max(end, 2 * len(self.buffer)), np.int32)
            grown[: self.known] = self.tokens
            self.buffer = grown
        self.buffer[self.known : end] = ids
        self.known = end

    def truncate(self, length: int, num_full_blocks: int) -> None:
        """Forget all tokens from `length` on. O(blocks forgotten)."""
        self.known = min(self.known, length)
        while isinstance(self.node, Node) and self.node.depth > num_full_blocks:
            self.node = self.node.parent

    def copy(self) -> Content:
        """The same content for a forked sequence. O(tokens)."""
        twin = Content(self.namespace)
        twin.buffer = self.tokens.copy()
        twin.known = self.known
        twin.node = self.node
        twin.publishable = self.publishable
        return twin


class SequenceTable:
    """The arrays. Rows are reused; generations are never."""

    def __init__(self) -> None:
        self.tables: Int32 = np.full((0, 4), -1, np.int32)
        self.lengths: Int64 = np.zeros(0, np.int64)
        self.committed: Int64 = np.zeros(0, np.int64)  # leading tokens whose KV is written
        self.num_blocks: Int64 = np.zeros(0, np.int64)
        self.first_blocks: Int64 = np.zeros(0, np.int64)  # blocks before it were given back
        self.generations: Int64 = np.zeros(0, np.int64)
        self.contents: list[Content | None] = []
        self.host_blocks: dict[int, Int32] = {}  # of swapped rows; -1 where the device kept it
        self._free_rows: list[int] = []

    def __len__(self) -> int:
        return len(self.contents) - len(self._free_rows)

    def add(self, content: Content) -> int:
        """A fresh, empty row. Amortised O(1)."""
        if not self._free_rows:
            self._add_rows(max(8, len(self.contents)))
        row = self._free_rows.pop()
        self.contents[row] = content
        return row

    def drop(self, row: int) -> None:
        """End the row's life: its handles are stale from now on. O(row's blocks)."""
        self.generations[row] += 1
        self.tables[row, : self.num_blocks[row]] = -1
        self.lengths[row] = self.committed[row] = 0
        self.num_blocks[row] = self.first_blocks[row] = 0
        self.contents[row] = None
        self.host_blocks.pop(row, None)
        self._free_rows.append(row)

    def content(self, row: int) -> Content:
        """The content of a live row."""
        content = self.contents[row]
        assert content is not None, f"row {row} is not live"
        return content

    def live_rows(self) -> Iterator[int]:
        """The rows in use."""
        return (row for row, content in enumerate(self.contents) if content is not None)

    def blocks(self, row: int) -> Int32:
        """The row's blocks in logical order, a view; -1 where one is not on the device."""
        return self.tables[row, : self.num_blocks[row]]

    def device_blocks(self, row: int) -> Int32:
        """The row's blocks that are on the device, a copy."""
        blocks = self.blocks(row)
        return blocks[blocks >= 0]

    def widen(self, num_columns: int) -> None:
        """Make room for tables of `num_columns` blocks. O(rows * width) when it has to grow."""
        rows, width = self.tables.shape
        if num_columns > width:
            wider = np.full((rows, max(num_columns, 2 * width)), -1, np.int32)
            wider[:, :width] = self.tables
            self.tables = wider

    def check(self) -> None:
        """Raise `BrokenInvariant` unless rows not in use are empty, and counted once. O(rows)."""
        idle = [row for row, content in enumerate(self.contents) if content is None]
        if sorted(self._free_rows) != idle:
            raise BrokenInvariant("sequences: the free rows are not those without content")
        stray = self.tables >= 0
        for row in self.live_rows():
            stray[row, : self.num_blocks[row]] = False
        if stray.any() or set(self.host_blocks) - set(self.live_rows()):
            raise BrokenInvariant("sequences: a block stands where no sequence has one")

    def _add_rows(self, count: int) -> None:
        first = len(self.contents)
        empty = np.full((count, self.tables.shape[1]), -1, np.int32)
        self.tables = np.concatenate([self.tables, empty])
        zeros = np.zeros(count, np.int64)
        for name in ("lengths", "committed", "num_blocks", "first_blocks", "generations"):
            setattr(self, name, np.concatenate([getattr(self, name), zeros]))
        self.contents.extend([None] * count)
        self._free_rows.extend(range(first + count - 1, first - 1, -1))
