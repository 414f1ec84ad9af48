"""The protocol of the buffer between blocks and stores, and leases of its slots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from kvpager.storage.tiers.host import HostStore


class SlotMemory(Protocol):
    """Slots of one block each; `kvpager.storage.staging.Staging` is one.

    `store` owns the slots: it loads and keeps blocks without a copy. None if the slots are only a
    buffer.
    """

    block_bytes: int
    store: HostStore | None

    @property
    def num_free(self) -> int: ...  # noqa: D102
    def take(self, count: int) -> list[int]: ...  # noqa: D102
    def share(self, slots: Iterable[int]) -> None: ...  # noqa: D102
    def give(self, slots: Iterable[int]) -> None: ...  # noqa: D102
    def slot(self, number: int) -> memoryview: ...  # noqa: D102
    def read(self, blocks: Sequence[int], slots: Sequence[int]) -> None: ...  # noqa: D102
    def write(self, slots: Sequence[int], blocks: Sequence[int]) -> None: ...  # noqa: D102


class Lease:
    """Slots that go back at the end of a `with` block, unless they were passed on.

    Code that takes slots leases them, so that no error loses a slot. `attach` leases them until
    `write` has given them back, and a save until `Saver.submit` owns them.

    Attributes:
        slots: the slots to give back. Set it to [] once another owner will give them back.
    """

    def __init__(self, memory: SlotMemory, slots: Iterable[int] = ()) -> None:
        self.slots = list(slots)
        self._memory = memory

    def take(self, count: int) -> list[int]:
        """Return up to `count` free slots of the memory. O(slots)."""
        self.slots = self._memory.take(count)
        return self.slots

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        slots, self.slots = self.slots, []
        self._memory.give(slots)
