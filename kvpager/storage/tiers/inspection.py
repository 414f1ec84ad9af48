"""What a store holds, for people: without the model that its blocks belong to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib import import_module
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


def open_inspector(place: str, secret: bytes | None = None) -> Inspector:
    """Open a store to look at it: a directory, `disk:/path`, or the URL of a server.

    `secret`: that of the seal, if it has one. Raises: `ValueError` for another place; `OSError` for
    one that cannot be read.
    """
    scheme, colon, path = place.partition(":")
    if not colon or scheme == "disk" or os.path.exists(place):
        from kvpager.storage.tiers.disk.inspector import DiskInspector

        path = path.partition("?")[0] if colon and scheme == "disk" else place
        return DiskInspector(os.path.expanduser(path), secret)
    if scheme not in ("valkey", "valkeys", "redis", "rediss", "unix"):
        raise ValueError(
            f"place={scheme}:...: expected a directory, or a URL such as valkey://host:6379"
        )
    # By name: a store below knows no integration above it.
    inspector: Inspector = import_module("kvpager.integrations.valkey.inspector").ValkeyInspector(
        place, secret
    )
    return inspector
