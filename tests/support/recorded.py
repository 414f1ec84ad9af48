"""A recorder whose lines are read back at once and compared with the manager."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvpager.blocks.manager import BlockManager
from kvpager.recording.format import Header, Step, encoded_header, parse_header, parse_line
from kvpager.recording.recorder import Recorder
from kvpager.recording.replay import ReplayedState
from kvpager.scheduling.progress import Progress


class Lines:
    """Keeps lines in place of a file."""

    is_open = True

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.error: object = None

    def write(self, line: bytes) -> None:
        self.lines.append(line)

    def give_up(self, why: object) -> None:
        self.error = why

    def close(self) -> None:
        """Keep the lines."""


class Recorded:
    """A manager, its recorder, and the state that its lines describe."""

    def __init__(self, manager: BlockManager, progress: Progress | None = None) -> None:
        self.manager = manager
        self.lines = Lines()
        self.recorder = Recorder(self.lines, manager, progress)  # type: ignore[arg-type]
        stats = manager.stats()
        header = Header(
            kvpager="0",
            source="manager",
            mode="paged",
            started=0.0,
            block_size=stats.block_size,
            num_blocks=stats.num_blocks,
            num_host_blocks=stats.num_host_blocks,
            windows=manager.windows,
        )
        self.state = ReplayedState(parse_header(encoded_header(header)))
        self.steps: list[Step] = []

    def step(self, plan: Any = None) -> Step:
        """Record a step, replay it, and compare all of the state."""
        self.recorder.step(plan)
        assert self.lines.error is None
        step = parse_line(self.lines.lines[-1], len(self.lines.lines) + 1)
        assert isinstance(step, Step)
        self.state.apply(step)
        self.steps.append(step)
        self.check()
        return step

    def check(self) -> None:
        """The replayed state is the manager's."""
        state, manager, replayed = self.manager._state, self.manager, self.state
        rows, stats = state.rows, manager.stats()
        real = [
            (
                [int(rows.lengths[row]) for row in rows.rows_of(first)],
                [rows.blocks(row).tolist() for row in rows.rows_of(first)],
            )
            for first in range(0, len(rows.prompts), rows.num_groups)
            if rows.prompts[first] is not None
        ]
        mine = [(each.lengths, each.tables) for each in replayed.sequences.values()]
        assert sorted(mine) == sorted(real)
        assert replayed.num_blocks == stats.num_blocks
        assert sorted(replayed.cached) == np.flatnonzero(state.pool.cached).tolist()
        for before, node in state.index.runs():
            chain = [before, *node.blocks.tolist()]
            parents = [replayed.cached[block] for block in chain[1:]]
            assert parents == chain[:-1]
        counts = replayed.counts
        assert counts[:4] == (stats.num_held, stats.num_cached, stats.num_kept, stats.num_free)
        assert counts.host == state.host.num_held
        assert counts.tokens == stats.num_tokens == sum(replayed.filled().values())
        assert set(replayed.holders()) == set(np.flatnonzero(state.pool.refs).tolist())
        assert replayed.totals[:2] == (stats.total_copied, stats.total_evicted)
