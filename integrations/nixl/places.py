"""Where the bytes of slots are, as NIXL is told: in one file, or in an object for each slot."""

from __future__ import annotations

import fcntl
import os
import tempfile
from typing import Protocol

Region = tuple[int, int, int]  # offset, bytes, file or object

_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux only


class Place(Protocol):
    """Slots in memory of the type `kind`, by NIXL's name of it."""

    kind: str

    def registered(self) -> list[tuple[int, int, int, str]]:
        """Return what NIXL registers. O(slots) at most."""

    def region(self, slot: int) -> Region:
        """Return the place of a slot. O(1)."""

    def use_page_cache(self) -> bool:
        """Use the page cache from now on. Returns False if that changes nothing."""

    def close(self) -> None:
        """Release the place. Twice is the same as once."""


class FilePlace:
    """Slots in a preallocated file without a name: it is gone when the process ends."""

    kind = "FILE"

    def __init__(self, folder: str | os.PathLike[str], num_slots: int, slot_bytes: int) -> None:
        """Make the file in `folder`, and the folder if there is none.

        Raises: `OSError` for a folder that cannot be used, or a disk without the room.
        """
        os.makedirs(folder, mode=0o700, exist_ok=True)
        self._num_bytes, self._slot_bytes = num_slots * slot_bytes, slot_bytes
        self.file, name = tempfile.mkstemp(prefix=".kvpager-nixl-", dir=folder)
        try:
            os.unlink(name)
            os.posix_fallocate(self.file, 0, self._num_bytes)
        except OSError as error:
            self.close()
            raise type(error)(error.errno, error.strerror, os.fspath(folder)) from None
        self._direct = self._set_direct(True)

    def registered(self) -> list[tuple[int, int, int, str]]:
        return [(0, self._num_bytes, self.file, "")]

    def region(self, slot: int) -> Region:
        return slot * self._slot_bytes, self._slot_bytes, self.file

    def use_page_cache(self) -> bool:
        was_direct, self._direct = self._direct, False
        return was_direct and self._set_direct(False)

    def close(self) -> None:
        file, self.file = self.file, -1
        if file >= 0:
            os.close(file)

    def _set_direct(self, direct: bool) -> bool:
        flags = fcntl.fcntl(self.file, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self.file, fcntl.F_SETFL, flags | _DIRECT if direct else flags & ~_DIRECT)
        except OSError:  # a file system without O_DIRECT
            return False
        return bool(_DIRECT)


class ObjectPlace:
    """Slots as objects `prefix/0`, `prefix/1`, ... of whatever bucket the backend is told."""

    kind = "OBJ"

    def __init__(self, prefix: str, num_slots: int, slot_bytes: int) -> None:
        """Name the objects. Each is made by the first write to its slot."""
        self._prefix, self._num_slots, self._slot_bytes = prefix, num_slots, slot_bytes

    def registered(self) -> list[tuple[int, int, int, str]]:
        return [
            (0, self._slot_bytes, slot, f"{self._prefix}/{slot}") for slot in range(self._num_slots)
        ]

    def region(self, slot: int) -> Region:
        return 0, self._slot_bytes, slot

    def use_page_cache(self) -> bool:
        return False

    def close(self) -> None:
        pass
