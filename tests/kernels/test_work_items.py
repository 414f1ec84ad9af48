"""Work plans read every kv token that a query sees exactly once for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvpager.kernels.work_items import Planner, Tiling, WorkPlan

Tables = NDArray[np.int32]

# Small numbers, so that every branch is taken by batches that can be printed.
TILING = Tiling(block_size=4, few=2, many=4, align=4, items=6, chunk_min=8)


def tables_of(rows: Sequence[Sequence[int]], columns: int | None = None) -> Tables:
    """Make block tables with garbage past a row's blocks."""
    width = max((len(row) for row in rows), default=0) if columns is None else columns
    tables = np.full((len(rows), width), 999, np.int32)
    for index, row in enumerate(rows):
        tables[index, : len(row)] = row
    return tables


def visible(position: int, seq_len: int, causal: bool, window: int | None) -> set[int]:
    low = 0 if window is None else max(0, position - window + 1)
    return set(range(low, max(low, min(seq_len, position + 1 if causal else seq_len))))


def require_cover(
    plan: WorkPlan,
    tables: Tables,
    seq_lens: Sequence[int],
    query_counts: Sequence[int] | None = None,
    *,
    block_size: int = TILING.block_size,
    causal: bool = True,
    window: int | None = None,
) -> int:
    """Check that every query sees each token through one item; return the kv tokens read."""
    counts = [1] * len(seq_lens) if query_counts is None else query_counts
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    ranks = [count - index for count in counts for index in range(count)]  # from the last
    seen: list[list[int]] = [[] for _ in rows]
    parts = [0] * len(rows)
    slots: list[list[int]] = [[] for _ in rows]
    tokens_read = 0
    for first, count, table_row, start, stop in plan.items.tolist():
        members = plan.queries[first : first + count].tolist()
        assert count >= 1
        if plan.one_query and count > 1:  # nothing past the end of any of them
            assert stop <= min(seq_lens[member] for member in members)
        reached: set[int] = set()
        for member, slot in zip(members, plan.slots[first : first + count].tolist(), strict=True):
            row = rows[member]
            parts[member] += 1
            slots[member].append(slot)
            may_see = visible(seq_lens[row] - ranks[member], seq_lens[row], causal, window)
            mine = {token for token in may_see if start <= token < stop}
            seen[member].extend(mine)
            reached |= mine
            for token in mine:  # the item reads through another row's table
                column = token // block_size
                assert tables[row, column] >= 0
                assert tables[table_row, column] == tables[row, column]
        tokens_read += len(reached)
    for query, row in enumerate(rows):
        expected = visible(seq_lens[row] - ranks[query], seq_lens[row], causal, window)
        assert sorted(seen[query]) == sorted(expected)
    require_slots(plan, parts, slots)
    return tokens_read


def require_slots(plan: WorkPlan, parts: list[int], slots: list[list[int]]) -> None:
    """Check that queries with several parts have runs of slots, and others no slot."""
    runs = dict(
        zip(
            plan.merged.tolist(),
            zip(plan.merge_starts[:-1].tolist(), plan.merge_starts[1:].tolist(), strict=True),
            strict=True,
        )
    )
    for query, count in enumerate(parts):
        if count == 1:
            assert slots[query] == [-1]
            assert query not in runs
        else:
            assert sorted(slots[query]) == list(range(*runs[query]))
    assert plan.num_slots == sum(count for count in parts if count > 1)


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
@pytest.mark.parametrize("chunk", [None, 8])
def test_rows_with_several_queries_are_covered(
    causal: bool, window: int | None, chunk: int | None
) -> None:
    query_counts = [5, 1, 0, 9, 3]
    seq_lens = [40, 7, 12, 9, 1]  # the last row has more queries than tokens
    tables = tables_of([list(range(20 * row, 20 * row + 10)) for row in range(5)])
    planner = Planner(TILING, causal=causal, window=window, chunk=chunk)
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


def test_a_fixed_chunk_sums_a_row_independently_of_others() -> None:
    prefix = list(range(100, 110))
    rows = [[*prefix, 1], [*prefix, 2], list(range(200, 230)), [3]]
    seq_lens = [41, 43, 117, 2]
    planner = Planner(TILING, chunk=8)
    together = planner.plan(tables_of(rows), np.array(seq_lens))
    require_cover(together, tables_of(rows), seq_lens)
    for row, blocks in enumerate(rows):
        alone = planner.plan(tables_of([blocks]), np.array([seq_lens[row]]))
        mine = together.items[together.items[:, 2] == row]
        assert mine[:, 3:].tolist() == alone.items[:, 3:].tolist()
        assert (mine[:, 3] % 8 == 0).all()
        ends = np.minimum(mine[:, 4], seq_lens[row])
        assert (ends - mine[:, 3]).max() <= 8


def test_a_fixed_chunk_stays_fixed_while_its_row_grows() -> None:
    tables = tables_of([list(range(10))])
    planner = Planner(TILING, chunk=8)
    for seq_len in range(40):
        plan = planner.plan(tables, np.array([seq_len]))
        starts = sorted(plan.items[:, 3].tolist())
        assert starts == list(range(0, max(seq_len, 1), 8))


