"""`ValkeyStore` on a real server: what is saved is found, and only verified bytes are served."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kvpager.integrations.valkey import ValkeyStore
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import Loaded, Saved
from kvpager.storage.tiers.seals import Digest, Encrypted, Mac, Seal
from tests.support.valkey_blocks import (
    FRAME_AT,
    LAYOUT,
    blocks,
    buffers,
    keys,
    load,
    open_store,
    save,
    soon,
)
from tests.support.valkey_servers import Server

HIT, MISS, BAD = Loaded.HIT, Loaded.MISS, Loaded.BAD
SECRET = b"a secret of 32 bytes, for tests."


@pytest.fixture(params=["tcp", "unix"])
def store(server: Server, request: pytest.FixtureRequest) -> Iterator[ValkeyStore]:
    store = open_store(server.url if request.param == "tcp" else server.unix_url)
    yield store
    store.close()


@pytest.fixture
def single(server: Server) -> Iterator[ValkeyStore]:
    store = open_store(server.unix_url)
    yield store
    store.close()


def test_saved_blocks_are_found_and_loaded(store: ValkeyStore) -> None:
    names, content = keys(5), blocks(5)
    assert store.find(names) == 0
    assert load(store, names)[0] == [MISS] * 5
    assert save(store, names[:3], content[:3]) == [Saved.SAVED] * 3
    assert store.find(names) == 3
    outcomes, into = load(store, names)
    assert outcomes == [HIT, HIT, HIT, MISS, MISS]
    assert into[:3] == content[:3]


def test_find_counts_the_leading_keys_alone(single: ValkeyStore) -> None:
    names, content = keys(5), blocks(5)
    save(single, [names[0], *names[2:]], [content[0], *content[2:]])
    assert single.find(names) == 1
    assert single.find(names[2:]) == 3


def test_each_key_is_answered_for(single: ValkeyStore) -> None:
    names, content = keys(5), blocks(5)
    save(single, [names[0], *names[2:]], [content[0], *content[2:]])
    assert single.find_each(names) == [True, False, True, True, True]
    assert single.find_each([]) == []
    single.close()
    assert single.find_each(names) == [False] * 5
    assert single.find([]) == 0


def test_more_blocks_than_fit_one_request_are_moved(server: Server) -> None:
    names, content = keys(1500), blocks(1500)
    store = open_store(server.unix_url)
    assert save(store, names, content) == [Saved.SAVED] * 1500
    assert store.find(names) == 1500
    outcomes, into = load(store, names)
    assert outcomes == [HIT] * 1500
    assert into == content


@pytest.mark.parametrize("num_bytes", [1, 4095, 4096, 3_000_000])
def test_blocks_of_any_size_are_moved(store: ValkeyStore, server: Server, num_bytes: int) -> None:
    sized = open_store(server.url, BlockLayout("sized", num_bytes))
    names, content = keys(3), blocks(3, num_bytes)
    assert save(sized, names, content) == [Saved.SAVED] * 3
    assert load(sized, names) == ([HIT] * 3, content)


def test_the_first_writer_of_a_key_stays(store: ValkeyStore, server: Server) -> None:
    (name,), first, second = keys(1), blocks(1, seed=1), blocks(1, seed=2)
    assert save(store, [name], first) == [Saved.SAVED]
    assert save(store, [name], second) == [Saved.KNOWN]
    # A key twice in one call: the server itself keeps the first.
    (other,) = keys(1, seed=9)
    assert save(store, [other] * 2, [*first, *second]) == [Saved.SAVED, Saved.KNOWN]
    assert load(store, [name, other]) == ([HIT] * 2, first * 2)


def test_dropped_blocks_are_gone_for_all(single: ValkeyStore, server: Server) -> None:
    names, content = keys(3), blocks(3)
    other = open_store(server.unix_url)
    save(single, names, content)
    assert other.find(names) == 3
    single.drop([names[1], *keys(1, seed=5)])
    assert other.find(names) == 1
    assert load(other, names)[0] == [HIT, MISS, HIT]


def test_blocks_expire_after_their_time_to_live(server: Server) -> None:
    names, content = keys(2), blocks(2)
    save(open_store(server.unix_url, ttl_s=100), names[:1], content[:1])
    save(open_store(server.unix_url, ttl_s=None), names[1:], content[1:])
    left = [server.ask(b"TTL", b"kvp1:" + name) for name in names]
    assert left[0] in (b":100\r\n", b":99\r\n")
    assert left[1] == b":-1\r\n"


@pytest.mark.parametrize("seal", [Digest(), Mac(SECRET), Encrypted(SECRET)])
def test_every_seal_gives_the_block_back(server: Server, seal: Seal) -> None:
    names, content = keys(3), blocks(3)
    save(open_store(server.unix_url, seal=seal), names, content)
    assert load(open_store(server.unix_url, seal=seal), names) == ([HIT] * 3, content)


def test_an_encrypted_block_is_not_to_be_seen(server: Server) -> None:
    (name,), (block,) = keys(1), blocks(1)
    save(open_store(server.unix_url, seal=Encrypted(SECRET)), [name], [block])
    assert bytes(block[:64]) not in server.ask(b"GET", b"kvp1:" + name)


def test_a_flipped_bit_anywhere_is_bad_and_then_gone(server: Server, single: ValkeyStore) -> None:
    (name,), content = keys(1), blocks(1)
    where = [*range(FRAME_AT), FRAME_AT, FRAME_AT + 500, FRAME_AT + 999]
    for offset in where:
        save(single, [name], content)
        value = bytearray(server.ask(b"GET", b"kvp1:" + name).split(b"\r\n", 1)[1][:-2])
        value[offset] ^= 1 << offset % 8
        server.ask(b"SET", b"kvp1:" + name, bytes(value))
        assert load(single, [name])[0] == [BAD], offset
        assert not server.names()
        assert load(single, [name])[0] == [MISS]
    assert single.stats().bad == len(where)


@pytest.mark.parametrize("num_bytes", [0, 1, FRAME_AT, FRAME_AT + 999, FRAME_AT + 1001, 5_000_000])
def test_a_value_of_another_length_is_bad_and_then_gone(
    server: Server, single: ValkeyStore, num_bytes: int
) -> None:
    names, content = keys(3), blocks(3)
    save(single, names, content)
    server.ask(b"SET", b"kvp1:" + names[1], os.urandom(num_bytes))
    first, into = load(single, names)
    assert first[:2] == [HIT, BAD]
    assert into[0] == content[0]
    outcomes, into = load(single, names)
    assert outcomes == [HIT, MISS, HIT]
    assert [into[0], into[2]] == [content[0], content[2]]


def test_a_value_of_another_kind_is_a_miss(server: Server, single: ValkeyStore) -> None:
    names, content = keys(2), blocks(2)
    server.ask(b"LPUSH", b"kvp1:" + names[0], b"an element")
    save(single, names[1:], content[1:])
    assert load(single, names)[0] == [MISS, HIT]


def test_other_layouts_and_seals_are_not_read(server: Server) -> None:
    names, content = keys(1), blocks(1)
    others = [
        open_store(server.unix_url, BlockLayout("another layout", 1000)),
        open_store(server.unix_url, seal=Mac(SECRET)),
        open_store(server.unix_url, seal=Encrypted(SECRET)),
    ]
    for other in others:
        save(open_store(server.unix_url), names, content)
        assert load(other, names)[0] == [BAD]


def test_a_value_under_another_key_is_not_read(server: Server, single: ValkeyStore) -> None:
    names, content = keys(2), blocks(2)
    save(single, names[:1], content[:1])
    server.ask(b"RENAME", b"kvp1:" + names[0], b"kvp1:" + names[1])
    assert load(single, names)[0] == [MISS, BAD]


def test_a_block_evicted_after_find_is_a_miss(server: Server, single: ValkeyStore) -> None:
    names, content = keys(2), blocks(2)
    save(single, names, content)
    assert single.find(names) == 2
    server.ask(b"DEL", b"kvp1:" + names[0])
    assert load(single, names)[0] == [MISS, HIT]


def test_a_full_server_refuses_and_still_serves(server: Server, single: ValkeyStore) -> None:
    names, content = keys(2), blocks(2)
    save(single, names[:1], content[:1])
    server.ask(b"CONFIG", b"SET", b"maxmemory", b"1")
    try:
        assert save(single, names, content) == [Saved.KNOWN, Saved.REFUSED]
        assert load(single, names)[0] == [HIT, MISS]
        assert not single.bypassed
    finally:
        server.ask(b"CONFIG", b"SET", b"maxmemory", b"0")
    assert save(single, names, content) == [Saved.KNOWN, Saved.SAVED]


def test_outcomes_are_counted(single: ValkeyStore) -> None:
    names, content = keys(3), blocks(3)
    save(single, names[:2], content[:2])
    save(single, names[:1], content[:1])
    load(single, names)
    stats = single.stats()
    assert (stats.hits, stats.misses, stats.saved, stats.known) == (2, 1, 2, 1)
    assert (stats.loaded_bytes, stats.saved_bytes) == (2000, 2000)
    assert (stats.num_blocks, stats.capacity, stats.block_bytes) == (None, None, 1000)
    assert stats.load_s > 0
    assert stats.save_s > 0


def test_a_closed_store_has_nothing(single: ValkeyStore) -> None:
    names, content = keys(2), blocks(2)
    save(single, names[:1], content[:1])
    single.close()
    single.close()
    single.drop(names)
    assert single.find(names) == 0
    assert load(single, names)[0] == [MISS] * 2
    assert save(single, names[1:], content[1:]) == [Saved.REFUSED]


def test_wrong_buffers_and_keys_are_refused_before_anything_is_sent(single: ValkeyStore) -> None:
    (name,), (block,) = keys(1), blocks(1)
    for into in (buffers(1, 999), buffers(2), [block]):
        with pytest.raises(ValueError, match="into: expected "):
            single.load([name], into, soon())
    with pytest.raises(ValueError, match="blocks: expected contiguous buffers of 1000 bytes"):
        single.save([name], blocks(1, 1001), soon())
    with pytest.raises(ValueError, match="keys: expected 32 bytes each"):
        single.save([name[1:]], [block], soon())
    assert single.stats().saved == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ttl_s": 0}, "ttl_s=0: expected at least 1"),
        ({"timeout_s": 0}, "timeout_s=0: expected 0.001 to 3600"),
    ],
)
def test_wrong_settings_are_refused(server: Server, options: dict[str, int], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ValkeyStore(server.url, LAYOUT, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", [bytes(32), b"\xff" * 32])
def test_a_store_opens_whatever_value_a_key_has(server: Server, key: bytes) -> None:
    server.ask(b"SET", b"kvp1:" + key, b"x")
    store = open_store(server.url)
    assert load(store, [key])[0] == [Loaded.BAD]
