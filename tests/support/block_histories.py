"""Random operations on a manager, chosen by the state of the manager itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from kvpager import BlockManager, KVPagerError
from kvpager.blocks.policies import POLICIES, Priority
from kvpager.blocks.sequences import SequenceHandle
from kvpager.plans import CopyPlan
from tests.support.clock import Clock
from tests.support.manager_state import handles_of


class History:
    """Random operations on one manager, chosen by what the manager itself says.

    Two managers that are equal get the same operations from equal random numbers.
    """

    def __init__(self, manager: BlockManager, clock: Clock) -> None:
        self.manager = manager
        self.clock = clock
        self.work: list[CopyPlan] = []
        self.pins: list[int] = []

    def live(self, *, swapped: bool | None = None) -> list[SequenceHandle]:
        handles = list(handles_of(self.manager).values())
        away = self.manager._state.rows.swapped
        return [one for one in handles if swapped is None or bool(away[one._row]) == swapped]

    def begun(self, copies: np.ndarray, ticket: int) -> list[list[int]]:
        if ticket:
            self.work.append(CopyPlan(copies, "device", "device", ticket))
        return copies.tolist()

    def step(self, chance: random.Random) -> object:
        """One operation; what it returned, as plain values, or how it was refused."""
        name = chance.choices(list(OPERATIONS), [weight for weight, _ in OPERATIONS.values()])[0]
        try:
            return name, OPERATIONS[name][1](self, chance)
        except (KVPagerError, ValueError) as refusal:
            return name, type(refusal).__name__, str(refusal)


def tokens(chance: random.Random, most: int) -> list[int]:
    return [chance.randint(0, 1) for _ in range(chance.randint(0, most))]


def do_allocate(history: History, chance: random.Random) -> object:
    if len(history.live()) >= 8:
        return None
    ids = tokens(chance, 20)
    mm_hashes = [(1, len(ids), b"cat")] if len(ids) > 1 and chance.random() < 0.1 else []
    sequence = history.manager.allocate(
        ids if chance.random() < 0.9 else len(ids) or [],
        namespace=chance.choice([None, None, "a", "b"]),
        lora=chance.choice([None, None, None, "x"]),
        mm_hashes=mm_hashes,
    )
    copies = history.begun(sequence.copies, sequence.ticket)
    return sequence.name, sequence.num_cached_tokens, copies


def do_append(history: History, chance: random.Random) -> object:
    here = history.live(swapped=False)
    some = chance.sample(here, min(len(here), chance.randint(0, 3)))
    ids = [tokens(chance, 4) for _ in some]
    step = history.manager.append(some, ids, speculative=chance.random() < 0.15)
    return step.slots.tolist(), history.begun(step.copies, step.ticket)


def do_accept(history: History, chance: random.Random) -> object:
    speculative = history.manager._state.rows.speculative
    here = [one for one in history.live(swapped=False) if speculative[one._row]]
    counts = [chance.randint(0, int(speculative[one._row])) for one in here]
    return history.manager.accept(here, counts)


def do_fork(history: History, chance: random.Random) -> object:
    here = history.live(swapped=False)
    if not here or len(history.live()) >= 8:
        return None
    return history.manager.fork(chance.choice(here)).name


def do_commit(history: History, chance: random.Random) -> object:
    here = history.live(swapped=False)
    return history.manager.commit(chance.choice(here)) if here else None


def do_truncate(history: History, chance: random.Random) -> object:
    here = history.live(swapped=False)
    if not here:
        return None
    sequence = chance.choice(here)
    return history.manager.truncate(sequence, chance.randint(len(sequence) // 2, len(sequence)))


def do_swap(history: History, chance: random.Random) -> object:
    to = chance.choice(["host", "device", "device"])
    live = history.live(swapped=to == "device")
    some = chance.sample(live, min(len(live), chance.randint(0, 3)))
    plan = history.manager.swap(some, to, at_most=chance.choice([None, None, 1, 3]))
    return history.begun(plan.copies, plan.ticket)


def do_free(history: History, chance: random.Random) -> object:
    live = history.live()
    if not live:
        return None
    return history.manager.free(chance.choice(live), publish=chance.random() < 0.3)


def do_complete(history: History, chance: random.Random) -> object:
    work = history.work
    return history.manager.copies.complete(work.pop(chance.randrange(len(work)))) if work else None


def do_pin(history: History, chance: random.Random) -> object:
    here = history.live(swapped=False)
    if here and len(history.pins) < 2:
        history.pins.append(history.manager.pins.pin(chance.choice(here)))
    return list(history.pins)


def do_unpin(history: History, chance: random.Random) -> object:
    return history.manager.pins.unpin(history.pins.pop(0)) if history.pins else None


def do_retain(history: History, chance: random.Random) -> object:
    here = history.live(swapped=False)
    ttl_s = chance.choice([None, 1.0, 5.0])
    pins = history.manager.pins
    return pins.retain(chance.choice(here), chance.randint(0, 100), ttl_s) if here else 0


def do_wait(history: History, chance: random.Random) -> object:
    history.clock.now += 1.0
    return None


OPERATIONS: dict[str, tuple[float, Callable[[History, random.Random], object]]] = {
    "allocate": (5, do_allocate),
    "append": (8, do_append),
    "accept": (2, do_accept),
    "fork": (2, do_fork),
    "commit": (6, do_commit),
    "truncate": (1, do_truncate),
    "swap": (4, do_swap),
    "free": (4, do_free),
    "complete": (4, do_complete),
    "pin": (0.5, do_pin),
    "unpin": (0.5, do_unpin),
    "retain": (1, do_retain),
    "wait": (0.5, do_wait),
}


def policy_of(name: str, num_blocks: int, clock: Clock) -> Any:
    """An empty policy, by a clock that stands still."""
    return Priority(num_blocks, clock) if name == "priority" else POLICIES[name](num_blocks)
