"""transformers' paged cache for continuous batching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.peers import scenarios

NAME = "transformers continuous batching"


def available() -> str | None:
    """None where the cache can be measured, otherwise why not."""
    return scenarios.adapter("transformers_continuous").available()


def _parts(adapter: Any) -> tuple[Any, Any]:
    (allocator,) = adapter.cache.cache_allocators.values()
    return adapter.cache, allocator


def _take_and_give(adapter: Any, count: int) -> None:
    cache, allocator = _parts(adapter)
    while cache.pool.count_free_blocks(allocator.index) < count:
        cache.pool.allocate_sector(allocator.index)
    cache.pool.free_blocks(allocator.index, cache.pool.get_free_blocks(allocator.index, count))


def _look_up(adapter: Any, prompt: list[int]) -> object:
    _, allocator = _parts(adapter)
    return allocator.match_prefix_blocks(prompt)


def _prepare(adapter: Any, batch: list[Any]) -> Callable[[], None]:
    cache, _ = _parts(adapter)

    def step() -> None:
        cache.pool.try_to_free_sectors()
        complete = []
        for state in batch:
            if not cache.can_store_request_tokens(state, 1):
                raise MemoryError("the cache is too small for this measurement")
            complete.append(cache.count_new_complete_blocks(state, 1))
            state.position_offset += 1
        for state, blocks in zip(batch, complete, strict=True):
            state.generated_tokens.append(7)
            cache.mark_complete_blocks(state, blocks)

    return step


def _fork_and_free(adapter: Any, parent: Any) -> None:
    """The block tables alone: neither the request's own deep copy nor the copy of its tail."""
    cache, allocator = _parts(adapter)
    cache.prepare_fork_request(parent, ["child"], {allocator.layer_type: ([], [])})
    cache.free_blocks("child")


def figures() -> scenarios.Figures:
    """Measure it."""
    return scenarios.figures(
        scenarios.adapter("transformers_continuous").make,
        take_and_give=_take_and_give,
        look_up=_look_up,
        prepare=_prepare,
        fork_and_free=_fork_and_free,
    )
