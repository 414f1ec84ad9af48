"""SGLang's paged allocator and radix cache behind the conformance protocol.

Driven as SGLang's scheduler drives them, written against SGLang 0.5.23, whose memory managers run
on a CPU. `commit` is its checkpoint into the tree, which may exchange blocks of the sequence for
identical ones that are there already; `free` keeps in the tree what was committed, as a retraction
does. It has no `fork`; its host tier needs a storage of its own, so `swap` is left out.
"""

from __future__ import annotations

import itertools
from array import array
from importlib import import_module
from typing import Any

_MODULES = ("srt.mem_cache.unified_radix_cache", "srt.managers.schedule_batch")


def available() -> str | None:
    """Return None if SGLang can be driven, or the reason why not."""
    try:
        for name in _MODULES:
            import_module(f"sglang.{name}")
    except Exception as error:  # importing SGLang may raise more than ImportError
        return f"SGLang cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return None


def _settings() -> None:
    """Set the SGLang server settings that the release of a request reads."""
    from sglang.srt.runtime_context import get_context, get_server_args

    try:
        get_server_args()
    except ValueError:
        get_context().override_server_args(device="cpu").install()


def make(num_blocks: int, block_size: int) -> SglangAdapter:
    """Return an adapter of a pool of `num_blocks` usable pages, with a radix cache."""
    return SglangAdapter(num_blocks, block_size)


class SglangAdapter:
    """One allocator, row pool and radix cache; a handle is a `Req`."""

    out_of_blocks = MemoryError

    def __init__(self, num_blocks: int, block_size: int, *, rows: int = 0, core: str = "") -> None:
        import torch
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        if block_size == 1:
            raise ValueError("SGLang has another allocator for pages of one slot")
        self.num_blocks, self.block_size = num_blocks, block_size
        slots = num_blocks * block_size
        _settings()
        self.allocator = PagedTokenToKVPoolAllocator(
            slots, block_size, torch.float32, "cpu", None, need_sort=False
        )
        self.rows = ReqToTokenPool(rows or num_blocks, slots, "cpu", enable_memory_saver=False)
        self.tree = UnifiedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.rows,
                token_to_kv_pool_allocator=self.allocator,
                page_size=block_size,
                tree_components=(ComponentType.FULL,),
                tree_core_backend=core or None,
            )
        )
        self._names = itertools.count()
        self._cached: dict[str, int] = {}

    def request(self, tokens: list[int]) -> Any:
        """Return SGLang's request for the prompt."""
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        name = f"request-{next(self._names)}"
        return Req(name, "", array("q", tokens), SamplingParams(max_new_tokens=1 << 30))

    def _slots(self, req: Any, start: int, stop: int, last: int) -> None:
        """Allocate slots for the tokens [start, stop) after slot `last`, in the request's row."""
        import torch
        from sglang.srt.mem_cache.common import evict_from_tree_cache

        old, new, before = (torch.tensor([number]) for number in (start, stop, last))
        if stop - start == 1 and req.kv.kv_allocated_len:
            evict_from_tree_cache(self.tree, self.block_size)
            slots = self.allocator.alloc_decode(new, new, before)
        else:
            evict_from_tree_cache(self.tree, stop - start + self.block_size)
            slots = self.allocator.alloc_extend(old, old, new, new, before, stop - start)
        if slots is None:
            raise MemoryError("the allocator returned None")
        self.rows.write((req.kv.req_pool_idx, slice(start, stop)), slots.to(torch.int32))
        req.kv.kv_allocated_len = req.kv.kv_committed_len = req.extend_end = stop

    def allocate(self, tokens: list[int]) -> Any:
        req = self.request(tokens)
        req.init_next_round_input(self.tree)
        req.lock = self.tree.lock(req.last_node)
        if self.rows.alloc([req]) is None:
            self.tree.unlock(req.lock)
            raise MemoryError("the pool of rows is full")
        cached = req.prefix_len
        prefix = self.tree.prefix_device_indices(req)
        try:
            self._slots(req, cached, len(tokens), int(prefix[-1]) if cached else -1)
        except MemoryError:
            self.tree.unlock(req.lock)
            self.rows.free(req)
            raise
        self.rows.write((req.kv.req_pool_idx, slice(0, cached)), prefix)
        self._cached[req.rid] = cached
        return req

    def num_cached_tokens(self, handle: Any) -> int:
        return self._cached[handle.rid]

    def _row(self, req: Any) -> Any:
        return self.rows.req_to_token[req.kv.req_pool_idx, : req.kv.kv_allocated_len]

    def append(self, handle: Any, tokens: list[int]) -> list[tuple[int, int]]:
        length = handle.kv.kv_allocated_len
        self._slots(handle, length, length + len(tokens), int(self._row(handle)[-1]))
        handle.output_ids.extend(tokens)
        return []

    def commit(self, handle: Any) -> None:
        from sglang.srt.mem_cache.common import checkpoint_kv_cache

        handle.refresh_fill_ids()
        checkpoint_kv_cache(handle, self.tree)

    def free(self, handle: Any) -> None:
        from sglang.srt.mem_cache.common import release_kv_cache

        release_kv_cache(handle, self.tree, checkpoint=False)

    def block_table(self, handle: Any) -> list[int]:
        """Return its pages, counted from 0. SGLang's page 0 takes the writes of padding."""
        return (self._row(handle)[:: self.block_size] // self.block_size - 1).tolist()

    def num_free_blocks(self) -> int:
        free = self.allocator.available_size() + self.tree.evictable_size()
        return int(free // self.block_size)
