"""The shown steps of a recording: the state of all blocks and sequences at each."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np

from kvpager.recording.format import Counts, TierCounts, Totals
from kvpager.recording.replay import ReplayedSequence, ReplayedState
from kvpager.report.cells import Array, Blocks, Cells, Grid, owner_of
from kvpager.report.prefixes import Node, prefix_tree


@dataclass(frozen=True, slots=True)
class Moment:
    """The state at a shown step.

    `saved` counts the blocks that would be there besides if no block were shared. `lengths` are
    the tokens of each sequence that a naive allocator would give a region. `num_queued` counts the
    requests without a sequence.
    """

    step: int
    t: float
    num_blocks: int
    counts: Counts
    totals: Totals
    tiers: tuple[TierCounts, ...]
    cells: Cells
    saved: int
    tree: list[Node]
    lengths: dict[int, int]
    requests: dict[int, int | None]
    num_running: int
    num_queued: int


def shown_steps(num_steps: int, num_frames: int) -> list[int]:
    """Return at most `num_frames` steps, spread evenly from the first to the last. O(frames)."""
    count = min(num_steps, num_frames)
    return sorted({round(i * (num_steps - 1) / max(1, count - 1)) for i in range(count)})


class Camera:
    """Takes the state of a replay as moments. Blocks are counted from the first one handed out."""

    def __init__(self, state: ReplayedState, grid: Grid) -> None:
        self._state, self._grid = state, grid
        self._first = state.header.num_reserved

    def moment(self, step: int, t: float) -> Moment:
        """Return the state after a step. O(blocks + table entries)."""
        state, entries = self._state, self._entries()
        blocks = self._blocks(entries)
        shown = {number: each for number, each in state.sequences.items() if self._counts(each)}
        return Moment(
            step=step,
            t=t,
            num_blocks=state.num_blocks - self._first,
            counts=state.counts,
            totals=state.totals,
            tiers=state.tiers,
            cells=self._grid.cells(blocks),
            saved=int(np.maximum(blocks.holders - 1, 0).sum()),
            tree=self._tree(entries, blocks.holders),
            lengths={number: max(each.lengths) for number, each in shown.items()},
            requests={number: each.request for number, each in shown.items()},
            num_running=sum(not self._is_swapped(each) for each in shown.values()),
            num_queued=len(state.requests.keys() - {each.request for each in shown.values()}),
        )

    def _counts(self, sequence: ReplayedSequence) -> bool:
        return is_of_user(self._state, sequence.request)

    def _is_swapped(self, sequence: ReplayedSequence) -> bool:
        request = self._state.requests.get(-1 if sequence.request is None else sequence.request)
        return request is not None and request.state == "swapped"

    def _entries(self) -> _Entries:
        sequences = self._state.sequences.values()
        tables = [table for each in sequences for table in each.tables]
        sizes = np.array([len(table) for table in tables], np.int64)
        blocks = np.fromiter(chain.from_iterable(tables), np.int64, int(sizes.sum()))
        columns = np.arange(len(blocks)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        lengths = np.array([length for each in sequences for length in each.lengths], np.int64)
        size = self._grid.block_size
        tokens = np.clip(np.repeat(lengths, sizes) - columns * size, 0, size)
        return _Entries(sizes, blocks - self._first, tokens)

    def _blocks(self, entries: _Entries) -> Blocks:
        size, num_blocks = self._grid.block_size, self._grid.num_blocks
        live, held, cached, owners = np.zeros((4, num_blocks), np.int64)
        there = entries.blocks >= 0
        blocks = entries.blocks[there]
        holders = np.bincount(blocks, minlength=num_blocks)
        np.maximum.at(live, blocks, entries.tokens[there])
        groups = len(self._state.header.windows)
        mine = [owner_of(each.request) for each in self._state.sequences.values()]
        rows = np.repeat(np.array(mine, np.int64), groups)
        owners[blocks] = np.repeat(rows, entries.sizes)[there]
        owners[holders > 1] = 0
        held[holders > 0] = size
        known = np.fromiter(self._state.cached, np.int64, len(self._state.cached)) - self._first
        cached[known[known >= 0]] = size
        cached[holders > 0] = 0
        return Blocks(live, held, cached, holders, owners)

    def _tree(self, entries: _Entries, holders: Array) -> list[Node]:
        """Return the prefix tree of the first group of layers."""
        groups = len(self._state.header.windows)
        requests = [each.request for each in self._state.sequences.values()]
        is_first = np.arange(len(entries.sizes)) % groups == 0
        blocks = entries.blocks[np.repeat(is_first, entries.sizes)]
        return prefix_tree(requests, entries.sizes[is_first], blocks, holders)


@dataclass(frozen=True, slots=True)
class _Entries:
    """All tables, one after the other: the blocks of each, and per entry its block and tokens.

    Blocks count from the first one handed out; below 0 for no device block.
    """

    sizes: Array
    blocks: Array
    tokens: Array


def is_of_user(state: ReplayedState, request: int | None) -> bool:
    """Return True for a sequence of a request, and for any if sequences have no requests."""
    return request is not None or state.header.source in ("patch", "manager")
