"""What an engine counts."""

from __future__ import annotations

from typing import NamedTuple

from kvpager.blocks.stats import Stats
from kvpager.scheduling.stats import SchedulerStats


class EngineStats(NamedTuple):
    """A moment's counts.

    `model_changes` counts changes of the model's weights, hooks or settings; each dropped the
    cached prompts. `unshared` is the reason why no prompts are shared now, or None.
    """

    scheduler: SchedulerStats
    pool: Stats
    busy_seconds: float  # in forward passes and sampling, since the engine was made
    model_changes: int = 0
    unshared: str | None = None


class StepRecord(NamedTuple):
    """One step: what it computed, how long that took, and the counts after it."""

    rows: int
    tokens: int
    seconds: float
    stats: EngineStats

    @property
    def slot_use(self) -> float:
        """Of the token slots in held blocks, the share that holds a token; 1 where none is held."""
        pool = self.stats.pool
        slots = pool.num_held * pool.block_size
        return pool.num_tokens / slots if slots else 1.0
