"""A miniature data plane: one integer for every token slot, on the device and on the host.

A token's integer represents its key and value. Like them it depends on the namespace and on all
tokens up to it. A prefix that was reused wrongly therefore reads back as wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from zlib import crc32

import numpy as np
from numpy.typing import ArrayLike

from kvpager.plans import CopyPlan, Int32
from kvpager.testing.histories import Violation

UNWRITTEN, BORROWED = -9, -7
_MULTIPLIER = 6364136223846793005  # Knuth's, for a 64-bit linear congruential step
_MASK = (1 << 62) - 1


class Content:
    """A sequence's tokens and the integers that represent their keys and values.

    >>> content = Content("acme", [1, 2])
    >>> content.extend([3])
    >>> content.values == Content("acme", [1, 2, 3]).values
    True
    >>> content.values[0] == Content("other", [1]).values[0]
    False
    """

    __slots__ = ("namespace", "tokens", "values")

    def __init__(self, namespace: str | None = None, tokens: Iterable[int] = ()) -> None:
        self.namespace = namespace
        self.tokens: list[int] = []
        self.values: list[int] = []
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens. O(new tokens)."""
        value = self.values[-1] if self.values else _start(self.namespace)
        for token in tokens:
            value = ((value ^ (token + 1)) * _MULTIPLIER + 1442695040888963407) & _MASK
            self.tokens.append(token)
            self.values.append(value)

    def truncate(self, length: int) -> None:
        """Drop all tokens from `length` on. O(dropped tokens)."""
        del self.tokens[length:]
        del self.values[length:]

    def copy(self) -> Content:
        """Return an independent copy. O(tokens)."""
        other = Content(self.namespace)
        other.tokens = self.tokens.copy()
        other.values = self.values.copy()
        return other


def _start(namespace: str | None) -> int:
    # None differs from every string, also from the empty one. `hash` would differ between
    # processes, and a seed must give the same run in all of them.
    return 0 if namespace is None else crc32(namespace.encode()) + 1


class TokenMemory:
    """Token slots of two tiers, `[blocks, block_size]` each.

    Args:
        num_blocks: blocks on the device.
        block_size: token slots of a block.
        num_host_blocks: blocks on the host.
    """

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self.block_size = block_size
        self.tiers = {
            "device": np.full((num_blocks, block_size), UNWRITTEN, np.int64),
            "host": np.full((num_host_blocks, block_size), UNWRITTEN, np.int64),
        }

    def copy(self, pairs: ArrayLike, source: str = "device", destination: str = "device") -> None:
        """Copy blocks, (source, destination) each. Reads all blocks before it writes any.

        O(pairs * block_size).
        """
        if len(pairs):  # type: ignore[arg-type]
            moves = np.asarray(pairs)
            self.tiers[destination][moves[:, 1]] = self.tiers[source][moves[:, 0]]

    def apply(self, plan: CopyPlan) -> None:
        """Apply a plan between tiers. O(pairs * block_size)."""
        self.copy(plan.copies, plan.source, plan.destination)

    def write(self, slots: ArrayLike, values: list[int]) -> None:
        """Write into flat device slots, `block * block_size + offset` each. O(slots)."""
        if values:
            self.tiers["device"].reshape(-1)[np.asarray(slots, np.intp)] = values

    def write_at(self, table: ArrayLike, first: int, values: list[int]) -> None:
        """Write values for the tokens from `first` on, through a block table. O(values)."""
        if values:
            positions = np.arange(first, first + len(values))
            blocks = np.asarray(table)[positions // self.block_size]
            self.tiers["device"][blocks, positions % self.block_size] = values

    def read(self, table: ArrayLike, length: int, start: int = 0) -> list[int]:
        """Return the values in the slots of tokens `start` to `length`. O(tokens).

        Skips the whole blocks before `start`: their table entries may be -1.
        """
        first = start // self.block_size
        end = -(-length // self.block_size)
        blocks = np.asarray(table, np.intp)[first:end]
        slots: list[int] = self.tiers["device"].take(blocks, axis=0).ravel().tolist()
        offset = first * self.block_size
        return slots[start - offset : length - offset]

    def mismatch(self, table: ArrayLike, values: list[int], start: int = 0) -> int | None:
        """Return the first token from `start` on that does not read back, or None. O(tokens)."""
        held = self.read(table, len(values), start)
        expected = values[start:] if start else values
        if held == expected:
            return None
        if len(held) != len(expected):
            return start + len(held)  # the table ends too early
        return start + next(at for at, value in enumerate(held) if value != expected[at])

    def resize(self, num_blocks: int) -> None:
        """Resize the device tier to `num_blocks` blocks. O(num_blocks * block_size)."""
        before = self.tiers["device"][:num_blocks]
        self.tiers["device"] = np.full((num_blocks, self.block_size), UNWRITTEN, np.int64)
        self.tiers["device"][: len(before)] = before


MakeMemory = Callable[[int, int, int], TokenMemory]


class HostBorrower:
    """A borrower of host blocks: it marks them, and notices when another user writes to one.

    `num_busy`: borrowed blocks that it cannot spare.
    """

    def __init__(self, memory: TokenMemory) -> None:
        self.blocks: list[int] = []
        self.num_busy = 0
        self._host = memory.tiers["host"]

    @property
    def num_spare(self) -> int:
        """Blocks that `give_back` would return. O(1)."""
        return max(len(self.blocks) - self.num_busy, 0)

    def borrow(self, blocks: Int32) -> None:
        """Mark these blocks. O(borrowed blocks). Raises `Violation` for a borrowed one."""
        self.blocks += blocks.tolist()
        if len(set(self.blocks)) < len(self.blocks):
            raise Violation("handed out once", f"a block was lent twice: {self.blocks}")
        self._host[blocks] = BORROWED

    def give_back(self, count: int) -> list[int]:
        """Return `count` blocks, the first ones first; none if it spares fewer. O(blocks)."""
        self.check()
        if count > self.num_spare:
            return []
        given, self.blocks = self.blocks[:count], self.blocks[count:]
        return given

    def check(self) -> None:
        """Raise `Violation` if another user wrote to a borrowed block. O(blocks * block_size)."""
        written = (self._host[self.blocks] != BORROWED).any(axis=1)
        if written.any():
            block = self.blocks[int(written.argmax())]
            raise Violation("lent blocks stay unwritten", f"a copy wrote to host block {block}")


def misplaced(contents: Iterable[Content], tables: Iterable[list[int]], size: int) -> int | None:
    """Return a block that two tables hold at unequal positions or for other tokens. O(tokens)."""
    # A token's value depends on all tokens before it, so equal values are equal prefixes.
    holder: dict[int, tuple[int, list[int]]] = {}
    for content, table in zip(contents, tables, strict=True):
        for column, block in enumerate(table):
            values = content.values[column * size : (column + 1) * size]
            place, others = holder.setdefault(block, (column, values))
            common = min(len(values), len(others))
            if block >= 0 and (place != column or values[:common] != others[:common]):
                return block
    return None
