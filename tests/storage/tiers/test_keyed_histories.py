"""Any history of a tier against a dictionary: who has a slot, and who leaves."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvpager.blocks.policies import POLICIES
from kvpager.storage.tiers.keyed import KNOWN, NO_ROOM, KeyedTier
from kvpager.testing.store_calls import key_of

NUM_KEYS = 12
# Three prompts: 0 1 2 3, its other end 4 5, and 8 9 10 11. 6 and 7 have no place in a prompt.
PARENTS = {1: 0, 2: 1, 3: 2, 4: 1, 5: 4, 9: 8, 10: 9, 11: 10}
KEYS = [key_of(number) for number in range(NUM_KEYS)]
PARENT_OF = {KEYS[child]: KEYS[parent] for child, parent in PARENTS.items()}


class Histories(RuleBasedStateMachine):
    """Each slot has an owner in the model; the tier must agree with it after every call.

    With a policy that evicts by last use, the model knows each key that leaves.
    """

    numbers = st.lists(st.integers(0, NUM_KEYS - 1), max_size=5)
    picks = st.integers(0, 5)

    @initialize(num_slots=st.integers(1, 6), name=st.sampled_from([None, *POLICIES]))
    def make(self, num_slots: int, name: str | None) -> None:
        self.tier = KeyedTier(num_slots, POLICIES[name](num_slots) if name else None)
        self.num_slots = num_slots
        self.is_exact = name in (None, "lru")
        self.offered: dict[bytes, int] = {}
        self.writing: dict[int, bytes] = {}
        self.pins: list[int] = []  # a slot for each pin
        self.nameless: set[int] = set()
        self.parents: dict[bytes, bytes] = {}  # of keys with a slot, where the test passed them
        self.queue: list[bytes] = []  # idle keys, least recently used first

    # ---------------------------------------------------------------- the model

    def idle(self, asked: list[bytes]) -> list[bytes]:
        return [key for key in dict.fromkeys(asked) if key in self.queue]

    def rest(self, keys: list[bytes]) -> None:
        """Queue keys; the last of a call leaves first."""
        self.queue = [key for key in self.queue if key not in keys] + keys[::-1]

    def evict(self, evicted: list[tuple[bytes, int]], kept: list[bytes]) -> None:
        """Remove the keys that left. Each was idle, and no key of the tier continued it."""
        candidates = [key for key in self.queue if key not in kept]
        is_forced = False
        for key, slot in evicted:
            leaves = [key for key in candidates if key not in self.parents.values()]
            is_forced = is_forced or not leaves  # the keys that continue them are in use
            allowed = candidates if is_forced else leaves
            assert key == allowed[0] if self.is_exact else key in allowed
            assert self.offered.pop(key) == slot
            candidates.remove(key)
            self.queue.remove(key)
            self.parents.pop(key, None)

    # ---------------------------------------------------------------- calls

    @rule(numbers=numbers, partly=st.booleans(), with_parents=st.booleans())
    def reserve(self, numbers: list[int], partly: bool, with_parents: bool) -> None:
        asked = [KEYS[number] for number in numbers]
        parents = [PARENT_OF.get(key) for key in asked] if with_parents else None
        held = self.offered.keys() | set(self.writing.values())
        new = list(dict.fromkeys(key for key in asked if key not in held))
        known = self.idle(asked)
        free = self.num_slots - len({*self.offered.values(), *self.writing, *self.pins})
        room = free + len(self.queue) - len(known)
        slots, evicted = self.tier.reserve(asked, partly=partly, parents=parents)
        taken = {asked[i]: slot for i, slot in enumerate(slots.tolist()) if slot >= 0}
        fit = len(new) if len(new) <= room else room if partly else 0
        assert list(taken) == new[:fit]
        assert len(evicted) == max(fit - free, 0)
        assert {slot for _, slot in evicted} <= set(taken.values())
        self.evict(evicted, known)
        self.rest(known)
        in_use = {*self.offered.values(), *self.writing, *self.pins}
        assert len(set(taken.values()) - in_use) == len(taken)
        self.writing |= {slot: key for key, slot in taken.items()}
        if with_parents:
            self.parents |= {key: PARENT_OF[key] for key in taken if key in PARENT_OF}
        refused = [key for key, slot in zip(asked, slots, strict=True) if slot == NO_ROOM]
        assert refused == new[fit:]

    @rule(numbers=numbers)
    def save(self, numbers: list[int]) -> None:
        self.reserve(numbers, True, True)
        self.finish(set(range(len(self.writing))), True)

    @rule(count=st.integers(0, 4), partly=st.booleans())
    def take(self, count: int, partly: bool) -> None:
        held = {*self.writing, *self.pins}
        room = self.num_slots - len(held)
        slots, evicted = self.tier.take(count, partly=partly)
        taken = slots.tolist()
        assert len(taken) == (count if count <= room else room if partly else 0)
        assert {slot for _, slot in evicted} <= set(taken)
        self.evict(evicted, [])
        assert not held.union(self.offered.values()) & set(taken)
        self.pins += taken
        self.nameless |= set(taken)

    @rule(numbers=numbers)
    def name(self, numbers: list[int]) -> None:
        slots = sorted(self.nameless)[: len(numbers)]
        for slot, number in zip(slots, numbers, strict=False):
            key = KEYS[number]
            is_known = key in self.offered or key in self.writing.values()
            [named] = self.tier.name([slot], [key]).tolist()
            assert named == (KNOWN if is_known else slot)
            self.rest(self.idle([key]))
            if not is_known:
                self.offered[key] = slot
                self.nameless.remove(slot)

    @rule(picks=st.sets(picks))
    def share(self, picks: set[int]) -> None:
        slots = [slot for i, slot in enumerate(self.pins) if i in picks]
        self.tier.share(slots)
        self.pins += slots

    @rule(picks=st.sets(picks), publish=st.booleans())
    def finish(self, picks: set[int], publish: bool) -> None:
        slots = [slot for i, slot in enumerate(self.writing) if i in picks]
        (self.tier.publish if publish else self.tier.abandon)(slots)
        keys = [self.writing.pop(slot) for slot in slots]
        if publish:
            self.offered |= dict(zip(keys, slots, strict=True))
            self.rest(keys)
        else:
            for key in keys:
                self.parents.pop(key, None)

    @rule(numbers=numbers)
    def pin(self, numbers: list[int]) -> None:
        asked = [KEYS[number] for number in numbers]
        slots = self.tier.pin(asked).tolist()
        assert slots == [self.offered.get(key, -1) for key in asked]
        self.pins += [slot for slot in slots if slot >= 0]
        self.queue = [key for key in self.queue if key not in asked]

    @rule(picks=st.sets(picks), discard=st.booleans())
    def unpin(self, picks: set[int], discard: bool) -> None:
        slots = [slot for i, slot in enumerate(self.pins) if i in picks]
        if discard:
            gone = self.tier.discard(slots)
            assert dict(gone) == {k: s for k, s in self.offered.items() if s in slots}
            for key, slot in gone:
                del self.offered[key]
                self.parents.pop(key, None)
                self.nameless.add(slot)
        self.tier.unpin(slots)
        self.pins = [slot for i, slot in enumerate(self.pins) if i not in picks]
        keys = {slot: key for key, slot in self.offered.items()}
        free = [slot for slot in dict.fromkeys(slots) if slot not in self.pins]
        self.rest([keys[slot] for slot in free if slot in keys])
        self.nameless &= set(self.pins)

    @rule(numbers=numbers)
    def rest_keys(self, numbers: list[int]) -> None:
        asked = [KEYS[number] for number in numbers]
        self.tier.rest(asked)
        self.rest(self.idle(asked))

    @rule(numbers=numbers)
    def find(self, numbers: list[int]) -> None:
        asked = [KEYS[number] for number in numbers]
        leading = next((i for i, key in enumerate(asked) if key not in self.offered), len(asked))
        assert self.tier.find(asked) == leading
        assert [self.tier.has(key) for key in asked] == [key in self.offered for key in asked]

    @invariant()
    def agrees(self) -> None:
        self.tier.check()
        pairs = self.tier.pairs()
        assert dict(pairs) == self.offered
        if self.is_exact:
            assert [key for key, _ in pairs[: len(self.queue)]] == self.queue
        assert self.tier.num_ready == len(self.offered)
        assert self.tier.capacity == self.num_slots - len(self.nameless)


class TestHistories(Histories.TestCase):
    settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


@pytest.mark.slow
class TestHistoriesAtLength(Histories.TestCase):
    settings = settings(TestHistories.settings, max_examples=60)
