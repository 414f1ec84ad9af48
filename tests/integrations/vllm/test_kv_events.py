"""KV events beside vLLM's own: its decoder, its hashes, its payloads."""

from __future__ import annotations

import random
from importlib.util import find_spec
from typing import Any

import pytest

from kvpager import BlockManager
from kvpager.kv_events.block_names import VLLMHashes
from kvpager.kv_events.translator import Translator
from tests.support.prefixes import cache
from tests.support.vllm_events import (
    ALGORITHMS,
    BLOCK_SIZE,
    TIME,
    Prompt,
    vllm_events,
    vllm_payload,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm"),
]


def prompt_of(source: random.Random) -> Prompt:
    """Return a random prompt, often salted, of an adapter, or with images."""
    length = source.randrange(4, 80)
    tokens = [
        source.choice((7, 300, 70_000, 2**31 - 1)) + source.randrange(3) - 2 for _ in range(length)
    ]
    images, at = [], source.randrange(12)
    while at < length - 1 and source.random() < 0.5:
        stop = source.randrange(at + 1, min(length, at + 14))
        images.append((at, stop, source.randbytes(32)))
        at = stop + source.randrange(8)
    salt, lora = source.choice((None, "alice", "b" * 300)), source.choice((None, "math"))
    return Prompt(tokens, salt, lora, images=tuple(images))


def messages_of(prompt: Prompt, algorithm: str, *, int_hashes: bool) -> list[Any]:
    names = VLLMHashes(algorithm, {"math": prompt.lora_path})
    manager = BlockManager(64, BLOCK_SIZE, num_events=1000)
    cache(manager, prompt.tokens, **prompt.key)
    return Translator(names, int_hashes=int_hashes).translate(manager.events.fetch())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("int_hashes", [True, False])
def test_random_prompts_have_the_bytes_that_vllm_sends(algorithm: str, int_hashes: bool) -> None:
    from kvpager.kv_events.wire import encode_batch

    source = random.Random(5)
    for _ in range(150):
        prompt = prompt_of(source)
        messages = messages_of(prompt, algorithm, int_hashes=int_hashes)
        hashes, events = vllm_events(prompt, algorithm, int_hashes=int_hashes)
        assert len(hashes) == len(prompt.tokens) // BLOCK_SIZE
        assert encode_batch(messages, TIME, 0, "maps") == vllm_payload(events), prompt


def test_vllm_decodes_what_a_publisher_sends() -> None:
    import msgspec
    from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

    from kvpager.kv_events.publisher import Publisher
    from kvpager.kv_events.settings import KVEvents
    from tests.support.kv_router import Router

    local = "tcp://127.0.0.1:0"
    manager = BlockManager(16, 4, num_events=100)
    settings = KVEvents(local, replay_endpoint=local, block_hashes="sha256", rank=3)
    with Publisher(manager, settings) as publisher, Router(publisher) as router:
        cache(manager, list(range(12)), "alice")
        manager.clear_prefix_cache()
        decoder = msgspec.msgpack.Decoder(KVEventBatch)
        batches = [decoder.decode(frames[-1]) for frames in router.ask(bytes(8))]
    assert {batch.data_parallel_rank for batch in batches} == {3}
    cleared, stored, removed = (event for batch in batches for event in batch.events)
    assert isinstance(cleared, AllBlocksCleared)
    assert isinstance(stored, BlockStored)
    assert isinstance(removed, BlockRemoved)
    assert stored.token_ids == list(range(12))
    assert stored.extra_keys == [("alice",), None, None]
    assert set(removed.block_hashes) == set(stored.block_hashes)


def test_records_are_of_the_vllm_that_is_installed() -> None:
    import json

    from tests.support.vllm_events import RECORDS, vllm_record

    recorded = json.loads(RECORDS.read_text())
    assert {name: recorded[name] for name in ("hashes", "maps")} == {
        name: value for name, value in vllm_record().items() if name != "vllm"
    }
