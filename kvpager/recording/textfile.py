"""Bounded reading of untrusted text files, line by line."""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

LINE_BYTES_MAX = 16 * 2**20
TEXT_BYTES_MAX = 2**30  # decompressed
LINES_MAX = 10_000_000


def lines(path: Path, wait: Callable[[], bool] | None = None) -> Iterator[bytes]:
    """Yield the lines of a regular file, decompressed if its name ends in .gz. O(text).

    At the end of a file that another process still writes, `wait` waits for more, and returns False
    to stop.
    Raises: `OSError` if the file cannot be read. `ValueError` for a device, pipe or folder, for a
    damaged archive, and for text that exceeds the bounds above.
    """
    total = 0
    with _open(path) as file:
        is_packed = path.suffix == ".gz"
        read = gzip.GzipFile(fileobj=file, mode="rb").readline if is_packed else file.readline
        for number in count(1):
            try:
                line = read(LINE_BYTES_MAX + 1)
                while wait and not line.endswith(b"\n") and len(line) <= LINE_BYTES_MAX and wait():
                    line += read(LINE_BYTES_MAX + 1 - len(line))
            except (EOFError, zlib.error) as error:
                raise ValueError(f"{path}: {error}") from None
            if not line:
                return
            total += len(line)
            if len(line) > LINE_BYTES_MAX:
                raise ValueError(f"{path}: line {number}: longer than {LINE_BYTES_MAX:,} bytes")
            if total > TEXT_BYTES_MAX or number > LINES_MAX:
                raise ValueError(
                    f"{path}: more than {TEXT_BYTES_MAX:,} bytes or {LINES_MAX:,} lines. "
                    "Use a part of it."
                )
            yield line


def _open(path: Path) -> io.BufferedIOBase:
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: expected a regular file. Save the text to one first.")
    return os.fdopen(descriptor, "rb")
