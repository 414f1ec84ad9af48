"""Block counts of each namespace that has a quota.

A namespace owns the blocks that its sequences hold and the blocks cached for it. A block belongs to
one namespace. `ceiling` bounds the number of its blocks. `floor` reserves blocks: while the
namespace's sequences hold fewer, other namespaces can neither take the difference nor evict the
namespace's cached blocks within it.

Each namespace with a quota has an account. Sums over all accounts are updated incrementally, so a
call reads only the accounts of the namespaces it names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.pool import BlockPool, Blocks
from kvpager.errors import BrokenInvariant, OutOfBlocks, OutOfQuota
from kvpager.plans import NO_BLOCKS, Int32, Int64

Index = NDArray[np.intp]
Owned = Iterable[tuple[str | None, Int32]]  # namespaces and their blocks
Counts = dict[int, int]  # blocks by the number of an account


@dataclass(frozen=True, slots=True)
class Quota:
    """Bounds of one namespace, in blocks: at least `floor`, at most `ceiling` (None: no bound)."""

    floor: int = 0
    ceiling: int | None = None


NO_QUOTA = Quota()


@dataclass(slots=True)
class Account:
    """The block counts of one namespace."""

    namespace: str | None
    quota: Quota
    used: int = 0  # held or cached
    evictable: int = 0  # cached, and in no table
    unmet: int = 0  # blocks of the floor that its sequences do not hold
    guarded: int = 0  # evictable, but within the floor
    is_open: bool = False  # some evictable blocks are not guarded

    def floor_after(self, need: int = 0, revived: int = 0) -> tuple[int, int]:
        """Return `unmet` and `guarded` as they would be after taking `need` blocks. O(1).

        `revived`: evictable blocks that the same call is about to hold.
        """
        evictable = self.evictable - revived
        unmet = max(self.quota.floor - (self.used - evictable) - need, 0)
        return unmet, min(evictable, unmet)


class Accounts:
    """Accounts by number. Namespaces without a quota share account 0."""

    def __init__(self, num_blocks: int) -> None:
        self._begin(num_blocks)

    def _begin(self, num_blocks: int) -> None:
        self.limits: dict[str | None, Quota] = {}
        self.numbers: dict[str | None, int] = {}
        self._owner: Int32 = np.zeros(num_blocks, np.int32)
        self._accounts = {0: Account(None, NO_QUOTA)}
        self._last_number = 0
        self._unmet = self._guarded = 0  # of all accounts
        self.opened: set[int] = set()  # accounts that just got evictable blocks

    def owner(self, namespace: str | None) -> int:
        """Return the number of a namespace's account. O(1)."""
        return self.numbers.get(namespace, 0)

    def account(self, namespace: str | None) -> Account:
        """Return the account of a namespace that has a quota. O(1)."""
        return self._accounts[self.numbers[namespace]]

    # ---------------------------------------------------------------- quotas come and go

    def recount(self, limits: dict[str | None, Quota], pool: BlockPool, owned: Owned) -> None:
        """Recount under these quotas; `owned` are all blocks in use. O(blocks)."""
        self._begin(pool.num_blocks)
        shared = self._accounts[0]
        shared.used = int(np.count_nonzero(pool.in_use()))
        shared.evictable = pool.num_evictable
        self._settle(0)
        blocks: dict[str | None, list[Int32]] = {namespace: [] for namespace in limits}
        for namespace, some in owned:
            if namespace in blocks:
                blocks[namespace].append(some)
        for namespace, quota in limits.items():
            self.open(namespace, quota, pool, np.concatenate([NO_BLOCKS, *blocks[namespace]]))

    def open(self, namespace: str | None, quota: Quota, pool: BlockPool, blocks: Int32) -> int:
        """Open an account for a namespace that owns `blocks`. O(blocks)."""
        blocks = np.unique(blocks)
        self._last_number += 1
        number = self.numbers[namespace] = self._last_number
        self.limits[namespace] = quota
        account = Account(namespace, quota, len(blocks), pool.count_idle(blocks))
        self._accounts[number] = account
        self._owner[blocks] = number
        self._accounts[0].used -= account.used
        self._accounts[0].evictable -= account.evictable
        self._settle(0)
        self._settle(number)
        return number

    def change(self, namespace: str | None, quota: Quota) -> None:
        """Replace the quota of a namespace that has one. O(1)."""
        self.limits[namespace] = self.account(namespace).quota = quota
        self._settle(self.numbers[namespace])

    def close(self, namespace: str | None) -> None:
        """Count a namespace's blocks among those without a quota. O(blocks)."""
        del self.limits[namespace]
        number = self.numbers.pop(namespace)
        account = self._accounts.pop(number)
        self._unmet -= account.unmet
        self._guarded -= account.guarded
        self._owner[self._owner == number] = 0
        self._accounts[0].used += account.used
        self._accounts[0].evictable += account.evictable
        self._settle(0)
        self.opened.discard(number)

    def parked(self, pool: BlockPool) -> list[tuple[str | None, Int32]]:
        """Return the blocks that only an unfinished copy keeps, by former owner. O(blocks)."""
        blocks = ((pool.refs == 0) & ~pool.cached & (pool.holds > 0)).nonzero()[0]
        blocks = blocks[blocks < len(self._owner)].astype(np.int32)
        owners = self._owner[blocks]
        return [(name, blocks[owners == number]) for name, number in self.numbers.items()]

    # ---------------------------------------------------------------- what the pool reports

    def charge(self, blocks: Blocks, owners: Int64) -> None:
        """Count taken `blocks` in the accounts `owners`. O(blocks)."""
        self._owner[blocks] = owners
        for number, count in by_owner(owners).items():
            self._accounts[number].used += count
            self._settle(number)

    def freed(self, blocks: Index) -> None:
        """See `kvpager.blocks.pool.Ledger`."""
        for number, count in self.count(blocks).items():
            self._accounts[number].used -= count
            self._settle(number)

    def evictable(self, blocks: Index, change: int) -> None:
        """See `kvpager.blocks.pool.Ledger`."""
        for number, count in self.count(blocks).items():
            self._accounts[number].evictable += change * count
            self._settle(number)

    def _settle(self, number: int) -> None:
        """Update the sums after an account changed. O(1)."""
        account = self._accounts[number]
        unmet, guarded = account.floor_after()
        self._unmet += unmet - account.unmet
        self._guarded += guarded - account.guarded
        account.unmet, account.guarded = unmet, guarded
        was_open, account.is_open = account.is_open, account.evictable > guarded
        if account.is_open and not was_open:
            self.opened.add(number)

    # ---------------------------------------------------------------- what may be taken

    def refuse(self, need: Counts, revived: Counts, pool: BlockPool) -> None:
        """Raise `OutOfBlocks` unless each account can take `need` blocks. O(accounts named).

        `revived`: cached blocks of each account that the same call is about to hold.
        """
        self.refuse_over_ceiling(need, revived, pool)
        unmet, guarded = self._unmet, self._guarded
        for number in need.keys() | revived.keys():
            account = self._accounts[number]
            after = account.floor_after(need.get(number, 0), revived.get(number, 0))
            unmet += after[0] - account.unmet
            guarded += after[1] - account.guarded
        total = sum(need.values())
        can_leave = pool.num_evictable - sum(revived.values()) - guarded
        missing = total - (pool.num_free - (unmet - guarded) + can_leave)
        if missing > 0:
            advice = "the floors of other namespaces reserve the rest; free a sequence"
            room = pool.num_free, can_leave, pool.num_blocks
            raise OutOfBlocks(total, *room, advice=advice, missing=missing)

    def refuse_over_ceiling(self, need: Counts, revived: Counts, pool: BlockPool) -> None:
        """Raise `OutOfQuota` if a namespace would pass its ceiling. O(accounts named)."""
        for number, count in sorted(need.items()):
            account = self._accounts[number]
            evictable = account.evictable - revived.get(number, 0)
            over = account.used + count - evictable
            ceiling = account.quota.ceiling
            if ceiling is not None and over > ceiling:
                advice = (
                    f"namespace {account.namespace!r} may have {ceiling} blocks. Free or swap "
                    "one of its sequences, or raise its quota"
                )
                room = pool.num_free, evictable, pool.num_blocks
                missing = over - ceiling
                raise OutOfQuota(account.namespace, count, *room, advice=advice, missing=missing)

    def forced(self, need: Counts) -> list[tuple[int, int]]:
        """Return the accounts over their ceilings, and how many cached blocks each must evict."""
        over = {
            number: self._accounts[number].used + count - ceiling
            for number, count in sorted(need.items())
            if (ceiling := self._accounts[number].quota.ceiling) is not None
        }
        return [(number, count) for number, count in over.items() if count > 0]

    def may_leave(self, number: int, need: int = 0) -> int:
        """Return how many cached blocks of an account are evictable when it takes `need`. O(1)."""
        return self._accounts[number].evictable - self._accounts[number].floor_after(need)[1]

    def num_may_leave(self, pool: BlockPool) -> int:
        """Return how many cached blocks are evictable when no blocks are taken. O(1)."""
        return pool.num_evictable - self._guarded

    def is_known_open(self, number: int) -> bool:
        """Return True if blocks of the account were evictable before this call. O(1)."""
        return not self.limits or (self._accounts[number].is_open and number not in self.opened)

    def shortfall(self, pool: BlockPool, fewer: int = 0) -> int:
        """Return how many blocks of all floors a pool smaller by `fewer` would lack. O(1).

        Never above 0 between calls: a call that would raise it above 0 is refused.
        """
        if not self.limits:
            return 0
        return self._unmet - (pool.num_free + pool.num_evictable - fewer)

    def unmet_beside(self, number: int, held: Counts) -> int:
        """Return what all other floors lack if accounts hold `held` blocks. O(accounts)."""
        others = (each for each in self._accounts.items() if each[0] != number)
        return sum(max(account.quota.floor - held.get(key, 0), 0) for key, account in others)

    def unmet_if(self, namespace: str | None, floor: int, held: int) -> int:
        """Return the unmet blocks of all floors if this namespace had `floor`. O(1).

        `held`: blocks that the namespace's sequences hold.
        """
        before = self.account(namespace).unmet if namespace in self.limits else 0
        return self._unmet - before + max(floor - held, 0)

    def count(self, blocks: Blocks) -> Counts:
        """Return how many of `blocks` each account has. O(blocks)."""
        return by_owner(self._owner[blocks])

    def check(self, pool: BlockPool, owned: Owned) -> None:
        """Raise `BrokenInvariant` unless the counts are those of a recount. O(blocks)."""
        if not self.limits:
            return
        fresh = Accounts(pool.num_blocks)
        fresh.recount(self.limits.copy(), pool, owned)
        names = [None, *self.limits]
        mine = [self._accounts[number] for number in (0, *map(self.owner, self.limits))]
        for name, account, counted in zip(names, mine, fresh._accounts.values(), strict=True):
            if account != counted:
                raise BrokenInvariant(f"quotas: {name!r} has {account}, a recount {counted}")
        if (self._unmet, self._guarded) != (fresh._unmet, fresh._guarded):
            raise BrokenInvariant(
                f"quotas: {self._unmet} unmet and {self._guarded} guarded blocks, "
                f"but a recount finds {fresh._unmet} and {fresh._guarded}"
            )
        if self.shortfall(pool) > 0:
            raise BrokenInvariant(f"quotas: {self.shortfall(pool)} blocks of floors are lacking")
        for account in mine:
            ceiling = account.quota.ceiling
            if ceiling is not None and account.used > ceiling:
                raise BrokenInvariant(
                    f"quotas: namespace {account.namespace!r} has more than its ceiling"
                )


def by_owner(owners: Int32 | Int64) -> Counts:
    """Return how often each number is in `owners`. O(owners)."""
    if not len(owners):
        return {}
    first = int(owners[0])
    if len(owners) == 1 or not np.count_nonzero(owners != first):  # the usual case
        return {first: len(owners)}
    numbers, counts = np.unique(owners, return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))
