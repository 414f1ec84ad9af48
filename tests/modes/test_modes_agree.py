"""The same operations in all modes: after each, every sequence has the same content in the three.

Each mode has a manager and a storage, and is read as attention reads it: through block tables,
through mapped rows, or in regions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvpager.blocks.manager import BlockManager
from kvpager.modes import ModeName, page_pool, regions
from kvpager.modes.reserved_manager import ReservedManager
from kvpager.storage.block_storage import BlockStorage
from kvpager.testing.memory import Content

NUM_ROWS, MAX_LENGTH, SIZE = 5, 24, 4
REGION = MAX_LENGTH // SIZE
NUM_BLOCKS = NUM_ROWS * REGION

pytestmark = pytest.mark.skipif(not hasattr(page_pool.os, "memfd_create"), reason="needs Linux")


class InMode:
    """A manager and a storage of one mode. A token's value is in both layers, negated in one."""

    def __init__(self, mode: ModeName) -> None:
        self.mode = mode
        self.manager: Any
        if mode == "reserved":
            self.manager = ReservedManager(NUM_ROWS, MAX_LENGTH, SIZE)
        else:
            self.manager = BlockManager(NUM_BLOCKS, SIZE)
        layers = [(1, 1, 1)] * 2
        self.storage = BlockStorage(NUM_BLOCKS, SIZE, layers, dtype=torch.float64, mode=mode)
        self.rows = None if mode == "paged" else self.storage.open_rows(NUM_ROWS, MAX_LENGTH)
        self.handles: dict[int, Any] = {}

    def write(self, slots: Any, values: list[int]) -> None:
        blocks, offsets = np.divmod(np.asarray(slots, np.intp), SIZE)
        numbers = torch.tensor(values, dtype=torch.float64)
        for layer, sign in ((0, 1), (1, -1)):
            for cache in self.storage.layer(layer):
                cache[blocks, offsets, 0, 0] = sign * numbers

    def read(self, number: int, place: int) -> list[float]:
        """Return a sequence's values. Row `place` shows it, if the mode has rows."""
        handle = self.handles[number]
        table, length = self.manager.block_tables(handle), len(handle)
        found = []
        for layer, sign in ((0, 1), (1, -1)):
            if self.rows is None:
                caches = [cache[table[0].astype(np.int64)] for cache in self.storage.layer(layer)]
                shown = [cache.flatten(0, 1)[:length, 0, 0] for cache in caches]
            else:
                row = int(table[0, 0]) // REGION if self.mode == "reserved" and length else place
                self.rows.follow(np.array([row], np.int32), table)
                caches = [*self.rows.caches(layer).tensors]
                shown = [cache[row, :length, 0, 0] for cache in caches]
            found += [(sign * each).tolist() for each in shown]
        assert all(each == found[0] for each in found), (self.mode, found)
        return found[0]


class Modes(RuleBasedStateMachine):
    """Up to five sequences of up to 24 tokens, so that each call fits in every mode."""

    num_operations = 0

    def __init__(self) -> None:
        super().__init__()
        self.modes = [InMode(mode) for mode in ("paged", "virtual", "reserved")]
        self.contents: dict[int, Content] = {}
        self.next = 0

    def pick(self, number: int) -> int | None:
        type(self).num_operations += 1
        live = sorted(self.contents)
        return live[-1 - number % len(live)] if live else None

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14), namespace=st.booleans())
    def allocate(self, tokens: list[int], namespace: bool) -> None:
        if len(self.contents) == NUM_ROWS:
            self.free(NUM_ROWS - 1)
        self.pick(0)
        name = "acme" if namespace else None
        self.contents[self.next] = content = Content(name, tokens)
        for each in self.modes:
            handle = each.manager.allocate(tokens, namespace=name)
            each.storage.copy(handle.copies)
            first = handle.num_cached_tokens
            each.write(each.manager.slots(handle, first), content_values(content)[first:])
            each.handles[self.next] = handle
        self.next += 1

    @rule(
        numbers=st.lists(st.integers(0, 4), min_size=1, max_size=3),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5),
        by_ids=st.booleans(),
    )
    def append(self, numbers: list[int], tokens: list[int], by_ids: bool) -> None:
        picked = [self.pick(number) for number in numbers]
        chosen = [
            each
            for each in dict.fromkeys(picked)
            if each is not None and len(self.contents[each]) + len(tokens) <= MAX_LENGTH
        ]
        if not chosen:
            return
        for number in chosen:
            self.contents[number].extend(tokens)
        for each in self.modes:
            handles = [each.handles[number] for number in chosen]
            given: Any = [tokens] * len(chosen) if by_ids else len(tokens)
            step = each.manager.append(handles, given)
            each.storage.copy(step.copies)
            values = [content_values(self.contents[number])[-len(tokens) :] for number in chosen]
            each.write(step.slots, [value for row in values for value in row])

    @rule(number=st.integers(0, 4))
    def fork(self, number: int) -> None:
        picked = self.pick(number)
        if picked is None or len(self.contents) == NUM_ROWS:
            return
        self.contents[self.next] = self.contents[picked].copy()
        for each in self.modes:
            each.handles[self.next] = each.manager.fork(each.handles[picked])
        self.next += 1

    @rule(number=st.integers(0, 4), length=st.integers(0, MAX_LENGTH))
    def truncate(self, number: int, length: int) -> None:
        picked = self.pick(number)
        if picked is None:
            return
        length = min(length, len(self.contents[picked]))
        self.contents[picked].truncate(length)
        for each in self.modes:
            each.manager.truncate(each.handles[picked], length)

    @rule(number=st.integers(0, 4))
    def commit(self, number: int) -> None:
        picked = self.pick(number)
        for each in self.modes if picked is not None else ():
            each.manager.commit(each.handles[picked])

    @rule(number=st.integers(0, 4))
    def free(self, number: int) -> None:
        picked = self.pick(number)
        if picked is None:
            return
        del self.contents[picked]
        for each in self.modes:
            each.manager.free(each.handles.pop(picked))

    @invariant()
    def every_mode_has_the_same_content(self) -> None:
        for place, (number, content) in enumerate(self.contents.items()):
            for each in self.modes:
                assert each.read(number, place) == content_values(content), each.mode

    def teardown(self) -> None:
        for each in self.modes:
            each.manager.check()


def content_values(content: Content) -> list[int]:
    """Return values that a float64 has exactly."""
    return [value >> 12 for value in content.values]


def campaign(examples: int, steps: int, **options: Any) -> None:
    checks = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        **options,
    )
    run_state_machine_as_test(Modes, settings=checks)


def test_all_modes_have_the_same_content() -> None:
    campaign(40, 25)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(50))
def test_all_modes_have_the_same_content_after_100_000_operations(part: int) -> None:
    Modes.num_operations = 0
    while Modes.num_operations < 2_000:
        campaign(25, 60, database=None)


@pytest.mark.slow
def test_a_wrong_copy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = regions.Regions._copies

    def short(self: regions.Regions, source: int, destination: int, num_tokens: int) -> Any:
        return real(self, source, destination, num_tokens)[1:]

    monkeypatch.setattr(regions.Regions, "_copies", short)
    with pytest.raises(AssertionError):
        campaign(60, 25, phases=[Phase.generate], database=None)
