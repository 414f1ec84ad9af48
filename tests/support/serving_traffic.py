"""Random scenarios and requests: see `tests.support.serving_simulation`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from kvpager.blocks.groups.manager import GroupedManager
from kvpager.blocks.manager import BlockManager
from kvpager.blocks.protocol import CacheManager
from kvpager.plans import Reason, StepPlan
from kvpager.scheduling.preemption import PreemptionCosts
from kvpager.scheduling.queue import POLICIES
from kvpager.scheduling.request import Request
from kvpager.scheduling.scheduler import Scheduler
from tests.support.serving_model import VOCABULARY, SchedulerError

COSTS = {
    "swap": PreemptionCosts(seconds_per_block=0.0),
    "recompute": PreemptionCosts(seconds_per_block=math.inf),
    "either": PreemptionCosts(
        seconds_per_token=1.0, seconds_per_token_squared=0.1, seconds_per_block=4.0
    ),
}


@dataclass(frozen=True)
class Scenario:
    """The settings of a scheduler and of its traffic."""

    num_blocks: int
    block_size: int
    num_host_blocks: int
    null_block: bool
    max_batch_tokens: int
    max_num_seqs: int
    max_queue_size: int | None
    policy: str
    watermark: float
    prefix_cache: bool
    costs: str
    max_model_len: int | None
    chunked: bool
    arrival_gap: float  # mean steps between two arrivals
    failures: float  # fraction of steps that fail
    windows: tuple[int | None, ...] = (None,)  # of each group of layers

    @property
    def max_chunk(self) -> int | None:
        """Maximum tokens per step of a row, which bounds the blocks of groups with a window."""
        return self.max_batch_tokens if self.chunked else None

    def can_serve(self, request: Request) -> bool:
        """Return True if the pool and budgets can serve this request."""
        prompt = len(request.prompt)
        length = prompt + request.max_new_tokens
        if self.max_model_len is not None and length > self.max_model_len:
            return False
        rows = min(self.max_num_seqs, self.max_batch_tokens)
        if any(self.windows):
            blocks_each = self._blocks_of_a_row(length - 1)
            fits = request.n * blocks_each <= self.num_blocks
            return fits and request.n <= rows
        blocks = {(0, at) for at in range(prompt // self.block_size)}
        for row in range(request.n):
            for token in range(prompt // self.block_size * self.block_size, length - 1):
                blocks.add((row + 1, token // self.block_size))
        return len(blocks) <= self.num_blocks - self.null_block and request.n <= rows

    def _blocks_of_a_row(self, length: int) -> int:
        total, size = 0, self.block_size
        for window in self.windows:
            blocks = -(-length // size)
            if window is not None and self.max_chunk is not None:
                blocks = min(blocks, -(-(window - 1 + self.max_chunk) // size) + 1)
            total += blocks
        return total

    def check_size(self, plan: StepPlan) -> None:
        """Raise `SchedulerError` unless a step is within its budgets."""
        num_tokens = int(plan.num_scheduled.sum())
        if len(plan) > self.max_num_seqs:
            raise SchedulerError(f"{len(plan)} rows in a step, max_num_seqs={self.max_num_seqs}")
        is_alone = not self.chunked and len(plan) == 1
        if num_tokens > self.max_batch_tokens and not is_alone:
            raise SchedulerError(
                f"{num_tokens} tokens in a step, max_batch_tokens={self.max_batch_tokens}"
            )


@dataclass
class Arrival:
    """A request: when it arrives, and when it is stopped."""

    request: Request
    at: int  # the step
    stop_at: int | None = None
    reason: Reason = Reason.CANCELLED
    stops_within: int | None = None  # may be cancelled during steps of this number modulo 7


def draw_scenario(random: Random) -> Scenario:
    """Draw settings, tiny to large. Half of them overload the pool. O(1)."""
    is_tight = random.random() < 0.5
    num_blocks = random.choice((7, 12, 24) if is_tight else (2, 4, 7, 12, 24, 64, 200))
    scenario = Scenario(
        num_blocks=num_blocks,
        block_size=random.choice((1, 2, 4, 4, 8)),
        num_host_blocks=random.choice((0, 3, num_blocks, 4 * num_blocks)),
        null_block=random.random() < 0.2,
        max_batch_tokens=random.choice((16, 64, 500) if is_tight else (1, 8, 17, 64, 500)),
        max_num_seqs=32 if is_tight else random.choice((1, 4, 8, 32)),
        max_queue_size=None if is_tight else random.choice((None, None, 5)),
        policy=random.choice(("fifo", "priority", "fair")),
        watermark=random.choice((0.0, 0.01) if is_tight else (0.0, 0.01, 0.1, 0.4)),
        prefix_cache=random.random() < 0.7,
        costs=random.choice(list(COSTS)),
        max_model_len=random.choice((None, None, None, 40)),
        chunked=random.random() < 0.7,
        arrival_gap=random.choice((0.05, 0.2, 1.0)),
        failures=random.choice((0.0, 0.0, 0.01, 0.05)),
    )
    if random.random() < 0.7:
        return scenario
    windows = random.choice(((5,), (None, 5), (3, None, 20), (8, 8)))
    num_blocks *= len(windows)
    return replace(scenario, windows=windows, num_blocks=num_blocks, null_block=False)


def draw_arrivals(random: Random, scenario: Scenario, count: int) -> list[Arrival]:
    """Draw requests that mostly fit, many with a shared prefix. O(count)."""
    room = scenario.num_blocks * scenario.block_size // len(scenario.windows)
    prefixes = [_tokens(random, random.randint(1, max(room // 2, 1))) for _ in range(3)]
    at, arrivals = 1.0, []
    for number in range(count):
        at += random.expovariate(1 / scenario.arrival_gap)
        arrival = _draw_arrival(random, f"r{number}", int(at), room, prefixes)
        for _ in range(10):  # so that most can be served
            if scenario.can_serve(arrival.request):
                break
            arrival = _draw_arrival(random, f"r{number}", int(at), room, prefixes)
        ranks_by = POLICIES[scenario.policy].ranks_by
        if "tenant" not in ranks_by:
            arrival.request = replace(arrival.request, tenant=None)
        if "priority" not in ranks_by:
            arrival.request = replace(arrival.request, priority=0)
        arrivals.append(arrival)
    return arrivals


def _draw_arrival(
    random: Random, name: str, at: int, room: int, prefixes: list[list[int]]
) -> Arrival:
    num_samples = random.choice((1, 1, 1, 2, 3, 4))
    longest = max(min(room * random.choice((1, 2, 4)) // 8 // num_samples, 120), 1)
    prompt = _tokens(random, random.randint(1, longest))
    if random.random() < 0.6:
        prefix = random.choice(prefixes)
        prompt = prefix[: random.randint(1, min(len(prefix), 2 * longest))] + prompt[:4]
    max_new_tokens = random.randint(1, min(4 * longest, 60))
    if num_samples == 1 and random.random() < 0.15:  # this one may fill the pool
        max_new_tokens = max(min(room - len(prompt), 100), 1)
    request = Request(
        request_id=name,
        prompt=np.array(prompt, np.int32),
        max_new_tokens=max_new_tokens,
        n=num_samples,
        namespace=random.choice((None, None, "a", "b")),
        lora=random.choice((None, None, None, "b")),
        tenant=random.choice((None, "x", "y")),
        priority=random.randint(0, 3),
        deadline=at + random.randint(0, 60) if random.random() < 0.15 else None,
    )
    arrival = Arrival(request, at)
    if random.random() < 0.15:
        arrival.stop_at = at + random.randint(0, 30)
        arrival.reason = random.choice((Reason.CANCELLED, Reason.FINISHED))
    if random.random() < 0.1:
        arrival.stops_within = random.randrange(7)
    return arrival


def _tokens(random: Random, count: int) -> list[int]:
    return [random.randrange(VOCABULARY) for _ in range(count)]


def make_manager(scenario: Scenario) -> CacheManager:
    """Make the manager of a scenario. O(blocks)."""
    sizes = scenario.num_blocks, scenario.block_size, scenario.num_host_blocks
    if any(scenario.windows):
        return GroupedManager(scenario.windows, *sizes, max_chunk=scenario.max_chunk)
    return BlockManager(*sizes, null_block=scenario.null_block)


def make_scheduler(scenario: Scenario, clock: Callable[[], float]) -> Scheduler:
    """Make kvpager's scheduler for a scenario. O(blocks)."""
    return Scheduler(
        make_manager(scenario),
        max_batch_tokens=scenario.max_batch_tokens,
        max_num_seqs=scenario.max_num_seqs,
        max_queue_size=scenario.max_queue_size,
        policy=scenario.policy,
        watermark=scenario.watermark,
        prefix_cache=scenario.prefix_cache,
        costs=COSTS[scenario.costs],
        max_model_len=scenario.max_model_len,
        chunked=scenario.chunked,
        clock=clock,
    )
