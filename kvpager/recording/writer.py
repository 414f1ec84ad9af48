"""Writes the lines of a recording in a background thread, so that no step waits for a disk."""

from __future__ import annotations

import atexit
import logging
import os
import stat
import threading
from contextlib import suppress
from pathlib import Path

from kvpager.recording.format import FORMAT, Header, encoded_header

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("kvpager")

_INTERVAL_S = 0.25  # a crash loses the lines of this time
_WAITING_BYTES_MAX = 64 * 2**20
_CLOSE_S = 5.0  # a disk that takes longer is given up
_BEGINS = f'{{"format":"{FORMAT}"'.encode()


class RecordingWriter:
    """Appends lines to a file. Thread-safe.

    An error, such as a full disk, ends the recording with one warning in the log. The lines written
    before stay readable.
    """

    def __init__(self, path: str | os.PathLike[str], header: Header) -> None:
        """Open the file and write the header. O(1).

        Only its owner can read a new file. Overwrites an empty file or an earlier recording, which
        keeps its permissions.
        Raises: `OSError` if the file cannot be written; `ValueError` for another file, and for a
        recording that is still being written.
        """
        self.path = Path(path)
        self._file = _opened(self.path)
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._lines = [encoded_header(header)]
        self._num_bytes = len(self._lines[0])
        self._is_open = True
        self._ending = threading.Event()
        try:
            self._flush()
            self._thread = threading.Thread(target=self._run, name="kvpager-recording", daemon=True)
            self._thread.start()
        except BaseException:
            os.close(self._file)
            raise
        atexit.register(self.close)

    @property
    def is_open(self) -> bool:
        """True until `close` or an error; False in a fork. O(1)."""
        return self._is_open and os.getpid() == self._process

    def write(self, line: bytes) -> None:
        """Hand a line to the thread. O(1); never waits or raises. Does nothing once closed."""
        if not self.is_open:  # in a fork, the lock may stay locked
            return
        with self._lock:
            if self._is_open:
                self._lines.append(line)
                self._num_bytes += len(line)
                if self._num_bytes > _WAITING_BYTES_MAX:
                    self._give_up("the disk is slower than the run")

    def give_up(self, why: object) -> None:
        """End the recording early, with a warning. O(1)."""
        with self._lock:
            self._give_up(why)

    def _give_up(self, why: object) -> None:
        if self._is_open:
            self._is_open = False
            logger.warning("recording %s ends here: %s", self.path, why)

    def close(self) -> None:
        """Write the waiting lines, and close the file. Idempotent. Does nothing in a fork.

        Waits at most 5 s for the disk.
        """
        if os.getpid() != self._process:
            return
        atexit.unregister(self.close)
        self._ending.set()
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            self.give_up(f"the disk took longer than {_CLOSE_S:.0f} s")

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            while not self._ending.wait(_INTERVAL_S):
                self._flush()
            self._flush()
        except OSError as error:
            self.give_up(error)
        finally:
            with self._lock:
                self._is_open = False
                self._lines.clear()
            with suppress(OSError):
                if fcntl is not None:  # a fork that lives on would keep the lock
                    fcntl.flock(self._file, fcntl.LOCK_UN)
                os.close(self._file)

    def _flush(self) -> None:
        """Write the waiting lines. Raises: `OSError`."""
        with self._lock:
            lines, self._lines, self._num_bytes = self._lines, [], 0
        left = memoryview(b"".join(lines))
        while left:
            left = left[os.write(self._file, left) :]


def _opened(path: Path) -> int:
    """Return a descriptor of an empty regular file. Only its owner can read a new file."""
    # Without O_NONBLOCK, opening a pipe would wait for a reader.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ValueError(f"record='{path}': not a regular file. Choose another name.")
        if fcntl is not None:
            _lock(file, path)
        begins = os.read(file, len(_BEGINS))
        if begins not in (b"", _BEGINS):
            raise ValueError(
                f"record='{path}': the file exists and is not a recording. Choose another name."
            )
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
    except BaseException:
        os.close(file)
        raise
    return file


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"record='{path}': another engine writes this file. Choose another name."
        ) from None
