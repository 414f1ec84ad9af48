"""The folder that keeps built libraries: where it is, what in it is trusted, what is thrown away.

    kernels-<source>-<variant>-<compiler>.so           a library: complete, or not there
                                        .so.sha256     its digest
                                        .lock          held by the process that builds it
                                        .<any>.part    a library that is being written
                                        .<any>.digest  a digest that is being written

What is in here will be executed, so folder and library have to belong to this user or to root, and
nobody else may write to them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from kvpager.errors import KVPagerError

VARIABLE = "KVPAGER_CACHE"
UNUSED_SECONDS_MAX = 30 * 24 * 3600
PART_SECONDS_MAX = 24 * 3600

# Other files in the folder are not ours.
_NAME = re.compile(
    r"(kernels-[0-9a-f]{16}-\w+-[0-9a-f]{8})\.(so|so\.sha256|lock|\w+\.part|\w+\.digest)"
)


class BuildError(KVPagerError):
    """The kernels could not be built; the message says why."""


# -------------------------------------------------------------------- which folder


def writable_folder() -> Path:
    """Where a new library goes: $KVPAGER_CACHE, or `kvpager` in the user's cache folder, or, where
    that cannot be used, a folder of the user's own among temporary files. Made if it is not there.

    `BuildError` where none of them is a folder that this user can write, and nobody else.
    """
    faults = []
    for folder in _folders():
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            fault = _fault(folder)
        except OSError as error:
            fault = f"cannot be made ({error.strerror})"
        if not fault and os.access(folder, os.W_OK | os.X_OK):
            return folder
        faults.append(f"{folder} {fault or 'cannot be written, and holds no library to be read'}")
    raise _refusal("; ".join(faults))


def find(pattern: str) -> Path | None:
    """A library that was built before. Its folder has to be trusted, but need not be writable.

    O(bytes of the library). `BuildError` for a $KVPAGER_CACHE that must not be trusted.
    """
    for folder in _folders():
        with contextlib.suppress(OSError):
            if not _fault(folder):
                for path in sorted(folder.glob(pattern)):
                    if is_intact(path):
                        return path
    return None


def _folders() -> list[Path]:
    """The folders that may hold libraries, best first, whether or not they are there."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return [_chosen_folder(chosen)]
    folders = [Path(tempfile.gettempdir()) / f"kvpager-{os.getuid()}"]
    with contextlib.suppress(RuntimeError):  # ~somebody, whom nobody knows
        base = os.environ.get("XDG_CACHE_HOME") or _home_cache()
        folders.insert(0, Path(base).expanduser() / "kvpager")
    return folders


def _chosen_folder(chosen: str) -> Path:
    """What somebody asked for is not quietly replaced by something else."""
    try:
        folder = Path(chosen).expanduser().absolute()
        fault = _fault(folder)
    except FileNotFoundError:
        return folder
    except OSError as error:
        raise _refusal(f"{folder} cannot be looked at ({error.strerror})") from error
    except RuntimeError as error:
        raise _refusal(str(error)) from error
    if fault:
        raise _refusal(f"{folder} {fault}")
    return folder


def _home_cache() -> Path:
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")


def _refusal(faults: str) -> BuildError:
    chosen = os.environ.get(VARIABLE)
    refused = f"{VARIABLE}={chosen} cannot" if chosen else "no cache folder can"
    return BuildError(
        f"{refused} be used for the CPU kernels: {faults}; "
        f"set {VARIABLE} to a folder that this user can write, and nobody else"
    )


def _fault(folder: Path) -> str:
    """Why `folder` must not be trusted, or nothing. `OSError` where it cannot be looked at."""
    status = folder.stat()
    return _stranger(status) if stat.S_ISDIR(status.st_mode) else "is not a folder"


def _stranger(status: os.stat_result) -> str:
    """Who else could have written a file, or nothing."""
    if status.st_uid not in (os.getuid(), 0):
        return f"belongs to another user (uid {status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


# -------------------------------------------------------------------- one library


def new_part(path: Path) -> Path:
    """An empty file beside the library `path`, to be written and then published."""
    handle, name = tempfile.mkstemp(prefix=f"{path.stem}.", suffix=".part", dir=path.parent)
    os.close(handle)
    return Path(name)


def publish(part: Path, path: Path) -> None:
    """Give a finished library its name; its digest first, so that it is never there without."""
    content = part.read_bytes()
    part.chmod(0o644)  # an image is built by one user and run by another
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    temporary = part.with_suffix(".digest")
    try:
        temporary.write_text(hashlib.sha256(content).hexdigest() + "\n")
        temporary.replace(_digest_path(path))
    finally:
        temporary.unlink(missing_ok=True)
    part.replace(path)


def is_intact(path: Path) -> bool:
    """Whether a library is there, this user's own, and byte for byte what was built. O(bytes)."""
    try:
        if _stranger(path.stat()):
            return False
        expected = _digest_path(path).read_text().strip()
        return hashlib.sha256(path.read_bytes()).hexdigest() == expected
    except OSError:
        return False


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".so.sha256")


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Only one process at a time builds or removes `path`; `OSError` if one does, unless `wait`.

    Where files cannot be locked, two may build at once, and the last one wins.
    """
    name = path.with_suffix(".lock")
    while True:
        with name.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if not wait:
                    raise
            # `prune` may have removed the file while this process waited for it.
            if _is_open(file, name):
                yield
                return


def _is_open(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


# -------------------------------------------------------------------- throwing away


def prune(folder: Path, source: str) -> None:
    """Remove libraries that other sources than `source` made and nobody loaded for 30 days, and
    what builds that were killed left a day ago or more. What is being built stays. O(files).

    Never fails: what cannot be removed stays.
    """
    with contextlib.suppress(OSError):
        names = filter(None, (_NAME.fullmatch(path.name) for path in folder.iterdir()))
        for stem in sorted({name[1] for name in names}):
            with contextlib.suppress(OSError):
                # Locking makes a file, so it is not done for nothing; what is stale may have
                # been built anew before it is locked.
                if _stale(folder, stem, source):
                    with lock(folder / f"{stem}.so", wait=False):
                        for path in _stale(folder, stem, source):
                            path.unlink()


def _stale(folder: Path, stem: str, source: str) -> list[Path]:
    """The files of one library that are to be removed; its lock goes last."""
    now = time.time()
    ours = (path for path in folder.glob(f"{stem}.*") if _NAME.fullmatch(path.name))
    unused = {path: now - path.stat().st_mtime for path in ours}
    locks = [path for path in unused if path.suffix == ".lock"]
    others = [path for path in unused if path not in locks]
    is_old = all(unused[path] > UNUSED_SECONDS_MAX for path in others or locks)
    if is_old and not stem.startswith(f"kernels-{source}-"):
        return others + locks
    parts = (path for path in others if path.suffix in (".part", ".digest"))
    return [path for path in parts if unused[path] > PART_SECONDS_MAX]
