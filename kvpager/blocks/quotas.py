"""Quotas: the most and the least device blocks of a namespace, see `kvpager.blocks.accounts`.

`manager.quotas`, `engine.quotas` and `patch.quotas` are set alike: `quotas["acme"] = 512`. Engines
and patches know the bytes of a block, so they also take sizes such as `"2GiB"`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import AbstractContextManager

from kvpager import _validate as arguments
from kvpager._atomic import Uninterrupted
from kvpager._text import size
from kvpager.blocks.accounts import Quota
from kvpager.blocks.protocol import Ceilings
from kvpager.blocks.state import BlockState
from kvpager.errors import OutOfQuota
from kvpager.plans import NO_BLOCKS


class Quotas:
    """The quotas of a manager's namespaces: `quotas["acme"] = 512` blocks. Thread-safe.

    `quotas["acme"]` is the most blocks that "acme" may own, and `del quotas["acme"]` removes the
    quota. `set` also reserves blocks.

    Writes the accounts, and moves the nodes of a namespace between queues of the evictor.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state

    def set(self, namespace: str | None, *, floor: int = 0, ceiling: int | None = None) -> None:
        """Bound the device blocks of a namespace, and reserve blocks for it.

        O(1) for a namespace that has a quota, else O(sequences + its blocks).

        Args:
            namespace: the owner of the blocks.
            floor: the number of blocks that its sequences can always get.
            ceiling: the most blocks it may own, held and cached. At its ceiling, the namespace
                evicts its own cached blocks.

        Raises: `ValueError` if the pool lacks blocks for all floors, or the namespace holds more
        than `ceiling` blocks already.
        """
        arguments.label("namespace", namespace)
        floor = arguments.count("floor", floor)
        if ceiling is not None:
            ceiling = arguments.count("ceiling", ceiling, at_least=max(floor, 1))
        state, quota = self._state, Quota(floor, ceiling)
        with state.lock, state.change:
            accounts, blocks = state.accounts, NO_BLOCKS
            is_new = namespace not in accounts.limits
            if is_new:
                blocks = state.owned_by(namespace)
                held = len(blocks) - state.pool.count_idle(blocks)
            else:
                account = accounts.account(namespace)
                held = account.used - account.evictable
            self._refuse(namespace, quota, held)
            state.change.begin()
            if not accounts.limits:
                state.recount({namespace: quota})
            elif is_new:
                number = accounts.open(namespace, quota, state.pool, blocks)
                state.evictor.add_queue(namespace, number)
            else:
                accounts.change(namespace, quota)
            state.evict_for(0, {accounts.owner(namespace): 0})

    def __setitem__(self, namespace: str | None, blocks: int) -> None:
        """Bound the device blocks of a namespace; what is reserved stays so. Raises: as `set`."""
        if isinstance(blocks, str):
            raise TypeError(
                f"quota={blocks!r}: a manager counts blocks and knows no bytes. Pass a number of "
                "blocks."
            )
        arguments.label("namespace", namespace)
        blocks = arguments.count("quota", blocks, at_least=1)
        with self._state.lock:
            quota = self._state.accounts.limits.get(namespace)
            self.set(namespace, floor=0 if quota is None else quota.floor, ceiling=blocks)

    def __getitem__(self, namespace: str | None) -> int | None:
        """Return the most blocks of a namespace; None: no bound. Raises: `KeyError`. O(1)."""
        if namespace not in self:
            raise KeyError(namespace)
        return self.ceiling(namespace)

    def __delitem__(self, namespace: str | None) -> None:
        """Remove the quota of a namespace. O(blocks). Raises: `KeyError`."""
        if namespace not in self:
            raise KeyError(namespace)
        self.drop(namespace)

    def __contains__(self, namespace: object) -> bool:
        """Return True if a namespace has a quota. O(1)."""
        with self._state.lock:
            return namespace in self._state.accounts.limits

    def _refuse(self, namespace: str | None, quota: Quota, held: int) -> None:
        pool = self._state.pool
        if quota.ceiling is not None and held > quota.ceiling:
            raise ValueError(
                f"ceiling={quota.ceiling}: namespace {namespace!r} holds {held} blocks. "
                "Free sequences first."
            )
        unmet = self._state.accounts.unmet_if(namespace, quota.floor, held)
        if unmet > pool.num_free + pool.num_evictable:
            raise ValueError(
                f"floor={quota.floor}: all floors together lack {unmet} blocks, but only "
                f"{pool.num_free + pool.num_evictable} are available"
            )

    def get(self, namespace: str | None) -> Quota:
        """Return the quota of a namespace. O(1). Raises: `ValueError` if it has none."""
        arguments.label("namespace", namespace)
        with self._state.lock:
            quota = self._state.accounts.limits.get(namespace)
        if quota is None:
            raise ValueError(f"namespace={namespace!r}: it has no quota. Call quotas.set first.")
        return quota

    def ceiling(self, namespace: str | None) -> int | None:
        """Return the most blocks that a namespace may own; None: no bound. O(1)."""
        arguments.label("namespace", namespace)
        with self._state.lock:
            quota = self._state.accounts.limits.get(namespace)
            return None if quota is None else quota.ceiling

    def drop(self, namespace: str | None) -> None:
        """Remove the quota of a namespace. O(blocks). Raises: as `get`."""
        state = self._state
        with state.lock, state.change:
            self.get(namespace)
            state.change.begin()
            if len(state.accounts.limits) == 1:
                state.recount({})
                return
            state.evictor.drop_queue(namespace)
            state.accounts.close(namespace)

    def used(self, namespace: str | None) -> int:
        """Return the device blocks held by and cached for a namespace. O(1). Raises: as `get`."""
        with self._state.lock:
            self.get(namespace)
            return self._state.accounts.account(namespace).used


