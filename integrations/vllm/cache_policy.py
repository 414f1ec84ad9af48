"""kvpager's `lifetime` for vLLM's own CPU offloading: vLLM stores chunks, kvpager evicts them.

kv_connector_extra_config={
    "cpu_bytes_to_use": 8 << 30,
    "eviction_policy": "LifetimePolicy",
    "cache_policy_module_path": "kvpager.integrations.vllm.cache_policy",
}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from kvpager.blocks.policies import make_policy
from kvpager.integrations.vllm.chunk_order import ChunkOrder, in_order
from kvpager.integrations.vllm.interface import CachePolicy, ReqContext
from kvpager.storage.tiers.eviction_order import NO_KEY, EvictionOrder


class LifetimePolicy(CachePolicy):  # type: ignore[misc]
    """Chunks in an `EvictionOrder`, by the numbers that vLLM gives them.

    vLLM reports one chunk at a time, in any order. So the policy queues all chunks that became
    evictable together: before the next use or eviction, and at the end of a request.
    """

    EVICTION: ClassVar[str] = "lifetime"

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self.clear()

    def clear(self) -> None:
        self._chunks: dict[bytes, Any] = {}
        self._keys = [NO_KEY] * self.cache_capacity  # by number
        self._numbers: dict[bytes, int] = {}
        policy = make_policy(self.EVICTION, self.cache_capacity)
        self._order = EvictionOrder(policy, self._keys, self._numbers)
        self._chunk_order = ChunkOrder()
        self._depths: dict[bytes, int] = {}  # of chunks that the policy does not know yet
        self._missed: dict[bytes, tuple[int, bytes | None]] = {}  # depths and parents
        self._waiting: dict[bytes, None] = {}  # evictable, and not queued yet

    def get(self, key: bytes) -> Any:
        return self._chunks.get(key)

    def on_store_miss(self, keys: Iterable[bytes], req_context: ReqContext) -> None:
        missed = list(keys)
        ancestry = self._chunk_order.ancestry(missed, req_context, {})
        self._missed = dict(zip(missed, zip(*ancestry, strict=True), strict=True))

    def insert(self, key: bytes, chunk: Any) -> None:
        number = chunk.chunk_id
        self._chunks[key], self._numbers[key], self._keys[number] = chunk, number, key
        self._depths[key], parent = self._missed.get(key, (0, None))
        if parent:
            self._order.link(number, parent)
        if chunk.ref_cnt == 0:
            self.mark_evictable(key)

    def remove(self, key: bytes) -> None:
        number = self._numbers[key]
        self._order.hold([number])
        if self._depths.pop(key, None) is None:
            self._order.forget([number])
        else:
            self._order.unlink(number)
        self._waiting.pop(key, None)
        self._drop(key)

    def mark_evictable(self, key: bytes) -> None:
        self._waiting[key] = None

    def mark_non_evictable(self, key: bytes) -> None:
        if key in self._waiting:
            del self._waiting[key]
        else:
            self._order.hold([self._numbers[key]])

    def touch(self, keys: Iterable[bytes], req_context: ReqContext) -> None:
        self._queue_waiting()
        self._use(in_order(keys, req_context), set(keys))

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[bytes]],
        insertion_only_keys: set[bytes],
        reused_keys: set[bytes],
        req_context: ReqContext,
    ) -> None:
        keys = [key for group in key_groups for key in group]
        for key, depth, parent in zip(
            keys, *self._chunk_order.ancestry(keys, req_context, {}), strict=True
        ):
            if key in self._depths:
                self._depths[key] = depth
            if parent and key in self._numbers:
                self._order.link(self._numbers[key], parent)
        self._queue_waiting()
        self._use(in_order(keys, req_context), reused_keys)

    def evict(self, n: int, protected: set[bytes]) -> list[tuple[bytes, Any]] | None:
        self._queue_waiting()
        kept = self._order.idle(self._numbers.get(key) for key in protected)
        self._order.hold(kept)
        evicted = self._order.evict(n) if n <= len(self._order) else None
        self._order.queue(kept)
        if evicted is None:
            return None
        gone = [self._keys[number] for number in evicted]
        return [(key, self._drop(key)) for key in gone]

    def _drop(self, key: bytes) -> Any:
        self._keys[self._numbers.pop(key)] = NO_KEY
        return self._chunks.pop(key)

    def _use(self, keys: list[bytes], reused: set[bytes]) -> None:
        """Note one use of the idle chunks among `keys`, from the front of a prompt."""
        idle = self._order.idle(map(self._numbers.get, keys))
        self._order.touch([number for number in idle if self._keys[number] in reused])
        self._order.rest(idle)

    def _queue_waiting(self) -> None:
        """Queue chunks that became evictable. The last chunk of a prompt leaves first."""
        depths, waiting = self._depths, [*self._waiting]
        self._waiting.clear()
        new = sorted((key for key in waiting if key in depths), key=depths.__getitem__)
        numbers = [self._numbers[key] for key in new]
        self._order.admit(numbers, [depths.pop(key) for key in new])
        self._order.rest(numbers)
        known = {self._numbers[key] for key in waiting}.difference(numbers)
        self._order.queue([*known])
