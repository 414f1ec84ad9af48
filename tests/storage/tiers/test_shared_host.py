"""Swapped sequences, cached blocks and blocks on their way in the same host blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvpager import BlockManager, BlockStorage
from kvpager.errors import OutOfBlocks
from kvpager.storage import streams
from kvpager.storage.keys import KeyContext
from kvpager.storage.staging import Staging
from kvpager.storage.tiers.host import HostStore
from kvpager.storage.tiers.loading import Fetch
from kvpager.storage.tiers.protocol import Saved
from kvpager.storage.tiers.tiering import Tiering
from tests.support.dict_store import DictStore
from tests.support.tier_node import finished

SIZE = 4
Sequence = Any  # a handle


class Process:
    """A manager whose host blocks are a tier. A block's bytes are a number of all its tokens."""

    def __init__(self, num_blocks: int, num_host: int, *, below: bool = False) -> None:
        self.manager = BlockManager(num_blocks, SIZE, num_host)
        self.storage = BlockStorage(
            num_blocks, SIZE, [(1, 2, 2)], dtype=torch.float32, num_host_blocks=num_host
        )
        self.staging = Staging.of_host(self.storage)
        assert self.staging.store is not None
        self.store = self.staging.store
        self.manager.host.lend_to(self.staging)
        self.below = [DictStore(self.storage.block_bytes)] if below else []
        self.tiering = Tiering(
            self.manager, self.staging, [self.store, *self.below],
            lambda namespace, lora: KeyContext("layout", "model"),
            max_wait_s=60.0, admit="always",
        )  # fmt: skip

    def compute(self, tokens: list[int]) -> Sequence:
        sequence = self.manager.allocate(tokens)
        self.storage.copy(sequence.copies)
        [table] = self.manager.block_tables([sequence])
        for at in range(sequence.num_cached_tokens // SIZE, len(tokens) // SIZE):
            self.storage.tier()[int(table[at])] = number_of(tokens, at)
        self.manager.commit(sequence)
        return sequence

    def swap(self, sequence: Sequence, to: Any) -> bool:
        try:
            plan = self.manager.swap(sequence, to)
        except OutOfBlocks:
            return False
        self.storage.apply(plan)
        return True

    def save(self) -> None:
        self.tiering.clean()
        self.tiering._saver._thread.submit(lambda: None).result(60)

    def begin(self, tokens: list[int]) -> Fetch | None:
        fetch = self.tiering.begin(tokens)
        if fetch is not None:
            finished(fetch)
        return fetch

    def table(self, sequence: Sequence) -> list[int]:
        """The blocks of a sequence; host block b is -2 - b."""
        state = self.manager._state
        entries: list[int] = state.rows.blocks(state.row(sequence)).tolist()
        return entries

    def check_bytes(self, sequence: Sequence, tokens: list[int]) -> None:
        table = self.table(sequence)
        device, host = self.storage.tier(), self.storage.tier("host")
        for at in range(len(tokens) // SIZE):
            block = table[at]
            found = device[block] if block >= 0 else host[-2 - block]
            assert (found == number_of(tokens, at)).all()

    def check_fetch(self, fetch: Fetch) -> None:
        for at, slot in enumerate(fetch.slots, fetch.first):
            found = np.frombuffer(self.staging.slot(slot), np.float32)
            assert (found == number_of(fetch.tokens.tolist(), at)).all()

    def check(self, num_swapped: int) -> None:
        """Each host block has one use."""
        self.manager.check()
        self.store._tier.check()
        stats = self.manager.stats()
        assert stats.num_host_blocks - stats.num_host_free == num_swapped
        num_lent, num_free = self.manager.host.num_lent, self.store.num_available
        num_under_way = num_lent - self.store.capacity
        assert num_under_way >= 0
        room = min(max(num_lent // 2, 1) - num_under_way, num_free)
        assert self.staging.num_free == max(room, 0)

    def close(self) -> None:
        self.tiering.close()
        self.manager.host.lend()
        swapped = self.manager.stats().num_host_blocks - self.manager.stats().num_host_free
        self.check(swapped)
        assert self.store.capacity == self.manager.host.num_lent  # none is on its way


def number_of(tokens: list[int], at: int) -> float:
    """The bytes of a block depend on all tokens up to its end."""
    return float(hash(tuple(tokens[: (at + 1) * SIZE])) % 100_003)


def prompt(number: int, length: int = 13) -> list[int]:
    return [number * 50 + place for place in range(length)]


def evicted(process: Process, *numbers: int) -> None:
    """Compute and free prompts, and save what is idle."""
    for number in numbers:
        process.manager.free(process.compute(prompt(number)))
        process.save()


# -------------------------------------------------------------------------------- one at a time


def test_a_prompt_that_left_the_device_is_in_the_host_blocks() -> None:
    process = Process(4, 8)
    evicted(process, 0, 1)
    assert process.manager.match_prefix(prompt(0)) == 0
    fetch = process.begin(prompt(0))
    assert fetch is not None
    process.check_fetch(fetch)
    assert process.tiering.attach(fetch) == {"host": 12}
    process.check_bytes(process.manager.allocate(prompt(0)), prompt(0)[:12])
    process.close()


def test_a_save_and_a_hit_copy_each_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(4, 8)
    copied: list[int] = []
    real = streams.copy_across

    def counting(source: Any, destination: Any, copies: Any) -> Any:
        copied.append(len(copies))
        return real(source, destination, copies)

    monkeypatch.setattr(streams, "copy_across", counting)
    for name in ("load", "save"):  # which copy to and from the memory of a caller
        monkeypatch.setattr(HostStore, name, None)
    evicted(process, 0)
    assert copied == [3]
    evicted(process, 1)
    copied.clear()
    fetch = process.begin(prompt(0))
    assert fetch is not None
    assert process.tiering.attach(fetch) == {"host": 12}
    assert copied == [3]
    process.check_bytes(process.manager.allocate(prompt(0)), prompt(0)[:12])
    process.close()


def test_a_swap_takes_the_blocks_of_the_oldest_cached_prompt() -> None:
    process = Process(8, 8)
    evicted(process, 0, 1)
    assert process.store.stats().num_blocks == 6
    sequence = process.compute(prompt(2))
    assert process.swap(sequence, "host")  # 4 blocks, and 2 are free
    assert process.store.stats().num_blocks == 4
    assert (process.store.stats().evicted, process.store.stats().capacity) == (2, 4)
    assert process.staging.num_free == 2  # half of them
    process.check_bytes(sequence, prompt(2)[:12])
    process.check(4)


def test_blocks_that_a_swap_pushed_out_are_offered_again() -> None:
    process = Process(16, 8)
    evicted(process, 0, 1)
    assert not process.tiering.has_dirty()
    sequences = [process.compute(prompt(number)) for number in (2, 3)]
    assert all(process.swap(sequence, "host") for sequence in sequences)
    assert process.store.stats().num_blocks == 0
    assert process.tiering.has_news
    for sequence in sequences:
        assert process.swap(sequence, "device")
    for _ in range(4):
        process.save()
    assert process.store.stats().num_blocks == 6
    assert not process.tiering.has_dirty()
    assert not process.tiering.has_news
    process.close()


def test_a_swap_leaves_the_slots_of_a_fetch_alone() -> None:
    process = Process(4, 4)
    evicted(process, 0, 1)
    fetch = process.begin(prompt(1, 9))
    assert fetch is None  # on the device
    fetch = process.begin(prompt(0))
    assert fetch is not None
    held = len(fetch.slots)
    assert held
    sequence = process.compute(prompt(2))
    assert not process.swap(sequence, "host")
    process.check_fetch(fetch)
    process.tiering.cancel(fetch)
    assert process.swap(sequence, "host")
    process.check(4)


def test_blocks_of_a_swap_are_lent_again_only_between_steps() -> None:
    process = Process(8, 4)
    sequence = process.compute(prompt(0))
    process.swap(sequence, "host")
    plan = process.manager.swap(sequence, "device")
    assert process.manager.host.num_lent == 0  # the plan still reads them
    process.storage.apply(plan)
    process.tiering.clean()
    assert process.manager.host.num_lent == 4


def test_a_block_from_below_is_kept_without_a_copy() -> None:
    process = Process(4, 12, below=True)
    evicted(process, 0, 1)
    process.store.drop(list(process.below[0].blocks))
    fetch = process.begin(prompt(0))
    assert fetch is not None
    slots = list(fetch.slots)
    assert process.tiering.attach(fetch) == {"dict": 12}
    process.save()
    assert process.store.pin(fetch.keys) == slots
    process.store.give(slots)
    process.close()


def test_blocks_on_their_way_take_half_of_the_host_blocks_at_most() -> None:
    process = Process(8, 8)
    taken = process.staging.take(8)
    assert len(taken) == 4
    assert process.staging.num_free == 0
    process.staging.give(taken)
    assert process.staging.num_free == 4


def test_a_forgotten_block_keeps_its_slot_until_the_fetch_ends() -> None:
    process = Process(4, 8)
    evicted(process, 0, 1)
    fetch = process.begin(prompt(0))
    assert fetch is not None
    process.store.drop(fetch.keys)
    process.check_fetch(fetch)
    assert process.store.capacity == 8 - len(fetch.slots)
    process.tiering.cancel(fetch)
    process.close()


def test_slots_that_are_in_use_already_are_not_adopted() -> None:
    process = Process(4, 8)
    evicted(process, 0)
    [key] = process.store._tier.pairs()[0][:1]
    [slot] = process.staging.take(1)
    assert process.store.adopt([key], [slot]).tolist() == [Saved.KNOWN]
    assert process.store.adopt([b"k" * 32], [slot]).tolist() == [Saved.SAVED]
    with pytest.raises(ValueError, match="not taken"):
        process.store.adopt([b"l" * 32], [slot])
    process.staging.give([slot])
    process.close()
    assert process.store.adopt([b"m" * 32], process.store.take(1)).tolist() == [Saved.REFUSED]


def test_a_manager_lends_to_one_borrower() -> None:
    process = Process(4, 4)
    with pytest.raises(ValueError, match="there is one already"):
        process.manager.host.lend_to(process.staging)


# ------------------------------------------------------------------------------------ any history


class Histories(RuleBasedStateMachine):
    """Every byte that a sequence or a fetch reads is that of its tokens, whatever happens."""

    prompts = st.integers(0, 5)
    picks = st.integers(0, 9)

    @initialize(num_host=st.integers(1, 12), below=st.booleans())
    def make(self, num_host: int, below: bool) -> None:
        self.process = Process(8, num_host, below=below)
        self.live: list[tuple[Sequence, list[int]]] = []
        self.away: list[tuple[Sequence, list[int]]] = []
        self.fetches: list[Fetch] = []

    @rule(number=prompts, keep=st.booleans())
    def compute(self, number: int, keep: bool) -> None:
        tokens = prompt(number)
        try:
            sequence = self.process.compute(tokens)
        except OutOfBlocks:
            return
        if keep:
            self.live.append((sequence, tokens[:12]))
        else:
            self.process.manager.free(sequence)

    @rule(pick=picks, to=st.sampled_from(["device", "host", None]))
    def move(self, pick: int, to: str | None) -> None:
        source, target = (self.away, self.live) if to == "device" else (self.live, self.away)
        if not source:
            return
        sequence, tokens = source.pop(pick % len(source))
        if to is None:
            self.process.manager.free(sequence)
        else:
            moved = self.process.swap(sequence, to)
            (target if moved else source).append((sequence, tokens))

    @rule()
    def save(self) -> None:
        self.process.save()

    @rule(number=prompts)
    def begin(self, number: int) -> None:
        fetch = self.process.begin(prompt(number))
        if fetch is not None and fetch not in self.fetches:
            self.fetches.append(fetch)

    @rule(pick=picks, attach=st.booleans())
    def end(self, pick: int, attach: bool) -> None:
        if not self.fetches:
            return
        fetch = self.fetches.pop(pick % len(self.fetches))
        if attach:
            self.process.tiering.attach(fetch)
        else:
            fetch.num_waiting = 1
            self.process.tiering.cancel(fetch)

    @rule(number=prompts)
    def drop(self, number: int) -> None:
        keys = [key for key, _ in self.process.store._tier.pairs()]
        self.process.store.drop(keys[number::6])

    @invariant()
    def agrees(self) -> None:
        for sequence, tokens in self.live + self.away:
            self.process.check_bytes(sequence, tokens)
        for fetch in self.fetches:
            self.process.check_fetch(fetch)
        swapped = set()
        for sequence, _ in self.away + self.live:
            swapped |= {-2 - block for block in self.process.table(sequence) if block < -1}
        self.process.check(len(swapped))
        cached = {slot for _, slot in self.process.store._tier.pairs()}
        assert not swapped & cached
        assert not swapped & {slot for fetch in self.fetches for slot in fetch.slots}

    def teardown(self) -> None:
        if hasattr(self, "process"):
            for fetch in self.fetches:
                fetch.num_waiting = 1
                self.process.tiering.cancel(fetch)
            self.process.close()


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)
