"""Every schedule of the device-side allocator's programs, by a model of them (`allocator_model`).

Triton's interpreter runs programs one after another, so it cannot show a race, and a GPU may hide
one for years. Each wrong variant below was or could have been a real algorithm.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kvpager.errors import BrokenInvariant
from kvpager.kernels.device_allocator import DeviceAllocator
from tests.support.allocator_history import History, perform, random_operation
from tests.support.allocator_model import (
    NONE,
    RIGHT,
    Launch,
    Memory,
    Variant,
    drop_rows,
    explore,
    memory_of,
    run_random,
    share_rows,
    step_launches,
)

BLOCK_SIZE = 4

WRONG = {
    "the_last_holder_stores_its_count": Variant(last_holder_stores=True),
    "the_last_holder_writes_at_once": Variant(settles=False),
    "what_was_not_there_is_not_given_back": Variant(refunds=False),
    "a_refused_row_forgets_its_hold": Variant(rejoins=False),
}


# The start and error that reveal each mistake.
WRONG_IN = [
    ("three_share", "the_last_holder_stores_its_count", "refcount"),
    ("two_share", "the_last_holder_writes_at_once", "a block that others hold is written"),
    ("two_share", "what_was_not_there_is_not_given_back", "num_free is -"),
    ("two_share", "a_refused_row_forgets_its_hold", "refcount"),
]


class Start(NamedTuple):
    """Rows before a step: some share a half-full block, some need a first block."""

    sharing: tuple[int, ...] = ()
    """Number of stepping rows that hold each shared block."""
    idle: int = 0
    """Rows that also hold the first shared block and do not step."""
    growing: int = 0
    free: int = 0
    """Free blocks."""
    programs: tuple[tuple[int, ...], ...] = ()
    """Lanes of each program; by default one program per lane."""

    def lanes(self) -> list[list[int]]:
        count = sum(self.sharing) + self.growing
        return [list(own) for own in self.programs] or [[lane] for lane in range(count)]

    def memory(self) -> Memory:
        stepping = sum(self.sharing) + self.growing
        blocks = len(self.sharing) + self.free
        memory = memory_of(blocks, BLOCK_SIZE, stepping + self.idle, 1, stepping)
        row = 0
        for tail, holders in enumerate(self.sharing):
            idle = range(stepping, stepping + self.idle if tail == 0 else stepping)
            for holder in (*range(row, row + holders), *idle):
                memory["seq_lens", holder] = 2
                memory["block_tables", holder, 0] = tail
                memory["ref_counts", tail] += 1
            row += holders
        memory["num_free"] = self.free
        for lane in range(stepping):
            memory["rows", lane] = lane
        return memory


STARTS = {
    "two_share": [Start((2,), free=free) for free in range(3)],
    "two_share_with_an_idle_row": [Start((2,), idle=1, free=free) for free in range(3)],
    "one_shares_with_an_idle_row": [Start((1,), idle=1, growing=1, free=free) for free in range(3)],
    "two_alone": [Start((1, 1)), Start((1,), growing=1), Start(growing=2, free=1)],
    "three_share": [Start((3,), free=free) for free in range(3)],
    "three_share_with_an_idle_row": [Start((3,), idle=1, free=free) for free in range(4)],
    "two_share_and_one_grows": [Start((2,), growing=1, free=free) for free in range(3)],
    "three_grow": [Start(growing=3, free=free) for free in range(4)],
    "programs_of_several_lanes": [
        Start((3,), growing=1, free=free, programs=((0, 3), (1, 2))) for free in range(4)
    ],
    "one_program": [Start((2,), growing=1, free=free, programs=((0, 1, 2),)) for free in range(3)],
}


def assert_books_balance(memory: Memory) -> None:
    """Check that refcounts equal the holders, and that each block is free or held."""
    rows = range(memory.count("seq_lens"))
    holders = Counter(block for row in rows for block in memory.table(row))
    num_blocks = memory.count("ref_counts")
    for block in range(num_blocks):
        refs = memory["ref_counts", block]
        assert refs == holders[block], f"block {block}: refcount {refs}, {holders[block]} holders"
    num_free = memory["num_free"]
    assert num_free >= 0, f"num_free is {num_free}"
    free = [memory["free", place] for place in range(num_free)]
    assert sorted([*free, *holders]) == list(range(num_blocks)), "a block is lost, or there twice"


def assert_step(before: Memory, after: Memory, lanes: list[int]) -> None:
    """Check the result of a step for every row, in any schedule."""
    assert_books_balance(after)
    refused = 0
    for lane in lanes:
        row, slot = before["rows", lane], after["slots", lane]
        length = before["seq_lens", row]
        old, new = before.table(row), after.table(row)
        copy = (after["sources_copied", lane], after["blocks_copied", lane])
        if slot == NONE:
            refused += 1
            assert (after["seq_lens", row], new, copy) == (length, old, (NONE, NONE))
            assert after["num_free"] == 0, "refused with blocks left"
            continue
        assert after["seq_lens", row] == length + 1
        assert slot == new[-1] * BLOCK_SIZE + length % BLOCK_SIZE
        assert after["ref_counts", new[-1]] == 1, "a block that others hold is written"
        copied = length % BLOCK_SIZE != 0 and new != old
        assert copy == ((old[-1], new[-1]) if copied else (NONE, NONE))
    assert after["failures"] - before["failures"] == refused
    if not refused:
        assert_no_copy_too_many(before, after, lanes)


def assert_no_copy_too_many(before: Memory, after: Memory, lanes: list[int]) -> None:
    """Check that all sharing rows but one copy a block, and all if an idle row holds it."""
    tails = Counter(
        before.table(lane)[-1] for lane in lanes if before["seq_lens", lane] % BLOCK_SIZE != 0
    )
    copied = Counter(after["sources_copied", lane] for lane in lanes)
    for tail, stepping in tails.items():
        idle = before["ref_counts", tail] - stepping
        assert copied[tail] == stepping - (idle == 0)


def ends(start: Start, variant: Variant = RIGHT) -> Iterator[tuple[Memory, Memory]]:
    before = start.memory()
    for after in explore(before, step_launches(start.lanes(), variant)):
        yield before, after


def assert_every_schedule(name: str, variant: Variant = RIGHT) -> None:
    for start in STARTS[name]:
        lanes = sorted(lane for own in start.lanes() for lane in own)
        for before, after in ends(start, variant):
            assert_step(before, after, lanes)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * name.startswith("three_share"))
        for name in STARTS
    ],
)
def test_every_schedule_of_a_step_is_right(name: str) -> None:
    assert_every_schedule(name)


@pytest.mark.parametrize(("name", "mistake", "message"), WRONG_IN)
def test_wrong_variants_are_found(name: str, mistake: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_every_schedule(name, WRONG[mistake])


def test_the_model_has_the_kernels_statements_in_order() -> None:
    def labels(path: Path) -> list[str]:
        return re.findall(r"# \[([A-Z]?\d+)\]", path.read_text(encoding="utf-8"))

    root = Path(__file__).resolve().parents[2]
    kernels = labels(root / "kernels" / "gpu" / "allocator.py")
    model = labels(root / "tests" / "support" / "allocator_model.py")
    # In the kernels' file, the end of a step stands before it, because Python reads downwards.
    settle = [label for label in kernels if label.startswith("S")]
    rest = [label for label in kernels if not label.startswith("S")]
    assert model == rest[:16] + settle + rest[16:]
    assert len(set(model)) == len(model) == 36


def test_several_outcomes_are_reached() -> None:
    """Either of two rows may get the only block, so the model does reorder."""
    slots = {
        tuple(after["slots", lane] >= 0 for lane in range(2))
        for _, after in ends(Start(growing=2, free=1))
    }
    assert slots == {(True, False), (False, True)}


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("lengths", [(6,), (6, 6), (2, 6, 6)])
def test_every_schedule_of_a_release_is_right(lengths: tuple[int, ...]) -> None:
    """Rows that share their first block, and have a second one of their own if they are long."""
    num_rows = len(lengths) + 1
    memory = memory_of(num_rows + 1, BLOCK_SIZE, num_rows, 2, len(lengths))
    for row, length in enumerate((2, *lengths)):
        memory["seq_lens", row] = length
        for column in range(memory.num_blocks(row)):
            block = 0 if column == 0 else row + 1
            memory["block_tables", row, column] = block
            memory["ref_counts", block] += 1
    held = [block for block in range(num_rows + 1) if memory["ref_counts", block]]
    memory["num_free"] = 0
    for block in set(range(num_rows + 1)) - set(held):
        memory["free", memory["num_free"]] = block
        memory["num_free"] += 1
    assert_books_balance(memory)
    for leaving in (range(1, num_rows), range(num_rows)):
        # The second time, the spared row is released too.
        for lane, row in enumerate(leaving):
            memory["rows", lane] = row
        launch: Launch = [lambda _, lane=lane: drop_rows(_, lane) for lane in range(len(leaving))]
        for after in explore(memory, [launch]):
            assert_books_balance(after)
            assert all(after["seq_lens", row] == 0 for row in leaving)


@pytest.mark.parametrize("targets", [(1, 2), (1, 2, 3)])
def test_every_schedule_of_a_fork_is_right(targets: tuple[int, ...]) -> None:
    memory = memory_of(3, BLOCK_SIZE, 4, 2, len(targets))
    memory["seq_lens", 0] = 6
    for column in range(2):
        memory["block_tables", 0, column] = 2 - column
        memory["ref_counts", 2 - column] = 1
    memory["free", 0], memory["num_free"] = 0, 1
    for pair, target in enumerate(targets):
        memory["rows", pair], memory["targets", pair] = 0, target
    launch: Launch = [lambda _, pair=pair: share_rows(_, pair) for pair in range(len(targets))]
    for after in explore(memory, [launch]):
        assert_books_balance(after)
        assert all(after.table(target) == after.table(0) for target in targets)


class Scheduled:
    """The model behind the functions of the kernels: every launch in a random order."""

    def __init__(self, chance: random.Random, variant: Variant = RIGHT) -> None:
        self.chance = chance
        self.variant = variant

    def step_alloc(self, allocator: DeviceAllocator, rows: Tensor) -> tuple[Tensor, Tensor]:
        lanes = list(range(len(rows)))
        per_program = self.chance.randint(1, 3)
        programs = [lanes[at : at + per_program] for at in lanes[::per_program]]
        memory = self._run(allocator, rows, rows, step_launches(programs, self.variant))
        slots = [memory["slots", lane] for lane in lanes]
        copies = [(memory["sources_copied", lane], memory["blocks_copied", lane]) for lane in lanes]
        return torch.tensor(slots), torch.tensor(copies, dtype=torch.int32).view(-1, 2)

    def fork_rows(self, allocator: DeviceAllocator, sources: Tensor, targets: Tensor) -> None:
        launch: Launch = [lambda _, pair=pair: share_rows(_, pair) for pair in range(len(sources))]
        self._run(allocator, sources, targets, [launch])

    def release_rows(self, allocator: DeviceAllocator, rows: Tensor) -> None:
        launch: Launch = [lambda _, lane=lane: drop_rows(_, lane) for lane in range(len(rows))]
        self._run(allocator, rows, rows, [launch])

    def _run(
        self, allocator: DeviceAllocator, rows: Tensor, targets: Tensor, launches: list[Launch]
    ) -> Memory:
        num_rows, columns = allocator.block_tables.shape
        memory = memory_of(len(allocator.free), allocator.block_size, num_rows, columns, len(rows))
        arrays = {name: getattr(allocator, name) for name in ("free", "ref_counts", "seq_lens")}
        for name, tensor in {**arrays, "rows": rows, "targets": targets}.items():
            for index, value in enumerate(tensor.tolist()):
                memory[name, index] = value
        for row, table in enumerate(allocator.block_tables.tolist()):
            for column, block in enumerate(table):
                memory["block_tables", row, column] = block
        memory["num_free"], memory["failures"] = int(allocator.num_free), int(allocator.failures)
        run_random(memory, launches, self.chance)
        for name, tensor in arrays.items():
            tensor.copy_(torch.tensor([memory[name, index] for index in range(len(tensor))]))
        flat = [memory["block_tables", row, at] for row in range(num_rows) for at in range(columns)]
        allocator.block_tables.copy_(torch.tensor(flat).view(num_rows, columns))
        allocator.num_free[0], allocator.failures[0] = memory["num_free"], memory["failures"]
        return memory


def run_history(seed: int, variant: Variant = RIGHT) -> History:
    chance = random.Random(seed)
    kernels: Any = Scheduled(chance, variant)
    history = History(kernels, chance.randint(4, 10), chance.choice([1, 2, 4]), 6, 4)
    for _ in range(30):
        perform(history, random_operation(history, chance))
        history.check()
    return history


def run_histories(count: int, variant: Variant = RIGHT) -> list[History]:
    return [run_history(seed, variant) for seed in range(count)]


@pytest.mark.slow
def test_rows_read_back_what_was_written_under_random_schedules() -> None:
    histories = run_histories(120)
    assert sum(history.copied for history in histories) > 100
    assert sum(history.refused for history in histories) > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_random_schedules_find_wrong_variants(name: str) -> None:
    with pytest.raises((AssertionError, BrokenInvariant, KeyError)):
        run_histories(400, WRONG[name])
