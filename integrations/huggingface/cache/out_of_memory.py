"""The errors of a pool or a namespace without room, in a user's terms: the arguments of `patch`."""

from __future__ import annotations

from kvpager._text import counted, size
from kvpager.errors import OutOfBlocks, OutOfQuota
from kvpager.integrations.huggingface.cache.budget import LayerKind
from kvpager.integrations.huggingface.cache.memory import Pool


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
    num_bytes, held, kept = pool.block_bytes, stats.num_held, stats.num_kept
    if larger_bytes:
        num_bytes, held, kept = larger_bytes, 0, 0
    is_host = budget.tier == "host"
    message = f"KV cache out of {'host ' if is_host else ''}memory: "
    message += f"{counted(need, 'more block')} ({size(need * num_bytes)}) needed, "
    if budget.bound is None or is_device_full:
        message += "but the device is full. Drop a cache that is no longer needed"
    else:
        others = memory.reserved_bytes - pool.reserved_bytes
        enough = max(others + (held + need) * num_bytes, memory.call_bytes(kind))
        enough += kept * num_bytes
        message += f"{budget.bound_as_given()} allows {budget.bound // num_bytes}"
        if held:
            message += f", {held} in use"
        if kept:
            message += f", {kept} retained"
        if others:
            message += f", other layers take {size(others)}"
        message += f". Raise {budget.name} to {size(enough, round_up=True)}"
    if is_host:
        message += _other_ways(pool)
    else:
        message += "." if pool.host is not None else " or set host_memory= to offload."
    return OutOfBlocks(need, *room, tier=budget.tier, advice=message, message=message)


def _other_ways(pool: Pool) -> str:
    call, ways = pool.memory.calls.current(), []
    if pool.memory.budget.device_bound is not None:
        ways.append("raise memory")
    if call is None or call.num_rows != 1:
        ways.append("use a smaller batch")
    return (f", {ways[0]}," if len(ways) > 1 else "") + (f" or {ways[-1]}." if ways else ".")


class PoolQuotas:
    """The ceilings of a pool. Blocks of calls that still run, or of caches still in use, count."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def ceiling(self, namespace: str | None) -> int | None:
        """Return the most blocks of a namespace, or None. O(1)."""
        return self._pool.manager.quotas.ceiling(namespace)

    def set(self, namespace: str | None, *, ceiling: int | None = None) -> None:
        """Bound the blocks of a namespace. O(its blocks).

        Raises: `ValueError` if its calls hold more.
        """
        try:
            self._pool.manager.quotas.set(namespace, ceiling=ceiling)
        except ValueError as error:
            raise ValueError(
                f"quota of {self._sized(ceiling or 0)} for namespace {namespace!r}: its calls, "
                "caches and retained prompts hold more. Drop a cache that is no longer needed, or "
                "raise the quota."
            ) from error

    def drop(self, namespace: str | None) -> None:
        """Remove the bound of a namespace. O(its blocks)."""
        self._pool.manager.quotas.drop(namespace)

    def out_of_quota(self, error: OutOfQuota) -> OutOfQuota:
        """Return `error`, which the manager raised, in a user's terms. O(blocks)."""
        pool, namespace = self._pool, error.namespace
        ceiling = self.ceiling(namespace) or 0
        given = None if namespace is None else pool.memory.quotas.get(namespace)
        enough = ceiling + error.missing + max(pool.memory.call_growth(pool) - error.need, 0)
        in_bytes = repr(size(enough * pool.block_bytes, round_up=True))
        message = (
            f"KV cache of namespace {namespace!r} out of quota: {self._sized(error.missing)} more "
            f"needed, quota {given!r} allows {self._sized(ceiling)}. "
            f"Raise quotas[{namespace!r}] to {in_bytes if isinstance(given, str) else enough}"
        )
        message += "." if pool.host is not None else " or set host_memory= to offload."
        return OutOfQuota(
            namespace, error.need, error.free, error.evictable, error.total, error.tier,
            missing=error.missing, advice=message, message=message,
        )  # fmt: skip

    def _sized(self, num_blocks: int) -> str:
        return f"{counted(num_blocks, 'block')} ({size(num_blocks * self._pool.block_bytes)})"
