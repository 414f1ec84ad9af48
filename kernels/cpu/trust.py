"""Open folders and files that only this user and root can change.

A path is checked part by part from /, and each checked part stays open. So another user cannot
replace anything between the check and the use, not even through a link or a parent folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from kvpager.errors import KVPagerError

_LINKS_MAX = 40  # as in Linux
# O_PATH: parent folders may allow traversal but not listing.
_ON_THE_WAY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO must not wait for its other end.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Untrusted(KVPagerError):
    """Another user could change the folder or file; the message says how."""


@contextlib.contextmanager
def opened_folder(path: Path) -> Iterator[int]:
    """Open a folder that only this user and root can change or exchange. O(parts).

    Every parent folder belongs to this user or to root, and is either sticky or not writable by
    other users. Links must be made by this user or root.
    Raises: `Untrusted`; `OSError` if it cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        here = _walk(path.absolute())
        stack.callback(os.close, here)
        _require(writer(os.fstat(here)), path, path)
        folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here)
        stack.callback(os.close, folder)
        yield folder


def _walk(path: Path) -> int:
    """Open the folder `path` part by part. The caller closes it. Raises: as `opened_folder`."""
    parts, walked = list(reversed(path.parts[1:])), Path("/")
    num_links = 0
    here = os.open("/", _ON_THE_WAY)
    try:
        while parts:
            _require(_exchanger(os.fstat(here)), walked, path)
            name = parts.pop()
            status = os.stat(name, dir_fd=here, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                _require(writer(status), walked / name, path)
                num_links += 1
                if num_links > _LINKS_MAX:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
                target = Path(os.readlink(name, dir_fd=here))
                parts += reversed([part for part in target.parts if part != "/"])
                if not target.is_absolute():
                    continue
                name = "/"
            here, last = os.open(name, _ON_THE_WAY, dir_fd=here), here
            os.close(last)
            walked /= name
    except BaseException:
        os.close(here)
        raise
    return here


def _require(fault: str, part: Path, path: Path) -> None:
    if fault:
        raise Untrusted(f"{path} {fault}" if part == path else f"{path}: {part} {fault}")


def _exchanger(status: os.stat_result) -> str:
    """Say, as `writer`, which other user could replace the content of a folder."""
    if status.st_mode & stat.S_ISVTX and status.st_uid in (os.getuid(), 0):
        return ""  # others can write there, but not move or remove what is not theirs
    return writer(status)


@contextlib.contextmanager
def opened_file(folder: int, name: str) -> Iterator[int]:
    """Open a file of an open folder. O(1).

    Raises: `Untrusted`; `OSError` if it is missing or not a plain file (a link or a FIFO).
    """
    file = os.open(name, _FILE, dir_fd=folder)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a plain file", name)
        fault = writer(status)
        if fault:
            raise Untrusted(f"{name} {fault}")
        yield file
    finally:
        os.close(file)


def read(file: int, most: int) -> bytes:
    """Return the content of an open file. O(bytes). Raises: `OSError` if over `most` bytes."""
    if os.fstat(file).st_size > most:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    with open(os.dup(file), "rb") as stream:
        stream.seek(0)
        return stream.read(most)


def writer(status: os.stat_result) -> str:
    """Say which other user could write, as the end of a sentence; empty if none. O(1)."""
    if status.st_uid not in (os.getuid(), 0):
        return f"belongs to another user (uid {status.st_uid})"
    if stat.S_ISLNK(status.st_mode):
        return ""  # a link has no mode of its own
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return ""
