"""Generate traces of several kinds of traffic.

A generated trace shows how policies differ, but is no evidence about real traffic. Lengths are in
blocks of about 512 tokens, and waiting times in requests. Equal arguments give equal traces.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from kvpager import _validate as arguments
from kvpager._text import listed
from kvpager.simulate.replay import Trace, number_prefixes

Prompt = list[int]

GENERATED_MAX = 1_000_000  # maximum requests of a generated trace


class Traffic:
    """The state of a generator: random numbers, unused block numbers and future requests."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self._now = -1  # the number of the request
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
        """Draw a number n below `count` with weight 1 / (n + 1). O(1)."""
        return min(int((count + 1) ** self.random.random()) - 1, count - 1)

    def wait(self, delay: float, prompt: Prompt, turns: int) -> None:
        """Schedule `prompt` to continue after `delay`, for `turns` turns. O(log waiting)."""
        self._num_waits += 1
        heapq.heappush(self._waiting, (self._now + delay, self._num_waits, prompt, turns))

    def due(self) -> tuple[Prompt, int] | None:
        """Go to the next request; pop the earliest prompt that is due. O(log waiting)."""
        self._now += 1
        if not self._waiting or self._waiting[0][0] > self._now:
            return None
        return heapq.heappop(self._waiting)[2:]


def chat(traffic: Traffic) -> Iterator[Prompt]:
    """Yield conversations of several turns with long pauses, behind a few system prompts."""
    random = traffic.random
    systems = [traffic.blocks(traffic.lengths(2, 0.5)) for _ in range(8)]
    while True:
        turn = traffic.due()
        if turn is None:
            prompt, turns = systems[traffic.zipf(8)], int(random.geometric(0.25))
        else:
            prompt, turns = turn
        prompt = prompt + traffic.blocks(traffic.lengths(2, 0.8))
        yield prompt
        if turns > 1:
            traffic.wait(traffic.lengths(150, 1.5, 10_000), prompt, turns - 1)


def agents(traffic: Traffic) -> Iterator[Prompt]:
    """Yield agents that call tools: long prompts that grow in bursts, behind tool descriptions."""
    random = traffic.random
    tools = [traffic.blocks(traffic.lengths(8, 0.5)) for _ in range(12)]
    while True:
        step = traffic.due()
        if step is None:
            prompt = tools[traffic.zipf(12)] + traffic.blocks(traffic.lengths(4, 0.8))
            turns = int(random.geometric(0.1))
        else:
            prompt, turns = step
            prompt = prompt + traffic.blocks(traffic.lengths(1, 1.0, 30))
        yield prompt
        if turns > 1:
            # One step in ten waits for a person.
            is_person = random.random() < 0.1
            delay = traffic.lengths(400, 1.0, 5000) if is_person else random.exponential(20)
            traffic.wait(delay, prompt, turns - 1)


def evaluation(traffic: Traffic) -> Iterator[Prompt]:
    """Yield batch evaluation: one task after another, whose examples precede each question."""
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
    """Yield documents that occur once, some behind system prompts, and a few that recur."""
    random = traffic.random
    systems = [traffic.blocks(traffic.lengths(2, 0.7)) for _ in range(30)]
    while True:
        again = traffic.due()
        if again is not None:
            yield again[0]
        else:
            system = systems[traffic.zipf(30)] if random.random() < 0.4 else []
            prompt = system + traffic.blocks(traffic.lengths(12, 0.9))
            yield prompt
            if random.random() < 0.04:
                traffic.wait(traffic.lengths(200, 1.5, 10_000), prompt, 1)


def shifting(traffic: Traffic) -> Iterator[Prompt]:
    """Yield questions about popular documents, which are all replaced at once now and then."""
    while True:
        documents = [traffic.blocks(traffic.lengths(12, 0.7)) for _ in range(150)]
        for _ in range(traffic.lengths(700, 0.5, 3000)):
            yield documents[traffic.zipf(150)] + traffic.blocks(traffic.lengths(1, 0.7))


def mixed(traffic: Traffic) -> Iterator[Prompt]:
    """Yield conversations, single questions and system prompts.

    Two in five new requests start a conversation, whose turns follow at random intervals. The
    others are single questions. Half of all start with one of 16 system prompts, whose popularity
    follows Zipf's law.
    """
    random = traffic.random
    systems = [[-1 - 100 * which - at for at in range(2 + 2 * which)] for which in range(16)]
    popularity = 1 / np.arange(1, 17)
    popularity /= popularity.sum()
    while True:
        turn = traffic.due()
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
            delay = 1 + int(random.lognormal(4.0, 1.2))
            # The last block of a prompt is partly filled, and the next turn fills it differently.
            traffic.wait(delay, prompt[:-1], 1)


KINDS: dict[str, Callable[[Traffic], Iterator[Prompt]]] = {
    "mixed": mixed,
    "chat": chat,
    "agents": agents,
    "evaluation": evaluation,
    "one-shot": one_shot,
    "shifting": shifting,
}


def generate_trace(num_requests: int, seed: int = 0, kind: str = "mixed") -> Trace:
    """Return a generated trace. O(blocks). Raises: `TypeError`, `ValueError`."""
    num_requests = arguments.count("num_requests", num_requests, at_least=1, at_most=GENERATED_MAX)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {listed(KINDS)}.")
    traffic = Traffic(arguments.count("seed", seed))
    name = f"generated {kind}, {num_requests} requests, seed {seed}"
    return number_prefixes(name, islice(KINDS[kind](traffic), num_requests))
