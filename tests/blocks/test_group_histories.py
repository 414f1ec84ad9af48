"""Any history of a manager over groups of layers; and one group under the conformance suite.

The state machine writes a number for each token into the slots of every group, and reads back
what each group's layers may look at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from kvpager import OutOfBlocks
from kvpager.blocks.groups.manager import GroupedManager
from kvpager.errors import SequenceSwapped, StaleSequence
from kvpager.testing.conformance import BlockManagerAdapter, ManagerConformance
from kvpager.testing.memory import Content, TokenMemory

WINDOWS = [(None,), (5,), (None, 5), (5, None, 9), (None, None, 1), (4, 4)]


class Row:
    """A sequence, and what must be true of it."""

    def __init__(self, handle: Any, content: Content, computed: int, *, known: bool) -> None:
        self.handle = handle
        self.content = content
        self.computed = computed  # leading tokens that are written and committed
        self.is_known = known  # the ids of all tokens were told
        self.is_swapped = False

    def __len__(self) -> int:
        return len(self.content)

    def child(self, handle: Any) -> Row:
        return Row(handle, self.content.copy(), self.computed, known=self.is_known)


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=30)


class Groups(RuleBasedStateMachine):
    rows = Bundle("rows")

    @initialize(
        windows=st.sampled_from(WINDOWS),
        num_blocks=st.integers(4, 40),
        block_size=st.sampled_from((1, 2, 4)),
        num_host_blocks=st.integers(0, 20),
        max_chunk=st.sampled_from((None, 1, 3, 8)),
        eviction=st.sampled_from(("lru", "priority", "lifetime")),
    )
    def start(
        self,
        windows: tuple[int | None, ...],
        num_blocks: int,
        block_size: int,
        num_host_blocks: int,
        max_chunk: int | None,
        eviction: str,
    ) -> None:
        self.manager = GroupedManager(
            windows, num_blocks, block_size, num_host_blocks, max_chunk=max_chunk, eviction=eviction
        )
        self.memory = TokenMemory(num_blocks, block_size, num_host_blocks)
        self.windows, self.size, self.max_chunk = windows, block_size, max_chunk
        self.live: list[Row] = []
        self.fresh = 1000
        self.past: list[Content] = []  # of sequences that were freed

    # -------------------------------------------------------------- helpers

    def attempt(self, call: Any, *arguments: Any, **options: Any) -> Any:
        """Return what a call returns, or None where it is refused and changes nothing."""
        before = self.manager.stats()
        try:
            return call(*arguments, **options)
        except OutOfBlocks as refusal:
            error = refusal
        assert error.need > error.free + error.evictable
        assert self.manager.stats() == before
        return None

    def write(self, row: Row, first: int, slots: Any) -> None:
        values = row.content.values[first : first + slots.shape[1]]
        for of_group in slots:
            has_room = of_group >= 0
            self.memory.write(of_group[has_room], np.array(values)[has_room].tolist())

    def compute(self, row: Row, count: int) -> None:
        """Write the next tokens as a step does, and commit them."""
        stop = min(row.computed + count, len(row))
        slots = self.attempt(self.manager.open_slots, row.handle, row.computed, stop)
        if slots is None:
            return
        assert (slots >= 0).all()
        self.read(row, row.computed)
        self.write(row, row.computed, slots)
        row.computed = stop
        self.manager.commit(row.handle, stop)

    def read(self, row: Row, length: int) -> None:
        """Every group has what the token after `length` looks at."""
        tables = self.manager.block_tables([row.handle])[:, 0]
        for table, window in zip(tables, self.windows, strict=True):
            first = 0 if window is None else max(length - window + 1, 0)
            wrong = self.memory.mismatch(table, row.content.values[:length], first)
            assert wrong is None, (window, wrong, table)

    def begin(self, handle: Any, content: Content, *, known: bool) -> Row:
        row = Row(handle, content, handle.num_cached_tokens, known=known)
        assert row.computed % self.size == 0
        assert row.computed <= max(len(row) - 1, 0)
        self.live.append(row)
        self.read(row, row.computed)
        return row

    def new_tokens(self, count: int) -> list[int]:
        self.fresh += count
        return list(range(self.fresh - count, self.fresh))

    # -------------------------------------------------------------- operations

    @rule(target=rows, tokens=TOKENS, namespace=st.sampled_from((None, "acme")))
    def allocate_new(self, tokens: list[int], namespace: str | None) -> Any:
        return self.allocate(tokens, namespace)

    def allocate(self, tokens: list[int], namespace: str | None) -> Any:
        cached = self.manager.match_prefix(tokens[:-1], namespace=namespace)
        handle = self.attempt(self.manager.allocate, tokens, namespace=namespace)
        if handle is None:
            return None
        assert handle.num_cached_tokens == cached
        return self.begin(handle, Content(namespace, tokens), known=True)

    @rule(target=rows, pick=st.integers(0, 5), cut=st.integers(0, 12), more=st.integers(1, 3))
    def allocate_again(self, pick: int, cut: int, more: int) -> Any:
        """Begin as a sequence does that lives or was freed, perhaps not to its end."""
        known = [*self.past, *(row.content for row in self.live)]
        if not known:
            return None
        content = known[-1 - pick % len(known)]
        ids = [*content.tokens[: max(len(content) - cut, 0)], *range(more)]
        return self.allocate(ids, content.namespace)

    @rule(target=rows, count=st.integers(1, 20), reserve=st.integers(0, 3))
    def allocate_unknown(self, count: int, reserve: int) -> Any:
        handle = self.attempt(self.manager.allocate, count, reserve=reserve)
        if handle is None:
            return None
        assert self.manager.num_available_blocks >= reserve
        return self.begin(handle, Content(None, self.new_tokens(count)), known=False)

    @rule(row=rows, count=st.integers(1, 9))
    def compute_some(self, row: Row | None, count: int) -> None:
        if row is not None and row in self.live and not row.is_swapped:
            self.compute(row, count)

    @rule(
        some=st.lists(rows, max_size=3), tokens=TOKENS, by_ids=st.booleans(), batched=st.booleans()
    )
    def append(self, some: list[Row], tokens: list[int], by_ids: bool, batched: bool) -> None:
        some = [row for row in dict.fromkeys(some) if row in self.live and not row.is_swapped]
        if not some:
            return
        new = [tokens[: 1 + at * 3] for at in range(len(some))]
        if not by_ids:
            new = [self.new_tokens(len(ids)) for ids in new]
        options = {"tokens": new} if by_ids else {"counts": [len(ids) for ids in new]}
        handles: Any = [row.handle for row in some]
        target = self.manager.batch(handles) if batched else handles
        step = self.attempt(self.manager.append, target, **options)
        if step is None:
            return
        self.memory.copy(step.copies)
        first = 0
        for row, ids in zip(some, new, strict=True):
            slots = step.slots[:, first : first + len(ids)]
            is_next, start = row.computed == len(row), len(row)
            row.content.extend(ids)
            row.is_known &= by_ids
            if is_next and (slots >= 0).all():
                self.write(row, start, slots)
                row.computed = len(row)
                self.manager.commit(row.handle)
            first += len(ids)

    @rule(target=rows, row=rows)
    def fork(self, row: Row | None) -> Any:
        if row is None or row not in self.live or row.is_swapped:
            return None
        free = self.manager.num_free_blocks
        child = row.child(self.manager.fork(row.handle))
        assert self.manager.num_free_blocks == free
        assert child.handle.num_cached_tokens == row.computed
        self.live.append(child)
        return child

    @rule(row=consumes(rows), publish=st.booleans())
    def free(self, row: Row | None, publish: bool) -> None:
        if row is None or row not in self.live:
            return
        is_written = row.computed == len(row) and not row.is_swapped
        self.manager.free(row.handle, publish=publish and is_written)
        self.live.remove(row)
        self.past.append(row.content)
        with pytest.raises(StaleSequence):
            len(row.handle)

    @rule(row=rows, length=st.integers(0, 40))
    def truncate(self, row: Row | None, length: int) -> None:
        if row is None or row not in self.live or row.is_swapped:
            return
        length %= len(row) + 1
        before = self.manager.stats()
        try:
            self.manager.truncate(row.handle, length)
        except ValueError:
            assert any(window is not None for window in self.windows)
            assert length < row.computed
            assert self.manager.stats() == before
            return
        row.content.truncate(length)
        row.computed = min(row.computed, length)
        self.read(row, row.computed)

    @rule(row=rows, speculative=st.integers(1, 4), kept=st.integers(0, 4), by_ids=st.booleans())
    def append_speculative(
        self, row: Row | None, speculative: int, kept: int, by_ids: bool
    ) -> None:
        if row is None or row not in self.live or row.is_swapped or row.computed < len(row):
            return
        if self.max_chunk is not None and speculative > self.max_chunk:
            return
        ids, start = self.new_tokens(speculative), len(row)
        step = self.attempt(
            self.manager.append, [row.handle], [ids] if by_ids else speculative, speculative=True
        )
        if step is None:
            return
        self.memory.copy(step.copies)
        row.content.extend(ids)
        self.write(row, start, step.slots)
        self.manager.accept([row.handle], [min(kept, speculative)])
        row.content.truncate(start + min(kept, speculative))
        row.is_known &= by_ids
        row.computed = len(row)
        self.manager.commit(row.handle)
        self.read(row, row.computed)

    @rule(pick=st.integers(0, 5), cut=st.integers(0, 4))
    def restore(self, pick: int, cut: int) -> None:
        """Bring back the beginning of a sequence, as from a store."""
        known = [*self.past, *(row.content for row in self.live)]
        if not known:
            return
        content = known[-1 - pick % len(known)]
        num_blocks = max(len(content) // self.size - cut, 0)
        restored = self.attempt(
            self.manager.restore, content.tokens, num_blocks, namespace=content.namespace
        )
        if restored is None:
            return
        handle, missing = restored
        self.manager.check()
        tables = self.manager.block_tables([handle])[:, 0]
        for group, position in zip(*missing.nonzero(), strict=True):
            first = int(position) * self.size
            slots = tables[group, position] * self.size + np.arange(self.size)
            self.memory.write(slots, content.values[first : first + self.size])
        if cut % 2 == 0:
            self.manager.commit(handle)
        self.manager.free(handle)
        if num_blocks and cut % 2 == 0:
            ids = content.tokens[: num_blocks * self.size]
            assert self.manager.match_prefix(ids, namespace=content.namespace) == len(ids)

    @rule(row=rows)
    def swap(self, row: Row | None) -> None:
        if row is None or row not in self.live:
            return
        if row.is_swapped:
            with pytest.raises(SequenceSwapped):
                self.manager.append(row.handle)
        to = "device" if row.is_swapped else "host"
        plan = self.attempt(self.manager.swap, row.handle, to)
        if plan is not None:
            self.memory.apply(plan)
            row.is_swapped = not row.is_swapped

    @rule()
    def clear_prefix_cache(self) -> None:
        self.manager.clear_prefix_cache()

    # -------------------------------------------------------------- invariants

    @invariant()
    def everything_holds(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check()
        held: set[int] = set()
        for row in self.live:
            assert len(row.handle) == len(row)
            tables = self.manager.block_tables([row.handle])[:, 0]
            held.update(tables[tables >= 0].tolist())
            if not row.is_swapped:
                self.read(row, row.computed)
            for table, window in zip(tables, self.windows, strict=True):
                if window is not None and self.max_chunk is not None and row.computed == len(row):
                    assert np.count_nonzero(table >= 0) <= -(-window // self.size) + 2
        stats = self.manager.stats()
        assert stats.num_held == len(held)
        assert stats.num_free + stats.num_held + stats.num_cached == stats.num_blocks
        assert stats.num_sequences == len(self.live)

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.manager.free([row.handle for row in self.live])
            self.manager.clear_prefix_cache()
            self.manager.check()
            assert self.manager.num_free_blocks == self.manager.num_blocks


class OneGroup(BlockManagerAdapter):
    """A manager over a single group for the conformance suite."""

    def block_table(self, handle: Any) -> list[int]:
        blocks: list[int] = self.manager.block_tables(handle)[0, 0].tolist()
        return blocks


class TestFullGroup(ManagerConformance):
    histories = examples = 8

    def make(self, num_blocks: int, block_size: int) -> OneGroup:
        return OneGroup(GroupedManager((None,), num_blocks, block_size, 6))


@pytest.mark.slow
class TestFullGroupAtLength(TestFullGroup):
    histories = examples = 25


@pytest.mark.slow
class TestGroupWithALongWindow(ManagerConformance):
    histories = examples = 25

    def make(self, num_blocks: int, block_size: int) -> OneGroup:
        return OneGroup(GroupedManager((1000,), num_blocks, block_size, 6))


class TestGroups(Groups.TestCase):
    settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


@pytest.mark.slow
class TestGroupsAtLength(Groups.TestCase):
    settings = settings(TestGroups.settings, max_examples=100)
