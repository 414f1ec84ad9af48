"""`DiskInspector`: what the directory of a `DiskStore` holds."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvpager.storage.tiers.disk.directory import TABLE, read_format
from kvpager.storage.tiers.disk.segments import slot_bytes
from kvpager.storage.tiers.disk.slot_table import RECORD_BYTES, read_table
from kvpager.storage.tiers.disk.store import DiskStore
from kvpager.storage.tiers.frame import Fault
from kvpager.storage.tiers.inspection import StoredBlock
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import Loaded
from kvpager.storage.tiers.seals import seal_of


class DiskInspector:
    """Lists a directory, also while a process uses it. `check` and `drop` need it for themselves.

    Raises: `ValueError` for a directory without a store; `OSError`.
    """

    def __init__(self, path: str | os.PathLike[str], secret: bytes | None = None) -> None:
        self._path, self._secret = Path(path), secret
        if not self._path.is_dir() or not (found := read_format(self._path)):
            raise ValueError(f"place={str(path)!r}: no disk store is there. Check the path.")
        self._layout = BlockLayout(found["layout"], int(found["block_bytes"]))
        self._seal = int(found["seal"])
        self._store: DiskStore | None = None

    def facts(self) -> dict[str, str | int]:
        """Return capacity, layout and seal."""
        return {
            "capacity in blocks": self._num_slots,
            "block bytes": self._layout.block_bytes,
            "layout": self._layout.text,
            "seal": {1: "Digest", 2: "Mac", 3: "Encrypted"}.get(self._seal, str(self._seal)),
        }

    def blocks(self) -> Iterator[StoredBlock]:
        """Yield the blocks, the one that leaves first first. O(blocks log blocks)."""
        now = time.time()
        records = read_table(self._path / TABLE).values()
        for record in sorted(records, key=lambda record: record.order):
            age_s = max(0.0, now - record.saved_ms / 1000)
            yield StoredBlock(record.key, self._layout.block_bytes, age_s)

    def check(self, keys: Sequence[bytes]) -> list[Fault | None]:
        """Load blocks; the store drops those that are damaged. O(bytes)."""
        block = memoryview(mmap.mmap(-1, self._layout.block_bytes))
        found = [self._opened().load([key], [block], float("inf"))[0] for key in keys]
        # A block that left meanwhile is no fault.
        return [Fault.BYTES if outcome == Loaded.BAD else None for outcome in found]

    def drop(self, keys: Sequence[bytes]) -> None:
        """Delete blocks. O(keys)."""
        self._opened().drop(keys)

    def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            self._store.close()

    @property
    def _num_slots(self) -> int:
        return os.stat(self._path / TABLE).st_size // RECORD_BYTES

    def _opened(self) -> DiskStore:
        """Return the store, locked for this process, with the capacity that it has."""
        if self._store is None:
            each = slot_bytes(self._layout.block_bytes) + RECORD_BYTES
            seal = seal_of(self._seal, self._secret)
            capacity = self._num_slots * each
            self._store = DiskStore(self._path, capacity, layout=self._layout, seal=seal)
        return self._store