def test_a_chunk_that_no_tile_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk=6: must be a positive multiple of 4 kv tokens"):
        Planner(TILING, chunk=6)


def test_a_plan_holds_while_rows_grow_into_their_own_blocks() -> None:
    prefix = list(range(100, 120))
    planner = Planner(TILING)
    tables = tables_of([[*prefix, 1], [*prefix, 2], [4]])
    plan = planner.plan(tables, np.array([82, 81, 3]))
    wider = tables_of([[*prefix, 1, 3], [*prefix, 2], [4, 5]])
    for grown in ([83, 82, 4], [84, 83, 5], [85, 84, 5], [88, 84, 6]):
        assert planner.plan(wider, np.array(grown)) is plan
        require_cover(plan, wider, grown)


def test_a_row_that_outgrows_its_plan_gets_a_new_plan() -> None:
    planner = Planner(TILING)
    tables = tables_of([list(range(50)), [60]])
    plan = planner.plan(tables, np.array([8, 1]))
    assert planner.plan(tables, np.array([200, 1])) is not plan


def test_a_row_may_double_its_share_of_the_work() -> None:
    planner = Planner(TILING)
    tables = tables_of([list(range(50)), [60]])
    plan = planner.plan(tables, np.array([8, 1]))  # one item of up to 8 tokens for each row
    assert planner.plan(tables, np.array([16, 1])) is plan
    assert planner.plan(tables, np.array([17, 1])) is not plan


@pytest.mark.parametrize("window", [None, 3, 13])
@pytest.mark.parametrize("first", range(1, 18, 2))
def test_items_of_a_fixed_chunk_end_at_chunk_boundaries(window: int | None, first: int) -> None:
    tables = tables_of([list(range(10))])
    planner = Planner(TILING, chunk=8, window=window)
    for seq_len in range(first, 40):
        plan = planner.plan(tables, np.array([seq_len]))
        require_cover(plan, tables, [seq_len], window=window)
        for start, stop in plan.items[:, 3:].tolist():
            assert start // 8 == (min(stop, seq_len) - 1) // 8


@pytest.mark.parametrize("cut", [79, 41, 4, 0])
@pytest.mark.parametrize("window", [None, 90])
def test_cutting_a_row_below_its_shared_prefix_needs_replanning(
    cut: int, window: int | None
) -> None:
    prefix = list(range(100, 120))
    planner = Planner(TILING, window=window)
    tables = tables_of([[*prefix, row] for row in range(3)])
    plan = planner.plan(tables, np.array([83, 82, 81]))
    assert plan.num_large > 0
    seq_lens = [84, cut, 82]
    after = planner.plan(tables, np.array(seq_lens))
    assert after is not plan
    require_cover(after, tables, seq_lens, window=window)


MANY = ([[0, 1, 2], [3, 4, 5]], [9, 9], [0, 3, 4])  # tables, seq_lens and cu_seqlens_q


