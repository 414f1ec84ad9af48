"""The counts of an engine."""

from __future__ import annotations

from typing import NamedTuple

from kvpager.blocks.stats import Stats
from kvpager.scheduling.scheduler import SchedulerStats
from kvpager.storage.tiers.tiering_stats import TieringStats


class EngineStats(NamedTuple):
    """Counts at one moment.

    `model_changes` counts changes of the model's weights, hooks or settings; each dropped the
    cached prefixes. `unshared` is the reason why requests share no prefixes now, or None. `tiers`
    is None for an engine without tiers.
    """

    scheduler: SchedulerStats
    pool: Stats
    busy_seconds: float  # in forward passes and sampling, in total
    model_changes: int = 0
    unshared: str | None = None
    tiers: TieringStats | None = None


class StepRecord(NamedTuple):
    """One step: its rows and tokens, its duration, and the counts after it."""

    rows: int
    tokens: int
    seconds: float
    stats: EngineStats

    @property
    def slot_use(self) -> float:
        """The share of token slots in held blocks that hold a token; 1 if no block is held."""
        pool = self.stats.pool
        slots = pool.num_held * pool.block_size
        return pool.num_tokens / slots if slots else 1.0
