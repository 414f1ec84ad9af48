"""Block tables, and a check that a work plan covers what every query sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvpager.kernels.work_items import Tiling, WorkPlan

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
        members = plan.members[first : first + count].tolist()
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
