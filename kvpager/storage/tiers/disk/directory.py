"""The directory of a disk store: one process at a time, one layout, files of the owner alone.

Links are never followed: in a directory that others may write, a link would let them choose which
file of the owner is overwritten.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
from hashlib import blake2b
from pathlib import Path
from typing import Any

from kvpager.storage.tiers.frame import Framing
from kvpager.storage.tiers.seals import Sealed

logger = logging.getLogger("kvpager")

_FORMAT, _LOCK, TABLE = "kvpager-disk.json", "lock", "slots"
_NEW_FORMAT = f"{_FORMAT}.tmp"
_OURS = re.compile(rf"{re.escape(_FORMAT)}(\.tmp)?|{_LOCK}|{TABLE}|segment-\d{{5}}")
_VERSION = 1
_PROVED = bytes(16)  # sealed into the format file, so that another secret is noticed


class Directory:
    """A locked directory that holds blocks of one layout under one seal."""

    def __init__(self, path: str | os.PathLike[str], framing: Framing, slots_per_file: int) -> None:
        """Lock the directory, and make it if there is none. Blocks of another layout are deleted.

        `slots_per_file` is for a new directory; an old one keeps its own.
        Raises, before anything is changed: `OSError` if the directory cannot be used or another
        process uses it; `ValueError` if it holds other files or blocks under another secret.
        """
        self.path = _usable(Path(path))
        self._lock: int | None = _locked(self.path)
        self._process = os.getpid()
        try:
            found = read_format(self.path)
            self._check_secret(found, framing)
            wanted = _described(framing)
            if not _same_layout(found, wanted):
                self._warn_of(found, wanted)
                self._start_anew(wanted, framing, slots_per_file)
                found = {"slots_per_file": slots_per_file}
            self.slots_per_file = int(found["slots_per_file"])
        except BaseException:
            self.close()
            raise

    def discard(self) -> None:
        """Delete all blocks. Raises: `OSError`."""
        # The slot table and the segments; the table first: without it no slot is offered.
        for path in sorted(self.path.glob("s*"), key=lambda path: path.name != TABLE):
            if _OURS.fullmatch(path.name):
                path.unlink()

    def sync(self) -> None:
        """Sync the directory, so that new names survive a power cut. Raises: `OSError`."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Release the lock. Twice is the same as once."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        if self._process == os.getpid():
            fcntl.flock(lock, fcntl.LOCK_UN)  # forked children have the descriptor too
        os.close(lock)

    def _check_secret(self, found: dict[str, Any], framing: Framing) -> None:
        if found.get("seal") != framing.seal.number:
            return
        nonce, tag, payload = map(bytes.fromhex, found["proof"])
        buffer = memoryview(bytearray(payload))
        genuine = framing.seal.unseal(_FORMAT.encode(), Sealed(nonce, tag, buffer))
        if not genuine or buffer != _PROVED:
            raise ValueError(
                f"seal: {self.path} was written with another secret. "
                "Pass that secret, or choose another directory."
            )

    def _warn_of(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        """Warn if there are blocks to delete."""
        if (self.path / TABLE).exists():
            logger.warning(
                "%s holds blocks of another layout or seal: deleting them. Found: %.1000r, seal "
                "%s. Expected: %r, seal %s.",
                self.path, found.get("layout"), found.get("seal"), wanted["layout"], wanted["seal"],
            )  # fmt: skip

    def _start_anew(self, wanted: dict[str, Any], framing: Framing, slots_per_file: int) -> None:
        self.discard()
        os.chmod(self.path, 0o700)
        proof = framing.seal.seal(_FORMAT.encode(), memoryview(_PROVED))
        parts = [bytes(part).hex() for part in proof]
        described = {**wanted, "slots_per_file": slots_per_file, "proof": parts}
        text = json.dumps(described, indent=1).encode()
        new = self.path / _NEW_FORMAT
        file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(file, "wb") as stream:
            stream.write(_check(text) + b"\n" + text)
            stream.flush()
            os.fsync(file)
        new.rename(self.path / _FORMAT)
        self.sync()


def read_format(path: Path) -> dict[str, Any]:
    """Return what the format file in `path` says; nothing if it is missing or damaged. O(1)."""
    try:
        check, _, text = (path / _FORMAT).read_bytes().partition(b"\n")
    except FileNotFoundError:
        return {}
    found: dict[str, Any] = json.loads(text) if check == _check(text) else {}
    return found if found.get("kvpager disk store") == _VERSION else {}


def _described(framing: Framing) -> dict[str, Any]:
    return {
        "kvpager disk store": _VERSION,
        "layout": framing.layout.text,
        "block_bytes": framing.layout.block_bytes,
        "seal": framing.seal.number,
    }


def _same_layout(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    others = {"slots_per_file": 0, "proof": ""}  # parts that may differ
    return {**found, **others} == {**wanted, **others}


def _check(text: bytes) -> bytes:
    digest = blake2b(text, digest_size=16, person=b"kvpager format")
    return b"kvpager disk store " + digest.hexdigest().encode()


def _usable(path: Path) -> Path:
    """Return the path of a directory that is ours or empty; make it if there is none."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = sorted(os.listdir(path))
    except FileExistsError:
        code = errno.ENOTDIR
        raise NotADirectoryError(code, "a disk store needs a directory", str(path)) from None
    except OSError as error:
        reason = f"a disk store cannot use the directory ({error.strerror})"
        raise type(error)(error.errno, reason, str(path)) from None
    foreign = [name for name in names if not _OURS.fullmatch(name)]
    if _FORMAT not in names:  # then a crash may have left no more than these
        foreign = [name for name in names if name not in (_LOCK, _NEW_FORMAT)]
    if foreign:
        raise ValueError(
            f"path={str(path)!r}: holds files of another program, such as {foreign[0]!r}. "
            "Choose an empty or a new directory."
        )
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        code = errno.EACCES
        raise PermissionError(code, "a disk store must read and write its directory", str(path))
    return path.resolve()


def _locked(path: Path) -> int:
    file = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise BlockingIOError(
            errno.EAGAIN, "another disk store uses the directory. Choose another one", str(path)
        ) from None
    except BaseException:
        os.close(file)
        raise
    return file
