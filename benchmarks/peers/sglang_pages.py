"""SGLang's paged allocator and radix cache, with the tree core that its settings choose."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from benchmarks.peers import scenarios

NAME = "SGLang"


def available() -> str | None:
    """None where SGLang can be measured, otherwise why not."""
    return scenarios.adapter("sglang_allocator").available()


def _make(num_blocks: int, block_size: int) -> Any:
    adapter = scenarios.adapter("sglang_allocator").SglangAdapter
    return adapter(num_blocks, block_size, rows=scenarios.SEQUENCES)


def _take_and_give(adapter: Any, count: int) -> None:
    pages = adapter.allocator.alloc(count * adapter.block_size)
    adapter.allocator.free_segment(pages, start_pos=0)


def _look_up(adapter: Any, prompt: array[int]) -> object:
    request = adapter.request(prompt)
    request.init_next_round_input(adapter.tree)
    return adapter.tree.prefix_device_indices(request)


def _prepare(adapter: Any, batch: list[Any]) -> Callable[[], None]:
    """The steps of SGLang's `alloc_for_decode`; the scheduler keeps these tensors in its batch."""
    import torch
    from sglang.srt.mem_cache.common import evict_from_tree_cache

    rows = torch.tensor([request.kv.req_pool_idx for request in batch])
    lengths = torch.tensor([request.kv.kv_allocated_len for request in batch])
    table = adapter.rows.req_to_token

    def step() -> None:
        last = table[rows, lengths - 1]
        evict_from_tree_cache(adapter.tree, len(batch) * adapter.block_size)
        slots = adapter.allocator.alloc_decode(lengths + 1, lengths + 1, last)
        if slots is None:
            raise MemoryError("the pool is too small for this measurement")
        adapter.rows.write((rows, lengths.clone()), slots.to(torch.int32))
        lengths.add_(1)
        for request in batch:
            request.output_ids.append(7)
            request.kv.kv_allocated_len += 1
            request.kv.kv_committed_len += 1

    return step


def figures() -> scenarios.Figures:
    """Measure it."""
    return scenarios.figures(
        _make,
        take_and_give=_take_and_give,
        look_up=_look_up,
        prepare=_prepare,
        native=lambda prompt: array("q", prompt),
    )
