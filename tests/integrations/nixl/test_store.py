"""`NixlStore` when transfers are late or fail, and what it refuses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvpager.integrations.nixl import NixlStore, agent, mover, store
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import Loaded, Saved
from kvpager.storage.tiers.urls import open_store
from kvpager.testing.store_calls import block_of, key_of, load, save
from tests.support.fake_nixl import FakeAgent

LAYOUT = BlockLayout("nixl", 4096)
SLOT = 8192
SOON = 1.0  # on a clock that starts at 0 and moves whenever it is read


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeAgent:
    fake, now = FakeAgent(), iter(range(10**9))
    monkeypatch.setattr(store, "open_agent", lambda backend, options: fake)
    clock = SimpleNamespace(monotonic=lambda: next(now) * 1e-3, sleep=lambda seconds: None)
    for module in (store, mover):
        monkeypatch.setattr(module, "time", clock)
    return fake


@pytest.fixture
def soon() -> Callable[[], float]:
    """Return a deadline ahead on the clock of the store."""
    return lambda: store.time.monotonic() + SOON


@pytest.fixture
def two(tmp_path: Path, fake: FakeAgent) -> Iterator[NixlStore]:
    """Return a store of two slots."""
    opened = NixlStore(tmp_path, 2 * SLOT, layout=LAYOUT)
    fake.written.clear()
    yield opened
    fake.let_go()
    opened.close()
    assert not fake.registered


# ---------------------------------------------------------------- late transfers


def test_a_late_load_keeps_its_slot_until_it_ends(
    two: NixlStore, fake: FakeAgent, soon: Callable[[], float]
) -> None:
    keys = [key_of(number) for number in range(4)]
    assert save(two, keys[:2]) == [Saved.SAVED] * 2
    fake.hold = 1
    outcomes, buffers = load(two, keys[:1], soon())
    assert outcomes == [Loaded.LATE]
    assert buffers == [bytes(4096)]
    offset = fake.held[0].region[0]
    fake.written.clear()
    assert save(two, keys[2:]) == [Saved.SAVED, Saved.REFUSED]
    assert fake.written == [SLOT - offset]
    fake.let_go()
    two.drop(keys[:1])
    assert save(two, keys[3:]) == [Saved.SAVED]
    assert load(two, keys[2:])[1] == [block_of(key, 4096) for key in keys[2:]]
    two._tier.check()


def test_blocks_that_arrived_beside_a_late_one_are_used(
    two: NixlStore, fake: FakeAgent, soon: Callable[[], float]
) -> None:
    keys = [key_of(0), key_of(1)]
    save(two, keys)
    fake.hold = 1
    assert load(two, keys, soon())[0] == [Loaded.LATE, Loaded.HIT]
    fake.let_go()
    assert load(two, keys)[0] == [Loaded.HIT] * 2


def test_a_late_save_offers_nothing_and_is_reported_as_lost(
    two: NixlStore, fake: FakeAgent, soon: Callable[[], float]
) -> None:
    key, lost = key_of(0), two.losses.follow()
    fake.hold = 1
    assert save(two, [key], soon()) == [Saved.LATE]
    assert two.find([key]) == 0
    assert save(two, [key]) == [Saved.KNOWN], "it may still arrive"
    assert load(two, [key])[0] == [Loaded.MISS]
    fake.let_go()
    assert save(two, [key_of(1)]) == [Saved.SAVED]
    assert list(lost) == [key]
    assert save(two, [key]) == [Saved.SAVED]
    assert load(two, [key])[1] == [block_of(key, 4096)]
    two._tier.check()


def test_stuck_transfers_leave_later_calls_late(
    tmp_path: Path, fake: FakeAgent, soon: Callable[[], float]
) -> None:
    many = NixlStore(tmp_path, 200 * SLOT, layout=LAYOUT)
    fake.hold = 1000
    keys = [key_of(number) for number in range(100)]
    assert set(save(many, keys, soon())) == {Saved.LATE}
    for start in range(100, 200, 10):  # no buffer is left in the end
        batch = [key_of(number) for number in range(start, start + 10)]
        assert set(save(many, batch, soon())) <= {Saved.LATE, Saved.REFUSED}
    fake.hold = 0
    fake.let_go()
    assert save(many, keys) == [Saved.SAVED] * 100
    assert load(many, keys)[0] == [Loaded.HIT] * 100
    many.close()


def test_close_waits_for_late_transfers(
    tmp_path: Path, fake: FakeAgent, soon: Callable[[], float]
) -> None:
    opened = NixlStore(tmp_path, 2 * SLOT, layout=LAYOUT)
    save(opened, [key_of(0)])
    fake.hold = 1
    load(opened, [key_of(0)], soon())
    file = opened._mover._place.file
    opened.close()  # it gives up after a while: the memory is still in use
    assert fake.registered == ["DRAM", "FILE"]
    assert os.fstat(file).st_size == 2 * SLOT
    fake.let_go()
    opened.close()
    assert fake.registered == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_an_interrupt_leaves_no_slot_and_no_buffer_behind(two: NixlStore, fake: FakeAgent) -> None:
    keys = [key_of(0), key_of(1)]
    for call in (save, load):  # the second one looks at what the first one left
        fake.interrupts = 1
        with pytest.raises(KeyboardInterrupt):
            call(two, keys)
    assert two.find(keys) == 0
    assert save(two, keys) == [Saved.SAVED] * 2
    fake.interrupts = 1
    with pytest.raises(KeyboardInterrupt):
        load(two, keys)
    two.drop(keys)
    assert load(two, keys)[0] == [Loaded.MISS] * 2
    assert save(two, keys) == [Saved.SAVED] * 2
    two._tier.check()


# ---------------------------------------------------------------- failed transfers


@pytest.mark.parametrize("when", ["refuses", "fails"])
def test_a_failed_load_is_bad_once(two: NixlStore, fake: FakeAgent, when: str) -> None:
    key = key_of(0)
    save(two, [key])
    setattr(fake, when, "READ")
    assert load(two, [key])[0] == [Loaded.BAD]
    assert load(two, [key])[0] == [Loaded.MISS]
    setattr(fake, when, "")
    assert save(two, [key]) == [Saved.SAVED]
    assert load(two, [key])[0] == [Loaded.HIT]


@pytest.mark.parametrize("when", ["refuses", "fails"])
def test_a_failed_save_is_refused(two: NixlStore, fake: FakeAgent, when: str) -> None:
    keys = [key_of(0), key_of(1)]
    setattr(fake, when, "WRITE")
    assert save(two, keys) == [Saved.REFUSED] * 2
    assert two.find(keys) == 0
    setattr(fake, when, "")
    assert save(two, keys) == [Saved.SAVED] * 2


def test_a_transfer_that_moves_nothing_serves_no_earlier_block(
    two: NixlStore, fake: FakeAgent
) -> None:
    save(two, [key_of(0)])
    assert load(two, [key_of(0)])[0] == [Loaded.HIT]
    fake.moves_nothing = True  # the buffer still holds the block
    assert load(two, [key_of(0)])[0] == [Loaded.BAD]


# ---------------------------------------------------------------- opening


def test_the_file_has_no_name_and_all_its_room(two: NixlStore, tmp_path: Path) -> None:
    assert os.listdir(tmp_path) == []
    status = os.fstat(two._mover._place.file)
    assert status.st_size == 2 * SLOT
    assert status.st_blocks * 512 >= 2 * SLOT
    assert status.st_mode & 0o777 == 0o600
    assert two.is_private


def test_direct_io_that_fails_is_left(tmp_path: Path, fake: FakeAgent) -> None:
    fake.fails_direct = True
    opened = NixlStore(tmp_path, 2 * SLOT, layout=LAYOUT)
    assert save(opened, [key_of(0)]) == [Saved.SAVED]
    assert load(opened, [key_of(0)])[0] == [Loaded.HIT]
    opened.close()


@pytest.mark.parametrize("operation", ["READ", "WRITE"])
def test_a_backend_that_does_not_work_is_told_at_once(
    tmp_path: Path, fake: FakeAgent, operation: str
) -> None:
    fake.fails = operation
    with pytest.raises(OSError, match="NIXL's POSIX cannot write and read there"):
        NixlStore(tmp_path, 2 * SLOT, layout=LAYOUT)
    assert not fake.registered
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("capacity", "error"),
    [("lots", ValueError), ("4KiB", ValueError), (None, TypeError), (0, ValueError)],
)
def test_a_bad_capacity_is_refused(tmp_path: Path, capacity: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="capacity="):
        NixlStore(tmp_path / "new", capacity, layout=LAYOUT)
    assert not (tmp_path / "new").exists()


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        NixlStore(tmp_path / "file", 2 * SLOT, layout=LAYOUT)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_without_the_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"\[Errno (27|28)\]"):  # too large, no space
        NixlStore(tmp_path, 1 << 50, layout=BlockLayout("huge", 1 << 31))
    assert os.listdir(tmp_path) == []


def test_a_backend_without_files_or_objects_is_refused(tmp_path: Path, fake: FakeAgent) -> None:
    fake.kind = "VRAM"
    with pytest.raises(ValueError, match="keeps neither files nor objects"):
        NixlStore(tmp_path, 2 * SLOT, layout=LAYOUT)


def test_a_missing_package_is_told_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'kvpager\[nixl\]'"):
        agent.open_agent("POSIX", {})


def test_a_backend_that_nixl_lacks_is_refused() -> None:
    if not any(map(agent.find_spec, agent.PACKAGES)):
        pytest.skip("NIXL is not installed: pip install 'kvpager[nixl]'")
    with pytest.raises(ValueError, match=r"no such backend. Use one of .*POSIX"):
        agent.open_agent("posix", {})
    with pytest.raises(OSError, match="NIXL cannot start it here"):
        agent.open_agent("GDS_MT", {"": ""})


# ---------------------------------------------------------------- URLs


def test_a_url_names_capacity_backend_and_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: FakeAgent
) -> None:
    asked = []
    monkeypatch.setattr(store, "open_agent", lambda *given: asked.append(given) or fake)
    url = f"nixl:{tmp_path}/a%20cache?capacity=64KiB&backend=OBJ&bucket=kv&region=eu"
    opened = open_store(url, layout=LAYOUT)
    assert asked == [("OBJ", {"bucket": "kv", "region": "eu"})]
    assert opened.stats().capacity == 8
    opened.close()
    open_store(f"nixl:{tmp_path}?capacity=64KiB", layout=LAYOUT).close()
    assert asked[1] == ("POSIX", {})


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nixl:", "expected a path, such as nixl:/var/cache/kv"),
        ("nixl://host/kv?capacity=1MiB", "expected a path"),
        ("nixl:/nowhere", "add the size of the store"),
        ("nixl:/nowhere?capacity=lots", "capacity='lots'"),
        ("nixl:/nowhere?capacity=1MiB&capacity=2MiB", "the option capacity comes twice"),
        ("nixl:/nowhere?secret_key=hunter2", "add the size of the store"),
    ],
)
def test_a_bad_url_is_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        open_store(url, layout=LAYOUT)
    assert message in str(error.value)
    assert "hunter2" not in str(error.value)
    assert not Path("/nowhere").exists()
