"""The prefix tree at a step: runs of blocks that several sequences share, and who shares them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np

from kvpager.report.cells import Array

NODES_MAX = 16
REQUESTS_MAX = 8  # named at a node; the others are counted


class Node(TypedDict):
    """A run of blocks. `parent` is the index of the run before it, -1 for none."""

    parent: int
    blocks: int
    holders: int
    requests: list[int]


@dataclass(slots=True)
class _Run:
    parent: int | None  # the first block of the parent's run
    blocks: int
    holders: int
    requests: list[int] = field(default_factory=list)


def prefix_tree(
    requests: Sequence[int | None], sizes: Array, blocks: Array, holders: Array
) -> list[Node]:
    """Return the nodes that save the most blocks, each after its parent. O(table entries).

    Args:
        requests: the request of each sequence.
        sizes: int64 [sequences], the blocks of its table.
        blocks: int64 [sum of sizes], all tables, one after the other; below 0 for no device block.
        holders: int64 [blocks of the pool], the sequences that hold each block.

    A run is named by its first block, since a block is in one place of the tree.
    """
    counts = np.where(blocks >= 0, holders[np.maximum(blocks, 0)], 0)
    firsts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    # A sequence shares its leading blocks, up to the first that it holds alone.
    alone = np.cumsum(counts < 2)
    leading = alone == np.where(firsts > 0, alone[firsts - 1], 0)
    turns = np.diff(counts, prepend=0) != 0
    turns[firsts] = True
    starts = np.flatnonzero(leading & turns)
    ends = np.flatnonzero(turns | ~leading)
    ends = np.append(ends, len(blocks))[np.searchsorted(ends, starts, side="right")]
    runs: dict[int, _Run] = {}
    rows = np.searchsorted(np.cumsum(sizes), starts, side="right").tolist()
    row = parent = None
    for start, end, now in zip(starts.tolist(), ends.tolist(), rows, strict=True):
        parent, row = (parent if now == row else None), now
        name, request = int(blocks[start]), requests[now]
        run = runs.setdefault(name, _Run(parent, end - start, int(counts[start])))
        room = len(run.requests) < REQUESTS_MAX
        if room and request is not None and request not in run.requests[-1:]:
            run.requests.append(request)
        parent = name
    return _listed(runs)


def _listed(runs: dict[int, _Run]) -> list[Node]:
    def saved(name: int) -> int:
        return runs[name].blocks * (runs[name].holders - 1)

    kept: dict[int, int] = {}
    listed: list[Node] = []
    # A parent comes first: it has all the holders of its children, but may have fewer blocks.
    for name in sorted(runs, key=saved, reverse=True)[:NODES_MAX]:
        path: list[int] = []
        above: int | None = name
        while above is not None and above not in kept:
            path.append(above)
            above = runs[above].parent
        for each in reversed(path):
            run = runs[each]
            kept[each] = len(listed)
            parent = -1 if run.parent is None else kept[run.parent]
            listed.append(
                {
                    "parent": parent,
                    "blocks": run.blocks,
                    "holders": run.holders,
                    "requests": run.requests,
                }
            )
    return listed[: 2 * NODES_MAX]
