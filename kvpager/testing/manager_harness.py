"""A harness that drives a kvpager manager, with plain lists of all tokens written through it.

operations ──▶ ManagerHarness ──▶ manager      applies every plan to a `TokenMemory`, writes every
                     │                         new token, and reads the touched sequences back
                     └──────▶ TokenMemory      through their block tables
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from kvpager.blocks.manager import BlockManager
from kvpager.errors import OutOfBlocks
from kvpager.testing.histories import Operation, Violation
from kvpager.testing.memory import Content, HostBorrower, MakeMemory, TokenMemory, misplaced
from kvpager.testing.setups import Setup

_FREED_KEPT = 4


@dataclass(eq=False, slots=True)
class LiveSequence:
    """A live sequence: its handle and its expected state.

    `num_known`: leading tokens whose ids the manager knows. `start`: the first token not dropped.
    `is_plain`: it has no LoRA and no mm_hashes.
    """

    handle: Any
    content: Content
    num_known: int
    start: int = 0
    num_speculative: int = 0
    is_swapped: bool = False
    is_plain: bool = True

    def child(self, handle: Any) -> LiveSequence:
        """Return the expected state of a fork. O(tokens)."""
        return replace(self, handle=handle, content=self.content.copy())

    def truncate(self, length: int) -> None:
        """Expect the first `length` tokens alone. O(dropped tokens)."""
        self.content.truncate(length)
        self.num_known = min(self.num_known, length)
        self.start = min(self.start, length)


class ManagerHarness:
    """The manager and memory of a simulated history. Raises `Violation`.

    `counts`: the number of operations by name, of refused calls and of prefix hits.
    """

    def __init__(
        self,
        setup: Setup,
        manager: Any,
        *,
        check_every: int | None = None,
        make_memory: MakeMemory = TokenMemory,
    ) -> None:
        self.setup = setup
        self.manager = manager
        self.size = setup.block_size
        self.check_every = setup.check_every if check_every is None else check_every
        self.memory = make_memory(setup.num_blocks, self.size, setup.num_host_blocks)
        self.borrower = HostBorrower(self.memory)
        self.is_lending = False  # the manager knows the borrower
        self.rows: list[LiveSequence] = []
        self.pending: list[Any] = []  # plans of the manager not yet applied
        self.pins: list[int] = []
        self.num_reserved = int(setup.null_block and isinstance(manager, BlockManager))
        self.freed: list[Any] = []
        self.published: set[int] = set()
        self.touched: list[LiveSequence] = []
        self.counts: Counter[str] = Counter()
        self._num_done = 0
        self._fresh_token = 1_000_000

    # ---------------------------------------------------------------- the Harness protocol

    def apply(self, operation: Operation, arguments: tuple[Any, ...]) -> None:
        """Run an operation and check the sequences it touched; every k-th time check everything."""
        self.touched.clear()
        operation.run(self, arguments)
        self._num_done += 1
        self.counts[operation.name] += 1
        if self._num_done % self.check_every == 0:
            self.check_everything()
        else:
            for row in self.touched:
                self.check_row(row)

    def finish(self) -> None:
        """Free all sequences, then check that no block is held. O(everything)."""
        self.complete_all()
        self.check_everything()
        self.manager.free([row.handle for row in self.rows])
        while self.pins:
            self.manager.pins.unpin(self.pins.pop())
        self.rows = []
        if self.is_lending:
            self.lend()
            self._check_lent(self.setup.num_host_blocks)
        stats = self.manager.stats()
        num_blocks = stats.num_blocks - self.num_reserved
        self.require(
            "blocks add up",
            stats.num_free + stats.num_cached == num_blocks
            and stats.num_host_free == stats.num_host_blocks
            and stats.num_held == 0,
            f"with no sequence left: {stats}",
        )
        self.manager.clear_prefix_cache()
        self.manager.check()
        free = self.manager.stats().num_free
        self.require("blocks add up", free == num_blocks, f"{free} of {num_blocks} are free")

    # ---------------------------------------------------------------- for operations

    def require(self, property: str, holds: bool, message: str) -> None:
        """Raise `Violation` unless the property `holds`. O(1)."""
        if not holds:
            raise Violation(property, message)

    def pick(self, number: int, kind: str) -> LiveSequence | None:
        """Return a sequence of a kind, counted from the newest, or None. O(sequences).

        `kind`: "live", or of those on the device, "speculating" or "settled" (without speculative
        tokens). The sequence is checked after the operation.
        """
        rows = self.rows
        if kind != "live":
            speculates = kind == "speculating"
            on_device = [row for row in rows if not row.is_swapped]
            rows = [row for row in on_device if (row.num_speculative > 0) == speculates]
        if not rows:
            return None
        row = rows[-1 - number % len(rows)]
        self.touched.append(row)
        return row

    def fresh_tokens(self, count: int) -> list[int]:
        """Return unused ids, for tokens whose ids the manager does not know. O(count)."""
        self._fresh_token += count
        return list(range(self._fresh_token - count, self._fresh_token))

    def blocks(self, num_tokens: int) -> int:
        """Return the number of blocks of `num_tokens` tokens. O(1)."""
        return -(-num_tokens // self.size)

    def attempt(self, most: int, function: Any, *arguments: Any, **options: Any) -> Any:
        """Return the result of a call that takes at most `most` blocks, or None if refused."""
        manager = self.manager
        room = manager.num_free_blocks
        # A region may be too short for what all free blocks could hold.
        may_refuse = room < most or self.setup.quotas or hasattr(manager, "region_blocks")
        before = self.state() if may_refuse else None
        try:
            return function(*arguments, **options)
        except OutOfBlocks as error:
            spare = self.borrower.num_spare if error.tier == "host" else 0
            fits = before is None or error.need <= error.free + error.evictable + spare
            fits = fits and not (self.setup.quotas or self.setup.null_block or self.setup.fences)
            self.require("served when it fits", not fits, f"{error}; at most {most} are needed")
            after = self.state()
            self.require(
                "refusal changes nothing", after == before, f"{before} before, {after} after"
            )
            self.counts["refused"] += 1
            return None

    def state(self) -> object:
        """Return the state that a refused call must keep: all counts, or three in large pools.

        O(1), in small pools O(everything).
        """
        manager, num_lent = self.manager, len(self.borrower.blocks)
        if self.check_every == 1:
            return manager.stats(), num_lent
        return manager.num_free_blocks, manager.num_held_blocks, num_lent

    def write(self, row: LiveSequence, first: int, slots: Any) -> None:
        """Write the tokens from `first` on to `slots`. O(tokens)."""
        values = row.content.values[first:]
        if len(slots) != len(values):
            raise Violation("a slot for each token", f"{len(slots)} slots for {len(values)} tokens")
        self.memory.write(slots, values)

    def free(self, row: LiveSequence) -> None:
        """Free a sequence. O(blocks + sequences)."""
        self.manager.free(row.handle)
        self.forget(row)

    def commit(self, row: LiveSequence, length: int | None = None) -> None:
        """Commit a sequence's first tokens; None: all. O(tokens)."""
        self.publish(row, len(row.content) if length is None else length)
        self.manager.commit(row.handle, length)

    def table(self, row: LiveSequence) -> list[int]:
        """Return a sequence's blocks; -1: none on the device. O(blocks)."""
        blocks: list[int] = self.manager.block_tables(row.handle)[0].tolist()
        return blocks

    def forget(self, row: LiveSequence) -> None:
        """Remove a freed sequence. O(sequences)."""
        self.rows.remove(row)
        self.touched = [other for other in self.touched if other is not row]
        self.freed = [row.handle, *self.freed[: _FREED_KEPT - 1]]

    def publish(self, row: LiveSequence, num_committed: int) -> None:
        """Record that the row's first tokens are committed. O(tokens)."""
        self.published.update(row.content.values[: num_committed // self.size * self.size])

    def make_copies(self, work: Any) -> None:
        """Make and complete the copies of a step or a new sequence. O(copies)."""
        self.memory.copy(work.copies)
        if getattr(work, "ticket", 0):
            self.manager.copies.complete(work)

    def carry_out(self, plan: Any, later: bool = False) -> None:
        """Make a plan's copies. `later`: with fences, defer those to the host. O(copies).

        `later` with fences also lends before the copies: no block that they read or write.
        """
        ticket = getattr(plan, "ticket", 0)
        if later and ticket:
            if self.is_lending:
                self.lend()
            if plan.destination == "host":
                self.pending.append(plan)
                return
        self.complete_all()
        self.memory.apply(plan)
        if ticket:
            self.manager.copies.complete(plan)

    def lend(self) -> None:
        """Lend all free host blocks to the borrower. O(host blocks)."""
        host = self.manager.host
        if self.is_lending:
            host.lend()
        else:
            host.lend_to(self.borrower)
            self.is_lending = True

    def complete_all(self) -> None:
        """Make and complete the pending copies, in order. O(copies)."""
        for plan in self.pending:
            self.memory.apply(plan)
            self.manager.copies.complete(plan)
        self.pending.clear()

    # ---------------------------------------------------------------- what must always hold

    def check_row(self, row: LiveSequence) -> None:
        """Check that a sequence reads back as written. O(its tokens)."""
        length, reported = len(row.content.values), len(row.handle)
        if reported != length:
            raise Violation("length", f"{reported} tokens, not {length}")
        if row.is_swapped:
            return
        table = self.manager.block_tables(row.handle)[0]
        if len(table) != -(-length // self.size):
            raise Violation("length", f"{len(table)} blocks for {length} tokens")
        wrong = self.memory.mismatch(table, row.content.values, row.start)
        if wrong is not None:
            raise Violation(
                "reads back",
                f"token {wrong} of {row.content.tokens} ({row.content.namespace!r}) in blocks "
                f"{table.tolist()} is not what was written",
            )

    def check_everything(self) -> None:
        """Check all sequences, the manager's state and the sharing of blocks. O(everything)."""
        self.manager.check()
        for row in self.rows:
            self.check_row(row)
        self._check_sharing()
        if self.is_lending:
            self._check_lent(self.manager.host.num_lent)

    def _check_sharing(self) -> None:
        """Check the counts, and that a shared block has one position and one content."""
        stats = self.manager.stats()
        tables = [self.table(row) for row in self.rows]
        held = len({block for table in tables for block in table} - {-1})
        self.require(
            "blocks add up",
            held == stats.num_held
            and stats.num_free + stats.num_held + stats.num_cached + stats.num_kept
            == stats.num_blocks - self.num_reserved
            and stats.num_sequences == len(self.rows),
            f"{held} blocks in {len(self.rows)} tables, but {stats}",
        )
        block = misplaced((row.content for row in self.rows), tables, self.size)
        message = f"two tables hold block {block} for different tokens"
        self.require("handed out once", block is None, message)

    def _check_lent(self, num_lent: int) -> None:
        """Check that the borrower has `num_lent` blocks, and that no copy wrote to one."""
        num_borrowed, num_free = len(self.borrower.blocks), self.manager.stats().num_host_free
        self.require(
            "blocks add up",
            num_borrowed == num_lent <= num_free,
            f"{num_lent} host blocks lent of {num_free}, but {num_borrowed} borrowed",
        )
        self.borrower.check()
