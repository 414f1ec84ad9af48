"""The table of slots on disk: a record of 64 bytes for each, in place.

    key 32 | saved 8 | order 8 | check 16

`saved` is a time, in milliseconds since 1970. `order` ranks the uses of blocks: the lowest is the
oldest. `check` is a BLAKE2b digest of the slot's number and all before it. A record of zeros is
empty, and so is a damaged one. The table has its full size from the start.
"""

from __future__ import annotations

import os
import struct
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvpager.storage.keys import KEY_BYTES

_RECORD = struct.Struct(f"<{KEY_BYTES}sQQ16s")
_CHECK_BYTES = 16
_CHECKED = _RECORD.size - _CHECK_BYTES
RECORD_BYTES = _RECORD.size
_EMPTY = bytes(RECORD_BYTES)
_CLOSED = -1  # no descriptor: system calls refuse it


class Record(NamedTuple):
    """The key of a block, when it was saved (ms), and the rank of its last use."""

    key: bytes
    saved_ms: int
    order: int


class SlotTable:
    """Reads and writes the records of slots. Nothing is cached."""

    def __init__(self, path: Path, num_slots: int) -> None:
        """Open or create the table of `num_slots` slots. Raises: `OSError`, as for a full disk."""
        self._num_slots = num_slots
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            size = num_slots * RECORD_BYTES
            os.ftruncate(self._file, min(size, os.fstat(self._file).st_size))
            os.posix_fallocate(self._file, 0, size)
        except BaseException:
            os.close(self._file)
            raise

    def read(self) -> dict[int, Record]:
        """Return the records of all slots that have an undamaged one. O(slots)."""
        return _records(self._file, self._num_slots)

    def write(self, slot: int, record: Record) -> None:
        """Write the record of a slot. O(1). Raises: `OSError`."""
        checked = _RECORD.pack(*record, b"")[:_CHECKED]
        self._write(slot, checked + _check(slot, checked))

    def erase(self, slot: int) -> None:
        """Empty the record of a slot. O(1). Raises: `OSError`."""
        self._write(slot, _EMPTY)

    def sync(self) -> None:
        """Wait until the device has the table. Raises: `OSError`."""
        os.fdatasync(self._file)

    def close(self) -> None:
        """Close the file. Twice is the same as once."""
        file, self._file = self._file, _CLOSED
        if file != _CLOSED:
            os.close(file)

    def _write(self, slot: int, raw: bytes) -> None:
        if os.pwrite(self._file, raw, slot * RECORD_BYTES) != len(raw):
            raise OSError(f"slot {slot}: the record was written in part")


def read_table(path: Path) -> dict[int, Record]:
    """Return the records of a table that another process may use. O(slots). Raises: `OSError`."""
    with path.open("rb") as table:
        return _records(table.fileno(), os.fstat(table.fileno()).st_size // RECORD_BYTES)


def _records(file: int, num_slots: int) -> dict[int, Record]:
    data = _read_all(file, num_slots * RECORD_BYTES)
    rows = np.frombuffer(data, np.uint8).reshape(-1, RECORD_BYTES)
    found = {}
    for slot in np.flatnonzero(rows.any(axis=1)).tolist():
        raw = data[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES]
        key, saved, order, check = _RECORD.unpack(raw)
        if check == _check(slot, raw[:_CHECKED]):
            found[slot] = Record(key, saved, order)
    return found


def _read_all(file: int, size: int) -> bytes:
    """Return `size` bytes of a file; zeros stand for those that cannot be read."""
    data, step = bytearray(size), 1 << 24
    for start in range(0, size, step):
        try:
            part = os.pread(file, min(step, size - start), start)
        except OSError:  # the blocks of these slots are lost, not the others
            continue
        data[start : start + len(part)] = part
    return bytes(data)


def _check(slot: int, checked: bytes) -> bytes:
    data = slot.to_bytes(8, "little") + checked
    return blake2b(data, digest_size=_CHECK_BYTES, person=b"kvpager slot").digest()
