"""kvpager's `lifetime` under vLLM's own manager of chunks."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.vllm_parts import cache_policy, context_of, key_of

KEYS = [key_of(number) for number in range(20)]


class Chunks:
    """The calls of vLLM's manager: chunks in the slots of a policy."""

    def __init__(self, num_chunks: int) -> None:
        self.policy = cache_policy.LifetimePolicy(num_chunks)
        self.free = list(range(num_chunks))

    def save(self, keys: list[Any], *, context: Any = None, end: bool = True) -> list[Any]:
        """Store chunks of a prompt; return the keys that left."""
        context = context or context_of(keys)
        new = [key for key in keys if self.policy.get(key) is None]
        self.policy.on_store_miss(new, context)
        evicted = self.policy.evict(max(len(new) - len(self.free), 0), set(keys))
        assert evicted is not None
        self.free += [chunk.chunk_id for _, chunk in evicted]
        for key in new:
            self.policy.insert(key, SimpleNamespace(chunk_id=self.free.pop(), ref_cnt=-1))
        for key in sorted(new, reverse=True):  # vLLM has a set
            self.policy.get(key).ref_cnt = 0
            self.policy.mark_evictable(key)
        if end:
            reused = set(keys) - set(new)
            self.policy.on_request_finished([keys], set(new), reused, context)
        return [key for key, _ in evicted]


def evicted(policy: Any, count: int) -> list[Any]:
    return [key for key, _ in policy.evict(count, set())]


def test_the_last_chunk_of_a_prompt_leaves_first() -> None:
    chunks = Chunks(4)
    chunks.save(KEYS[:4])
    assert chunks.save(KEYS[9:11]) == [KEYS[3], KEYS[2]]


def test_a_chunk_leaves_after_those_that_continue_it() -> None:
    chunks = Chunks(3)
    prompt = context_of(KEYS[:3])
    chunks.save(KEYS[:3], context=prompt)
    chunks.save(KEYS[1:3], context=prompt)  # used again without the first, which is on the device
    assert evicted(chunks.policy, 3) == [KEYS[2], KEYS[1], KEYS[0]]


def test_chunks_of_a_prompt_that_still_runs_can_leave() -> None:
    chunks = Chunks(2)
    chunks.save(KEYS[:2], end=False)
    assert evicted(chunks.policy, 2) == [KEYS[1], KEYS[0]]


def test_a_pinned_chunk_does_not_leave() -> None:
    chunks = Chunks(2)
    chunks.save(KEYS[:2])
    chunks.policy.mark_non_evictable(KEYS[1])
    assert chunks.policy.evict(2, set()) is None
    assert evicted(chunks.policy, 1) == [KEYS[0]]
    chunks.policy.mark_evictable(KEYS[1])
    assert evicted(chunks.policy, 1) == [KEYS[1]]


def test_a_protected_chunk_does_not_leave_and_none_leaves_without_room() -> None:
    chunks = Chunks(3)
    for key in KEYS[:3]:
        chunks.save([key])
    assert chunks.policy.evict(3, {KEYS[0]}) is None
    assert [key for key, _ in chunks.policy.evict(1, {KEYS[0]})] == [KEYS[1]]
    assert evicted(chunks.policy, 2) == [KEYS[0], KEYS[2]]


def test_a_failed_store_leaves_nothing() -> None:
    chunks = Chunks(2)
    prompt = context_of(KEYS[:2])
    chunks.policy.on_store_miss(KEYS[:2], prompt)
    for number, key in enumerate(KEYS[:2]):
        chunks.policy.insert(key, SimpleNamespace(chunk_id=number, ref_cnt=-1))
    chunks.policy.mark_evictable(KEYS[0])
    chunks.policy.remove(KEYS[1])
    assert chunks.policy.get(KEYS[1]) is None
    assert evicted(chunks.policy, 1) == [KEYS[0]]
    chunks.policy._order.check()


def test_after_a_reset_nothing_is_known() -> None:
    chunks = Chunks(2)
    chunks.save(KEYS[:2])
    chunks.policy.clear()
    chunks.free = [0, 1]
    assert chunks.policy.get(KEYS[0]) is None
    assert chunks.save(KEYS[:2]) == []


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm")
def test_vllms_manager_evicts_by_it() -> None:
    from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

    manager = CPUOffloadingManager(
        8,
        cache_policy="LifetimePolicy",
        cache_policy_module_path="kvpager.integrations.vllm.cache_policy",
    )
    for turn in range(200):
        first = turn * 7 % 15
        keys = KEYS[first : first + 5]
        request = context_of(keys)
        manager.on_new_request(request)
        hits = 0
        while hits < len(keys) and manager.lookup(keys[hits], request).name == "HIT":
            hits += 1
        if hits:
            manager.prepare_load(keys[:hits], request)
        output = manager.prepare_store(keys[hits:], request)
        assert output is not None
        manager.complete_store(output.keys_to_store, request, success=turn % 5 > 0)
        if hits:
            manager.complete_load(keys[:hits], request)
        manager.on_request_finished(request)
        manager._policy._order.check()
    assert len(manager._policy._chunks) == 8
    manager.reset_cache()
    assert not manager._policy._chunks
