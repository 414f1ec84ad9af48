"""vLLM's KVCacheManager and BlockPool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.peers import scenarios

NAME = "vLLM"


def available() -> str | None:
    """None where vLLM can be measured, otherwise why not."""
    return scenarios.adapter("vllm_block_pool").available()


def _take_and_give(adapter: Any, count: int) -> None:
    pool = adapter.manager.block_pool
    pool.free_blocks(pool.get_new_blocks(count))


def _look_up(adapter: Any, prompt: list[int]) -> object:
    return adapter.manager.get_computed_blocks(adapter.request(prompt))


def _prepare(adapter: Any, batch: list[Any]) -> Callable[[], None]:
    manager = adapter.manager

    def step() -> None:
        manager.new_step_starts()
        for request in batch:
            request.append_output_token_ids(7)
            if manager.allocate_slots(request, 1) is None:
                raise MemoryError("the pool is too small for this measurement")
            request.num_computed_tokens += 1

    return step


def figures() -> scenarios.Figures:
    """Measure it."""
    return scenarios.figures(
        scenarios.adapter("vllm_block_pool").make,
        take_and_give=_take_and_give,
        look_up=_look_up,
        prepare=_prepare,
    )
