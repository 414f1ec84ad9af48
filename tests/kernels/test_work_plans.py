"""When a work plan serves later steps, and when it is made again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvpager.kernels.work_items import Planner, WorkPlan
from tests.support.work_items import TILING, require_cover, tables_of


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