@pytest.mark.parametrize(
    "changed",
    [
        ([[0, 1, 2], [3, 4, 6]], [9, 9], [0, 3, 4]),
        ([[0, 1, 2, 7], [3, 4, 5, 8]], [9, 9], [0, 3, 4]),
        ([[0, 1], [3, 4]], [8, 8], [0, 3, 4]),
        ([[0, 1, 2], [3, 4, 5]], [10, 9], [0, 3, 4]),
        ([[0, 1, 2], [3, 4, 5]], [9, 8], [0, 3, 4]),
        ([[0, 1, 2], [3, 4, 5]], [9, 9], [0, 1, 4]),
        ([[0, 1, 2], [3, 4, 5]], [9, 9], [0, 1, 2]),
        ([[0, 1, 2], [3, 4, 5]], [9, 9], None),
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_plan_for_several_queries_holds_for_nothing_else(changed: Any, reverse: bool) -> None:
    before, after = (changed, MANY) if reverse else (MANY, changed)
    planner = Planner(TILING)
    plan = plan_for(planner, *before)
    assert plan_for(planner, *before) is plan
    other = plan_for(planner, *after)
    assert other is not plan
    tables, seq_lens, starts = after
    counts = [1] * len(seq_lens) if starts is None else np.diff(starts).tolist()
    require_cover(other, tables_of(tables), seq_lens, counts)


def plan_for(planner: Planner, tables: Any, seq_lens: list[int], starts: Any) -> WorkPlan:
    cu_seqlens_q = None if starts is None else np.array(starts)
    return planner.plan(tables_of(tables), np.array(seq_lens), cu_seqlens_q)


@pytest.mark.parametrize("change", ["fork", "finish", "join", "replace"])
def test_rows_that_fork_join_or_finish_need_a_new_plan(change: str) -> None:
    prefix = list(range(100, 120))
    rows = [[*prefix, 1], [*prefix, 2], list(range(200, 221))]
    planner = Planner(TILING)
    seq_lens = np.full(3, 81)
    plan = planner.plan(tables_of(rows), seq_lens)
    if change == "fork":
        rows.append(rows[2])
    elif change == "finish":
        rows.pop(0)
    elif change == "join":
        rows.append(list(range(300, 321)))
    else:
        rows[1] = list(range(400, 421))
    tables = tables_of(rows)
    seq_lens = np.full(len(rows), 81)
    after = planner.plan(tables, seq_lens)
    assert after is not plan
    require_cover(after, tables, seq_lens.tolist())


def test_callers_that_take_turns_keep_their_plans() -> None:
    planner = Planner(TILING, keep=2)
    batches = [tables_of([list(range(start, start + 9))]) for start in (0, 50)]
    plans = [planner.plan(tables, np.array([33])) for tables in batches]
    assert [planner.plan(tables, np.array([34])) for tables in batches] == plans


def test_the_plans_used_last_are_the_ones_remembered() -> None:
    planner = Planner(TILING, keep=2)

    def plan(start: int) -> WorkPlan:
        return planner.plan(tables_of([list(range(start, start + 9))]), np.array([33]))

    first, second = plan(0), plan(50)
    assert plan(0) is first
    third = plan(100)
    assert plan(0) is first
    assert plan(100) is third
    assert plan(50) is not second


def test_tables_with_too_few_blocks_for_a_plan_get_another() -> None:
    planner = Planner(TILING)
    tables = tables_of([list(range(10))])
    plan = planner.plan(tables, np.array([33]))
    assert planner.plan(tables[:, :8], np.array([33])) is plan  # the newest block does not matter
    assert planner.plan(tables[:, :7], np.array([33])) is not plan


def test_a_block_freed_behind_the_window_needs_no_new_plan() -> None:
    planner = Planner(TILING, window=8)
    tables = tables_of([list(range(10))])
    plan = planner.plan(tables, np.array([24]))
    tables[0, 2:4] = -1
    assert planner.plan(tables, np.array([25])) is plan
    tables[0, 4] = -1  # the window still reaches tokens 17 to 24
    assert planner.plan(tables, np.array([25])) is not plan


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_block_freed_by_one_row_is_read_through_another(ahead: int) -> None:
    planner = Planner(TILING, window=140)
    rows = [[*range(100, 140), *range(10 * row, 10 * row + 7)] for row in (1, 2)]
    seq_lens = [170, 170]
    seq_lens[ahead] = 180
    plan = planner.plan(tables_of(rows), np.array(seq_lens))
    assert plan.num_large > 0
    seq_lens[ahead] = 184
    rows[ahead][:11] = [-1] * 11  # tokens 0 to 43, of which the other row still sees 30 to 43
    tables = tables_of(rows)
    require_cover(planner.plan(tables, np.array(seq_lens)), tables, seq_lens, window=140)


def test_a_window_reaches_further_back_in_a_shortened_row() -> None:
    planner = Planner(TILING, window=8)
    tables = tables_of([list(range(10))])
    planner.plan(tables, np.array([40]))
    plan = planner.plan(tables, np.array([30]))
    require_cover(plan, tables, [30], window=8)


def test_items_start_where_a_shared_prefix_ends_however_tiles_lie() -> None:
    prefix = list(range(100, 121))
    tables = tables_of([[*prefix, 1, 3], [*prefix, 2]])
    plan = Planner(TILING._replace(align=8)).plan(tables, np.array([90, 85]))
    assert require_cover(plan, tables, [90, 85]) == 84 + 6 + 1


def test_arrays_of_the_caller_may_change_afterwards() -> None:
    planner = Planner(TILING)
    tables, seq_lens = tables_of([list(range(10))]), np.array([33])
    plan = planner.plan(tables, seq_lens)
    before = plan.items.copy()
    tables[:], seq_lens[:] = 7, 1
    assert np.array_equal(plan.items, before)
    assert planner.plan(tables_of([list(range(10))]), np.array([33])) is plan


@pytest.mark.parametrize(
    ("cu_seqlens_q", "changed"),
    [(None, 0), (None, 1), ([0, 2, 3], 0), ([0, 2, 3], 1), ([0, 2, 3], 2)],
)
def test_changes_in_place_are_noticed(cu_seqlens_q: list[int] | None, changed: int) -> None:
    planner = Planner(TILING)
    arrays = [tables_of([list(range(9)), list(range(20, 29))]), np.array([33, 33])]
    if cu_seqlens_q is not None:
        arrays.append(np.array(cu_seqlens_q))
    plan = planner.plan(*arrays)
    arrays[changed][1] -= 1  # other blocks, a shorter row, a query of the next row
    assert planner.plan(*arrays) is not plan


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
        st.sampled_from([None, None, 8, 32]),
        st.sampled_from([1, 4, 8]),
    )
    def holds(
        history: list[tuple[str, int, int]], window: int | None, chunk: int | None, align: int
    ) -> None:
        if chunk is not None and chunk % align:
            chunk = align
        planner = Planner(TILING._replace(align=align), window=window, chunk=chunk)
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
