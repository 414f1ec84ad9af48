"""nano-vllm's BlockManager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.peers import scenarios

NAME = "nano-vllm"


def available() -> str | None:
    """None where nano-vllm can be measured, otherwise why not."""
    return scenarios.adapter("nano_vllm").available()


def _take_and_give(adapter: Any, count: int) -> None:
    """Its own helpers: nano-vllm has no call for blocks outside a sequence."""
    manager = adapter.manager
    taken = [manager._allocate_block() for _ in range(count)]
    for block in taken:  # what `deallocate` does with a sequence's last reference
        manager.blocks[block].ref_count = 0
        manager._deallocate_block(block)


def _look_up(adapter: Any, prompt: list[int]) -> object:
    return adapter.manager.can_allocate(adapter.request(prompt))


def _prepare(adapter: Any, batch: list[Any]) -> Callable[[], None]:
    manager = adapter.manager

    def step() -> None:
        for sequence in batch:
            sequence.append_token(7)
            if not manager.can_append(sequence):
                raise MemoryError("the pool is too small for this measurement")
            sequence.num_scheduled_tokens = 1
            manager.may_append(sequence)
        for sequence in batch:
            manager.hash_blocks(sequence)
            sequence.num_cached_tokens += sequence.num_scheduled_tokens
            sequence.num_scheduled_tokens = 0

    return step


def figures() -> scenarios.Figures:
    """Measure it."""
    return scenarios.figures(
        scenarios.adapter("nano_vllm").make,
        take_and_give=_take_and_give,
        look_up=_look_up,
        prepare=_prepare,
    )
