"""Any history of operations, checked against plain Python lists of the tokens written.

The harness plays the data plane with one integer per token slot: it applies every plan, writes
every new token, and reads each sequence back through its block table after every operation.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvpager.errors import KVPagerError, OutOfBlocks
from kvpager.manager import BlockManager
from kvpager.plan import Plan
from kvpager.sequences import Sequence

BLOCK_SIZE = 4
TOKENS = st.lists(st.integers(0, 2), min_size=0, max_size=18)
PICK = st.integers(0, 10**6)
NAMESPACES = st.sampled_from([None, "acme"])
UNWRITTEN = -9


def content(namespace: str | None, history: list[int]) -> int:
    """A stand-in for KV: it depends on the namespace and on every token up to here."""
    return hash((namespace, tuple(history))) & 0x7FFFFFFF


class PagedMemory(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(1, 14), num_host_blocks=st.integers(0, 6))
    def start(self, num_blocks: int, num_host_blocks: int) -> None:
        self.manager = BlockManager(num_blocks, BLOCK_SIZE, num_host_blocks)
        self.memory = {
            "device": np.full((num_blocks, BLOCK_SIZE), UNWRITTEN, np.int64),
            "host": np.full((num_host_blocks, BLOCK_SIZE), UNWRITTEN, np.int64),
        }
        self.live: dict[Sequence, tuple[str | None, list[int]]] = {}
        self.swapped: set[Sequence] = set()
        self.slid: dict[Sequence, int] = {}
        self.unknown = 100

    # ------------------------------------------------------------ the data plane, in miniature

    def copy(self, copies: np.ndarray) -> None:
        memory = self.memory["device"]
        memory[copies[:, 1]] = memory[copies[:, 0]]

    def apply(self, plan: Plan) -> None:
        source, target = self.memory[plan.source], self.memory[plan.destination]
        target[plan.copies[:, 1]] = source[plan.copies[:, 0]]

    def write(self, sequence: Sequence, first: int, slots: np.ndarray) -> None:
        namespace, tokens = self.live[sequence]
        flat = self.memory["device"].reshape(-1)
        for position, slot in enumerate(slots.tolist(), start=first):
            flat[slot] = content(namespace, tokens[: position + 1])

    def pick(self, number: int, *, resident: bool = True) -> Sequence | None:
        handles = [s for s in self.live if not (resident and s in self.swapped)]
        return handles[number % len(handles)] if handles else None

    # ------------------------------------------------------------ the verbs

    @rule(tokens=TOKENS, namespace=NAMESPACES)
    def allocate(self, tokens: list[int], namespace: str | None) -> None:
        before = self.manager.stats()
        try:
            sequence = self.manager.allocate(tokens, namespace=namespace)
        except OutOfBlocks:
            assert self.manager.stats() == before
            assert before.num_free < -(-len(tokens) // BLOCK_SIZE)
            return
        assert sequence.num_cached_tokens <= max(len(tokens) - 1, 0)
        self.live[sequence] = (namespace, list(tokens))
        self.copy(sequence.copies)
        first = sequence.num_cached_tokens
        self.write(sequence, first, self.manager.slots(sequence, first))

    @rule(count=st.integers(0, 18))
    def allocate_unknown(self, count: int) -> None:
        try:
            sequence = self.manager.allocate(count)
        except OutOfBlocks:
            return
        self.live[sequence] = (None, [self.fresh_token() for _ in range(count)])
        self.write(sequence, 0, self.manager.slots(sequence))

    def fresh_token(self) -> int:
        self.unknown += 1
        return self.unknown

    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        resident = [s for s in self.live if s not in self.swapped]
        if not resident:
            return
        batch = data.draw(st.lists(st.sampled_from(resident), unique=True, min_size=1))
        if data.draw(st.booleans()):
            new = [data.draw(st.lists(st.integers(0, 2), max_size=5)) for _ in batch]
            arguments: dict[str, object] = {"tokens": new}
        else:
            counts = [data.draw(st.integers(0, 5)) for _ in batch]
            new = [[self.fresh_token() for _ in range(count)] for count in counts]
            arguments = {"counts": counts}
        before = self.manager.stats()
        target = self.manager.batch(batch) if data.draw(st.booleans()) else batch
        try:
            step = self.manager.append(target, **arguments)  # type: ignore[arg-type]
        except OutOfBlocks:
            assert self.manager.stats() == before
            return
        self.copy(step.copies)
        start = 0
        for sequence, tokens in zip(batch, new, strict=True):
            known = self.live[sequence][1]
            first = len(known)
            known += tokens
            self.write(sequence, first, step.slots[start : start + len(tokens)])
            start += len(tokens)
        assert start == len(step.slots)

    @rule(number=PICK, count=st.integers(1, 3))
    def fork(self, number: int, count: int) -> None:
        parent = self.pick(number)
        if parent is None:
            return
        held = self.manager.stats().num_held
        for child in self.manager.fork(parent, count):
            namespace, tokens = self.live[parent]
            self.live[child] = (namespace, list(tokens))
            if parent in self.slid:
                self.slid[child] = self.slid[parent]
        assert self.manager.stats().num_held == held

    @rule(number=PICK)
    def free(self, number: int) -> None:
        sequence = self.pick(number, resident=False)
        if sequence is None:
            return
        self.manager.free(sequence)
        del self.live[sequence]
        self.swapped.discard(sequence)
        self.slid.pop(sequence, None)
        with pytest.raises(KVPagerError):
            self.manager.free(sequence)

    @rule(number=PICK, length=st.none() | PICK)
    def commit(self, number: int, length: int | None) -> None:
        sequence = self.pick(number)
        if sequence is not None:
            end = len(self.live[sequence][1]) + 1
            self.manager.commit(sequence, None if length is None else length % end)

    @rule(number=PICK, length=PICK)
    def truncate(self, number: int, length: int) -> None:
        sequence = self.pick(number)
        if sequence is None:
            return
        _, tokens = self.live[sequence]
        length %= len(tokens) + 1
        if length < self.slid.get(sequence, 0) // BLOCK_SIZE * BLOCK_SIZE:
            with pytest.raises(ValueError, match="allocate it anew"):
                self.manager.truncate(sequence, length)
            return
        self.manager.truncate(sequence, length)
        del tokens[length:]
        if sequence in self.slid:
            self.slid[sequence] = min(self.slid[sequence], length)

    @rule(number=PICK, start=PICK)
    def slide(self, number: int, start: int) -> None:
        sequence = self.pick(number)
        if sequence is None:
            return
        start %= len(self.live[sequence][1]) + 1
        self.manager.slide(sequence, start)
        self.slid[sequence] = max(start, self.slid.get(sequence, 0))

    @rule(number=PICK)
    def swap(self, number: int) -> None:
        sequence = self.pick(number, resident=False)
        if sequence is None:
            return
        tier = "device" if sequence in self.swapped else "host"
        before = self.manager.stats()
        try:
            plan = self.manager.swap(sequence, tier)
        except OutOfBlocks:
            assert self.manager.stats() == before
            return
        self.apply(plan)
        self.swapped ^= {sequence}

    @rule(extra=st.integers(0, 3))
    def grow(self, extra: int) -> None:
        if self.manager.num_blocks + extra > 20:
            return
        self.manager.grow(self.manager.num_blocks + extra)
        room = np.full((extra, BLOCK_SIZE), UNWRITTEN, np.int64)
        self.memory["device"] = np.concatenate([self.memory["device"], room])

    @rule()
    def drop_cached(self) -> None:
        self.manager.drop_cached()
        assert self.manager.stats().num_cached == 0

    # ------------------------------------------------------------ what must always hold

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "manager"):
            self.manager.check()

    @invariant()
    def every_sequence_reads_back_what_was_written(self) -> None:
        for sequence, (namespace, tokens) in getattr(self, "live", {}).items():
            assert len(sequence) == len(tokens)
            if sequence in self.swapped:
                continue
            start = self.slid.get(sequence, 0)
            table = self.manager.block_table(sequence)
            for position in range(start, len(tokens)):
                block, offset = divmod(position, BLOCK_SIZE)
                kept = self.memory["device"][table[block], offset]
                assert kept == content(namespace, tokens[: position + 1])

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.manager.free(list(self.live))
            stats = self.manager.stats()
            assert stats.num_free + stats.num_cached == stats.num_blocks
            assert stats.num_host_free == stats.num_host_blocks
            self.manager.drop_cached()
            self.manager.check()
            assert self.manager.stats().num_free == stats.num_blocks


TestPagedMemory = PagedMemory.TestCase
TestPagedMemory.settings = settings(max_examples=400, stateful_step_count=40, deadline=None)
