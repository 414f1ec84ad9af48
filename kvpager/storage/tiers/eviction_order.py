"""Which slots may be evicted, and in which order.

A *child* of a key is the key of the block that continues it. A block is of no use without the ones
before it, so a slot whose key has children in the tier is *held*: it leaves after them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from kvpager.errors import BrokenInvariant
from kvpager.plans import Float64, Int32, Int64, UInt64
from kvpager.storage.tiers.ranked import Ranked

_NO_SLOTS: Int32 = np.empty(0, np.int32)
_NO_PRINTS: UInt64 = np.empty(0, np.uint64)
_NO_DEPTHS: Int64 = np.empty(0, np.int64)
NO_KEY = b""


class SlotPolicy(Protocol):
    """The part of an eviction policy that a tier calls. `kvpager.blocks.policies` has some.

    The slots of a call are distinct, int32 [n].
    """

    needs_fingerprints: bool

    def admit(self, blocks: Int32, fingerprints: UInt64, depths: Int64) -> None:
        """Note that the slots are offered from now on. See `EvictionPolicy.admit`."""

    def touch(self, blocks: Int32) -> None:
        """Note that the slots are used again."""

    def release(self, blocks: Int32) -> None:
        """Note that no reader holds the slots any more."""

    def rank(self, blocks: Int32) -> Float64 | Int64:
        """Return the rank of each slot: the lowest leaves first."""

    def forget(self, blocks: Int32) -> None:
        """Note that the slots are not offered any more."""

    def reranked(self, count: int) -> Int32:
        """Return the slots whose rank changed although no call named them."""


class Recency:
    """Evict the slot whose last use is oldest. O(slots named)."""

    needs_fingerprints = False

    def __init__(self, num_slots: int) -> None:
        self._now = 0
        self._last_used: Int64 = np.zeros(num_slots, np.int64)

    def admit(self, blocks: Int32, fingerprints: UInt64, depths: Int64) -> None:  # noqa: D102
        pass

    def touch(self, blocks: Int32) -> None:  # noqa: D102
        pass

    def release(self, blocks: Int32) -> None:  # noqa: D102
        self._now += 1
        self._last_used[blocks] = self._now

    def rank(self, blocks: Int32) -> Int64:  # noqa: D102
        return self._last_used[blocks]

    def forget(self, blocks: Int32) -> None:  # noqa: D102
        pass

    def reranked(self, count: int) -> Int32:  # noqa: D102
        return _NO_SLOTS


class EvictionOrder:
    """Idle slots by the ranks of a policy, each after the slots of its children.

    Attributes:
        keys: the key of each slot, `NO_KEY` for none. The owner changes it.
        slots: the slot of each key. The owner changes it.
    """

    def __init__(
        self, policy: SlotPolicy, keys: Sequence[bytes], slots: Mapping[bytes, int]
    ) -> None:
        """Begin without idle slots. O(slots)."""
        self.keys, self.slots = keys, slots
        self._policy = policy
        self._ranked = Ranked(len(keys))
        self._parents = [NO_KEY] * len(keys)
        self._num_children: dict[bytes, int] = {}  # of keys that have some

    def __len__(self) -> int:
        return len(self._ranked)

    def __contains__(self, slot: int) -> bool:
        return slot in self._ranked

    def idle(self, slots: Iterable[int | None]) -> list[int]:
        """Return those slots that are idle, each once. O(slots)."""
        return self._ranked.queued(slot for slot in dict.fromkeys(slots) if slot is not None)

    def in_order(self) -> list[int]:
        """Return the idle slots by rank, as if none had children. O(n log n)."""
        return self._ranked.in_order()

    def link(self, slot: int, parent: bytes) -> None:
        """Note that the key of `slot` continues `parent`, which may be absent. O(1).

        Later parents of the same slot are ignored.
        """
        if self._parents[slot]:
            return
        self._parents[slot] = parent
        self._num_children[parent] = self._num_children.get(parent, 0) + 1

    def unlink(self, slot: int) -> None:
        """Note that the key of `slot` leaves. O(log slots)."""
        if not (parent := self._parents[slot]):
            return
        self._parents[slot] = NO_KEY
        self._num_children[parent] -= 1
        if not self._num_children[parent]:
            del self._num_children[parent]
            if (above := self.slots.get(parent)) is not None:
                self._ranked.release([above])

    def admit(self, slots: Sequence[int], depths: Sequence[int]) -> None:
        """Tell the policy that slots are offered. O(slots)."""
        if not slots:
            return
        prints, places = _NO_PRINTS, _NO_DEPTHS
        if self._policy.needs_fingerprints:
            keys = [self.keys[slot][:8] for slot in slots]
            prints = np.frombuffer(b"".join(keys), "<u8").astype(np.uint64)
            places = np.array(depths, np.int64)
        self._policy.admit(np.array(slots, np.int32), prints, places)

    def touch(self, slots: Sequence[int]) -> None:
        """Tell the policy that slots are used. They are idle again after `rest`. O(slots)."""
        if slots:
            self._ranked.forget(slots)
            self._policy.touch(np.array(slots, np.int32))

    def rest(self, slots: Sequence[int]) -> None:
        """Make slots idle; of equal ranks the last given leaves first. O(slots + log slots)."""
        if slots:
            self._policy.release(np.array(slots, np.int32))
            self.queue(slots[::-1])

    def hold(self, slots: Iterable[int]) -> None:
        """Take slots out of the order until `queue`; this is no use. O(slots)."""
        self._ranked.forget(slots)

    def queue(self, slots: Sequence[int]) -> None:
        """Make slots idle at their ranks; of equal ranks the first given leaves first. O(slots)."""
        if slots:
            self._ranked.push(self._policy.rank(np.array(slots, np.int32)).tolist(), slots)

    def evict(self, count: int) -> list[int]:
        """Remove and return the idle slots that leave first. O(log slots) each.

        At least `count` slots must be idle. If all that are left have children, the children are in
        use: then these slots leave by rank, in O(slots log slots).
        """
        if len(reranked := self._policy.reranked(count)):
            self.queue(self._ranked.queued(reranked.tolist()))
        is_held = self._has_children if self._num_children else None
        left: list[int] = []
        while len(left) < count:
            slot = self._ranked.pop(is_held)
            if slot is None:
                is_held = None
                self._ranked.release_all()
                continue
            left.append(slot)
            self.unlink(slot)
        if left:
            self._policy.forget(np.array(left, np.int32))
        return left

    def forget(self, slots: Sequence[int]) -> None:
        """Tell the policy that slots are no longer offered. They must not be idle. O(slots)."""
        if slots:
            self._policy.forget(np.array(slots, np.int32))
            for slot in slots:
                self.unlink(slot)

    def check(self) -> None:
        """Raise `BrokenInvariant` unless the counts of children are right. O(slots)."""
        parents = Counter(parent for parent in self._parents if parent)
        if parents != self._num_children:
            raise BrokenInvariant("eviction order: number of children")
        if any(not self.keys[slot] for slot, up in enumerate(self._parents) if up):
            raise BrokenInvariant("eviction order: a parent of a slot without a key")

    def _has_children(self, slot: int) -> bool:
        return self.keys[slot] in self._num_children
