"""A server that stops, dies or forgets costs outcomes, one deadline each at most, no error."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvpager.integrations.valkey import ValkeyStore
from kvpager.storage.tiers.protocol import Loaded, Saved
from tests.support.clock import Clock
from tests.support.links import Link
from tests.support.servers import free_port
from tests.support.valkey_blocks import blocks, keys, load, open_store, save
from tests.support.valkey_servers import Server, valkey

HIT, MISS, LATE = Loaded.HIT, Loaded.MISS, Loaded.LATE


def shortly() -> float:
    """Return a deadline just after a limit of 0.5 s."""
    return time.monotonic() + 0.52


def test_a_stopped_server_is_late_and_then_bypassed(own_server: Server) -> None:
    clock, names, content = Clock(), keys(3), blocks(3)
    store = open_store(own_server.url, clock=clock, timeout_s=0.5)
    save(store, names[:2], content[:2])
    own_server.freeze()
    # The first call has a connection already, the others try to connect.
    assert load(store, names, shortly())[0] == [LATE] * 3
    assert list(store.save(names, content, shortly())) == [Saved.LATE] * 3
    assert load(store, names, shortly())[0] == [LATE] * 3
    assert store.bypassed
    assert load(store, names)[0] == [MISS] * 3
    assert save(store, names, content) == [Saved.REFUSED] * 3
    assert store.find(names) == 0

    own_server.thaw()
    assert store.bypassed, "until a probe"
    clock.now += 1
    assert store.find(names) == 2
    assert not store.bypassed
    assert load(store, names) == ([HIT, HIT, MISS], [*content[:2], memoryview(bytes(1000))])


def test_a_deadline_that_has_passed_is_not_the_servers_fault(own_server: Server) -> None:
    names, content = keys(2), blocks(2)
    store = open_store(own_server.url)
    save(store, names[:1], content[:1])
    for _ in range(5):
        past = time.monotonic() - 1
        assert load(store, names, past)[0] == [LATE] * 2
        assert list(store.save(names[1:], content[1:], past)) == [Saved.LATE]
    assert not store.bypassed
    assert store.find(names) == 1
    assert store.find(names[1:]) == 0


def test_a_deadline_before_the_limit_is_not_the_servers_fault(own_server: Server) -> None:
    names = keys(2)
    store = open_store(own_server.url)
    own_server.freeze()
    for _ in range(5):
        assert load(store, names, time.monotonic() + 0.02)[0] == [LATE] * 2
    assert not store.bypassed


def test_finds_on_a_stopped_server_bypass_it(own_server: Server) -> None:
    store = open_store(own_server.url, timeout_s=0.5)
    own_server.freeze()
    for _ in range(3):
        assert store.find(keys(2)) == 0
    assert store.bypassed


def test_a_drop_that_a_stopped_server_did_not_answer_says_so(own_server: Server) -> None:
    store, names = open_store(own_server.url, timeout_s=0.05), keys(2)
    save(store, names, blocks(2))
    own_server.freeze()
    assert not any(store.drop(names) for _ in range(4))
    assert store.bypassed
    own_server.thaw()


def test_find_on_a_stopped_server_ends(own_server: Server) -> None:
    store = open_store(own_server.url, timeout_s=0.5)
    own_server.freeze()
    assert store.find(keys(2)) == 0


def test_a_killed_server_is_a_miss_and_its_successor_is_used(
    own_server: Server, tmp_path: Path
) -> None:
    clock, names, content = Clock(), keys(2), blocks(2)
    store = open_store(own_server.url, clock=clock)
    save(store, names, content)
    own_server.stop()
    assert load(store, names)[0] == [MISS] * 2
    assert save(store, names, content) == [Saved.REFUSED] * 2
    assert store.find(names) == 0
    assert store.bypassed

    successor = valkey(tmp_path, port=own_server.port)
    try:
        clock.now += 1
        assert load(store, names)[0] == [MISS] * 2, "it is empty"
        assert save(store, names, content) == [Saved.SAVED] * 2
        assert load(store, names) == ([HIT] * 2, content)
    finally:
        successor.stop()


def test_idle_connections_that_the_server_closed_are_not_used(own_server: Server) -> None:
    names, content = keys(2), blocks(2)
    store = open_store(own_server.url)
    save(store, names, content)
    for _ in range(5):
        own_server.ask(b"CLIENT", b"KILL", b"TYPE", b"NORMAL")
        assert load(store, names)[0] == [HIT] * 2


def test_a_restart_does_not_count_as_failures(own_server: Server, tmp_path: Path) -> None:
    names, content = keys(2), blocks(2)
    store = open_store(own_server.url)
    save(store, names, content)
    own_server.stop()
    successor = valkey(tmp_path, port=own_server.port)
    try:
        assert load(store, names)[0] == [MISS] * 2
        assert save(store, names, content) == [Saved.SAVED] * 2
        assert not store.bypassed
    finally:
        successor.stop()


def test_blocks_that_arrived_before_the_deadline_count(server: Server) -> None:
    names, content = keys(3), blocks(3)
    save(open_store(server.url), names, content)
    between = Link(server, passing=1 << 20)
    try:
        store = open_store(between.url)
        assert load(store, names)[0] == [HIT] * 3
        between.left = 1500  # one block, and a part of the next
        outcomes, into = load(store, names, time.monotonic() + 0.6)
        assert outcomes == [HIT, LATE, LATE]
        assert into[0] == content[0]
        between.left = 1 << 20
        assert load(store, names) == ([HIT] * 3, content), "the half-read connection is not used"
    finally:
        between.close()


def test_a_save_that_was_not_confirmed_is_late(server: Server) -> None:
    names, content = keys(3), blocks(3)
    between = Link(server, passing=1 << 20)
    try:
        store = open_store(between.url)
        save(store, names[:1], content[:1])
        between.left = len(b":1\r\n:0\r\n:0\r\n+OK\r\n")
        outcomes = store.save(names, content, time.monotonic() + 0.6)
        assert list(outcomes) == [Saved.KNOWN, Saved.SAVED, Saved.LATE]
        between.left = 1 << 20
        assert load(store, names) == ([HIT] * 3, content)
    finally:
        between.close()


def test_threads_share_a_store(server: Server) -> None:
    store = open_store(server.url)
    names, content = keys(64), blocks(64)

    def work(first: int) -> bool:
        mine = slice(first, first + 8)
        save(store, names[mine], content[mine])
        return all(load(store, names[mine]) == ([HIT] * 8, content[mine]) for _ in range(10))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(0, 64, 8)))
    stats = store.stats()
    assert (stats.hits, stats.saved) == (640, 64)


def test_closing_while_others_load_gives_hits_or_misses(server: Server) -> None:
    store: ValkeyStore = open_store(server.url)
    names, content = keys(64), blocks(64)
    save(store, names, content)
    started = threading.Barrier(5)

    def work(_: int) -> bool:
        started.wait()
        for _ in range(20):
            outcomes, into = load(store, names)
            if any(a == HIT and b != c for a, b, c in zip(outcomes, into, content, strict=True)):
                return False
        return True

    with ThreadPoolExecutor(4) as threads:
        results = threads.map(work, range(4))
        started.wait()
        store.close()
        assert all(results)
    assert load(store, names)[0] == [MISS] * 64


def test_a_server_of_a_cluster_is_refused(tmp_path: Path) -> None:
    bus = str(free_port())
    server = valkey(tmp_path, "--cluster-enabled", "yes", "--cluster-port", bus)
    try:
        with pytest.raises(ValueError, match="is a cluster"):
            open_store(server.url)
    finally:
        server.stop()
