"""A harness that drives a kvpager manager, with plain lists of all tokens written through it.

operations ──▶ ManagerHarness ──▶ manager      applies every plan to a `TokenMemory`, writes every
                     │                         new token, and reads the touched sequences back
                     └──────▶ TokenMemory      through their block tables
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from kvpager.blocks.manager import BlockManager
from kvpager.errors import OutOfBlocks
from kvpager.testing.histories import Operation, Violation
from kvpager.testing.memory import Content, TokenMemory
from kvpager.testing.setups import Setup

_FREED_KEPT = 4


class LiveSequence:
    """A live sequence: its handle and its expected state.

    `start`: the first token not dropped. `num_known`: leading tokens whose ids the manager knows.
    `num_committed`: leading committed tokens. `is_plain`: it has no LoRA and no mm_hashes.
    """

    __slots__ = (
        "content",
        "handle",
        "is_plain",
        "is_swapped",
        "num_committed",
        "num_known",
        "num_speculative",
        "start",
    )

    def __init__(self, handle: Any, content: Content, num_known: int, num_committed: int) -> None:
        self.handle = handle
        self.content = content
        self.num_known = num_known
        self.num_committed = num_committed
        self.start = 0
        self.is_swapped = False
        self.num_speculative = 0
        self.is_plain = True

    def child(self, handle: Any) -> LiveSequence:
        """Return the expected state of a fork. O(tokens)."""
        child = LiveSequence(handle, self.content.copy(), self.num_known, self.num_committed)
        child.start, child.is_plain = self.start, self.is_plain
        child.num_speculative = self.num_speculative
        return child


class ManagerHarness:
    """The manager and memory of a simulated history. Raises `Violation`.

    `counts`: the number of operations by name, of refused calls and of prefix hits.
    """

    def __init__(self, setup: Setup, manager: Any, *, check_every: int | None = None) -> None:
        self.setup = setup
        self.manager = manager
        self.size = setup.block_size
        self.check_every = setup.check_every if check_every is None else check_every
        self.memory = TokenMemory(setup.num_blocks, self.size, setup.num_host_blocks)
        self.rows: list[LiveSequence] = []
        self.num_swapped = 0
        self.num_speculating = 0
        self.pending: list[Any] = []  # plans of the manager not yet applied
        self.pins: list[int] = []
        self.num_reserved = int(setup.null_block and isinstance(manager, BlockManager))
        self.freed: list[Any] = []
        self.published: set[int] = set()
        self.touched: list[LiveSequence] = []
        self.counts: Counter[str] = Counter()
        self._num_done = 0
        self._fresh_token = 1_000_000

    @property
    def alphabet(self) -> int:
        """The number of different token ids in prompts."""
        return self.setup.alphabet

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return self.setup.longest

    @property
    def num_live(self) -> int:
        """The number of live sequences."""
        return len(self.rows)

    # ---------------------------------------------------------------- the Harness protocol

    def apply(self, operation: Operation, arguments: tuple[Any, ...]) -> None:
        """Run an operation and check the sequences it touched; every k-th time check everything."""
        self.touched.clear()
        operation.run(self, *arguments)
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
        self.rows, self.num_swapped, self.num_speculating = [], 0, 0
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

    def pick(self, number: int) -> LiveSequence | None:
        """Return a live sequence, counted from the newest, or None. O(1)."""
        return self.rows[-1 - number % len(self.rows)] if self.rows else None

    def pick_resident(self, number: int) -> LiveSequence | None:
        """Pick a sequence on the device without speculative tokens. O(sequences)."""
        if not (self.num_swapped or self.num_speculating):
            return self.pick(number)
        rows = [row for row in self.rows if not (row.is_swapped or row.num_speculative)]
        return rows[-1 - number % len(rows)] if rows else None

    def pick_speculating(self, number: int) -> LiveSequence | None:
        """Pick a sequence with speculative tokens. O(sequences)."""
        if not self.num_speculating:
            return None
        rows = [row for row in self.rows if row.num_speculative and not row.is_swapped]
        return rows[-1 - number % len(rows)] if rows else None

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
        before = self.state() if room < most or self.setup.quotas else None
        try:
            return function(*arguments, **options)
        except OutOfBlocks as error:
            fits = before is None or error.need <= error.free + error.evictable
            fits = fits and not (self.setup.quotas or self.setup.null_block or self.setup.fences)
            self.require("served when it fits", not fits, f"{error}; at most {most} are needed")
            after = self.state()
            self.require(
                "refusal changes nothing", after == before, f"{before} before, {after} after"
            )
            self.counts["refused"] += 1
            return None

    def state(self) -> object:
        """Return the state that a refused call must keep: all counts, or two in large pools.

        O(1), in small pools O(everything).
        """
        manager = self.manager
        if self.check_every == 1:
            return manager.stats()
        return manager.num_free_blocks, manager.num_held_blocks

    def write(self, row: LiveSequence, first: int, slots: Any) -> None:
        """Write the tokens from `first` on to `slots`. O(tokens)."""
        values = row.content.values[first:] if first else row.content.values
        if len(slots) != len(values):
            raise Violation("a slot for each token", f"{len(slots)} slots for {len(values)} tokens")
        self.memory.write(slots, values)

    def forget(self, row: LiveSequence) -> None:
        """Remove a freed sequence. O(sequences)."""
        self.rows.remove(row)
        self.num_swapped -= row.is_swapped
        self.num_speculating -= row.num_speculative > 0
        self.freed = [row.handle, *self.freed[: _FREED_KEPT - 1]]

    def publish(self, row: LiveSequence, num_committed: int) -> None:
        """Record that the row's first tokens are committed. O(tokens)."""
        row.num_committed = max(row.num_committed, num_committed)
        self.published.update(row.content.values[: num_committed // self.size * self.size])

    def make_copies(self, work: Any) -> None:
        """Make and complete the copies of a step or a new sequence. O(copies)."""
        self.memory.copy(work.copies)
        if getattr(work, "ticket", 0):
            self.manager.copies.complete(work)

    def carry_out(self, plan: Any, later: bool = False) -> None:
        """Make a plan's copies. `later`: with fences, defer those to the host. O(copies)."""
        ticket = getattr(plan, "ticket", 0)
        if later and ticket and plan.destination == "host":
            self.pending.append(plan)
            return
        self.complete_all()
        self.memory.apply(plan)
        if ticket:
            self.manager.copies.complete(plan)

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

    def _check_sharing(self) -> None:
        """Check the counts, and that a shared block has one position and one content."""
        stats = self.manager.stats()
        tables = [self.manager.block_tables(row.handle)[0] for row in self.rows]
        blocks = np.concatenate([*tables, np.empty(0, np.int32)])
        held = len(np.unique(blocks[blocks >= 0]))
        self.require(
            "blocks add up",
            held == stats.num_held
            and stats.num_free + stats.num_held + stats.num_cached + stats.num_kept
            == stats.num_blocks - self.num_reserved
            and stats.num_sequences == len(self.rows),
            f"{held} blocks in {len(self.rows)} tables, but {stats}",
        )
        # A token's value depends on all tokens before it, so equal values are equal prefixes.
        holder: dict[int, tuple[int, list[int]]] = {}
        for row, table in zip(self.rows, tables, strict=True):
            for column, block in enumerate(table.tolist()):
                if block < 0:
                    continue
                values = row.content.values[column * self.size : (column + 1) * self.size]
                place, others = holder.setdefault(block, (column, values))
                common = min(len(values), len(others))
                self.require(
                    "handed out once",
                    place == column and values[:common] == others[:common],
                    f"two tables hold block {block} for different tokens",
                )
