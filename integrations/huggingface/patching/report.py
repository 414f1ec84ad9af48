"""The figures of a patch, and the text that reports them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvpager._text import change, counted, size
from kvpager.integrations.huggingface.cache.budget import Counters
from kvpager.integrations.huggingface.cache.memory import PagedLayers, PagedMemory


@dataclass(frozen=True, slots=True)
class PatchStats:
    """The current contents of a patch's pools, and totals since the patch was made.

    A block counts once, however many sequences share it. `used_bytes` are the bytes of slots that
    hold a token; `held_bytes - used_bytes` is the waste in partly filled blocks.
    `peak_dense_bytes` is the most that `DynamicCache` would have held for the same calls at the end
    of a step. `prefix_unserved_calls` counts calls whose prompts `prefix_cache` does not keep.

    The fields with `host` or `swapped` in their name count host memory, all others the device. Rows
    that began in host memory were never swapped out.

    `num_sessions`, `session_requests` and `session_tokens` count continuous batching: its sessions,
    their ended requests, and the tokens that these generated. Its pools are in no other field.
    """

    num_blocks: int
    num_held_blocks: int
    num_shared_blocks: int
    num_cached_blocks: int
    num_sequences: int
    reserved_bytes: int
    held_bytes: int
    used_bytes: int
    cached_bytes: int
    peak_held_bytes: int
    peak_dense_bytes: int
    copied_blocks: int
    evicted_blocks: int
    gathers: int
    in_place_reads: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    prefix_unserved_calls: int
    host_reserved_bytes: int
    host_held_bytes: int
    peak_host_held_bytes: int
    swapped_out_blocks: int
    swapped_in_blocks: int
    num_sessions: int
    session_requests: int
    session_tokens: int

    @classmethod
    def of(cls, memory: PagedMemory) -> PatchStats:
        """Return the figures of a patch's pools. O(blocks)."""
        host = memory.host
        pools, host_pools = memory.pools(), [] if host is None else host.pools()
        memory.settle()
        if host is not None:
            host.settle()
        stats = [(pool.manager.stats(), pool.block_bytes) for pool in pools]
        swapped_out = Counters() if host is None else host.counters
        return cls(
            num_blocks=sum(s.num_blocks for s, _ in stats),
            num_held_blocks=sum(s.num_held for s, _ in stats),
            num_shared_blocks=sum(s.num_shared for s, _ in stats),
            num_cached_blocks=sum(s.num_cached for s, _ in stats),
            num_sequences=sum(s.num_sequences for s, _ in stats),
            reserved_bytes=memory.reserved_bytes,
            held_bytes=sum(s.num_held * size for s, size in stats),
            used_bytes=sum(s.num_tokens * size // s.block_size for s, size in stats),
            cached_bytes=sum(s.num_cached * size for s, size in stats),
            host_reserved_bytes=sum(pool.reserved_bytes for pool in host_pools),
            host_held_bytes=sum(pool.held_bytes for pool in host_pools),
            peak_host_held_bytes=swapped_out.peak_held_bytes,
            swapped_out_blocks=swapped_out.swapped_in_blocks,
            **vars(memory.counters),
        )


def report(memory: PagedMemory, stats: PatchStats) -> str:
    """Return a text on layers, blocks, sharing, reads and bytes saved. O(kinds of layers)."""
    lines = [*_layers(memory), *_sessions(stats, memory), *_fallbacks(memory)] or [
        "nothing was paged yet"
    ]
    lines += [
        f"blocks of {counted(memory.budget.block_size, 'token')}: {stats.num_held_blocks} held "
        f"({stats.num_shared_blocks} shared), {stats.num_cached_blocks} cached; "
        f"{stats.copied_blocks} copied, {stats.evicted_blocks} evicted so far",
        f"reads: {stats.in_place_reads} in place, {stats.gathers} gathered",
        f"memory: {size(stats.held_bytes)} held, {size(stats.cached_bytes)} cached, "
        f"{size(stats.reserved_bytes)} reserved",
        f"at the peak: {size(stats.peak_held_bytes)}; DynamicCache: {size(stats.peak_dense_bytes)}"
        + _saved(stats, memory),
    ]
    if memory.host is not None:
        lines.append(
            f"host memory: {size(stats.host_held_bytes)} held, "
            f"{size(stats.peak_host_held_bytes)} at the peak; "
            f"{counted(stats.swapped_out_blocks, 'block')} swapped out, "
            f"{stats.swapped_in_blocks} in"
        )
    if stats.prefix_query_tokens:
        hits, asked = stats.prefix_hit_tokens, stats.prefix_query_tokens
        lines.append(f"prompts: {hits} of {asked} tokens were cached ({hits / asked:.0%})")
    return "\n".join(lines)


def _layers(memory: PagedMemory) -> Iterator[str]:
    for layers, count in memory.paged.items():
        yield f"paged: {counted(count, 'layer')}, {_described(layers, memory)}"
    for what, count in memory.unpaged_layers.items():
        yield f"not paged, transformers' own: {counted(count, 'layer')}, {what}"


def _sessions(stats: PatchStats, memory: PagedMemory) -> Iterator[str]:
    if stats.num_sessions:
        yield (
            f"continuous batching: {counted(stats.num_sessions, 'session')} with pools of their "
            f"own, {counted(stats.session_requests, 'request')}, "
            f"{counted(stats.session_tokens, 'token')} generated"
        )
    for doubt in sorted(memory.session_doubts):
        yield f"continuous batching: prompts not shared, the model may change undetected ({doubt})"


def _fallbacks(memory: PagedMemory) -> Iterator[str]:
    for why, count in memory.fallbacks.items():
        what, _, reason = why.partition(": ")
        yield f"{what}: {counted(count, 'call')} with {reason}"


def _described(layers: PagedLayers, memory: PagedMemory) -> str:
    shape, dtype, device = layers.kind
    kept = str(dtype).removeprefix("torch.")
    if memory.budget.kv_cache_dtype is not None:
        kept += f" kept as {memory.budget.kv_cache_dtype}"
    sees = "full attention"
    if layers.window is not None:
        sees = f"a window of {counted(layers.window, 'token')}"
    dims = f"{shape.head_dim}"
    if shape.value_head_dim != shape.head_dim:
        dims += f" (keys) and {shape.value_head_dim} (values)"
    return f"{sees}, {counted(shape.num_kv_heads, 'kv head')} of {dims}, {kept} on {device}"


def _saved(stats: PatchStats, memory: PagedMemory) -> str:
    if not stats.peak_dense_bytes:
        return ""
    where = "" if memory.host is None else " on the device"
    return f" ({change(stats.peak_held_bytes, stats.peak_dense_bytes)}{where})"
