"""Starts the recorder of an engine."""

from __future__ import annotations

import os
from functools import partial
from typing import NamedTuple, cast

from kvpager.blocks.manager import BlockManager
from kvpager.engine.fetching import Fetching
from kvpager.engine.runner import Runner
from kvpager.recording.recorder import Described, Recorder, TierTotals
from kvpager.scheduling.scheduler import Scheduler


class Record(NamedTuple):
    """A file to record an engine in, and what the engine does not know; see `Header`."""

    path: str | os.PathLike[str]
    max_tokens: int | None = None
    policy: str | None = None
    eviction: str | None = None
    model: str | None = None
    mode: str = "paged"


def record_engine(
    scheduler: Scheduler, runner: Runner, fetching: Fetching | None, record: Record
) -> Recorder:
    """Start to record a scheduler, its manager and its tiers. O(blocks).

    Raises: as `Recorder.open`.
    """
    tiers = [] if fetching is None else fetching.stats().tiers
    described = Described(
        source="engine",
        mode=record.mode,
        block_bytes=runner.block_bytes,
        max_tokens=record.max_tokens,
        policy=record.policy,
        eviction=record.eviction,
        model=record.model,
        tiers=tuple(tier.name for tier in tiers),
    )
    counts = None if fetching is None else partial(_tier_totals, fetching)
    manager = cast(BlockManager, scheduler.manager)  # `open` refuses others
    return Recorder.open(record.path, manager, described, scheduler.progress(), counts)


def _tier_totals(fetching: Fetching) -> TierTotals:
    stores = [tier.store for tier in fetching.stats().tiers]
    return [(store.num_blocks, store.loaded_bytes, store.saved_bytes) for store in stores]