class NamespaceQuotas(MutableMapping[str, int | str]):
    """The most KV cache of each namespace: `quotas["acme"] = 512` blocks, or `"2GiB"`.

    A quota bounds the device blocks that a namespace owns in each pool, held and cached. At its
    quota, a namespace evicts its own cached blocks. A call that needs more raises `OutOfQuota`.
    `del quotas["acme"]` removes the bound.

    Args:
        pools: returns the quotas of each current pool, and the bytes of its blocks.
        locked: returns the lock to hold while a quota changes. Signals wait meanwhile.
    """

    def __init__(
        self,
        pools: Callable[[], Iterable[tuple[Ceilings, int]]],
        locked: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._pools, self._locked = pools, locked
        self._given: dict[str, int | str] = {}

    def __repr__(self) -> str:
        return repr(self._given)

    def __getitem__(self, namespace: str) -> int | str:
        return self._given[namespace]

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def __setitem__(self, namespace: str, quota: int | str) -> None:
        """Bound a namespace from now on. O(its blocks) in each pool.

        Raises: `ValueError` if its sequences hold more already, or for a size below a block of
        some pool; `TypeError` for an invalid name or quota. Then the quota is unchanged.
        Without a pool any size is valid. If a later pool has larger blocks, each call of the
        namespace that needs that pool raises `ValueError`.
        """
        if namespace is None:
            raise TypeError("namespace=None: expected the name of a namespace")
        arguments.label("namespace", namespace)
        _ceiling(quota, 0)
        lock = self._locked()
        with lock, Uninterrupted(lock):
            bounded: list[tuple[Ceilings, int | None]] = []
            try:
                for quotas, block_bytes in self._pools():
                    before = quotas.ceiling(namespace)
                    _bound(quotas, namespace, _ceiling(quota, block_bytes))
                    bounded.append((quotas, before))
            except ValueError:
                for quotas, before in bounded:
                    _bound(quotas, namespace, before)
                raise
            self._given[namespace] = quota

    def __delitem__(self, namespace: str) -> None:
        lock = self._locked()
        with lock, Uninterrupted(lock):
            del self._given[namespace]
            for quotas, _ in self._pools():
                _bound(quotas, namespace, None)

    def enforce(self, quotas: Ceilings, namespace: str | None, block_bytes: int) -> None:
        """Bound a namespace in a pool that is new or whose blocks grew. O(1) if bounded already.

        Raises: `OutOfQuota` if the namespace holds more; `ValueError` for less than a block.
        """
        given = None if namespace is None else self._given.get(namespace)
        if given is None:
            return
        ceiling = _ceiling(given, block_bytes)
        if ceiling is None or quotas.ceiling(namespace) == ceiling:
            return
        try:
            quotas.set(namespace, ceiling=ceiling)
        except ValueError as error:
            message = f"quota={given!r}: {error}"
            raise OutOfQuota(namespace, 1, 0, 0, ceiling, message=message) from None


def _bound(quotas: Ceilings, namespace: str | None, ceiling: int | None) -> None:
    if ceiling is not None:
        quotas.set(namespace, ceiling=ceiling)
    elif quotas.ceiling(namespace) is not None:
        quotas.drop(namespace)


def _ceiling(quota: int | str, block_bytes: int) -> int | None:
    """Return a quota in blocks; None for a size if the bytes of a block are unknown, or 0."""
    if not isinstance(quota, str):
        return arguments.count("quota", quota, at_least=1)
    num_bytes = arguments.parse_memory(quota, "quota") or 0
    if not block_bytes:
        return None
    if num_bytes < block_bytes:
        raise ValueError(
            f"quota={quota!r}: one block takes {size(block_bytes)}. Raise the quota to at least "
            f"{size(block_bytes, round_up=True)}."
        )
    return min(num_bytes // block_bytes, arguments.COUNT_MAX)
