"""The counts of an engine, as plain numbers and as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from kvpager.blocks.metric_families import Families
from kvpager.blocks.stats import Stats, block_families
from kvpager.scheduling.scheduler import SchedulerStats
from kvpager.storage.tiers.metrics import tier_families
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


class HasEngineStats(Protocol):
    """The members of an engine that `EngineMetrics` needs."""

    @property
    def block_bytes(self) -> int:
        """The bytes of a block."""
        ...

    def stats(self) -> EngineStats:
        """Return current counts. O(blocks + sequences)."""
        ...


class EngineMetrics:
    """An engine's stats for `prometheus_client`: `REGISTRY.register(EngineMetrics(engine))`.

    Reports requests, steps, blocks and tiers. Needs the extra `kvpager[metrics]`. Several engines
    in a process need different prefixes. The registry keeps the engine until `unregister`.
    """

    def __init__(self, engine: HasEngineStats, prefix: str = "kvpager") -> None:
        """Report `engine`, also after it is closed. Raises: `ValueError` for a bad prefix."""
        self._engine = engine
        self._families = Families(prefix)

    def collect(self) -> Iterator[Any]:
        """Yield the metric families. O(blocks + sequences). Raises: `EngineClosed` in a fork."""
        make, stats = self._families, self._engine.stats()
        counts = stats.scheduler
        states = {
            ("waiting",): counts.num_waiting,
            ("running",): counts.num_running,
            ("preempted",): counts.num_preempted,
        }
        yield make.gauge("requests", "Live requests.", states, "state")
        yield make.gauge("running_sequences", "Running sequences.", counts.num_running_seqs)
        kinds = {
            ("swap",): counts.total_preempted_by_swap,
            ("recompute",): counts.total_preempted_by_recompute,
        }
        yield make.counter("preemptions", "Preempted requests.", kinds, "kind")
        for name, text, value in (
            ("steps", "Steps.", counts.total_steps),
            ("computed_tokens", "Tokens of prompts and replies computed.", counts.total_tokens),
            ("reused_tokens", "Tokens of prompts not computed.", counts.total_reused_tokens),
            ("busy_seconds", "Seconds in forward passes and sampling.", stats.busy_seconds),
            ("model_changes", "Changes of the model.", stats.model_changes),
        ):
            yield make.counter(name, text, value)
        yield from block_families(make, stats.pool, self._engine.block_bytes)
        if stats.tiers is not None:
            yield from tier_families(make, stats.tiers)
