"""`DiskStore`: what it keeps, whom it refuses, and what it does when the disk fails."""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from kvpager.storage.tiers.disk import DiskStore
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import Loaded, Saved
from kvpager.storage.tiers.seals import Encrypted, Mac
from tests.support.failing_calls import failing_calls

NEVER, PAST = math.inf, -math.inf
LAYOUT = BlockLayout("test", 8192)
SLOT_BYTES = 4096 + 8192 + 64
SECRET = bytes(range(32))


def key_of(number: int) -> bytes:
    return blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


def block_of(key: bytes, num_bytes: int = 8192) -> memoryview:
    return memoryview((key * (num_bytes // 32 + 1))[:num_bytes])


def save(store: DiskStore, *numbers: int, deadline: float = NEVER) -> list[int]:
    keys = [key_of(number) for number in numbers]
    blocks = [block_of(key, store.block_bytes) for key in keys]
    return store.save(keys, blocks, deadline).tolist()


def load(store: DiskStore, *numbers: int, deadline: float = NEVER) -> list[int]:
    """Load blocks and compare those that are served; return the outcomes."""
    keys = [key_of(number) for number in numbers]
    buffers = [memoryview(np.zeros(store.block_bytes, np.uint8)) for _ in keys]
    outcomes: list[int] = store.load(keys, buffers, deadline).tolist()
    for key, buffer, outcome in zip(keys, buffers, outcomes, strict=True):
        assert outcome != Loaded.HIT or buffer == block_of(key, store.block_bytes)
    return outcomes


def found(store: DiskStore, numbers: range) -> list[int]:
    return [number for number in numbers if store.find([key_of(number)])]


Open = Callable[..., DiskStore]


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Open]:
    """Open a store for 8 blocks, unless told otherwise. Closes all at the end."""
    stores = []

    def opened(path: Path = tmp_path / "kv", blocks: int = 8, **options: Any) -> DiskStore:
        options = {"layout": LAYOUT, "admit": "always", **options}
        stores.append(DiskStore(path, blocks * SLOT_BYTES, **options))
        return stores[-1]

    yield opened
    for store in stores:
        store.close()


# ------------------------------------------------------------------ blocks


@pytest.mark.parametrize("num_bytes", [1, 100, 4096, 8192, 10_000])
@pytest.mark.parametrize("seal", [None, Mac(SECRET), Encrypted(SECRET)])
def test_blocks_of_any_size_come_back(open_store: Open, num_bytes: int, seal: Any) -> None:
    store = open_store(layout=BlockLayout("test", num_bytes), seal=seal)
    assert save(store, 1, 2, 3) == [Saved.SAVED] * 3
    assert load(store, 3, 1, 2, 4) == [Loaded.HIT] * 3 + [Loaded.MISS]


@pytest.mark.parametrize("shift", [0, 64])
def test_buffers_may_start_anywhere(open_store: Open, shift: int) -> None:
    store = open_store()
    memory = memoryview(mmap.mmap(-1, 3 * 8192))
    source, target = memory[shift : shift + 8192], memory[8192 + shift : 2 * 8192 + shift]
    source[:] = block_of(key_of(1))
    assert store.save([key_of(1)], [source], NEVER).tolist() == [Saved.SAVED]
    assert store.load([key_of(1)], [target], NEVER).tolist() == [Loaded.HIT]
    assert target == source


def test_a_file_system_without_direct_transfers_is_used(open_store: Open) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct transfers")
        return real(path, flags, *rest)

    with mock.patch("os.open", refusing):
        store = open_store(layout=BlockLayout("test", 10_000))
        assert save(store, 1, 2) == [Saved.SAVED] * 2
    assert load(store, 1, 2) == [Loaded.HIT] * 2


def test_a_file_that_refuses_direct_transfers_is_read_without(open_store: Open) -> None:
    store = open_store()
    save(store, 1)
    real, refused = os.preadv, []

    def refusing(*arguments: Any) -> int:
        if not refused:
            refused.append(1)
            raise OSError(errno.EINVAL, "not aligned")
        return real(*arguments)

    with mock.patch("os.preadv", refusing):
        assert load(store, 1, 1) == [Loaded.HIT] * 2


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """Note how many blocks each read takes."""
    real, sizes = os.preadv, list[int]()

    def counting(file: int, buffers: Any, start: int) -> int:
        sizes.append(len(buffers) // 2)
        return real(file, buffers, start)

    with mock.patch("os.preadv", counting):
        yield sizes


@pytest.mark.parametrize("num_bytes", [8192, 10_000])
def test_blocks_side_by_side_are_read_by_one_call(open_store: Open, num_bytes: int) -> None:
    store = open_store(layout=BlockLayout("test", num_bytes), blocks=16)
    save(store, *range(8))
    with counted_reads() as sizes:
        assert load(store, 4, 5, 6, 7, 3, 2, 0, 1) == [Loaded.HIT] * 8  # to the right, to the left
        assert load(store, 3, 4, 5, 5, 6, 5) == [Loaded.HIT] * 6
        assert load(store, 3, 9, 4) == [Loaded.HIT, Loaded.MISS, Loaded.HIT]
    assert sizes == [4, 2, 2, 3, 2, 1, 1, 1]


def test_one_call_reads_no_more_than_a_mebibyte_and_from_one_file(open_store: Open) -> None:
    quarter = BlockLayout("test", 256 << 10)
    with mock.patch("kvpager.storage.tiers.disk.store._SEGMENT_BYTES_MIN", 6 * (260 << 10)):
        store = open_store(layout=quarter, blocks=320)
    save(store, *range(9))
    with counted_reads() as sizes:
        assert load(store, *range(9)) == [Loaded.HIT] * 9
    assert sizes == [4, 2, 3]


def test_loading_ends_at_the_deadline_between_two_reads(open_store: Open) -> None:
    store, real = open_store(), os.preadv
    save(store, 1, 2, 3, 4)
    now = mock.Mock(return_value=0.0)

    def slow(*arguments: Any) -> int:
        now.return_value += 1.0
        return real(*arguments)

    with mock.patch("time.monotonic", now), mock.patch("os.preadv", slow):
        outcomes = load(store, 1, 9, 3, 2, 4, deadline=2.0)  # 3 and 2 by one call
    assert outcomes == [Loaded.HIT, Loaded.MISS, Loaded.HIT, Loaded.HIT, Loaded.LATE]


def test_blocks_beside_one_that_cannot_be_read_are_served(open_store: Open) -> None:
    store, real = open_store(), os.preadv
    save(store, 1, 2, 3)
    place = store._segments._place(1)[1]

    def failing(file: int, buffers: Any, start: int) -> int:
        if start <= place < start + sum(len(buffer) for buffer in buffers):
            raise OSError(errno.EIO, "a bad sector")
        return real(file, buffers, start)

    with mock.patch("os.preadv", failing):
        assert load(store, 1, 2, 3) == [Loaded.HIT, Loaded.BAD, Loaded.HIT]
    assert load(store, 1, 2, 3) == [Loaded.HIT, Loaded.MISS, Loaded.HIT]


def test_the_least_recently_used_block_leaves(open_store: Open) -> None:
    store = open_store(blocks=3)
    for number in (1, 2, 3):
        save(store, number)
    load(store, 1)
    assert save(store, 2, 4) == [Saved.KNOWN, Saved.SAVED]
    assert found(store, range(6)) == [1, 2, 4]
    assert store.stats().evicted == 1


def test_a_block_that_is_read_keeps_its_slot(open_store: Open) -> None:
    """While it is read, it is dropped, and the store is filled with others."""
    store = open_store(blocks=2)
    save(store, 1, 2)
    real, others = os.preadv, count(10)

    def overwriting(*arguments: Any) -> int:
        store.drop([key_of(1)])
        save(store, *(next(others) for _ in range(3)))
        return real(*arguments)

    with mock.patch("os.preadv", overwriting):
        assert load(store, 1) == [Loaded.HIT]
    assert load(store, 1) == [Loaded.MISS]
    assert save(store, 30, 31) == [Saved.SAVED] * 2
    assert found(store, range(40)) == [30, 31]


def test_a_store_whose_slots_are_all_read_refuses(open_store: Open) -> None:
    store = open_store(blocks=1)
    save(store, 1)
    real, outcomes = os.preadv, []

    def saving(*arguments: Any) -> int:
        outcomes.extend(save(store, 2))
        return real(*arguments)

    with mock.patch("os.preadv", saving):
        assert load(store, 1) == [Loaded.HIT]
    assert outcomes == [Saved.REFUSED]
    assert found(store, range(3)) == [1]


def test_a_block_is_not_offered_while_it_is_written(open_store: Open) -> None:
    store, seen, real = open_store(), [], os.pwritev

    def looking(*arguments: Any) -> int:
        seen.append((store.find([key_of(1)]), load(store, 1), save(store, 1)))
        return real(*arguments)

    with mock.patch("os.pwritev", looking):
        save(store, 1)
    assert seen == [(0, [Loaded.MISS], [Saved.KNOWN])]
    assert load(store, 1) == [Loaded.HIT]


def test_what_comes_after_the_deadline_is_late(open_store: Open) -> None:
    store, real = open_store(), os.pwritev
    now = mock.Mock(return_value=0.0)

    def slow(*arguments: Any) -> int:
        now.return_value += 1.0
        return real(*arguments)

    with mock.patch("time.monotonic", now), mock.patch("os.pwritev", slow):
        outcomes = save(store, 1, 2, 3, deadline=2.0)
    assert outcomes == [Saved.SAVED, Saved.SAVED, Saved.LATE]
    assert found(store, range(5)) == [1, 2]
    assert load(store, 1, 3, deadline=PAST) == [Loaded.LATE] * 2
    assert (store.stats().late, store.stats().late_saves) == (2, 1)


@contextmanager
def interrupted(call: str) -> Iterator[None]:
    """Interrupt the next call of a function."""
    with (
        mock.patch(call, side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        yield


def test_closing_waits_for_a_transfer(open_store: Open) -> None:
    store, real = open_store(), os.pwritev
    begun, may_end = threading.Event(), threading.Event()

    def waiting(*arguments: Any) -> int:
        begun.set()
        may_end.wait()
        return real(*arguments)

    with mock.patch("os.pwritev", waiting):
        saving = threading.Thread(target=save, args=(store, 1))
        saving.start()
        begun.wait()
        closing = threading.Thread(target=store.close)
        closing.start()
        assert found(store, range(3)) == []
        may_end.set()
        saving.join()
        closing.join()
    assert found(open_store(), range(3)) == [1]


@pytest.mark.parametrize("step", ["pwrite", "fdatasync", "close"])
def test_closing_again_finishes_an_interrupted_close(open_store: Open, step: str) -> None:
    store = open_store()
    save(store, 1)
    load(store, 1)
    with interrupted(f"os.{step}"):
        store.close()
    assert found(store, range(3)) == []
    store.close()
    assert found(open_store(), range(3)) == [1]


def test_closing_again_waits_for_a_transfer(open_store: Open) -> None:
    store, real = open_store(), os.pwritev
    begun, may_end = threading.Event(), threading.Lock()
    may_end.acquire()

    def waiting(*arguments: Any) -> int:
        begun.set()
        with may_end:
            return real(*arguments)

    with mock.patch("os.pwritev", waiting):
        saving = threading.Thread(target=save, args=(store, 1))
        saving.start()
        begun.wait()
        with interrupted("threading.Condition.wait"):
            store.close()
        may_end.release()
        store.close()
        saving.join()
    assert found(open_store(), range(3)) == [1]


# ------------------------------------------------------------------ admission and age


def test_a_store_may_take_only_what_is_offered_twice(open_store: Open) -> None:
    store = open_store(admit="second")
    assert save(store, 1, 2, 1) == [Saved.REFUSED, Saved.REFUSED, Saved.SAVED]
    assert save(store, 2) == [Saved.SAVED]


def test_a_store_with_room_takes_all_and_a_full_one_the_second(open_store: Open) -> None:
    store = open_store(blocks=2, admit="auto")
    assert save(store, 1, 2, 3, 4) == [Saved.SAVED] * 2 + [Saved.REFUSED] * 2
    assert save(store, 3) == [Saved.SAVED]
    assert found(store, range(5)) == [1, 3]


def test_refused_keys_are_remembered_for_four_times_the_capacity(open_store: Open) -> None:
    store = open_store(blocks=2, admit="second")
    assert save(store, *range(9)) == [Saved.REFUSED] * 9
    assert save(store, 0, 8) == [Saved.REFUSED, Saved.SAVED]


def test_blocks_are_served_until_they_are_too_old(open_store: Open) -> None:
    now = mock.Mock(return_value=1000.0)
    store = open_store(ttl_s=60, clock=now)
    save(store, 1)
    now.return_value = 1030.0
    save(store, 2)
    now.return_value = 1060.0
    assert found(store, range(4)) == [2]
    assert load(store, 1, 2) == [Loaded.MISS, Loaded.HIT]
    assert store.stats().num_blocks == 1
    store.close()
    now.return_value = 1100.0
    assert open_store(ttl_s=60, clock=now).stats().num_blocks == 0


# ------------------------------------------------------------------ restarts


@pytest.mark.parametrize("restart", [False, True])
def test_the_end_of_a_prefix_leaves_before_its_beginning(open_store: Open, restart: bool) -> None:
    store = open_store(blocks=4)
    save(store, 1, 2, 3)
    save(store, 4)
    if restart:
        store.close()
        store = open_store(blocks=4)
    save(store, 5)
    assert found(store, range(6)) == [1, 2, 4, 5]
    save(store, 6)
    assert found(store, range(7)) == [1, 4, 5, 6]


def test_blocks_and_their_order_survive_a_restart(open_store: Open) -> None:
    store = open_store(blocks=3)
    save(store, 1, 2, 3)
    load(store, 1)
    store.close()
    store = open_store(blocks=3)
    assert load(store, 3, 1, 2) == [Loaded.HIT] * 3
    store.close()
    store = open_store(blocks=3)
    save(store, 4)
    assert found(store, range(5)) == [1, 3, 4]


def test_dropped_blocks_stay_gone_after_a_restart(open_store: Open) -> None:
    store = open_store()
    save(store, 1, 2)
    store.drop([key_of(1), key_of(9)])
    store.close()
    store = open_store()
    assert load(store, 1, 2) == [Loaded.MISS, Loaded.HIT]
    assert save(store, 1) == [Saved.SAVED]


def used_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def test_the_capacity_bounds_the_disk_now_and_after_a_restart(
    open_store: Open, tmp_path: Path
) -> None:
    for _ in range(3):
        store = open_store(blocks=20)
        save(store, *range(50))
        assert store.stats().num_blocks == store.stats().capacity == 20
        assert used_bytes(tmp_path / "kv") <= 20 * SLOT_BYTES + 2 * 4096  # rounded to pages
        store.close()


@pytest.mark.parametrize("each", [2, 100])
def test_the_capacity_may_change_between_restarts(
    open_store: Open, tmp_path: Path, each: int
) -> None:
    with mock.patch("kvpager.storage.tiers.disk.store._SEGMENT_BYTES_MIN", each * SLOT_BYTES):
        store = open_store(blocks=8)
    save(store, *range(8))
    store.close()
    store = open_store(blocks=5)
    assert found(store, range(8)) == [0, 1, 2, 3, 4]
    assert used_bytes(tmp_path / "kv") <= 5 * SLOT_BYTES + 2 * 4096
    store.close()
    store = open_store(blocks=11)
    save(store, *range(10, 16))
    assert load(store, 0, 1, 2, 3, 4, *range(10, 16)) == [Loaded.HIT] * 11


@pytest.mark.parametrize(
    "options",
    [{"layout": BlockLayout("another", 8192)}, {"seal": Mac(SECRET)}, {"seal": Encrypted(SECRET)}],
)
def test_blocks_of_another_layout_or_seal_are_deleted(
    open_store: Open, options: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store()
    save(store, 1, 2)
    store.close()
    assert not caplog.records
    store = open_store(**options)
    [record] = caplog.records  # it tells what differs
    assert repr(LAYOUT.text) in record.getMessage()
    assert repr(options.get("layout", LAYOUT).text) in record.getMessage()
    assert store.stats().num_blocks == 0
    assert load(store, 1) == [Loaded.MISS]
    assert save(store, 1) == [Saved.SAVED]


# ------------------------------------------------------------------ the directory


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mode) for path in folder.iterdir()}


def test_only_the_owner_may_read(open_store: Open, tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    folder.mkdir(mode=0o755)
    save(open_store(), 1)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_a_directory_in_use_is_refused(open_store: Open, tmp_path: Path) -> None:
    store = open_store()
    save(store, 1)
    before = snapshot(tmp_path / "kv")
    with pytest.raises(BlockingIOError, match="another disk store uses the directory"):
        open_store(layout=BlockLayout("another", 8192))
    assert snapshot(tmp_path / "kv") == before
    assert load(store, 1) == [Loaded.HIT]


def test_a_directory_with_other_files_is_refused(open_store: Open, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "slots").write_text("also mine")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"holds files of another program, such as 'notes\.txt'"):
        open_store(tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["slots", "segment-00000", "segment-00700"])
def test_files_named_like_ours_without_a_format_file_are_refused(
    open_store: Open, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"holds files of another program, such as '{name}'"):
        open_store(tmp_path)
    assert snapshot(tmp_path) == before


def test_a_directory_whose_making_was_interrupted_is_used(open_store: Open, tmp_path: Path) -> None:
    with mock.patch.object(Path, "rename", fail(errno.EIO)), pytest.raises(OSError, match="error"):
        open_store()
    assert sorted(os.listdir(tmp_path / "kv")) == ["kvpager-disk.json.tmp", "lock"]
    assert save(open_store(), 1) == [Saved.SAVED]


def test_a_forked_child_does_not_keep_the_lock(open_store: Open) -> None:
    store, (waits, may_end) = open_store(), os.pipe()
    save(store, 1)
    child = os.fork()
    if not child:
        os.close(may_end)
        os.read(waits, 1)
        os._exit(0)
    try:
        store.close()
        assert load(open_store(), 1) == [Loaded.HIT]
    finally:
        os.close(may_end)
        os.waitpid(child, 0)
        os.close(waits)


def test_a_forked_child_that_closes_leaves_the_lock(open_store: Open) -> None:
    store = open_store()
    child = os.fork()
    if not child:
        try:
            store.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(BlockingIOError):
        open_store()


def test_another_secret_is_refused(open_store: Open, tmp_path: Path) -> None:
    for seal in (Mac, Encrypted):
        folder = tmp_path / seal.__name__
        store = open_store(folder, seal=seal(SECRET))
        save(store, 1)
        store.close()
        before = snapshot(folder)
        with pytest.raises(ValueError, match=r"seal: .* written with another secret"):
            open_store(folder, seal=seal(bytes(32)))
        assert snapshot(folder) == before
        assert load(open_store(folder, seal=seal(SECRET)), 1) == [Loaded.HIT]


def test_a_path_that_is_no_directory_is_refused(open_store: Open, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(NotADirectoryError, match="a disk store needs a directory"):
        open_store(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "text"


def test_a_directory_that_cannot_be_written_is_refused(open_store: Open, tmp_path: Path) -> None:
    # The tests may run as root, who may write anywhere.
    with (
        mock.patch("os.access", return_value=False),
        pytest.raises(PermissionError, match="must read and write its directory"),
    ):
        open_store(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": "lots"}, "capacity='lots': expected a size such as '4GiB'"),
        ({"capacity": 1000}, "capacity=1000: room for no block. Expected at least 12.1 KiB"),
        ({"admit": "never"}, "admit='never': expected one of 'auto', 'always', 'second'"),
        ({"ttl_s": -1}, "ttl_s=-1: expected seconds"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_made(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    options = {"capacity": 10 * SLOT_BYTES, "layout": LAYOUT, **options}
    with pytest.raises(ValueError, match=message):
        DiskStore(tmp_path / "kv", **options)
    assert not (tmp_path / "kv").exists()


# ------------------------------------------------------------------ failing disks


def fail(error: int) -> mock.Mock:
    return mock.Mock(side_effect=OSError(error, os.strerror(error)))


def test_a_full_disk_refuses_blocks_until_there_is_room(open_store: Open) -> None:
    store, now = open_store(), mock.Mock(return_value=0.0)
    with mock.patch("time.monotonic", now):
        with mock.patch("os.posix_fallocate", fail(errno.ENOSPC)):
            assert save(store, 1) == [Saved.REFUSED]
        now.return_value = 61.0
        assert save(store, 1) == [Saved.SAVED]


def test_a_full_disk_leaves_a_store_the_files_that_it_has(open_store: Open) -> None:
    with mock.patch("kvpager.storage.tiers.disk.store._SEGMENT_BYTES_MIN", 2 * SLOT_BYTES):
        store = open_store()
    assert save(store, 1, 2) == [Saved.SAVED] * 2
    with mock.patch("os.posix_fallocate", fail(errno.ENOSPC)):
        assert save(store, 3, 4, 5) == [Saved.SAVED] * 3
    assert found(store, range(6)) == [4, 5]


def test_a_block_that_cannot_be_read_is_bad_and_forgotten(open_store: Open) -> None:
    store = open_store()
    save(store, 1, 2)
    with mock.patch("os.preadv", fail(errno.EIO)):
        assert load(store, 1) == [Loaded.BAD]
    assert load(store, 1, 2) == [Loaded.MISS, Loaded.HIT]
    assert save(store, 1) == [Saved.SAVED]


def test_a_damaged_block_is_bad_and_forgotten(open_store: Open, tmp_path: Path) -> None:
    store = open_store()
    save(store, 1, 2)
    with (tmp_path / "kv" / "segment-00000").open("r+b") as file:
        file.seek(4096 + 5000)
        file.write(b"\xff")
    assert load(store, 1, 2) == [Loaded.BAD, Loaded.HIT]
    assert load(store, 1) == [Loaded.MISS]
    assert store.stats().bad == 1


def test_a_dropped_block_whose_record_stays_is_dropped_again(open_store: Open) -> None:
    store = open_store(blocks=2)
    save(store, 1, 2)
    with mock.patch("os.pwrite", fail(errno.EIO)):
        assert not store.drop([key_of(1)])
        assert load(store, 1, 2) == [Loaded.MISS, Loaded.HIT]
    assert store.drop([key_of(2)])
    assert store.drop([key_of(1)])
    store.close()
    assert found(open_store(blocks=2), range(3)) == []


def test_a_drop_that_is_not_synced_is_synced_by_the_next(open_store: Open) -> None:
    store, synced = open_store(), list[int]()
    save(store, 1, 2)
    with mock.patch("os.fdatasync", fail(errno.EIO)):
        assert not store.drop([key_of(1)])
    with mock.patch("os.fdatasync", synced.append):
        assert store.drop([key_of(1)])
        assert len(synced) == 1
        assert store.drop([key_of(1)])  # nothing was erased since
        assert len(synced) == 1


def test_a_slot_is_not_written_before_its_record_is_erased(open_store: Open) -> None:
    store = open_store(blocks=2)
    save(store, 1, 2)
    with mock.patch("os.pwrite", fail(errno.EIO)):
        store.drop([key_of(1)])
        assert save(store, 3) == [Saved.REFUSED]
    assert save(store, 3) == [Saved.SAVED]
    assert found(store, range(4)) == [2, 3]
    store.close()
    assert load(open_store(blocks=2), 1, 2, 3) == [Loaded.MISS, Loaded.HIT, Loaded.HIT]


def test_a_store_opens_whose_records_cannot_be_erased(open_store: Open) -> None:
    store = open_store(blocks=2, clock=lambda: 0.0)
    save(store, 1, 2)
    store.close()
    with mock.patch("os.pwrite", fail(errno.EIO)):
        store = open_store(blocks=2, ttl_s=60, clock=lambda: 100.0)
        assert save(store, 3) == [Saved.REFUSED]
    assert save(store, 3, 4) == [Saved.SAVED] * 2


def test_a_disk_that_takes_no_writes_keeps_serving_its_blocks(open_store: Open) -> None:
    store = open_store(blocks=2)
    save(store, 1, 2)
    with mock.patch("os.pwrite", fail(errno.EIO)), mock.patch("os.pwritev", fail(errno.EIO)):
        assert save(store, 3, 4, 5) == [Saved.REFUSED] * 3
        assert load(store, 1, 2) == [Loaded.HIT] * 2
    assert save(store, 3) == [Saved.SAVED]


def test_a_disk_that_fails_at_any_call_harms_no_other_block(open_store: Open) -> None:
    """Each call of the system fails once, in a history that evicts, drops and opens again."""

    def history(folder: Path, failing: int) -> int:
        store = open_store(folder, blocks=3)
        with failing_calls(failing, errno.EIO) as calls:
            save(store, *range(5))
            load(store, *range(6))
            store.drop([key_of(4)])
            save(store, 5, 6)
            store.close()
        store = open_store(folder, blocks=3)
        load(store, *range(7))
        store.close()
        return next(calls)

    folder = open_store()._directory.path.parent
    num_calls = history(folder / "none", -1)
    assert num_calls > 20
    for failing in range(num_calls):
        history(folder / str(failing), failing)
        shutil.rmtree(folder / str(failing))
