"""How much there is, who may have it, and what stays: pool sizes, quotas, pins, retention."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpager import _validate as arguments
from kvpager.blocks import swap as moves
from kvpager.blocks.policies import PRIORITY_MAX
from kvpager.blocks.queries import Views
from kvpager.blocks.quotas import Quota
from kvpager.blocks.sequences import Sequence
from kvpager.blocks.state import NO_BLOCKS
from kvpager.errors import OutOfBlocks
from kvpager.plans import NO_COPIES, Plan, Step

Int32 = NDArray[np.int32]


class Capacity(Views):
    """The part of a `BlockManager` that decides over room, not over sequences."""

    def grow(self, num_blocks: int) -> None:
        """Raise the device pool to `num_blocks`; no block moves. O(num_blocks).

        Raises: `ValueError` where that is less than there are, or a plan of `shrink` is not
        completed.
        """
        with self._lock, self._change:
            least = self._pool.num_blocks
            num_blocks = arguments.count("num_blocks", num_blocks, at_least=least)
            if self._fences.cut_off:
                raise ValueError("complete the plan of `shrink` first: it reads what was cut off")
            self._change.begin()
            self._resize(num_blocks, NO_COPIES)

    def shrink(self, num_blocks: int) -> Plan:
        """Lower the device pool to `num_blocks`; blocks beyond move to free ones. O(num_blocks).

        Cached blocks are evicted where there is not enough room. Apply the plan, device to device,
        before the storage shrinks.
        Raises: `OutOfBlocks` where more are held, `ValueError` for more than there are, or where a
        block beyond is pinned or in an unfinished copy.
        """
        with self._lock, self._change:
            pool = self._pool
            least = pool.num_reserved + 1
            num_blocks = arguments.count(
                "num_blocks", num_blocks, at_least=least, at_most=pool.num_blocks
            )
            if pool.holds[num_blocks:].any():
                raise ValueError(
                    f"num_blocks {num_blocks}: a block beyond is pinned or in an unfinished copy"
                )
            room = num_blocks - pool.num_reserved
            staying = pool.num_held + pool.num_kept
            excess = staying + pool.num_evictable - room
            can_leave = self._quotas.num_may_leave(pool)
            if excess > can_leave:
                need = room + excess - can_leave
                raise OutOfBlocks(need, room, 0, pool.num_blocks, "remaining device")
            if self._quotas.shortfall(pool, fewer=pool.num_blocks - num_blocks) > 0:
                raise ValueError(f"num_blocks {num_blocks}: too few for what floors promise")
            num_beyond = int(np.count_nonzero(pool.in_use()[num_blocks:]))
            copies = np.empty((num_beyond, 2), np.int32)
            plan = Plan(copies, "device", "device", self._fences.ticket(copies))
            self._change.begin()
            self._evict(excess, {} if self._quotas.limits else None)
            in_use = pool.in_use()
            old = in_use[num_blocks:].nonzero()[0] + num_blocks
            places = (~in_use[:num_blocks]).nonzero()[0]
            copies.resize((len(old), 2), refcheck=False)  # in place: some were evicted
            copies[:, 0], copies[:, 1] = old, places[places >= pool.num_reserved][: len(old)]
            self._resize(num_blocks, copies)
            self._moved(copies, plan.ticket, "device", "device", "moved")
            return plan

    def _resize(self, num_blocks: int, copies: Int32) -> None:
        places = np.arange(self._pool.num_blocks, dtype=np.int32)
        places[copies[:, 0]] = copies[:, 1]
        moves.replace(self._rows, np.array(self._rows.live_rows(), np.int64), *copies.T)
        self._pool.resize(num_blocks, copies)
        self._index.resize(num_blocks, places)
        self._recount(self._quotas.limits)

    def drop_cached(self) -> int:
        """Evict all that only the prefix index keeps; how many blocks that freed. O(cached)."""
        with self._lock, self._change:
            free = self._pool.num_free
            self._change.begin()
            self._evict(self._pool.num_evictable, None)
            return self._pool.num_free - free

    # ---------------------------------------------------------------- what stays

    def complete(self, work: Plan | Step | Sequence | int) -> None:
        """The copies of a plan, step or new sequence are made: let their blocks go. O(copies).

        Needed with `fences=True` only; without it, or without copies, there is nothing to do.
        Raises: `ValueError` where they were completed already, or are of another manager.
        """
        ticket = work if isinstance(work, int) else getattr(work, "ticket", None)
        if ticket is None or isinstance(work, bool):
            raise TypeError(f"expected a plan, step, sequence or ticket, got {type(work).__name__}")
        with self._lock, self._change:
            if ticket:
                self._fences.refuse_closed(ticket)
                self._change.begin()
                self._index.retire(self._fences.complete(ticket))

    def pin(self, sequence: Sequence) -> int:
        """Keep what the index offers of this sequence, also when it is freed. O(blocks).

        Returns the ticket for `unpin`. Raises: `StaleSequence`, `SequenceSwapped`, `ValueError`
        where other namespaces' floors need the blocks.
        """
        with self._lock, self._change:
            blocks = self._offered_blocks(self._resident_row(sequence))
            pool = self._pool
            idle = (pool.refs[blocks] == 0) & (pool.holds[blocks] == 0)
            if self._quotas.shortfall(pool, fewer=int(np.count_nonzero(idle))) > 0:
                raise ValueError("too few blocks would be left for what floors promise")
            self._change.begin()
            return self._fences.pin(blocks)

    def unpin(self, ticket: int) -> None:
        """End a pin. O(blocks). Raises: `ValueError` for a ticket that is not one, or was used."""
        with self._lock, self._change:
            self._fences.refuse_no_pin(ticket)
            self._change.begin()
            self._index.retire(self._fences.unpin(ticket))

    def retain(self, sequence: Sequence, priority: int, ttl_s: float | None = None) -> None:
        """Rank what the index offers of this sequence by `priority`, 0 (leaves first) to 100.

        `ttl_s`: for so many seconds; then it is the first to leave. O(blocks).
        Raises: `ValueError` where the manager was not made with `eviction="priority"`.
        """
        priority = arguments.count("priority", priority, at_most=PRIORITY_MAX)
        if ttl_s is not None:
            ttl_s = arguments.seconds("ttl_s", ttl_s)
        with self._lock, self._change:
            blocks = self._offered_blocks(self._resident_row(sequence))
            self._change.begin()
            try:
                is_known = self._index.policy.retain(blocks, priority, ttl_s)
            except Exception:  # of the policy's clock, which it reads before it changes
                self._change.end()
                raise
            if not is_known:
                self._change.end()
                raise ValueError('this policy knows no priorities; use eviction="priority"')
            self._index.offer_idle(blocks)

    def _offered_blocks(self, row: int) -> Int32:
        # Perhaps not its own: an equal prefix may have been offered before.
        position = int(self._rows.published[row])
        node = self._index.locate(self._rows.nodes[row], position) if position else None
        return NO_BLOCKS if node is None else self._index.path(node, position)

    # ---------------------------------------------------------------- quotas

    def set_quota(
        self, namespace: str | None, *, floor: int = 0, ceiling: int | None = None
    ) -> None:
        """Bound the device blocks of a namespace, and keep some for it.

        O(1) for a namespace that has a quota, else O(sequences + its blocks).

        Args:
            floor: blocks its sequences can always get; what is cached within it nobody else evicts.
            ceiling: the most blocks it may have, held and cached; beyond, it evicts its own.

        Raises: `ValueError` where the floors promise more than can be had, or the namespace holds
        more than `ceiling` blocks already.
        """
        arguments.label("namespace", namespace)
        floor = arguments.count("floor", floor)
        if ceiling is not None:
            ceiling = arguments.count("ceiling", ceiling, at_least=max(floor, 1))
        with self._lock, self._change:
            pool, quotas, quota = self._pool, self._quotas, Quota(floor, ceiling)
            is_new, blocks = namespace not in quotas.limits, NO_BLOCKS
            if is_new:
                blocks = self._owned_by(namespace)
                held = len(blocks) - pool.count_idle(blocks)
            else:
                held = quotas.account(namespace).used - quotas.account(namespace).evictable
            if ceiling is not None and held > ceiling:
                raise ValueError(
                    f"ceiling {ceiling}: namespace {namespace!r} holds {held} blocks; "
                    "free some first"
                )
            promised = quotas.promised(namespace, floor, held)
            if promised > pool.num_free + pool.num_evictable:
                raise ValueError(
                    f"floor {floor}: with what the other floors promise, {promised} blocks, and "
                    f"{pool.num_free + pool.num_evictable} can be had"
                )
            self._change.begin()
            if not quotas.limits:
                self._recount({namespace: quota})
            elif is_new:
                self._index.add_queue(namespace, quotas.open(namespace, quota, pool, blocks))
            else:
                quotas.change(namespace, quota)
            number = quotas.owner(namespace)
            self._evict_for(0, {number: 0})

    def quota(self, namespace: str | None) -> Quota:
        """The quota of a namespace. O(1). Raises: `ValueError` where it has none."""
        arguments.label("namespace", namespace)
        with self._lock:
            if namespace not in self._quotas.limits:
                raise ValueError(f"namespace {namespace!r} has no quota; give it one by set_quota")
            return self._quotas.limits[namespace]

    def ceiling(self, namespace: str | None) -> int | None:
        """Return the most blocks a namespace may have; None where no quota sets a bound. O(1)."""
        arguments.label("namespace", namespace)
        with self._lock:
            quota = self._quotas.limits.get(namespace)
            return None if quota is None else quota.ceiling

    def drop_quota(self, namespace: str | None) -> None:
        """Let a namespace share what is left with the others. O(blocks). Raises: as `quota`."""
        with self._lock, self._change:
            self.quota(namespace)
            self._change.begin()
            if len(self._quotas.limits) == 1:
                self._recount({})
                return
            self._index.drop_queue(namespace)
            self._quotas.close(namespace)

    def namespace_blocks(self, namespace: str | None) -> int:
        """Device blocks held by and cached for a namespace. O(1). Raises: as `quota`."""
        with self._lock:
            self.quota(namespace)
            return self._quotas.account(namespace).used
