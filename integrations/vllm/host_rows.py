"""Memory that the processes of one engine share: the scheduler's and the workers'."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
from numpy.typing import NDArray

from kvpager._text import size

FOLDER = "/dev/shm"
_COUNT_BYTES = 8


class HostRows:
    """Rows of bytes in a file in memory.

    The first process makes the file, the others open it. The last one to come removes its name, so
    the memory ends with the processes, however they end. A process that ends earlier removes the
    name, too. A file that no process uses was left by a killed engine, and is replaced.

    Attributes:
        rows: uint8 [num_rows, row_bytes].
    """

    def __init__(
        self, name: str, num_rows: int, row_bytes: int, *, num_processes: int, folder: str = FOLDER
    ) -> None:
        """Share the rows called `name` with the other of `num_processes`. O(bytes) for the first.

        Raises: `MemoryError` if the folder has no room; `ValueError` if the others share rows of
        another size.
        """
        self._path = os.path.join(folder, f"kvpager-{name}")
        num_bytes = num_rows * row_bytes
        with self._arriving() as file:
            if _is_alone(file):
                os.ftruncate(file, 0)
                self._allocate(file, num_bytes)
            elif os.fstat(file).st_size != num_bytes + _COUNT_BYTES:
                raise ValueError(f"{self._path}: another process shares rows of another size")
            memory = mmap.mmap(file, num_bytes + _COUNT_BYTES)
            self._count = np.frombuffer(memory, np.int64, 1, num_bytes)
            self._count += 1
            self._finalizer = weakref.finalize(self, _remove, self._path, os.fstat(file).st_ino)
            if self._count[0] == num_processes:
                os.unlink(self._path)
            fcntl.flock(file, fcntl.LOCK_SH)  # the mapping holds the lock until it is closed
        self._num_processes = num_processes
        self.rows: NDArray[np.uint8] = np.frombuffer(memory, np.uint8, num_bytes)
        self.rows = self.rows.reshape(num_rows, row_bytes)

    @property
    def is_complete(self) -> bool:
        """True when all processes share the rows. O(1)."""
        return bool(self._count[0] == self._num_processes)

    @contextmanager
    def _arriving(self) -> Iterator[int]:
        """Open the file, one process at a time."""
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX)
                if os.fstat(file).st_nlink:
                    yield file
                    return
            finally:
                os.close(file)  # also releases the lock
            # Its name was removed meanwhile.

    def _allocate(self, file: int, num_bytes: int) -> None:
        try:
            # Allocate all now: memory that is missing later would end the process with SIGBUS.
            os.posix_fallocate(file, 0, num_bytes + _COUNT_BYTES)
        except OSError as error:
            os.unlink(self._path)
            if error.errno != errno.ENOSPC:
                raise
            raise MemoryError(
                f"host_memory: {size(num_bytes)} do not fit into {os.path.dirname(self._path)}. "
                "Make it larger (docker run --shm-size=...), or lower host_memory."
            ) from None


def _remove(path: str, inode: int) -> None:
    """Remove the name of a file, unless another file has it now."""
    with suppress(FileNotFoundError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)


def _is_alone(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
