"""The errors of a pool without room, in a user's terms: memory, and the arguments of `patch`."""

from __future__ import annotations

from typing import Protocol

from kvpager._text import counted, size
from kvpager.blocks.manager import BlockManager
from kvpager.errors import OutOfBlocks
from kvpager.integrations.huggingface.cache.budget import LayerKind, PoolOwner


class Pool(Protocol):
    """The members of `PagedPool` that an error is made of."""

    manager: BlockManager
    memory: PoolOwner

    @property
    def has_host(self) -> bool:
        """Return True if there is host memory for rows that do not fit."""

    @property
    def block_bytes(self) -> int:
        """Return the bytes of a block over all storages."""

    @property
    def reserved_bytes(self) -> int:
        """Return the bytes of all storages."""


def out_of_memory(
    pool: Pool, need: int, kind: LayerKind, *, larger_bytes: int = 0, is_device_full: bool = False
) -> OutOfBlocks:
    """Return the error for a need of `need` more blocks. O(pools + blocks).

    Args:
        pool: the pool without room.
        need: the blocks; free and evictable blocks of the pool are among them.
        kind: of the pool's layers, by which the memory of the whole call is computed.
        larger_bytes: the bytes of a block if all blocks grow by a layer; 0 if they do not.
        is_device_full: the bound has room, but the device has none.
    """
    stats, memory, budget = pool.manager.stats(), pool.memory, pool.memory.budget
    room = (
        (stats.num_free, stats.num_cached, stats.num_blocks) if pool.reserved_bytes else (0, 0, 0)
    )
    # If all blocks grow, those in use are among the blocks that are needed.
    num_bytes, held = (larger_bytes, 0) if larger_bytes else (pool.block_bytes, stats.num_held)
    is_host = budget.tier == "host"
    message = f"KV cache out of {'host ' if is_host else ''}memory: "
    message += f"{counted(need, 'more block')} ({size(need * num_bytes)}) needed, "
    if budget.bound is None or is_device_full:
        message += "but the device is full. Drop a cache that is no longer needed"
    else:
        others = memory.reserved_bytes - pool.reserved_bytes
        enough = max(others + (held + need) * num_bytes, memory.call_bytes(kind))
        message += f"{budget.bound_as_given()} allows {budget.bound // num_bytes}"
        if held:
            message += f", {held} in use"
        if others:
            message += f", other layers take {size(others)}"
        message += f". Raise {budget.name} to {size(enough, round_up=True)}"
    if is_host:
        message += _other_ways(pool)
    else:
        message += "." if pool.has_host else " or set host_memory= to offload."
    return OutOfBlocks(need, *room, tier=budget.tier, advice=message, message=message)


def _other_ways(pool: Pool) -> str:
    """Return what helps besides host memory, as the end of a sentence."""
    call, ways = pool.memory.calls.current(), []
    if pool.memory.budget.device_bound is not None:
        ways.append("raise memory")
    if call is None or call.num_rows != 1:
        ways.append("use a smaller batch")
    return (f", {ways[0]}," if len(ways) > 1 else "") + (f" or {ways[-1]}." if ways else ".")
