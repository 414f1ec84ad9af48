"""The results of a run, and the figures of several runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


@dataclass(slots=True)
class Served:
    """A served request. Times are seconds since the start of the run."""

    arrival: float
    first_token: float
    finished: float
    tokens: list[int]

    @property
    def to_first_token(self) -> float:
        """Return the TTFT: seconds from arrival to the first token."""
        return self.first_token - self.arrival

    @property
    def per_token(self) -> float | None:
        """Return the mean seconds per token after the first; None for a single token."""
        if len(self.tokens) < 2:
            return None
        return (self.finished - self.first_token) / (len(self.tokens) - 1)


class Moment(NamedTuple):
    """The state of a system after a step."""

    seconds: float
    rows: int
    tokens: int
    held_blocks: int  # reserved ones included
    pool_blocks: int
    slot_use: float  # of the slots in held blocks, the share that holds a token
    running: int
    waiting: int
    preempted: int


class Memory(NamedTuple):
    """The KV cache at its peak."""

    held_bytes: int
    live_share: float  # KV utilisation: share of held token slots whose token is still needed


@dataclass(slots=True)
class Run:
    """One run of a system over the requests. None: the system does not report it."""

    seconds: float  # from the first arrival to the last token
    served: list[Served]
    memory: Memory | None = None
    swapped: int | None = None  # preemptions by swap
    recomputed: int | None = None  # preemptions by recompute
    hit_tokens: int | None = None  # of prompts, found in the prefix cache
    tier_tokens: int | None = None  # of those, loaded from tiers
    copied_blocks: int | None = None  # on the device
    moments: list[Moment] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Return the number of generated tokens. O(requests)."""
        return sum(len(each.tokens) for each in self.served)

    @property
    def tokens_per_second(self) -> float:
        """Return the generated tokens per second. O(requests)."""
        return self.num_tokens / self.seconds

    def check(self, expected: Sequence[int]) -> None:
        """Raise `ValueError` unless every request got all its tokens. O(requests)."""
        for number, (each, count) in enumerate(zip(self.served, expected, strict=True)):
            if len(each.tokens) != count:
                raise ValueError(f"request {number} got {len(each.tokens)} of {count} tokens")


@dataclass(slots=True)
class Figures:
    """The figures of one system: medians over its runs."""

    system: str
    num_requests: int
    runs: list[Run]
    note: str | None = None
    over_kvpager: float | None = None

    @property
    def last(self) -> Run:
        """Return the last run. O(1)."""
        return self.runs[-1]

    def as_record(self) -> dict[str, Any]:
        """Return the figures as plain data. Times are in seconds. O(tokens)."""
        first = [np.array([each.to_first_token for each in run.served]) for run in self.runs]
        later = [
            [each.per_token for each in run.served if each.per_token is not None]
            for run in self.runs
        ]
        rates = [run.tokens_per_second for run in self.runs]
        last = self.last
        return {
            "system": self.system,
            "requests": self.num_requests,
            "repeats": len(self.runs),
            "generated_tokens": last.num_tokens,
            "seconds": _median(run.seconds for run in self.runs),
            "tokens_per_s": _median(rates),
            "tokens_per_s_of_each_repeat": rates,
            "over_kvpager": self.over_kvpager,
            "first_token_s_median": _median(float(np.median(each)) for each in first),
            "first_token_s_p99": _median(float(np.percentile(each, 99)) for each in first),
            "per_token_s_median": _median(statistics.median(each) for each in later if each),
            "kv_peak_bytes": _median(run.memory.held_bytes for run in self.runs if run.memory),
            "kv_live_share": _median(run.memory.live_share for run in self.runs if run.memory),
            "preempted_by_swap": last.swapped,
            "preempted_by_recompute": last.recomputed,
            "prefix_hit_tokens": last.hit_tokens,
            "tier_hit_tokens": last.tier_tokens,
            "note": self.note,
        }


def _median(values: Any) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def compare(runs: dict[str, list[Run]], notes: dict[str, str]) -> list[Figures]:
    """Return the figures of each system, with its speed relative to kvpager. O(tokens).

    The relative speed is the median over repeats of the ratio of the two runs of a repeat.
    """
    found = []
    for name, mine in runs.items():
        figures = Figures(name, len(mine[0].served), mine, notes.get(name))
        if "kvpager" in runs:
            pairs = zip(mine, runs["kvpager"], strict=True)
            ratios = [run.tokens_per_second / ours.tokens_per_second for run, ours in pairs]
            figures.over_kvpager = statistics.median(ratios)
        found.append(figures)
    return found
