"""The quotas of a pool, and their errors, in a user's terms: calls, memory, `patch.quotas`."""

from __future__ import annotations

from kvpager._text import counted, size
from kvpager.errors import OutOfQuota
from kvpager.integrations.huggingface.cache.out_of_memory import Pool


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
                f"quota of {self._sized(ceiling or 0)} for namespace {namespace!r}: its calls and "
                "caches hold more. Drop a cache that is no longer needed, or raise the quota."
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
        message += "." if pool.has_host else " or set host_memory= to offload."
        return OutOfQuota(
            namespace, error.need, error.free, error.evictable, error.total, error.tier,
            missing=error.missing, advice=message, message=message,
        )  # fmt: skip

    def _sized(self, num_blocks: int) -> str:
        return f"{counted(num_blocks, 'block')} ({size(num_blocks * self._pool.block_bytes)})"
