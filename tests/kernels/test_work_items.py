"""Work plans read every kv token that a query sees exactly once for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from kvpager.kernels.work_items import Planner
from tests.support.work_items import TILING, require_cover, tables_of


def test_rows_without_anything_in_common_are_read_alone() -> None:
    seq_lens = [0, 1, 3, 4, 5, 20]
    tables = tables_of([[], [1], [2], [3], [4, 5], [6, 7, 8, 9, 10]])
    plan = Planner(TILING).plan(tables, np.array(seq_lens))
    assert require_cover(plan, tables, seq_lens) == sum(seq_lens)
    assert plan.num_large == 0


def test_a_prefix_of_many_rows_is_read_once() -> None:
    prefix = list(range(100, 120))
    tables = tables_of([[*prefix, row] for row in range(4)])
    seq_lens = [81, 82, 83, 84]
    plan = Planner(TILING).plan(tables, np.array(seq_lens))
    assert require_cover(plan, tables, seq_lens) == 80 + 1 + 2 + 3 + 4
    assert plan.num_large > 0


def test_prefixes_inside_prefixes_are_read_once_each() -> None:
    a, b, c = list(range(100, 140)), list(range(200, 240)), list(range(300, 340))
    tables = tables_of([[*a, *b, *c, 1], [*a, *b, *c, 2], [*a, *b, 3], [*a, 4], [5]])
    seq_lens = [481, 481, 321, 161, 1]
    plan = Planner(TILING).plan(tables, np.array(seq_lens))
    assert require_cover(plan, tables, seq_lens) == 480 + 5


def test_rows_beyond_one_tile_share_a_prefix_per_tile() -> None:
    prefix = list(range(100, 120))
    tables = tables_of([[*prefix, row] for row in range(9)])
    plan = Planner(TILING).plan(tables, np.full(9, 81))
    assert require_cover(plan, tables, [81] * 9) == 3 * 80 + 9
    assert plan.items[:, 1].max() == TILING.many


def test_a_short_common_prefix_is_not_worth_a_partial_result() -> None:
    tables = tables_of([[9, 1], [9, 2]])
    plan = Planner(TILING).plan(tables, np.array([5, 5]))
    assert require_cover(plan, tables, [5, 5]) == 10
    assert plan.num_slots == 0


def test_the_block_that_is_being_written_is_never_shared() -> None:
    prefix = list(range(100, 120))
    # Just forked: both rows share the last block until copy-on-write.
    tables = tables_of([prefix, prefix])
    plan = Planner(TILING).plan(tables, np.array([80, 80]))
    assert require_cover(plan, tables, [80, 80]) == 76 + 4 + 4


def test_sharing_can_be_turned_off() -> None:
    prefix = list(range(100, 120))
    tables = tables_of([[*prefix, 1], [*prefix, 2]])
    plan = Planner(TILING, share=False).plan(tables, np.array([81, 81]))
    assert require_cover(plan, tables, [81, 81]) == 162
    assert set(plan.items[:, 1].tolist()) == {1}


def test_uneven_rows_become_items_of_even_length() -> None:
    seq_lens = [400, 8, 8, 8]
    tables = tables_of([list(range(100)), [200, 201], [300, 301], [400, 401]])
    plan = Planner(TILING).plan(tables, np.array(seq_lens))
    require_cover(plan, tables, seq_lens)
    lengths = np.minimum(plan.items[:, 4], 400) - plan.items[:, 3]
    assert lengths[plan.items[:, 2] == 0].max() <= -(-sum(seq_lens) // TILING.items) + TILING.align
    assert len(plan.items) >= TILING.items


def test_long_items_come_first() -> None:
    tables = tables_of([[1], list(range(10, 16)), [2, 3, 4]])
    seq_lens = np.array([3, 24, 9])
    plan = Planner(TILING._replace(items=1)).plan(tables, seq_lens)
    assert plan.items[:, 2].tolist() == [1, 2, 0]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 6])
def test_rows_with_several_queries_are_covered(causal: bool, window: int | None) -> None:
    query_counts = [5, 1, 0, 9, 3]
    seq_lens = [40, 7, 12, 9, 1]  # the last row has more queries than tokens
    tables = tables_of([list(range(20 * row, 20 * row + 10)) for row in range(5)])
    planner = Planner(TILING, causal=causal, window=window)
    starts = np.cumsum([0, *query_counts])
    plan = planner.plan(tables, np.array(seq_lens), starts)
    require_cover(plan, tables, seq_lens, query_counts, causal=causal, window=window)
    assert not plan.one_query
    assert planner.plan(tables, np.array(seq_lens), starts) is plan
    assert planner.plan(tables, np.array([41, 7, 12, 9, 1]), starts) is not plan


def test_rows_of_one_query_each_are_decode() -> None:
    prefix = list(range(100, 120))
    tables = tables_of([[*prefix, 1], [*prefix, 2]])
    plan = Planner(TILING).plan(tables, np.array([81, 81]), np.array([0, 1, 2]))
    assert plan.one_query
    assert require_cover(plan, tables, [81, 81]) == 82


@pytest.mark.parametrize("seq_len", [24, 22])  # 22: the last block is half full
@pytest.mark.parametrize(
    ("window", "hole", "holes"),
    [(None, 2, True), (4, 2, False), (4, 4, True), (None, 5, True), (4, 5, True), (None, 6, False)],
)
def test_a_missing_block_counts_only_where_a_query_may_look(
    window: int | None, hole: int, holes: bool, seq_len: int
) -> None:
    tables = tables_of([list(range(7))])
    tables[0, hole] = -1
    plan = Planner(TILING, window=window).plan(tables, np.array([seq_len]), np.array([0, 3]))
    assert plan.holes == holes


@dataclass
class Forest:
    """Sequences over blocks with sharing forks and copy-on-write, like a manager's."""

    block_size: int
    window: int | None
    rows: list[list[int]] = field(default_factory=list)
    seq_lens: list[int] = field(default_factory=list)
    next_block: int = 0

    def fresh(self) -> int:
        self.next_block += 1
        return self.next_block

    def join(self, tokens: int) -> None:
        self.rows.append([])
        self.seq_lens.append(0)
        self.append(len(self.rows) - 1, tokens)

    def append(self, row: int, tokens: int) -> None:
        blocks = self.rows[row]
        used = -(-self.seq_lens[row] // self.block_size)
        del blocks[used:]
        if tokens and self.seq_lens[row] % self.block_size:
            blocks[-1] = self.fresh()  # copy-on-write, needed or not
        self.seq_lens[row] += tokens
        while len(blocks) * self.block_size < self.seq_lens[row]:
            blocks.append(self.fresh())

    def fork(self, row: int) -> None:
        self.rows.append(list(self.rows[row]))
        self.seq_lens.append(self.seq_lens[row])

    def finish(self, row: int) -> None:
        self.rows.pop(row)
        self.seq_lens.pop(row)

    def truncate(self, row: int, tokens: int) -> None:
        self.seq_lens[row] = max(0, self.seq_lens[row] - tokens)

    def give_back(self, row: int) -> None:
        """Drop blocks that no query sees any more."""
        if self.window is not None:
            behind = max(0, self.seq_lens[row] - self.window) // self.block_size
            self.rows[row][:behind] = [-1] * min(behind, len(self.rows[row]))


def test_any_history_of_sequences_is_covered_after_every_step() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = pytest.importorskip("hypothesis.strategies")
    block_size = TILING.block_size
    steps = st.tuples(
        st.sampled_from(["join", "append", "append", "fork", "fork", "finish", "truncate", "step"]),
        st.integers(0, 7),
        st.sampled_from([0, 1, block_size - 1, block_size, block_size + 1, 30, 90]),
    )

    @hypothesis.settings(max_examples=150)
    @hypothesis.given(
        st.lists(steps, max_size=14),
        st.sampled_from([None, None, 1, 5, 40]),
        st.sampled_from([1, 4, 8]),
    )
    def holds(history: list[tuple[str, int, int]], window: int | None, align: int) -> None:
        planner = Planner(TILING._replace(align=align), window=window)
        forest = Forest(block_size, window)
        for verb, row, tokens in history:
            take(forest, verb, row, tokens)
            for each in range(len(forest.rows)):
                forest.give_back(each)
            tables = tables_of(forest.rows, columns=200)
            plan = planner.plan(tables, np.array(forest.seq_lens, np.int32))
            tokens_read = require_cover(plan, tables, forest.seq_lens, window=window)
            assert tokens_read <= sum(forest.seq_lens)

    holds()


def take(forest: Forest, verb: str, row: int, tokens: int) -> None:
    """Run one step of a history; skip steps that need a row if there is none."""
    if verb == "join" or not forest.rows:
        forest.join(tokens)
        return
    row %= len(forest.rows)
    if verb == "append":
        forest.append(row, tokens)
    elif verb == "fork" and len(forest.rows) < 9:
        forest.fork(row)
    elif verb == "finish":
        forest.finish(row)
    elif verb == "truncate" and forest.window is None:
        forest.truncate(row, tokens)
    elif verb == "step":  # one decode step of the batch
        for each in range(len(forest.rows)):
            forest.append(each, 1)
