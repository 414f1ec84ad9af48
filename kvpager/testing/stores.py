"""A pytest suite that checks the properties of any `BlockStore`.

    from kvpager.testing.stores import StoreConformance

    class TestMyStore(StoreConformance):
        def make_store(self, layout, num_blocks):
            return MyStore(capacity=num_blocks, layout=layout)

Define `reopen` for a store that keeps blocks when it is closed, and `damage` if a test can reach
the stored bytes. Needs pytest.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import BlockStore, Loaded, Saved
from kvpager.testing.store_calls import NEVER, block_of, key_of, load, read, save

PAST = float("-inf")
_HIT, _MISS, _BAD, _LATE = Loaded


def _in_threads(work: Callable[[int], None], count: int) -> None:
    """Call `work` with a number in each of `count` threads; raise what one of them raised."""
    with ThreadPoolExecutor(count) as threads:
        list(threads.map(work, range(count)))


class StoreConformance:
    """A mixin for pytest classes: define `make_store`, and each property becomes a test.

    Attributes: `block_bytes` of the stores, `num_blocks` that must fit, `seeds` of the random
    histories.
    """

    block_bytes = 4096
    num_blocks = 16
    seeds = range(4)

    def make_store(self, layout: BlockLayout, num_blocks: int) -> BlockStore:
        """Return a new, empty store with room for at least `num_blocks` blocks of `layout`."""
        raise NotImplementedError("define make_store(self, layout, num_blocks) -> BlockStore")

    def reopen(self, store: BlockStore, layout: BlockLayout) -> BlockStore:
        """Close `store` and open its place again, for blocks of `layout`."""
        pytest.skip("the store keeps nothing when it is closed")

    def damage(self, store: BlockStore, key: bytes) -> None:
        """Change a bit of the stored block of `key`."""
        pytest.skip("no test reaches the stored bytes")

    @property
    def layout(self) -> BlockLayout:
        """The layout of the blocks."""
        return BlockLayout("conformance", self.block_bytes)

    @contextmanager
    def opened(self, num_blocks: int | None = None) -> Iterator[BlockStore]:
        """Make a store, and close it at the end."""
        store = self.make_store(self.layout, num_blocks or self.num_blocks)
        try:
            yield store
        finally:
            store.close()

    @pytest.fixture
    def store(self) -> Iterator[BlockStore]:
        """Return an empty store."""
        with self.opened() as store:
            yield store

    @pytest.fixture
    def keys(self) -> list[bytes]:
        """Return as many keys as the store has room for."""
        return [key_of(number) for number in range(self.num_blocks)]

    # ---------------------------------------------------------------- load and save

    def test_a_store_tells_its_name_and_block_bytes(self, store: BlockStore) -> None:
        assert store.name
        assert isinstance(store.name, str)
        assert store.block_bytes == self.block_bytes

    def test_blocks_come_back_as_they_were_saved(
        self, store: BlockStore, keys: list[bytes]
    ) -> None:
        assert save(store, keys) == [Saved.SAVED] * len(keys)
        outcomes, blocks = load(store, keys)
        assert outcomes == [_HIT] * len(keys)
        assert blocks == [block_of(key, self.block_bytes) for key in keys]

    def test_a_block_is_loaded_as_often_as_asked(self, store: BlockStore) -> None:
        save(store, [key_of(0)])
        for _ in range(3):
            assert load(store, [key_of(0)])[0] == [_HIT]

    def test_an_empty_store_misses(self, store: BlockStore, keys: list[bytes]) -> None:
        assert store.find(keys) == 0
        assert load(store, keys)[0] == [_MISS] * len(keys)

    def test_calls_without_keys_do_nothing(self, store: BlockStore) -> None:
        assert store.find([]) == 0
        assert load(store, []) == ([], [])
        assert save(store, []) == []
        assert store.drop([])

    def test_outcomes_and_buffers_are_in_the_order_of_the_keys(self, store: BlockStore) -> None:
        there = [key_of(number) for number in (3, 1, 4)]
        save(store, there)
        asked = [key_of(number) for number in (0, 4, 9, 1, 1, 8, 3)]
        outcomes, blocks = load(store, asked)
        assert outcomes == [_HIT if key in there else _MISS for key in asked]
        for key, outcome, block in zip(asked, outcomes, blocks, strict=True):
            assert outcome == _MISS or block == block_of(key, self.block_bytes)

    def test_the_first_bytes_of_a_key_stay(self, store: BlockStore) -> None:
        key = key_of(0)
        save(store, [key])
        other = [block_of(key, self.block_bytes, version=1)]
        assert store.save([key], other, NEVER).tolist() == [Saved.KNOWN]
        assert load(store, [key])[1] == [block_of(key, self.block_bytes)]

    def test_a_key_that_comes_twice_is_saved_once(self, store: BlockStore) -> None:
        key = key_of(0)
        blocks = [block_of(key, self.block_bytes, version) for version in (0, 1)]
        assert store.save([key, key], blocks, NEVER).tolist() == [Saved.SAVED, Saved.KNOWN]
        assert load(store, [key, key])[1] == [blocks[0], blocks[0]]

    def test_known_keys_are_told_from_new_ones(self, store: BlockStore) -> None:
        save(store, [key_of(1)])
        assert save(store, [key_of(0), key_of(1)]) == [Saved.SAVED, Saved.KNOWN]

    def test_keys_that_differ_in_one_bit_are_others(self, store: BlockStore) -> None:
        key = key_of(0)
        save(store, [key])
        for bit in range(256):
            near = (int.from_bytes(key, "little") ^ 1 << bit).to_bytes(32, "little")
            assert store.find([near]) == 0
        assert load(store, [near])[0] == [_MISS]

    def test_blocks_are_read_from_and_into_parts_of_buffers(self, store: BlockStore) -> None:
        key, size = key_of(0), self.block_bytes
        source = memoryview(b"#" * size + bytes(block_of(key, size)) + b"#" * size)
        store.save([key], [source[size : 2 * size]], NEVER)
        target = bytearray(b"-" * 3 * size)
        store.load([key], [memoryview(target)[size : 2 * size]], NEVER)
        assert target == b"-" * size + bytes(block_of(key, size)) + b"-" * size

    # ---------------------------------------------------------------- find and drop

    def test_find_counts_leading_keys_only(self, store: BlockStore) -> None:
        save(store, [key_of(number) for number in (0, 1, 3)])
        asked = [key_of(number) for number in range(5)]
        assert store.find(asked) == 2
        assert store.find(asked[2:]) == 0
        assert store.find(asked[3:]) == 1

    def test_dropped_blocks_are_gone(self, store: BlockStore, keys: list[bytes]) -> None:
        save(store, keys[:3])
        assert store.drop([keys[1], key_of(99)])
        assert store.find(keys[:3]) == 1
        assert load(store, keys[:3])[0] == [_HIT, _MISS, _HIT]

    def test_a_dropped_key_takes_other_bytes(self, store: BlockStore) -> None:
        key = key_of(0)
        save(store, [key])
        assert store.drop([key])
        other = block_of(key, self.block_bytes, version=1)
        assert store.save([key], [other], NEVER).tolist() == [Saved.SAVED]
        assert load(store, [key])[1] == [other]

    # ---------------------------------------------------------------- room

    def test_dropped_blocks_make_room(self, store: BlockStore) -> None:
        for first in range(0, 4 * self.num_blocks, self.num_blocks):
            keys = [key_of(first + number) for number in range(self.num_blocks)]
            assert save(store, keys) == [Saved.SAVED] * self.num_blocks
            assert store.drop(keys)

    def test_a_store_is_never_over_its_capacity(self, store: BlockStore) -> None:
        capacity = self._capacity(store)
        for number in range(3 * capacity):
            save(store, [key_of(number)])
            assert self._num_blocks(store) <= capacity
        self._check_offered(store, [key_of(number) for number in range(3 * capacity)])

    def test_new_blocks_take_the_place_of_old_ones(self, store: BlockStore) -> None:
        capacity = self._capacity(store)
        old = [key_of(number) for number in range(capacity)]
        save(store, old)
        before, evicted = self._num_blocks(store), store.stats().evicted
        outcomes = save(store, [key_of(number) for number in range(capacity, capacity + 4)])
        assert set(outcomes) <= {Saved.SAVED, Saved.REFUSED}
        left = before + outcomes.count(Saved.SAVED) - self._num_blocks(store)
        assert store.stats().evicted - evicted == left

    def test_lost_keys_are_reported(self, store: BlockStore) -> None:
        losses = getattr(store, "losses", None)
        if losses is None:
            pytest.skip("the store does not know which keys it loses")
        lost, capacity = losses.follow(), self._capacity(store)
        keys = [key_of(number) for number in range(2 * capacity)]
        for key in keys:
            save(store, [key])
        store.drop([keys[-1], key_of(10**6)])
        gone = [key for key in keys if not store.find([key])]
        assert set(lost) <= set(gone)
        assert len(lost) == store.stats().evicted + 1

    def test_more_blocks_than_fit_break_nothing(self, store: BlockStore) -> None:
        capacity = self._capacity(store)
        keys = [key_of(number) for number in range(2 * capacity + 1)]
        outcomes = save(store, keys)
        assert set(outcomes) <= {Saved.SAVED, Saved.REFUSED}
        assert self._num_blocks(store) <= capacity
        self._check_offered(store, keys)

    # ---------------------------------------------------------------- deadlines

    def test_a_late_load_hits_nothing(self, store: BlockStore, keys: list[bytes]) -> None:
        save(store, keys[:3])
        outcomes, _ = load(store, [*keys[:3], key_of(99)], PAST)
        assert set(outcomes) <= {_LATE, _MISS}
        assert load(store, keys[:3])[0] == [_HIT] * 3

    def test_a_late_save_offers_nothing(self, store: BlockStore, keys: list[bytes]) -> None:
        assert set(save(store, keys, PAST)) <= {Saved.LATE, Saved.REFUSED}
        assert store.find(keys[:1]) == 0
        assert load(store, keys)[0] == [_MISS] * len(keys)
        assert save(store, keys) == [Saved.SAVED] * len(keys)

    def test_a_deadline_ahead_is_enough(self, store: BlockStore) -> None:
        ahead = time.monotonic() + 600
        assert save(store, [key_of(0)], ahead) == [Saved.SAVED]
        assert load(store, [key_of(0)], ahead)[0] == [_HIT]

    # ---------------------------------------------------------------- arguments

    @pytest.mark.parametrize("key", [b"", b"short", bytes(31), bytes(33)])
    def test_keys_of_another_length_are_refused(self, store: BlockStore, key: bytes) -> None:
        block = memoryview(bytearray(self.block_bytes))
        for call in (store.load, store.save):
            with pytest.raises(ValueError, match="keys: expected 32 bytes each"):
                call([key], [block], NEVER)

    @pytest.mark.parametrize("wrong", [-1, 1])
    def test_buffers_of_another_length_are_refused(self, store: BlockStore, wrong: int) -> None:
        block = memoryview(bytearray(self.block_bytes + wrong))
        with pytest.raises(ValueError, match=f"into: .*{self.block_bytes} bytes"):
            store.load([key_of(0)], [block], NEVER)
        with pytest.raises(ValueError, match=f"blocks: .*{self.block_bytes} bytes"):
            store.save([key_of(0)], [block], NEVER)

    def test_each_key_needs_a_buffer(self, store: BlockStore) -> None:
        block = memoryview(bytearray(self.block_bytes))
        with pytest.raises(ValueError, match="into: expected a buffer for each of 2 keys"):
            store.load([key_of(0), key_of(1)], [block], NEVER)
        with pytest.raises(ValueError, match="blocks: expected a buffer for each of 1 keys"):
            store.save([key_of(0)], [block, block], NEVER)

    def test_load_refuses_buffers_that_cannot_be_written(self, store: BlockStore) -> None:
        save(store, [key_of(0)])
        with pytest.raises(ValueError, match="into: expected writable buffers"):
            store.load([key_of(0)], [memoryview(bytes(self.block_bytes))], NEVER)

    # ---------------------------------------------------------------- statistics

    def test_statistics_count_each_outcome(self, store: BlockStore, keys: list[bytes]) -> None:
        save(store, keys[:4])
        save(store, keys[2:6])
        load(store, [*keys[:3], key_of(98), key_of(99)])
        stats = store.stats()
        assert (stats.saved, stats.known, stats.refused) == (6, 2, 0)
        assert (stats.hits, stats.misses, stats.bad, stats.late) == (3, 2, 0, 0)
        assert stats.loaded_bytes == 3 * self.block_bytes
        assert stats.saved_bytes == 6 * self.block_bytes
        assert stats.block_bytes == self.block_bytes

    def test_a_closed_store_offers_and_takes_nothing(self, store: BlockStore) -> None:
        save(store, [key_of(0)])
        store.close()
        assert store.find([key_of(0)]) == 0
        assert load(store, [key_of(0)])[0] == [_MISS]
        assert save(store, [key_of(1)]) == [Saved.REFUSED]
        store.drop([key_of(0)])

    def test_a_store_may_be_closed_twice(self, store: BlockStore) -> None:
        save(store, [key_of(0)])
        store.close()
        store.close()
        assert store.stats().saved == 1

    # ---------------------------------------------------------------- histories and threads

    def test_any_history_serves_what_was_saved_first(self) -> None:
        for seed in self.seeds:
            with self.opened() as store:
                self._play(store, random.Random(seed), steps=120)

    def test_threads_get_the_bytes_of_their_keys(self, store: BlockStore) -> None:
        def work(seed: int) -> None:
            chosen = random.Random(seed)
            for _ in range(40):
                keys = [key_of(chosen.randrange(3 * self.num_blocks)) for _ in range(4)]
                calls: list[Callable[[BlockStore, list[bytes]], object]]
                calls = [save, save, self._check_offered, self._find_and_drop]
                chosen.choice(calls)(store, keys)

        _in_threads(work, 6)
        assert store.stats().bad == 0

    def test_a_store_may_be_closed_while_threads_use_it(self, keys: list[bytes]) -> None:
        with self.opened() as store:
            save(store, keys)
            begun = threading.Barrier(5)

            def work(number: int) -> None:
                begun.wait()
                if number == 0:
                    store.close()
                    return
                for _ in range(20):
                    self._check_offered(store, keys[:4])
                    save(store, keys[:4])

            _in_threads(work, 5)

    # ---------------------------------------------------------------- kept and damaged blocks

    def test_blocks_are_there_after_the_store_is_opened_again(
        self, store: BlockStore, keys: list[bytes]
    ) -> None:
        save(store, keys)
        store.drop(keys[:1])
        again = self.reopen(store, self.layout)
        try:
            outcomes, blocks = load(again, keys)
            assert outcomes == [_MISS] + [_HIT] * (len(keys) - 1)
            assert blocks[1:] == [block_of(key, self.block_bytes) for key in keys[1:]]
            assert save(again, keys[:2]) == [Saved.SAVED, Saved.KNOWN]
        finally:
            again.close()

    def test_blocks_of_another_layout_are_never_read(
        self, store: BlockStore, keys: list[bytes]
    ) -> None:
        save(store, keys)
        again = self.reopen(store, BlockLayout("another", self.block_bytes))
        try:
            assert _HIT not in load(again, keys)[0]
        finally:
            again.close()

    def test_a_damaged_block_is_bad_once_and_then_missing(
        self, store: BlockStore, keys: list[bytes]
    ) -> None:
        save(store, keys[:3])
        self.damage(store, keys[1])
        assert load(store, keys[:3])[0] == [_HIT, _BAD, _HIT]
        assert load(store, keys[:3])[0] == [_HIT, _MISS, _HIT]
        assert store.stats().bad == 1
        assert save(store, keys[:3]) == [Saved.KNOWN, Saved.SAVED, Saved.KNOWN]
        assert load(store, keys[:3])[0] == [_HIT] * 3

    # ---------------------------------------------------------------- helpers

    def _capacity(self, store: BlockStore) -> int:
        capacity = store.stats().capacity
        if capacity is None:
            pytest.skip("the store has no bound")
        assert capacity >= self.num_blocks
        return capacity

    def _num_blocks(self, store: BlockStore) -> int:
        num_blocks = store.stats().num_blocks
        assert num_blocks is not None, "a store with a bound knows how many blocks it has"
        return num_blocks

    def _check_offered(self, store: BlockStore, keys: list[bytes]) -> None:
        outcomes, blocks = load(store, keys)
        for key, outcome, block in zip(keys, outcomes, blocks, strict=True):
            assert outcome in (_HIT, _MISS)
            assert outcome == _MISS or block == block_of(key, self.block_bytes)

    @staticmethod
    def _find_and_drop(store: BlockStore, keys: list[bytes]) -> None:
        assert 0 <= store.find(keys) <= len(keys)
        store.drop(keys[:1])

    def _play(self, store: BlockStore, chosen: random.Random, steps: int) -> None:
        """Compare a history with a dictionary. A store may lose blocks, but not confuse them."""
        kept: dict[bytes, memoryview] = {}
        for step in range(steps):
            numbers = chosen.choices(range(2 * self.num_blocks), k=chosen.randrange(6))
            keys = [key_of(number) for number in numbers]
            match chosen.choice(["save", "save", "load", "find", "drop"]):
                case "save":
                    blocks = [block_of(key, self.block_bytes, step) for key in keys]
                    outcomes = read(store.save(keys, blocks, NEVER), len(keys))
                    for key, outcome, block in zip(keys, outcomes, blocks, strict=True):
                        if outcome == Saved.SAVED:
                            kept[key] = block
                        else:
                            assert outcome == Saved.REFUSED or key in kept
                case "load":
                    outcomes, loaded = load(store, keys)
                    assert set(outcomes) <= {_HIT, _MISS}
                    for key, outcome, bytes_ in zip(keys, outcomes, loaded, strict=True):
                        assert outcome == _MISS or bytes_ == kept[key]
                case "find":
                    assert all(key in kept for key in keys[: store.find(keys)])
                case "drop":
                    store.drop(keys)
                    for key in keys:
                        kept.pop(key, None)
