"""The protocol of the buffer between blocks and stores."""

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
