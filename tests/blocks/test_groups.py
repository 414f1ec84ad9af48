"""Managers over groups of layers: one pool, blocks behind windows, all groups or none.

The state machine writes a number for each token into the slots of every group, and reads back
what each group's layers may look at.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
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
from tests.support.interrupts import Moments, by_signal
from tests.support.manager_state import differences, state_of

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

    # -------------------------------------------------------------- laws

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


def state_of_groups(manager: GroupedManager) -> dict[str, Any]:
    """Return all that a manager over groups knows, but for room that is not used."""
    table = manager._table
    used = np.union1d(table.live(), table.generations.nonzero()[0])
    return {
        **state_of(manager),  # type: ignore[arg-type]
        "groups.rows": table.rows[:, used],
        "groups.lengths": table.lengths[used],
        "groups.generations": table.generations[used],
        "groups.pending": np.array(sorted(table.pending)),
        "groups.digests": np.array([len(table.digests[name]) for name in used]),
    }


def begun() -> tuple[GroupedManager, Any]:
    """Return a manager with a sequence that is computed in part, and little room."""
    manager = GroupedManager((None, 5, 9), 40, 4, 40, max_chunk=8)
    sequence = manager.allocate(range(30))
    for start in (0, 8):
        manager.open_slots(sequence, start, start + 8)
        manager.commit(sequence, start + 8)
    return manager, sequence


def allocate_a_hit() -> tuple[GroupedManager, Any]:
    manager, sequence = begun()
    manager.free(sequence)
    return manager, lambda: manager.allocate(range(20))


def open_a_chunk() -> tuple[GroupedManager, Any]:
    manager, sequence = begun()
    return manager, lambda: manager.open_slots(sequence, 16, 24)


def commit_a_chunk() -> tuple[GroupedManager, Any]:
    manager, sequence = begun()
    manager.open_slots(sequence, 16, 24)
    return manager, lambda: manager.commit(sequence, 24)


def append_in_part() -> tuple[GroupedManager, Any]:
    manager, sequence = begun()
    other = manager.allocate(3)
    return manager, lambda: manager.append([sequence, other], counts=[5, 2])


def fork_twice() -> tuple[GroupedManager, Any]:
    manager, sequence = begun()
    return manager, lambda: manager.fork(sequence, 9)


def truncate() -> tuple[GroupedManager, Any]:
    manager, sequence = begun()
    return manager, lambda: manager.truncate(sequence, 16)


def swap_out() -> tuple[GroupedManager, Any]:
    manager, sequence = begun()
    return manager, lambda: manager.swap(sequence, "host")


CHANGES = [
    allocate_a_hit,
    open_a_chunk,
    commit_a_chunk,
    append_in_part,
    fork_twice,
    truncate,
    swap_out,
]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX signals")
@pytest.mark.parametrize("scenario", CHANGES)
def test_an_interrupted_call_is_complete_or_has_changed_nothing(
    scenario: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two managers with the same history are equal, their tickets included.
    monkeypatch.setattr(secrets, "randbits", lambda bits: 1)
    manager, operation = scenario()
    operation()
    complete = state_of_groups(manager)
    for number in range(1 + CHANGES.index(scenario), 10_000, 11):
        manager, operation = scenario()
        before, moment = state_of_groups(manager), Moments(number, by_signal)
        with contextlib.suppress(KeyboardInterrupt), moment:
            operation()
            assert not moment.was_hit, "the signal was lost"
        if not moment.was_hit:
            break
        manager.check()
        after = state_of_groups(manager)
        assert not differences(after, before) or not differences(after, complete), number
    else:
        pytest.fail("the operation never came through")


def test_what_one_group_lacks_no_group_takes() -> None:
    manager = GroupedManager((None, 8), 9, 4)
    sequence = manager.allocate(range(16))  # four blocks each
    with pytest.raises(OutOfBlocks) as caught:
        manager.append(sequence)
    assert (caught.value.need, caught.value.free) == (2, 1)
    assert manager.num_free_blocks == 1
    with pytest.raises(OutOfBlocks, match="need 4 device blocks, 1 free"):
        manager.allocate(8)
    manager.check()


def test_a_block_behind_the_window_stays_cached_and_leaves_first() -> None:
    manager = GroupedManager((4,), 8, 4)
    one = manager.allocate(range(16))
    manager.commit(one)
    assert (manager.stats().num_held, manager.stats().num_cached) == (1, 3)
    manager.free(one)
    other = manager.allocate(range(100, 128))  # evicts all but one block
    assert manager.stats().num_cached == 1
    manager.free(other)
    assert manager.match_prefix(range(16)) == 16  # served by the last window alone
    assert manager.match_prefix(range(12)) == 0


def test_match_prefix_returns_the_blocks_of_every_group() -> None:
    manager = GroupedManager((None, 4), 40, 4)
    manager.free(manager.allocate(range(12)), publish=True)
    match = manager.match_prefix(range(13), blocks=True)
    assert match.num_tokens == 12
    shared = manager.block_tables(manager.allocate(range(13)))[:, 0, :3]
    assert match.blocks.tolist() == shared.tolist()
    assert (match.blocks[1] < 0).tolist() == [True, True, False]
    unknown = manager.match_prefix([99] * 12, blocks=True)
    assert (unknown.num_tokens, unknown.blocks.shape) == (0, (2, 0))


def test_a_hit_has_every_block_of_the_last_window() -> None:
    manager = GroupedManager((9,), 8, 4)  # the token after 24 looks at the last two blocks
    one = manager.allocate(range(24))
    manager.commit(one, 16)
    manager.commit(one)
    manager.free(one)
    served = []
    for num_fresh in range(3, 9):  # the blocks leave one after the other
        manager.free(manager.allocate(4 * num_fresh))
        left = manager.stats().num_cached
        served.append((left, manager.match_prefix(range(24))))
    assert served == [(5, 24), (4, 24), (3, 24), (2, 24), (1, 0), (0, 0)]


def test_tokens_after_a_truncation_get_new_digests() -> None:
    manager = GroupedManager((2,), 40, 4)
    manager.commit(manager.allocate(range(8)))
    old, new, end = [20, 21, 22, 23], [50, 51, 52, 53], [60, 61, 62, 63]
    sequence = manager.allocate([*range(8), *old, 0])
    assert sequence.num_cached_tokens == 8
    manager.truncate(sequence, 8)
    manager.append(sequence, [*new, *end])
    manager.commit(sequence)
    assert manager.match_prefix([*range(8), *new, *end]) == 16
    assert manager.match_prefix([*range(8), *old, *end]) == 8


def test_groups_and_namespaces_share_no_prefix() -> None:
    manager = GroupedManager((6, 6), 40, 4)
    manager.commit(manager.allocate(range(12), namespace="a"))
    assert manager.match_prefix(range(12), namespace="a") == 12
    assert manager.match_prefix(range(12)) == 0
    assert manager.match_prefix(range(12), namespace="a", lora="b") == 0
    again = manager.allocate(range(13), namespace="a")
    one, other = manager.block_tables(again)[:, 0]
    assert not set(one[one >= 0]) & set(other[other >= 0])


def test_an_equal_block_after_another_prompt_is_not_reused() -> None:
    manager = GroupedManager((4,), 40, 4)
    manager.commit(manager.allocate([1, 1, 1, 1, 7, 7, 7, 7]))
    assert manager.match_prefix([1, 1, 1, 1, 7, 7, 7, 7]) == 8
    assert manager.match_prefix([2, 2, 2, 2, 7, 7, 7, 7]) == 0
    assert manager.match_prefix([7, 7, 7, 7]) == 0


def test_contents_before_the_window_tell_prompts_apart() -> None:
    manager = GroupedManager((4,), 40, 4)
    manager.commit(manager.allocate(range(12), mm_hashes=[(0, 3, b"cat")]))
    assert manager.match_prefix(range(12), mm_hashes=[(0, 3, b"cat")]) == 12
    assert manager.match_prefix(range(12), mm_hashes=[(0, 3, b"dog")]) == 0


def test_a_quota_counts_the_blocks_of_all_groups() -> None:
    manager = GroupedManager((None, 8), 40, 4)
    manager.quotas.set("a", ceiling=6)
    sequence = manager.allocate(range(12), namespace="a")
    with pytest.raises(OutOfBlocks):
        manager.append(sequence)
    manager.commit(sequence)
    manager.free(sequence)
    manager.free(manager.allocate(range(50, 62), namespace="a"))
    manager.check()
    assert manager.stats().num_held == 0


@pytest.mark.parametrize("windows", [(), (0,), (None, -1), (2.5,)])
def test_windows_that_make_no_sense_are_refused(windows: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="window"):
        GroupedManager(windows, 8)


class OneGroup(BlockManagerAdapter):
    """A manager over a single group for the conformance suite."""

    def block_table(self, handle: Any) -> list[int]:
        blocks: list[int] = self.manager.block_tables(handle)[0, 0].tolist()
        return blocks


class TestFullGroup(ManagerConformance):
    histories = examples = 25

    def make(self, num_blocks: int, block_size: int) -> OneGroup:
        return OneGroup(GroupedManager((None,), num_blocks, block_size, 6))


class TestGroupWithALongWindow(ManagerConformance):
    histories = examples = 25

    def make(self, num_blocks: int, block_size: int) -> OneGroup:
        return OneGroup(GroupedManager((1000,), num_blocks, block_size, 6))


TestGroups = Groups.TestCase
TestGroups.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_accept_keeps_tokens_that_have_no_room_yet() -> None:
    manager = GroupedManager((5,), 40, 4, max_chunk=4)
    waiting, speculating = manager.allocate(range(20)), manager.allocate([1, 2, 3])
    manager.append(speculating, [4, 5], speculative=True)
    manager.accept([waiting, speculating], [0, 1])
    assert manager.lengths([waiting, speculating]).tolist() == [20, 4]
    manager.check()
    manager.commit(waiting, 4)
    assert manager.open_slots(waiting, 4, 8).shape == (1, 4)
