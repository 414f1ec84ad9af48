"""Serve the same requests with an engine of each mode, in turns, in the same bytes.

Two runs answer two questions:

    all at once         how many requests fit at once, how much of the memory holds tokens, and how
                        fast they are served
    one after another   requests arrive at random (Poisson) at rates that are fractions of what mode
                        "paged" serves: how many tokens per second each mode serves within one bound
                        of the latency
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvpager import _validate as arguments
from kvpager.bench import models
from kvpager.bench.throughput.by_engine import EngineSystem
from kvpager.bench.throughput.comparison import Stage, take_turns
from kvpager.bench.throughput.results import Run
from kvpager.bench.throughput.systems import Options, System
from kvpager.bench.throughput.workload import Workload
from kvpager.integrations.huggingface.cache.budget import Budget
from kvpager.integrations.huggingface.runner.model_info import inspect_model
from kvpager.modes import ModeName, mode_named

MODES: tuple[ModeName, ...] = ("reserved", "paged", "virtual")
_REGIONS = 4
_LIMIT = 1.5  # the bound of latency, as a multiple of that of "paged" at the lowest rate

# Callback: requests per second, None for all at once -> the requests.
Arriving = Callable[[float | None], Workload]


@dataclass(slots=True)
class ModeFigures:
    """The figures of one mode. Latency is from a request's arrival to its last token."""

    mode: ModeName
    runs: list[Run]  # of all requests at once
    latencies: dict[float, float] = field(default_factory=dict)  # requests per second -> p90, s
    within_limit: float | None = None  # tokens per second

    @property
    def tokens_per_second(self) -> float:
        """Return the median over runs. O(tokens)."""
        return statistics.median(run.tokens_per_second for run in self.runs)

    def as_record(self) -> dict[str, Any]:
        """Return the figures as plain data. O(steps)."""
        last = self.runs[-1]
        waiting = [moment for moment in last.moments if moment.waiting] or last.moments
        held = np.array([moment.held_blocks for moment in waiting], np.float64)
        live = held * [moment.slot_use for moment in waiting]
        return {
            "mode": self.mode,
            "requests_at_once": max((moment.running for moment in last.moments), default=0),
            "live_share": float(live.sum() / held.sum()) if held.sum() else None,
            "tokens_per_s": self.tokens_per_second,
            "tokens_per_s_of_each_repeat": [run.tokens_per_second for run in self.runs],
            "copied_blocks": last.copied_blocks,
            "preempted": (last.swapped or 0) + (last.recomputed or 0),
            "p90_latency_s": p90_latency(last),
            "p90_latency_s_by_rate": self.latencies,
            "tokens_per_s_within_limit": self.within_limit,
        }


def p90_latency(run: Run) -> float:
    """Return the time in which nine of ten requests are served. O(requests)."""
    return float(np.percentile([each.finished - each.arrival for each in run.served], 90))


def engine_options(
    model: Any, memory: str | None, max_model_len: int, block_size: int, threads: int | None
) -> Options:
    """Return the options of the engines of all modes. O(layers).

    Without `memory`, there is room for four regions of `max_model_len` tokens.
    Raises: `ValueError` for an invalid argument.
    """
    most = arguments.count("max_model_len", max_model_len, at_least=1)
    info = inspect_model(model, one_group=True)
    block_bytes = Budget(None, block_size).block_bytes(info.shapes, info.dtype)
    num_bytes = _REGIONS * -(-most // block_size) * block_bytes
    options = Options(
        memory=memory or num_bytes,
        block_size=block_size,
        threads=threads,
        engine={"max_model_len": most},
    )
    options.check()
    return options


def check_modes(names: Iterable[str], fractions: Sequence[float]) -> list[ModeName]:
    """Return the modes by their names, without repeats. Raises: `ValueError`. O(modes)."""
    found: list[Any] = list(dict.fromkeys(name.strip() for name in names))
    for name in found:
        mode_named(name)
    if fractions and "paged" not in found:
        raise ValueError("rates: fractions of what paged serves. Add paged to the modes.")
    return found


def measure(
    model: Any,
    arriving: Arriving,
    options: Options,
    *,
    modes: Sequence[ModeName] = MODES,
    fractions: Sequence[float] = (),
    repeats: int = 1,
    stage: Stage = lambda name, repeat, num_requests: lambda count: None,
) -> tuple[list[ModeFigures], float | None]:
    """Measure each mode; return its figures, and the bound of latency in seconds.

    Args:
        model: the model to serve.
        arriving: makes the requests for a rate. They differ in nothing else.
        options: of the engines; `memory` is the same for all, and must be given.
        modes: which, "paged" among them if there are `fractions`.
        fractions: rates of arrival, as fractions of the requests per second that "paged" serves.
        repeats: runs with all requests at once.
        stage: as for `kvpager.bench.throughput.comparison.measure`.

    Raises: `ValueError` for an invalid argument; `KVPagerError` if an engine fails.
    """
    workload = arriving(None)
    workload.check(models.max_length(model))
    with contextlib.ExitStack() as stack:
        stack.enter_context(models.torch_threads(options.threads))
        stack.enter_context(models.quiet_transformers())
        systems: dict[str, System] = {}
        for mode in modes:
            of_mode = options.with_engine(mode=mode)
            system = EngineSystem(model, of_mode, workload)
            systems[mode] = stack.enter_context(contextlib.closing(system))
            few = workload.warm_up()
            system.run(few, stage(mode, 0, len(few.items)))
        runs = take_turns(systems, dict.fromkeys(systems, workload), repeats, stage)
        found = {mode: ModeFigures(mode, runs[mode]) for mode in modes}
        if not fractions:
            return list(found.values()), None
        served = found["paged"].tokens_per_second / (workload.new_tokens / len(workload.items))
        for fraction in sorted(fractions):
            rate = fraction * served
            works = dict.fromkeys(systems, arriving(rate))
            at_rate = take_turns(systems, works, 1, stage)
            for mode in modes:
                found[mode].latencies[rate] = p90_latency(at_rate[mode][0])
    return list(found.values()), _compare_within_limit(found, workload)


def _compare_within_limit(found: dict[ModeName, ModeFigures], workload: Workload) -> float:
    """Note the tokens per second at which each mode reaches one bound; return the bound."""
    limit = _LIMIT * found["paged"].latencies[min(found["paged"].latencies)]
    new_tokens = workload.new_tokens / len(workload.items)
    for figures in found.values():
        figures.within_limit = new_tokens * rate_within(figures.latencies, limit)
    return limit


def rate_within(latencies: dict[float, float], limit: float) -> float:
    """Return the highest rate whose latency is within the limit, interpolated between rates.

    Between 0 and the lowest rate, latency is taken to rise in proportion. O(rates).

    >>> rate_within({1.0: 2.0, 2.0: 4.0}, 3.0)
    1.5
    """
    below_rate = below = 0.0
    for rate, latency in sorted(latencies.items()):
        if latency > limit:
            return below_rate + (rate - below_rate) * (limit - below) / (latency - below)
        below_rate, below = rate, latency
    return below_rate
