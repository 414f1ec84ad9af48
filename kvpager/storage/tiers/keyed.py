"""Maps the keys of a tier to its slots: NumPy only, no bytes of blocks.

    free ──reserve──▶ writing ──publish──▶ ready ──reserve, take──▶ evicted for another use
     │ ▲                 │                   │ ▲
     │ └─────abandon─────┘             pin,  │ │ unpin
     │ ▲                                     ▼ │
     │ └──unpin──── nameless ◀──discard── pinned
     └──────take──────▶ │ ────────name───────▲

Only a ready slot is offered. A pinned slot keeps its bytes, whatever happens to its key.
A nameless slot is pinned and has no key: its owner uses it for something else, or fills it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from kvpager import _validate as arguments
from kvpager.errors import BrokenInvariant
from kvpager.plans import Int32
from kvpager.storage.tiers.eviction_order import NO_KEY, EvictionOrder, Recency, SlotPolicy

KNOWN, NO_ROOM = -1, -2  # in the place of a slot
_FREE, _WRITING, _READY, _NAMELESS = range(4)

KeySlot = tuple[bytes, int]


class Reservation(NamedTuple):
    """What `reserve` or `take` did.

    Attributes:
        slots: for each key its slot to write, `KNOWN` or `NO_ROOM`; of `take` the slots. int32 [n].
        evicted: the keys that left, each with its slot, which is one of `slots` now.
    """

    slots: Int32
    evicted: list[KeySlot]


class KeyedTier:
    """Keys and slots of one tier. All methods may be called from any thread.

    Pass the keys of a prefix in one call, from the front: of slots with equal rank, those of later
    keys leave first. Calls that take slots skip negative ones.

    Attributes:
        needs_places: True if the policy ranks by more than the last use. Then pass depths and
            parents: otherwise a prefix may leave before the keys that continue it.
    """

    def __init__(self, num_slots: int, policy: SlotPolicy | None = None) -> None:
        """Make a tier of free slots. O(slots).

        `policy` chooses who leaves, least recently used unless given. Raises: `ValueError`,
        `TypeError` for a bad number.
        """
        self.num_slots = arguments.count("num_slots", num_slots, at_least=1)
        self._lock = threading.Lock()
        self._slots: dict[bytes, int] = {}  # of writing and ready slots
        self._keys: list[bytes] = [NO_KEY] * self.num_slots
        self._states = bytearray(self.num_slots)
        self._pins: list[int] = [0] * self.num_slots
        self._depths: list[int] = [0] * self.num_slots
        self._free = list(range(self.num_slots - 1, -1, -1))
        # Idle: ready and not pinned.
        policy = Recency(self.num_slots) if policy is None else policy
        self._order = EvictionOrder(policy, self._keys, self._slots)
        self.needs_places = bool(policy.needs_fingerprints)
        self._num_ready = self._num_nameless = 0
        self._closed = False

    @property
    def num_ready(self) -> int:
        """The number of keys that are offered. O(1)."""
        return 0 if self._closed else self._num_ready

    @property
    def capacity(self) -> int:
        """The number of slots that are not nameless: for keys. O(1)."""
        return self.num_slots - self._num_nameless

    @property
    def num_available(self) -> int:
        """The number of slots that are free or may be evicted. O(1)."""
        return len(self._free) + len(self._order)

    def has(self, key: bytes) -> bool:
        """Return True if a key is offered. Changes nothing. O(1)."""
        with self._lock:
            slot = self._slots.get(key)
            return slot is not None and self._states[slot] == _READY and not self._closed

    def find(self, keys: Sequence[bytes]) -> int:
        """Return how many leading keys are offered. Changes nothing. O(keys)."""
        with self._lock:
            for count, key in enumerate(keys):
                if self._offered(key) is None:
                    return count
        return len(keys)

    def reserve(
        self,
        keys: Sequence[bytes],
        *,
        partly: bool = False,
        depths: Sequence[int] | None = None,
        parents: Sequence[bytes | None] | None = None,
    ) -> Reservation:
        """Take a slot to write for each new key. Evicts if needed. O(keys log slots).

        Keys that are offered or being written are `KNOWN`, and count as used. Without room for all
        new keys none gets a slot; with `partly` the first do. End each reservation by `publish` or
        `abandon`. `depths` are the positions of the keys in their prefix; by default 0, 1, ...
        `parents` are the keys that they continue, in the tier or not: a key leaves after its
        continuations, unless these are pinned or being written and no other key is left.
        """
        outcomes = [KNOWN] * len(keys)
        with self._lock:
            held = [*map(self._slots.get, keys)]
            new = dict[bytes, int]()
            for index, slot in enumerate(held):
                if slot is None and keys[index] not in new:
                    new[keys[index]] = index
                    outcomes[index] = NO_ROOM
            # A known key is in use: it makes no room for its neighbours.
            known = self._order.idle(held)
            self._order.touch(known)
            room = 0 if self._closed else self.num_available
            indices = [*new.values()]
            if len(indices) > room:
                indices = indices[:room] if partly else []
            evicted = self._evict(len(indices) - len(self._free))
            for index in indices:
                outcomes[index] = slot = self._take(keys[index])
                self._depths[slot] = index if depths is None else depths[index]
                if parents is not None and (parent := parents[index]):
                    self._order.link(slot, parent)
            self._order.rest(known)
        return Reservation(_array(outcomes), evicted)

    def publish(self, slots: Iterable[int]) -> None:
        """Offer the keys of slots that are written. O(slots log slots)."""
        with self._lock:
            written = self._written(slots)
            for slot in written:
                self._states[slot] = _READY
            self._num_ready += len(written)
            self._admit(written)
            self._order.rest(written)

    def abandon(self, slots: Iterable[int]) -> None:
        """Free slots that were reserved; their keys are not offered. O(slots)."""
        with self._lock:
            for slot in self._written(slots):
                self._order.unlink(slot)
                del self._slots[self._keys[slot]]
                self._release(slot)

    def pin(self, keys: Sequence[bytes]) -> Int32:
        """Keep the slots of keys as they are until `unpin`. O(keys).

        Returns a slot for each key, or -1 for a key that is not offered, int32 [n].
        """
        with self._lock:
            offered = [*map(self._offered, keys)]
            pinned = [slot for slot in offered if slot is not None]
            for slot in pinned:
                self._pins[slot] += 1
            self._order.touch([*dict.fromkeys(pinned)])
        return _array([-1 if slot is None else slot for slot in offered])

    def link(self, slots: Sequence[int], parents: Sequence[bytes | None]) -> None:
        """Note which keys the keys of pinned slots continue, if not known yet. O(slots)."""
        with self._lock:
            for slot, parent in zip(slots, parents, strict=True):
                if parent and self._states[slot] == _READY:
                    self._order.link(slot, parent)

    def unpin(self, slots: Iterable[int]) -> None:
        """Undo one `pin` of each slot. Frees discarded slots. O(slots log slots)."""
        with self._lock:
            rested = []
            for slot, count in self._pinned(slots).items():
                self._pins[slot] -= count
                if not self._pins[slot] and self._states[slot] == _READY:
                    rested.append(slot)
                elif not self._pins[slot]:
                    self._release(slot)
            self._order.rest(rested)

    def share(self, slots: Iterable[int]) -> None:
        """Pin slots that are pinned once more. O(slots)."""
        with self._lock:
            for slot, count in self._pinned(slots).items():
                self._pins[slot] += count

    def take(self, count: int, *, partly: bool = False) -> Reservation:
        """Pin slots that have no key, until `unpin` frees them. Evicts if needed. O(n log slots).

        Without room for `count`, takes none; with `partly`, takes all that there are.
        """
        with self._lock:
            if count > self.num_available:
                count = self.num_available if partly else 0
            evicted = self._evict(count - len(self._free))
            slots = [self._free.pop() for _ in range(count)]
            for slot in slots:
                self._states[slot], self._pins[slot] = _NAMELESS, 1
            self._num_nameless += count
            return Reservation(_array(slots), evicted)

    def name(self, slots: Sequence[int], keys: Sequence[bytes]) -> Int32:
        """Offer the bytes of nameless slots under keys. The slots stay pinned. O(slots log slots).

        Returns for each its slot; `KNOWN`, without effect, for a key that is offered or being
        written; `NO_ROOM` after `close`, int32 [n].
        """
        outcomes = _array(slots)
        with self._lock:
            for slot in slots:
                if self._states[slot] != _NAMELESS:
                    raise ValueError(f"slot {slot}: it is not taken")
            known = self._order.idle(map(self._slots.get, keys))  # in use: see `reserve`
            self._order.touch(known)
            for index, (slot, key) in enumerate(zip(slots, keys, strict=True)):
                if self._closed or key in self._slots:
                    outcomes[index] = NO_ROOM if self._closed else KNOWN
                    continue
                self._slots[key], self._keys[slot] = slot, key
                self._states[slot], self._depths[slot] = _READY, index
            named = _given(outcomes)
            self._num_ready += len(named)
            self._num_nameless -= len(named)
            self._admit(named)
            self._order.rest(known)
        return outcomes

    def rest(self, keys: Sequence[bytes]) -> None:
        """Let keys leave as if they were released now, without a use. O(keys log slots)."""
        with self._lock:
            self._order.rest(self._order.idle(map(self._slots.get, keys)))

    def discard(self, slots: Iterable[int]) -> list[KeySlot]:
        """Stop to offer the keys of pinned slots. O(slots).

        Returns the keys that were offered until now, each with its slot. The slots stay pinned.
        """
        with self._lock:
            gone = []
            for slot in self._pinned(slots):
                if self._states[slot] == _READY:
                    self._states[slot] = _NAMELESS
                    gone.append((self._keys[slot], slot))
            self._num_nameless += len(gone)
            self._order.forget([slot for _, slot in gone])
            self._withdraw(gone)
            return gone

    def restore(self, pairs: Iterable[KeySlot]) -> None:
        """Offer blocks that the slots of an empty tier already hold, oldest first. O(slots).

        Raises: `ValueError` if a slot or a key comes twice, no such slot exists, or the tier is not
        empty.
        """
        with self._lock:
            if len(self._free) < self.num_slots:
                raise ValueError("restore: the tier is not empty")
            held = dict(pairs := list(pairs))
            slots = list(held.values())
            if len(set(slots)) < len(pairs):
                raise ValueError("restore: a key or a slot comes twice")
            if not set(slots) <= set(self._free):
                raise ValueError(f"restore: a slot is not in 0..{self.num_slots - 1}")
            self._slots.update(held)
            for key, slot in pairs:
                self._keys[slot] = key
                self._states[slot] = _READY
            self._free = [slot for slot in self._free if self._states[slot] == _FREE]
            self._num_ready = len(slots)
            self._admit(slots)
            self._order.rest(slots[::-1])  # of equal ranks the last given leaves first

    def pairs(self) -> list[KeySlot]:
        """Return the offered keys and their slots, in the order they would leave. O(n log n).

        Pinned slots come last.
        """
        with self._lock:
            slots = self._order.in_order()
            held = [slot for slot in range(self.num_slots) if self._pins[slot]]
            slots += [slot for slot in held if self._states[slot] == _READY]
            return [(self._keys[slot], slot) for slot in slots]

    def close(self) -> None:
        """Offer and reserve nothing from now on. Slots in use may still be ended. O(1)."""
        self._closed = True

    def check(self) -> None:
        """Raise `BrokenInvariant` unless keys, slots and queue agree. O(slots)."""
        with self._lock:
            free = sorted(self._free)
            ready = [slot for slot, state in enumerate(self._states) if state == _READY]
            idle = [slot for slot in ready if not self._pins[slot]]
            nameless = [slot for slot, state in enumerate(self._states) if state == _NAMELESS]
            offered = [slot for slot, state in enumerate(self._states) if state in _KEYED]
            for what, good in (
                ("free slots", free == [s for s, t in enumerate(self._states) if t == _FREE]),
                ("number of ready slots", self._num_ready == len(ready)),
                ("idle slots", sorted(self._order.in_order()) == idle),
                ("keys", sorted(self._slots.values()) == offered),
                ("slots", all(self._slots[self._keys[slot]] == slot for slot in offered)),
                ("pins", all(self._states[s] >= _READY for s, n in enumerate(self._pins) if n)),
                ("pins of nameless slots", all(self._pins[slot] > 0 for slot in nameless)),
                ("number of nameless slots", self._num_nameless == len(nameless)),
            ):
                if not good:
                    raise BrokenInvariant(f"keyed tier: {what}")
            self._order.check()

    def _offered(self, key: bytes) -> int | None:
        """Return the slot of a key that is offered."""
        slot = self._slots.get(key)
        return (
            slot if slot is not None and self._states[slot] == _READY and not self._closed else None
        )

    def _admit(self, slots: list[int]) -> None:
        self._order.admit(slots, [self._depths[slot] for slot in slots])

    def _evict(self, count: int) -> list[KeySlot]:
        if count <= 0:
            return []
        gone = [(self._keys[slot], slot) for slot in self._order.evict(count)]
        self._withdraw(gone)
        for _, slot in gone:
            self._release(slot)
        return gone

    def _withdraw(self, gone: list[KeySlot]) -> None:
        for key, _ in gone:
            del self._slots[key]
        self._num_ready -= len(gone)

    def _take(self, key: bytes) -> int:
        slot = self._free.pop()
        self._slots[key], self._keys[slot], self._states[slot] = slot, key, _WRITING
        return slot

    def _release(self, slot: int) -> None:
        self._num_nameless -= self._states[slot] == _NAMELESS
        self._states[slot] = _FREE
        self._keys[slot] = NO_KEY
        self._free.append(slot)

    def _written(self, slots: Iterable[int]) -> list[int]:
        given = _distinct(slots)
        for slot in given:
            if self._states[slot] != _WRITING:
                raise ValueError(f"slot {slot}: it is not reserved")
        return given

    def _pinned(self, slots: Iterable[int]) -> Counter[int]:
        counts = Counter(_given(slots))
        for slot, count in counts.items():
            if self._pins[slot] < count:
                raise ValueError(f"slot {slot}: it is not pinned")
        return counts


_KEYED = (_WRITING, _READY)


def _array(slots: Sequence[int]) -> Int32:
    return np.array(slots, np.int32)


def _given(slots: Iterable[int]) -> list[int]:
    numbers = slots.tolist() if isinstance(slots, np.ndarray) else slots
    return [int(slot) for slot in numbers if slot >= 0]


def _distinct(slots: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(_given(slots)))
