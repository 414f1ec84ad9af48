"""A harness that drives a block manager through a `ManagerAdapter` and checks the properties.

It keeps lists of the written tokens and simulates memory with one integer per token slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from kvpager.testing.histories import Ended, Operation, Violation
from kvpager.testing.memory import Content, TokenMemory, misplaced
from kvpager.testing.properties import PROPERTIES, ManagerAdapter, is_supported


@dataclass(eq=False)
class LiveSequence:
    """A live sequence: its handle and its expected content."""

    handle: Any
    content: Content
    is_swapped: bool = False


def copies_of(call: Callable[..., Iterable[tuple[int, int]]], *arguments: Any) -> list[Any]:
    """Return the copies that a call yields. O(copies)."""
    return list(call(*arguments))


class AdapterHarness:
    """Drives a manager through its adapter, and checks the properties in `watch`.

    A violated property in `watch` raises `Violation`. Any other violation after which the history
    cannot continue raises `Ended`.
    """

    def __init__(self, adapter: ManagerAdapter, watch: Iterable[str] = PROPERTIES) -> None:
        self.adapter: Any = adapter  # it may lack optional methods
        self.watch = frozenset(name for name in watch if is_supported(name, adapter))
        self.rows: list[LiveSequence] = []
        self.freed: list[Any] = []
        self.written: set[int] = set()
        self.committed: set[int] = set()
        self.size = adapter.block_size
        num_ids = getattr(adapter, "num_block_ids", adapter.num_blocks)
        num_host_blocks = getattr(adapter, "num_host_blocks", 0)
        self.memory = TokenMemory(num_ids, adapter.block_size, num_host_blocks)

    # ---------------------------------------------------------------- the Harness protocol

    def apply(self, operation: Operation, arguments: tuple[Any, ...]) -> None:
        """Run one operation, then check everything. O(everything)."""
        operation.run(self, arguments)
        self.inspect()

    def finish(self) -> None:
        """Free all sequences, then check that all blocks are available. O(everything)."""
        while self.rows:
            self.attempt(0, self.adapter.free, self.rows.pop().handle)
        self.inspect()

    # ---------------------------------------------------------------- for operations

    def report(self, name: str, message: str) -> None:
        """Raise `Violation` if the violated property `name` is watched. O(1)."""
        if name in self.watch:
            raise Violation(name, message)

    def pick(self, number: int, kind: str) -> LiveSequence | None:
        """Return a "live" or "resident" sequence, counted from the newest. O(sequences)."""
        rows = self.resident() if kind == "resident" else self.rows
        return rows[-1 - number % len(rows)] if rows else None

    def resident(self) -> list[LiveSequence]:
        """Return the sequences on the device. O(sequences)."""
        return [row for row in self.rows if not row.is_swapped]

    def table(self, row: LiveSequence) -> list[int]:
        """Return a sequence's blocks as ints. O(blocks)."""
        blocks = self.call("served_when_it_fits", self.adapter.block_table, row.handle)
        return [int(block) for block in blocks]

    def call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of a call. An error violates the property `name`."""
        try:
            return function(*arguments)
        except Exception as error:
            self.report(name, f"raised {error!r}")
            raise Ended from error

    def num_free(self) -> int:
        """Return the available blocks that the manager reports."""
        return int(self.call("blocks_add_up", self.adapter.num_free_blocks))

    def snapshot(self) -> object:
        """Return the visible state. O(held blocks)."""
        return self.num_free(), [self.table(row) for row in self.resident()]

    def copy_for(self, handle: Any) -> None:
        """Apply the block copies that a new sequence requires. O(copies)."""
        if hasattr(self.adapter, "copies"):
            self.copy(self.call("reads_back", copies_of, self.adapter.copies, handle))

    def copy(
        self, pairs: list[tuple[int, int]], source: str = "device", to: str = "device"
    ) -> None:
        """Apply block copies that the manager requires. O(copies)."""
        tiers = self.memory.tiers
        for one, other in pairs:
            if not (0 <= one < len(tiers[source]) and 0 <= other < len(tiers[to])):
                self.report("reads_back", f"a copy from {one} to {other}: no such block")
                raise Ended
        self.memory.copy(pairs, source, to)

    def attempt(self, most: int, function: Callable[..., Any], *arguments: Any) -> tuple[bool, Any]:
        """Make a valid call that takes at most `most` blocks; return (was served, result)."""
        free = self.num_free()
        # A refusal despite enough free blocks always violates a property.
        before = self.snapshot() if most > free else None
        try:
            return True, function(*arguments)
        except self.adapter.out_of_blocks as error:
            if before is None:
                self.report("served_when_it_fits", f"{error!r}, though {most} of {free} will do")
            elif (after := self.snapshot()) != before:
                message = f"{error!r} left (free, tables) {after}, before it was {before}"
                self.report("refusal_changes_nothing", message)
            return False, None
        except Exception as error:
            name = "full_pool_refused" if most > free else "served_when_it_fits"
            self.report(name, f"raised {error!r}")
            raise Ended from error

    def attempt_empty(self, function: Callable[..., Any], *arguments: Any) -> tuple[bool, Any]:
        """Make a call without tokens, which may raise any error; return (was served, result)."""
        before = self.snapshot()
        try:
            return True, function(*arguments)
        except Exception as error:
            if self.snapshot() != before:
                self.report("refusal_changes_nothing", f"{error!r} for no tokens changed something")
            return False, None

    def must_refuse(
        self, name: str, what: str, function: Callable[..., Any], *arguments: Any
    ) -> None:
        """Make a call that every manager must refuse."""
        before = self.snapshot()
        try:
            function(*arguments)
        except Exception:
            if self.snapshot() != before:
                self.report(name, f"{what} was refused, but changed something")
            return
        self.report(name, f"{what} was accepted")
        raise Ended

    def write(self, row: LiveSequence, first: int) -> None:
        """Write the tokens from `first` on, as the model's forward pass would. O(tokens)."""
        values = row.content.values[first:]
        if not values:
            return
        table = self.table(row)
        touched = table[first // self.size : -(-len(row.content) // self.size)]
        num_ids = len(self.memory.tiers["device"])
        exist = all(0 <= block < num_ids for block in touched)
        if len(table) * self.size < len(row.content) or not exist:
            self.report("reads_back", f"{len(row.content)} tokens, but the table is {table}")
            raise Ended
        for other in self.resident():
            both = set(touched) & set(self.table(other)) if other is not row else set()
            if both:
                message = f"block {min(both)} is written, and another table holds it"
                self.report("shared_not_written", message)
        self.memory.write_at(table, first, values)
        self.written.update(values)

    # ---------------------------------------------------------------- what must always hold

    def inspect(self) -> None:
        """Check the visible state. O(everything)."""
        resident = self.resident()
        tables = [self.table(row) for row in resident]
        if "reads_back" in self.watch:
            for row, table in zip(resident, tables, strict=True):
                self._check_content(row, table)
        if "handed_out_once" in self.watch:
            self._check_sharing(resident, tables)
        free, held = self.num_free(), {b for table in tables for b in table}
        total = free + len(held - {-1})
        # The adapter does not show which blocks of a swapped sequence stay on the device.
        all_seen = len(resident) == len(self.rows)
        missing = self.adapter.num_blocks - total
        if missing < 0 or (all_seen and missing):
            message = f"{free} free + {total - free} held is not {self.adapter.num_blocks}"
            self.report("blocks_add_up", message)
        check = getattr(self.adapter, "check", None)
        if check is not None and "check_passes" in self.watch:
            self.call("check_passes", check)

    def _check_content(self, row: LiveSequence, table: list[int]) -> None:
        length = len(row.content)
        num_ids = len(self.memory.tiers["device"])
        used = table[: -(-length // self.size)]
        fits = len(table) * self.size >= length and all(0 <= b < num_ids for b in used)
        wrong = self.memory.mismatch(table, row.content.values) if fits else 0
        if wrong is not None:
            where = f"token {wrong} of {row.content.tokens} in blocks {table}"
            self.report("reads_back", f"{where} is not what was written")

    def _check_sharing(self, rows: list[LiveSequence], tables: list[list[int]]) -> None:
        """Check that blocks are shared only at equal positions and for equal tokens."""
        for table in tables:
            if len(set(table)) != len(table):
                self.report("handed_out_once", f"a block stands twice in the table {table}")
        block = misplaced((row.content for row in rows), tables, self.size)
        if block is not None:
            message = f"two tables hold block {block} for different tokens"
            self.report("handed_out_once", message)
