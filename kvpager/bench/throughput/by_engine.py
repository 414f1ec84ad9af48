"""kvpager's own `Engine`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import Any

from kvpager.bench.models import share_weights
from kvpager.bench.throughput.results import Memory, Moment, Run, Served
from kvpager.bench.throughput.systems import Options, Progress
from kvpager.bench.throughput.workload import MONOTONIC, Clock, Item, Workload, arrivals
from kvpager.engine.metrics import StepRecord
from kvpager.engine.stream import Output, Stream
from kvpager.errors import BadInput
from kvpager.integrations.huggingface.cache.budget import Budget
from kvpager.integrations.huggingface.engine import Engine
from kvpager.integrations.huggingface.runner.model_info import inspect_model
from kvpager.scheduling.scheduler import SchedulerStats


class EngineSystem:
    """An engine that stays open between runs. No run finds the prompts of another run."""

    def __init__(
        self,
        model: Any,
        options: Options,
        workload: Workload,
        *,
        compiled: bool = False,
        clock: Clock = MONOTONIC,
    ) -> None:
        self._model, self._clock = share_weights(model), clock
        info = inspect_model(self._model)
        config = options.engine_config()
        budget = Budget(None, config.block_size, kv_cache_dtype=config.kv_cache_dtype)
        self.block_bytes = budget.block_bytes(info.shapes, info.dtype)
        self._start = 0.0
        self._moments: list[Moment] = []
        self._num_runs = 0
        if config.memory is None:  # 2 % more: the scheduler reserves a few blocks
            blocks = workload.blocks(config.block_size) * len(info.windows)
            memory = (blocks * 51 // 50 + 1) * self.block_bytes
            config = dataclasses.replace(config, memory=memory)
        if compiled:  # the weights are constant during a measurement: the compiler may pack them
            config = dataclasses.replace(config, compile={"options": {"freezing": True}})
        try:
            self.engine = Engine(self._model, config, on_step=self._note)
        except ValueError as error:  # no block fits
            raise BadInput(str(error)) from error

    def run(self, workload: Workload, progress: Progress) -> Run:
        """Serve the requests. Raises: `KVPagerError` if a request fails or can never fit."""
        at_once = sum(item.arrival <= 0 for item in workload.items)
        self._num_runs += 1
        with self._fresh():
            before, copied = self._counts()
            self._moments = []
            self._start = self._clock.now()
            coming = arrivals(workload, self._start, self._clock)
            streams = [self._submit(item) for _, item in itertools.islice(coming, at_once)]
        streams += [self._submit(item) for _, item in coming]
        outputs = []
        for stream in streams:
            outputs.append(stream.result())
            progress(1)
        after, now_copied = self._counts()
        served = [
            self._served(output, item.arrival)
            for output, item in zip(outputs, workload.items, strict=True)
        ]
        return Run(
            max(each.finished for each in served),
            served,
            memory=busiest(self._moments, self.block_bytes),
            swapped=after.total_preempted_by_swap - before.total_preempted_by_swap,
            recomputed=after.total_preempted_by_recompute - before.total_preempted_by_recompute,
            hit_tokens=after.total_reused_tokens - before.total_reused_tokens,
            tier_tokens=sum(sum(each.cached_tokens_by_tier.values()) for each in outputs)
            if self.engine.config.tiers
            else None,
            copied_blocks=now_copied - copied,
            moments=self._moments,
        )

    def _counts(self) -> tuple[SchedulerStats, int]:
        stats = self.engine.stats()
        return stats.scheduler, stats.pool.total_copied

    def _fresh(self) -> contextlib.AbstractContextManager[None]:
        """Begin a run that finds no prompts of earlier runs.

        Without tiers, a pause drops them, and the first step sees all requests that are due. So the
        batching depends on the workload, not on how fast this thread submits. A pause would turn
        tiers off, so with tiers each run has its own namespace.
        """
        return contextlib.nullcontext() if self.engine.config.tiers else self.engine.pause()

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()

    def _submit(self, item: Item) -> Stream:
        namespace = f"run {self._num_runs}" if self.engine.config.tiers else None
        try:
            return self.engine.submit(
                item.prompt, max_new_tokens=item.new_tokens, namespace=namespace
            )
        except ValueError as error:  # the request is too long for the pool
            raise BadInput(str(error)) from error

    def _served(self, output: Output, arrival: float) -> Served:
        assert output.first_token_time is not None
        assert output.finished_time is not None
        first, finished = output.first_token_time - self._start, output.finished_time - self._start
        return Served(arrival, first, finished, output.token_ids)

    def _note(self, record: StepRecord) -> None:
        scheduler, pool = record.stats.scheduler, record.stats.pool
        held = pool.num_held + pool.num_kept
        slots = held * pool.block_size
        self._moments.append(
            Moment(
                self._clock.now() - self._start,
                record.rows,
                record.tokens,
                held,
                pool.num_blocks,
                pool.num_tokens / slots if slots else 1.0,
                scheduler.num_running,
                scheduler.num_waiting,
                scheduler.num_preempted,
            )
        )


def busiest(moments: list[Moment], block_bytes: int) -> Memory | None:
    """Return the memory of the step that holds the most blocks. O(steps)."""
    if not moments:
        return None
    most = max(moments, key=lambda moment: moment.held_blocks)
    return Memory(most.held_blocks * block_bytes, most.slot_use)
