"""vLLM's own tiering manager over kvpager's stores: hits, bytes, and nothing held in the end."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.valkey_servers import Server, valkey
from tests.support.vllm_parts import key_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm"),
]
KEYS = [key_of(number) for number in range(64)]
MakeNode = Callable[..., Any]


def contents(keys: list[Any]) -> list[int]:
    """Return the byte of which the chunk of each key is made."""
    return [KEYS.index(key) + 1 for key in keys]


@pytest.fixture
def make() -> Iterator[MakeNode]:
    """Make engines that hold no chunk in the end."""
    from tests.support.vllm_tiering import TieringNode, secondary

    with ExitStack() as stack:

        def made(*stores: str, **settings: Any) -> Any:
            node = TieringNode([secondary(store) for store in stores], **settings)
            stack.callback(node.close)
            return node

        yield made


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = valkey(tmp_path_factory.mktemp("valkey"))
    yield server
    server.stop()


@pytest.fixture(params=["disk", "valkey", "host"])
def store(request: pytest.FixtureRequest, tmp_path: Path, server: Server) -> str:
    """Return the URL of an empty store."""
    server.ask(b"FLUSHALL")
    return {
        "disk": f"disk:{tmp_path / 'kv'}?capacity=1MiB&admit=always",
        "valkey": server.url,
        "host": "host:1MiB",
    }[request.param]


def ask(node: Any, keys: list[Any]) -> int:
    """Serve a request: load what is a hit, compare it, compute and save the rest."""
    context = node.request(keys)
    count: int = node.look_up(keys, context)
    assert node.load(keys[:count], context) == [{byte} for byte in contents(keys[:count])]
    node.save(keys[count:], contents(keys[count:]), context)
    node.finish(context)
    return count


def test_what_left_the_host_memory_comes_back_from_the_store(make: MakeNode, store: str) -> None:
    node = make(store, num_chunks=8)
    assert ask(node, KEYS[:4]) == 0
    node.settle()
    for first in (8, 16, 24):  # two chunks at a time are saved
        ask(node, KEYS[first : first + 8])
    node.settle()
    assert ask(node, KEYS[:4]) == 2
    node.settle()
    assert node.held() == 0


def test_a_reset_keeps_what_the_store_has(make: MakeNode, store: str) -> None:
    node = make(store)
    ask(node, KEYS[:2])
    node.manager.reset_cache()
    assert ask(node, KEYS[:3]) == 2
    node.settle()
    assert node.held() == 0


def test_a_reset_during_transfers_leaves_nothing_under_way(make: MakeNode, store: str) -> None:
    node = make(store)
    ask(node, KEYS[:2])
    node.manager.reset_cache()
    context = node.request(KEYS)
    for _ in range(2):
        for key in KEYS[:2]:
            node.manager.lookup(key, context)
        node.step()
        node.manager.secondary_tiers[0].drain_jobs()
    node.manager.reset_cache()
    assert not node.manager._jobs
    assert node.held() == 0
    assert node.look_up(KEYS[:1], context) == 0  # asked for once: it is computed
    node.finish(context)
    assert ask(node, KEYS[:2]) == 2


def test_a_request_that_ends_while_its_chunks_are_loaded_leaves_them(
    make: MakeNode, store: str
) -> None:
    node = make(store)
    ask(node, KEYS[:2])
    node.manager.reset_cache()
    gone = node.request(KEYS)
    node.manager.lookup(KEYS[0], gone)
    node.step()
    node.manager.secondary_tiers[0].drain_jobs()
    node.manager.lookup(KEYS[0], gone)  # promised
    node.finish(gone)
    node.step()
    node.settle()
    assert node.held() == 0
    assert ask(node, KEYS[:2]) == 2


def test_the_first_tier_that_has_a_chunk_serves_it(
    make: MakeNode, tmp_path: Path, server: Server
) -> None:
    server.ask(b"FLUSHALL")
    disk = f"disk:{tmp_path / 'kv'}?capacity=1MiB&admit=always"
    both = make(disk, server.url)
    ask(both, KEYS[:2])
    both.settle()
    both.close()
    server.ask(b"FLUSHALL")  # the server lost it, the disk did not
    node = make(server.url, disk)
    context = node.request(KEYS)
    assert node.look_up(KEYS[:2], context) == 2
    assert node.load(KEYS[:2], context) == [{1}, {2}]
    assert node.manager.get_load_source(KEYS[0], context).value == "disk"
    node.finish(context)


def test_two_engines_share_a_server_at_once(make: MakeNode, server: Server) -> None:
    server.ask(b"FLUSHALL")
    one, other = make(server.url), make(server.url)
    ask(one, KEYS[:2])
    one.settle()
    assert ask(other, KEYS[:3]) == 2
    other.settle()
    assert ask(one, KEYS[:4]) == 3


def test_two_engines_share_a_disk_after_each_other(make: MakeNode, tmp_path: Path) -> None:
    disk = f"disk:{tmp_path / 'kv'}?capacity=1MiB"
    one = make(disk)
    ask(one, KEYS[:2])
    one.settle()
    one.close()
    assert ask(make(disk), KEYS[:3]) == 2


def test_damage_in_the_store_is_computed_again(make: MakeNode, server: Server) -> None:
    server.ask(b"FLUSHALL")
    one, other = make(server.url), make(server.url)
    ask(one, KEYS[:2])
    one.settle()
    for name in server.names():
        server.ask(b"SETRANGE", name, b"2000", b"?")
    assert ask(other, KEYS[:2]) == 0
    other.settle()
    assert other.held() == 0


@pytest.mark.parametrize("seed", range(4))
def test_any_history_loads_the_bytes_of_its_keys(make: MakeNode, server: Server, seed: int) -> None:
    """Prompts that share beginnings, in three small engines over one server, with losses."""
    server.ask(b"FLUSHALL")
    choices = random.Random(seed)
    nodes = [make(server.url, num_chunks=choices.choice([4, 8, 16])) for _ in range(3)]
    num_hits = 0
    for _ in range(80):
        node, first = choices.choice(nodes), 8 * choices.randrange(8)
        num_hits += ask(node, KEYS[first : first + choices.randrange(1, 4)])
        if choices.random() < 0.2:
            node.settle()
        if choices.random() < 0.1:
            node.manager.reset_cache()
        if choices.random() < 0.05:
            server.ask(b"FLUSHALL")
    assert num_hits > 20
    for node in nodes:
        node.settle()
        assert node.held() == 0
