"""Generate traces of several kinds of traffic.

A generated trace shows how policies differ. It is no evidence about real traffic. Lengths are in
blocks of about 512 tokens, waits in requests. The same arguments give the same trace.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from kvpager import _validate as arguments
from kvpager.simulate.replay import Trace, number_prefixes

Prompt = list[int]

GENERATED_MAX = 1_000_000  # requests


class Traffic:
    """Random numbers, block numbers that were never used before, and the requests to come."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self._num_ids = 0
        self._waiting: list[tuple[float, int, Prompt, int]] = []
        self._num_waits = 0

    def blocks(self, count: int) -> Prompt:
        """Return `count` new blocks. O(count)."""
        self._num_ids += count
        return list(range(self._num_ids - count, self._num_ids))

    def lengths(self, mean: float, spread: float = 1.0, most: int = 200) -> int:
        """Draw a length of at least 1 from a lognormal distribution with this median. O(1)."""
        return 1 + int(min(self.random.lognormal(np.log(mean), spread), most))

    def zipf(self, count: int) -> int:
        """Draw a number below `count`: number n with a weight of 1 / (n + 1). O(1)."""
        return min(int((count + 1) ** self.random.random()) - 1, count - 1)

    def wait(self, until: float, prompt: Prompt, turns: int) -> None:
        """Let `prompt` continue at `until`, for `turns` turns. O(log waiting)."""
        self._num_waits += 1
        heapq.heappush(self._waiting, (until, self._num_waits, prompt, turns))

    def due(self, now: float) -> tuple[Prompt, int] | None:
        """Take out the prompt that has waited longest for `now` or earlier. O(log waiting)."""
        if not self._waiting or self._waiting[0][0] > now:
            return None
        return heapq.heappop(self._waiting)[2:]


def chat(traffic: Traffic) -> Iterator[Prompt]:
    """Conversations of several turns, with long times to think, behind a few system prompts."""
    random = traffic.random
    systems = [traffic.blocks(traffic.lengths(2, 0.5)) for _ in range(8)]
    now = 0
    while True:
        turn = traffic.due(now)
        if turn is None:
            prompt, turns = systems[traffic.zipf(8)], int(random.geometric(0.25))
        else:
            prompt, turns = turn
        prompt = prompt + traffic.blocks(traffic.lengths(2, 0.8))
        yield prompt
        if turns > 1:
            traffic.wait(now + traffic.lengths(150, 1.5, 10_000), prompt, turns - 1)
        now += 1


def agents(traffic: Traffic) -> Iterator[Prompt]:
    """Agents that call tools: long prompts that grow in bursts, behind preambles of tools."""
    random = traffic.random
    tools = [traffic.blocks(traffic.lengths(8, 0.5)) for _ in range(12)]
    now = 0.0
    while True:
        step = traffic.due(now)
        if step is None:
            prompt = tools[traffic.zipf(12)] + traffic.blocks(traffic.lengths(4, 0.8))
            turns = int(random.geometric(0.1))
        else:
            prompt, turns = step
            prompt = prompt + traffic.blocks(traffic.lengths(1, 1.0, 30))
        yield prompt
        if turns > 1:
            # One step in ten waits for a person.
            wait = (
                traffic.lengths(400, 1.0, 5000) if random.random() < 0.1 else random.exponential(20)
            )
            traffic.wait(now + wait, prompt, turns - 1)
        now += 1


def evaluation(traffic: Traffic) -> Iterator[Prompt]:
    """Batch evaluation: one task after the other, its examples before each of its questions."""
    random = traffic.random
    while True:
        examples = traffic.blocks(traffic.lengths(8, 0.6))
        num_samples = int(random.choice([1, 1, 1, 4]))
        questions = [
            examples + traffic.blocks(traffic.lengths(2, 0.7))
            for _ in range(traffic.lengths(150, 0.8, 1000))
        ]
        for _ in range(num_samples):
            yield from questions


def one_shot(traffic: Traffic) -> Iterator[Prompt]:
    """Documents that come once, some behind system prompts, and a few that come again."""
    random = traffic.random
    systems = [traffic.blocks(traffic.lengths(2, 0.7)) for _ in range(30)]
    now = 0
    while True:
        again = traffic.due(now)
        if again is not None:
            yield again[0]
        else:
            system = systems[traffic.zipf(30)] if random.random() < 0.4 else []
            prompt = system + traffic.blocks(traffic.lengths(12, 0.9))
            yield prompt
            if random.random() < 0.04:
                traffic.wait(now + traffic.lengths(200, 1.5, 10_000), prompt, 1)
        now += 1


def shifting(traffic: Traffic) -> Iterator[Prompt]:
    """Questions about popular documents, which other documents replace all at once."""
    while True:
        documents = [traffic.blocks(traffic.lengths(12, 0.7)) for _ in range(150)]
        for _ in range(traffic.lengths(700, 0.5, 3000)):
            yield documents[traffic.zipf(150)] + traffic.blocks(traffic.lengths(1, 0.7))


def mixed(traffic: Traffic) -> Iterator[Prompt]:
    """Conversations of several turns, questions asked once, system prompts.

    Two in five requests begin a conversation whose turns come back at ever longer intervals, the
    others are asked once; half of all begin with one of 16 system prompts, some far more often than
    others.
    """
    random = traffic.random
    systems = [[-1 - 100 * which - at for at in range(2 + 2 * which)] for which in range(16)]
    popularity = 1 / np.arange(1, 17)
    popularity /= popularity.sum()
    now = 0
    while True:
        turn = traffic.due(now)
        if turn is not None:
            prompt = turn[0]
            added = 1 + int(random.geometric(0.4))
        else:
            is_system = random.random() < 0.5
            prompt = systems[random.choice(16, p=popularity)] if is_system else []
            added = 1 + int(min(random.lognormal(2.3, 1.0), 200))
        prompt = prompt + traffic.blocks(added)
        yield prompt
        if random.random() < (0.75 if turn is not None else 0.4):
            wait = 1 + int(random.lognormal(4.0, 1.2))
            # The end of a prompt is a partly filled block, which the next turn fills otherwise.
            traffic.wait(now + wait, prompt[:-1], 1)
        now += 1


KINDS: dict[str, Callable[[Traffic], Iterator[Prompt]]] = {
    "mixed": mixed,
    "chat": chat,
    "agents": agents,
    "evaluation": evaluation,
    "one-shot": one_shot,
    "shifting": shifting,
}


def generate_trace(num_requests: int, seed: int = 0, kind: str = "mixed") -> Trace:
    """Return a generated trace. O(blocks). Raises: `ValueError` for a bad argument."""
    num_requests = arguments.count("num_requests", num_requests, at_least=1, at_most=GENERATED_MAX)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    traffic = Traffic(arguments.count("seed", seed))
    name = f"generated {kind}, {num_requests} requests, seed {seed}"
    return number_prefixes(name, islice(KINDS[kind](traffic), num_requests))
