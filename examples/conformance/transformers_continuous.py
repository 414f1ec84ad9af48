"""transformers' paged cache for continuous batching behind the conformance protocol.

Driven as its scheduler drives it, written against transformers 5.23. One layer of 16 dimensions
makes one sector hold one block, so that the pool has exactly `num_blocks` of them. A fork copies
its partial block at once: `copies` of the child names the pair. `commit` may exchange a block of
the sequence for an identical one that was committed earlier.
"""

from __future__ import annotations

import itertools
from importlib import import_module
from typing import Any

_PACKAGE = "transformers.generation.continuous_batching"


def available() -> str | None:
    """Return None if the cache can be driven, or the reason why not."""
    try:
        import_module(f"{_PACKAGE}.cache_allocators")
    except ImportError as error:
        return f"transformers 5.23 or newer cannot be imported: {error}".splitlines()[0]
    return None


def make(num_blocks: int, block_size: int) -> TransformersAdapter:
    """Return an adapter of a cache of `num_blocks` blocks on the CPU."""
    return TransformersAdapter(num_blocks, block_size)


class TransformersAdapter:
    """One PagedAttentionCache with full attention; a handle is a `RequestState`."""

    out_of_blocks = MemoryError

    def __init__(self, num_blocks: int, block_size: int) -> None:
        import torch
        from transformers import ContinuousBatchingConfig, LlamaConfig

        self.num_blocks, self.block_size = num_blocks, block_size
        model = LlamaConfig(
            num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=16
        )
        batching = ContinuousBatchingConfig(
            page_size=block_size,
            num_blocks=num_blocks,
            max_batch_tokens=1,
            max_memory_percent=0.9,
        )
        helper = import_module(f"{_PACKAGE}.distributed").DistributedHelper(None, None)
        self._state = import_module(f"{_PACKAGE}.requests").RequestState
        self.cache = import_module(_PACKAGE).PagedAttentionCache(
            model, batching, "cpu", helper, torch.float32
        )
        (self._allocator,) = self.cache.cache_allocators.values()
        self._first = self.cache.pool.num_reserved_sectors  # these are never allocated
        self._names = itertools.count()
        self._cached: dict[str, int] = {}
        self._copies: dict[str, list[tuple[int, int]]] = {}
        self._complete: dict[str, int] = {}

    def _store(self, state: Any, count: int) -> None:
        """Allocate slots for `count` more tokens. If blocks are short, evict all cached blocks."""
        self.cache.pool.try_to_free_sectors()
        complete = self.cache.count_new_complete_blocks(state, count)
        fits = self.cache.can_store_request_tokens(state, count)
        if not fits and self.cache.evict_cached_blocks():
            fits = self.cache.can_store_request_tokens(state, count)
        if not fits:
            raise MemoryError("can_store_request_tokens returned False")
        state.position_offset += count
        name = state.request_id
        self._complete[name] = self._complete.get(name, 0) + sum(complete.values())

    def allocate(self, tokens: list[int]) -> Any:
        state = self._state(f"request-{next(self._names)}", list(tokens))
        cached = self.cache.search_prefix_match(state.request_id, state.initial_tokens)
        state.position_offset = cached
        try:
            self._store(state, len(tokens) - cached)
        except MemoryError:
            self.cache.free_blocks(state.request_id)
            raise
        self._cached[state.request_id] = cached
        return state

    def num_cached_tokens(self, handle: Any) -> int:
        return self._cached[handle.request_id]

    def copies(self, handle: Any) -> list[tuple[int, int]]:
        return self._copies.get(handle.request_id, [])

    def append(self, handle: Any, tokens: list[int]) -> list[tuple[int, int]]:
        self._store(handle, len(tokens))
        handle.generated_tokens.extend(tokens)
        return []

    def commit(self, handle: Any) -> None:
        complete = self._complete.pop(handle.request_id, 0)
        if complete:
            self.cache.mark_complete_blocks(handle, {self._allocator.layer_type: complete})

    def fork(self, handle: Any) -> Any:
        self.cache.pool.try_to_free_sectors()
        name = f"request-{next(self._names)}"
        pairs: dict[str, tuple[list[int], list[int]]] = {self._allocator.layer_type: ([], [])}
        if not self.cache.prepare_fork_request(handle, [name], pairs):
            raise MemoryError("prepare_fork_request forked nothing")
        copies = zip(*pairs[self._allocator.layer_type], strict=True)
        self._copies[name] = [(old - self._first, new - self._first) for old, new in copies]
        self._cached[name] = self._cached[handle.request_id]
        self._complete[name] = self._complete.get(handle.request_id, 0)
        return handle.fork(name)

    def free(self, handle: Any) -> None:
        self.cache.free_blocks(handle.request_id)

    def block_table(self, handle: Any) -> list[int]:
        """Return its block ids, counted from the first usable block."""
        table = self._allocator.block_table[handle.request_id]
        return [block - self._first for block in table]

    def num_free_blocks(self) -> int:
        pool, ledger = self.cache.pool, self._allocator.ledger
        free = pool.num_free_sectors + pool.count_free_blocks(self._allocator.index)
        return int(free + len(ledger.cached_blocks))
