"""Rows of different lengths in one array: what is read, and how much memory they keep."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest

from kvpager import BlockManager
from kvpager.blocks.block_tables import Ragged
from kvpager.errors import BrokenInvariant
from kvpager.scheduling.request import Request, RequestState
from kvpager.scheduling.sequence_state import SequenceState

MIB = 2**20


class Rows:
    """The same rows as plain lists."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.ragged = Ragged(-1)
        self.lists: list[list[int]] = []

    def step(self) -> None:
        random, ragged, lists = self.random, self.ragged, self.lists
        match int(random.integers(6)) if lists else 0:
            case 0:
                more = int(random.integers(1, 4))
                ragged.add_rows(more)
                lists += [[] for _ in range(more)]
            case 1 | 2:
                chosen = np.flatnonzero(random.integers(0, 2, len(lists)))
                counts = random.integers(0, 2 ** random.integers(1, 13), len(chosen))
                longer = np.maximum(counts, [len(lists[row]) for row in chosen])
                ragged.reserve(chosen, longer.astype(np.int64))
                for row, count in zip(chosen.tolist(), longer.tolist(), strict=True):
                    values = random.integers(0, 99, count - len(lists[row])).tolist()
                    ragged.row(row)[len(lists[row]) : count] = values
                    lists[row] += values
            case 3:
                row = int(random.integers(len(lists)))
                ragged.release(row)
                lists[row] = []
            case 4:
                row = int(random.integers(len(lists)))
                keep = int(random.integers(0, len(lists[row]) + 1)) // 8
                ragged.part(row, keep, len(lists[row]))[:] = -1
                lists[row] = lists[row][:keep]
                ragged.trim(row, keep)
            case _:
                row = int(random.integers(len(lists)))
                ragged.reserve_row(row, len(lists[row]) + 3)

    def check(self) -> None:
        ragged, lists = self.ragged, self.lists
        counts = np.array([len(one) for one in lists])
        ragged.check("rows", counts)
        chosen = self.random.integers(0, len(lists), 5)
        width = int(self.random.integers(0, counts[chosen].max() + 3))
        padded = [(lists[row] + [-1] * width)[:width] for row in chosen]
        assert ragged.table(chosen, width).tolist() == padded
        places, columns = ragged.places(chosen, counts[chosen])
        assert ragged.data[places].tolist() == [n for row in chosen for n in lists[row]]
        assert columns.tolist() == [at for row in chosen for at in range(counts[row])]
        spans = np.maximum(8 * counts, 4).sum() + 4 * len(lists)
        assert len(ragged.data) <= 4 * spans + 2**16


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("seed", range(20))
def test_rows_read_as_they_were_written(seed: int) -> None:
    rows = Rows(seed)
    for _ in range(120):
        rows.step()
        rows.check()


@pytest.mark.parametrize("damage", ["entry behind the end", "two spans", "short span", "count"])
def test_a_damaged_array_is_found(damage: str) -> None:
    ragged = Ragged(-1)
    ragged.add_rows(2)
    ragged.reserve(np.array([0, 1]), np.array([3, 5]))
    used = np.array([3, 5])
    ragged.row(0)[:3] = ragged.row(1)[:5] = 7
    ragged.check("rows", used)
    match damage:
        case "entry behind the end":
            ragged.row(0)[3] = 7
        case "two spans":
            ragged.starts[1] = ragged.starts[0]
        case "short span":
            used[0] = 9
        case "count":
            ragged._num_spanned += 1
    with pytest.raises(BrokenInvariant, match="rows"):
        ragged.check("rows", used)


def test_memory_that_runs_out_leaves_the_rows_as_they_were(monkeypatch) -> None:
    ragged = Ragged(-1)
    ragged.add_rows(2)
    ragged.reserve_row(0, 3)
    ragged.row(0)[:] = 5

    def out_of_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("kvpager.blocks.block_tables.np.empty", out_of_memory)
    with pytest.raises(MemoryError):
        ragged.reserve(np.array([0, 1]), np.array([8, 2**20]))
    ragged.check("rows", np.array([4, 0]))
    assert ragged.row(0).tolist() == [5] * 4
    ragged.release(0)  # the next release shrinks the array
    ragged.check("rows", np.array([0, 0]))


# -------------------------------------------------------------------- in managers and schedulers


class Kept:
    """Bytes that Python and NumPy hold since it was made."""

    def __init__(self) -> None:
        gc.collect()
        tracemalloc.start()
        self._before = tracemalloc.get_traced_memory()[0]

    def __call__(self) -> float:
        gc.collect()
        return (tracemalloc.get_traced_memory()[0] - self._before) / MIB

    def stop(self) -> None:
        tracemalloc.stop()


@pytest.fixture
def kept():
    kept = Kept()
    yield kept
    kept.stop()


@pytest.mark.slow
def test_short_sequences_beside_a_long_one_stay_short(kept: Kept) -> None:
    manager = BlockManager(70_000, 1)
    empty = kept()
    short = [manager.allocate(2) for _ in range(2000)]
    few = kept() - empty
    long = manager.allocate(60_000)
    assert kept() - empty < few + 2  # as a table of 2,000 rows it would be 469 MiB
    batch = manager.batch([*short[:100], long])
    manager.append(batch, 1)
    assert kept() - empty < few + 2
    assert len(manager.slots(long)) == 60_001
    manager.check()
    manager.free(long)
    assert kept() - empty < few + 1
    manager.free(short)
    manager.check()


def test_a_sequence_that_was_cut_short_gives_its_table_back(kept: Kept) -> None:
    manager = BlockManager(140_000, 1)
    empty = kept()
    sequence = manager.allocate(130_000)
    assert kept() - empty > 0.4
    manager.truncate(sequence, 3)
    assert kept() - empty < 0.3
    manager.check()


@pytest.mark.slow
def test_forks_in_their_thousands_keep_nothing_when_they_end(kept: Kept) -> None:
    manager = BlockManager(2000, 1)
    parent = manager.allocate(1000)
    empty = kept()
    manager.free(manager.fork(parent, 4000))  # 16 MiB of tables
    assert kept() - empty < 3
    manager.check()


def test_a_call_that_is_refused_keeps_no_table(kept: Kept) -> None:
    manager = BlockManager(200_000, 1)
    manager.quotas.set("a", ceiling=5)
    empty = kept()
    with pytest.raises(Exception, match="may have 5 blocks"):
        manager.allocate(150_000, namespace="a")
    manager.allocate(4)
    assert kept() - empty < 0.3
    manager.check()


@pytest.mark.slow
def test_one_long_reply_does_not_widen_those_of_all_others(kept: Kept) -> None:
    sequences, prompt = SequenceState(), np.array([1, 2], np.int32)
    request = Request(request_id="a", prompt=prompt, max_new_tokens=30_000)
    state = RequestState(request, prompt, 0, 0.0)
    numbers = np.array([sequences.add(state) for _ in range(500)], np.int32)
    sequences.extend(numbers, numbers)
    few, one = kept(), numbers[7:8]
    for token in range(20_000):
        sequences.extend(one, np.array([token], np.int32))
    assert sequences.tokens(7, 0, 5).tolist() == [1, 2, 7, 0, 1]
    assert sequences.tokens(8, 0, 3).tolist() == [1, 2, 8]
    assert kept() < few + 1  # as a table of 512 rows it would be 64 MiB
    sequences.drop(7)
    assert kept() < few + 0.5
