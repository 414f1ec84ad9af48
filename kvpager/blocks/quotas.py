"""How many device blocks a namespace may have at most, and can always get: `manager.quotas`.

A namespace's blocks are those its sequences hold and those that stay cached for it; no block ever
belongs to two. Its `ceiling` bounds their number. Its `floor` is kept for it: as long as its
sequences hold fewer, other namespaces can neither take the difference nor evict what is cached
within it.
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
    """The quotas of a manager's namespaces. Its methods are as safe to share as the manager's.

    Writes the accounts, and which queue of the evictor the nodes of a namespace are in.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state

    def set(self, namespace: str | None, *, floor: int = 0, ceiling: int | None = None) -> None:
        """Bound the device blocks of a namespace, and keep some for it.

        O(1) for a namespace that has a quota, else O(sequences + its blocks).

        Args:
            namespace: whose blocks.
            floor: blocks its sequences can always get; what is cached within it nobody else evicts.
            ceiling: the most blocks it may have, held and cached; beyond, it evicts its own.

        Raises: `ValueError` where the floors promise more than can be had, or the namespace holds
        more than `ceiling` blocks already.
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

    def _refuse(self, namespace: str | None, quota: Quota, held: int) -> None:
        pool = self._state.pool
        if quota.ceiling is not None and held > quota.ceiling:
            raise ValueError(
                f"ceiling {quota.ceiling}: namespace {namespace!r} holds {held} blocks; "
                "free some first"
            )
        promised = self._state.accounts.promised(namespace, quota.floor, held)
        if promised > pool.num_free + pool.num_evictable:
            raise ValueError(
                f"floor {quota.floor}: with what the other floors promise, {promised} blocks, and "
                f"{pool.num_free + pool.num_evictable} can be had"
            )

    def get(self, namespace: str | None) -> Quota:
        """Return the quota of a namespace. O(1). Raises: `ValueError` where it has none."""
        arguments.label("namespace", namespace)
        with self._state.lock:
            return self._known(namespace)

    def _known(self, namespace: str | None) -> Quota:
        limits = self._state.accounts.limits
        if namespace not in limits:
            raise ValueError(f"namespace {namespace!r} has no quota; give it one by quotas.set")
        return limits[namespace]

    def ceiling(self, namespace: str | None) -> int | None:
        """Return the most blocks a namespace may have; None where no quota sets a bound. O(1)."""
        arguments.label("namespace", namespace)
        with self._state.lock:
            quota = self._state.accounts.limits.get(namespace)
            return None if quota is None else quota.ceiling

    def drop(self, namespace: str | None) -> None:
        """Let a namespace share what is left with the others. O(blocks). Raises: as `get`."""
        arguments.label("namespace", namespace)
        state = self._state
        with state.lock, state.change:
            self._known(namespace)
            state.change.begin()
            if len(state.accounts.limits) == 1:
                state.recount({})
                return
            state.evictor.drop_queue(namespace)
            state.accounts.close(namespace)

    def used(self, namespace: str | None) -> int:
        """Return the device blocks held by and cached for a namespace. O(1). Raises: as `get`."""
        arguments.label("namespace", namespace)
        with self._state.lock:
            self._known(namespace)
            return self._state.accounts.account(namespace).used


class NamespaceQuotas(MutableMapping[str, int | str]):
    """The most that each namespace may have: `quotas["acme"] = 512` blocks, or `"2GiB"`.

    A quota bounds the device blocks that the namespace's sequences hold together with those that
    stay cached for it, in each pool. At its quota, a namespace evicts its own cached blocks. A call
    that needs more raises `OutOfQuota`. `del quotas["acme"]` lifts the bound.

    Args:
        pools: returns the quotas of each pool that there is now, and the bytes of its blocks.
        locked: returns the lock that is held while a quota changes. Signals wait meanwhile.
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

        Raises: `ValueError` where its sequences hold more already, or for a size below a block of
        some pool; `TypeError` for what is no name or no quota. The quota stays as it was then.
        Without a pool yet, any size is taken. If it is below a block of a pool that is made later,
        each call of the namespace that needs that pool raises `ValueError`.
        """
        if namespace is None:
            raise TypeError("namespace None: pass the name of a namespace")
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
        """Bound a namespace in a pool that may be new, or whose blocks grew. O(1) if it is bounded.

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
            message = f"{error}, or raise quota {given!r}"
            raise OutOfQuota(namespace, 1, 0, 0, ceiling, message=message) from None


def _bound(quotas: Ceilings, namespace: str | None, ceiling: int | None) -> None:
    if ceiling is not None:
        quotas.set(namespace, ceiling=ceiling)
    elif quotas.ceiling(namespace) is not None:
        quotas.drop(namespace)


def _ceiling(quota: int | str, block_bytes: int) -> int | None:
    """Return a quota in blocks; None for a size while the size of a block is not known, or 0."""
    if not isinstance(quota, str):
        return arguments.count("quota", quota, at_least=1)
    num_bytes = arguments.parse_memory(quota, "quota") or 0
    if not block_bytes:
        return None
    if num_bytes < block_bytes:
        raise ValueError(
            f"quota {quota!r}: one block takes {size(block_bytes)}. Raise the quota to at least "
            f"{size(block_bytes, round_up=True)}."
        )
    return min(num_bytes // block_bytes, arguments.COUNT_MAX)
