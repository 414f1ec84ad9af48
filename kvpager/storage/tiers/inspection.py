"""What a store holds, for people: without the model that its blocks belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from kvpager.storage.tiers.frame import Fault


class StoredBlock(NamedTuple):
    """A block of a store. `age_s`: seconds since it was saved or, on a server, used last."""

    key: bytes
    num_bytes: int
    age_s: float


class Inspector(Protocol):
    """Lists and checks the blocks of one store."""

    def facts(self) -> dict[str, str | int]:
        """Return what is known of the store, by name. O(1)."""
        ...

    def blocks(self) -> Iterator[StoredBlock]:
        """Yield the blocks, in no certain order. O(blocks)."""
        ...

    def check(self, keys: Sequence[bytes]) -> list[Fault | None]:
        """Read and verify blocks. Damaged ones are dropped, as by a load. O(bytes).

        Raises: `OSError` if the store is in use or cannot be read; `ValueError` for a missing or
        wrong secret.
        """
        ...

    def drop(self, keys: Sequence[bytes]) -> None:
        """Delete blocks. O(keys). Raises: as `check`."""
        ...

    def close(self) -> None:
        """Release files and connections."""
        ...
