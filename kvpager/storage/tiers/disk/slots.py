"""Which slot holds which key, in memory, and which key leaves first."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable


class Slots:
    """Slots that are free, being written, or ready. The least recently used key leaves first.

    A ready slot may have readers. It is not taken by another key before the last one has left. The
    caller holds a lock.
    """

    def __init__(self) -> None:
        self._ready: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._free: list[int] = []
        self._writing: set[bytes] = set()
        self._readers: Counter[int] = Counter()
        self._leaving: set[int] = set()  # free once they are not read any more

    def __contains__(self, key: bytes) -> bool:
        """Return True if `key` is ready. O(1)."""
        return key in self._ready

    def __len__(self) -> int:
        """Return how many keys are ready. O(1)."""
        return len(self._ready)

    @property
    def has_free(self) -> bool:
        """True if a slot is free. O(1)."""
        return bool(self._free)

    @property
    def is_idle(self) -> bool:
        """True if no slot is being read or written. O(1)."""
        return not self._writing and not self._readers

    def is_writing(self, key: bytes) -> bool:
        """Return True if `key` is being written. O(1)."""
        return key in self._writing

    def add(self, slots: Iterable[int]) -> None:
        """Add free slots. Lower numbers are taken first if given first. O(slots)."""
        self._free[:0] = reversed(list(slots))

    def restore(self, key: bytes, slot: int) -> None:
        """Add a ready slot, as the most recently used. O(1)."""
        self._ready[key] = slot

    def slot(self, key: bytes) -> int | None:
        """Return the slot of a ready key. O(1)."""
        return self._ready.get(key)

    def items(self) -> Iterable[tuple[bytes, int]]:
        """Return the ready keys and their slots, least recently used first. O(keys)."""
        return self._ready.items()

    def touch(self, key: bytes) -> None:
        """Make `key` the most recently used. O(1)."""
        self._ready.move_to_end(key)

    def victim(self) -> tuple[bytes, int] | None:
        """Return the key that leaves first, and its slot; None if all slots have readers.

        O(slots with readers).
        """
        idle = (item for item in self._ready.items() if not self._readers[item[1]])
        return next(idle, None)

    def take(self, key: bytes) -> int:
        """Take a free slot, to write `key`. O(1). Raises: `IndexError` if no slot is free."""
        slot = self._free.pop()
        self._writing.add(key)
        return slot

    def publish(self, key: bytes, slot: int) -> None:
        """Offer `key`, whose slot was taken and written. O(1)."""
        self._writing.remove(key)
        self._ready[key] = slot

    def abandon(self, key: bytes, slot: int) -> None:
        """Free the slot that was taken for `key`. O(1)."""
        self._writing.remove(key)
        self._free.append(slot)

    def pin(self, key: bytes) -> int | None:
        """Return the slot of `key`, with one more reader. O(1)."""
        slot = self._ready.get(key)
        if slot is not None:
            self._readers[slot] += 1
            self.touch(key)
        return slot

    def unpin(self, slot: int) -> None:
        """Note that a reader has left. O(1)."""
        self._readers[slot] -= 1
        if not self._readers[slot]:
            del self._readers[slot]
            if slot in self._leaving:
                self._leaving.remove(slot)
                self._free.append(slot)

    def withdraw(self, key: bytes) -> int:
        """Stop offering a ready key. Returns its slot, which waits for `free`. O(1)."""
        return self._ready.pop(key)

    def free(self, slot: int) -> None:
        """Free a slot whose key was withdrawn, once it has no reader. O(1)."""
        if slot in self._readers:
            self._leaving.add(slot)
        else:
            self._free.append(slot)
