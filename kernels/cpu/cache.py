"""The cache folder of built libraries: location, trust and pruning.

    kernels-<source>-<variant>-<compiler>.so           a complete library
                                        .so.sha256     its digest
                                        .lock          held by the process that builds the library
                                        .<any>.part    a library being written
                                        .<any>.digest  a digest being written

A process executes these libraries. So folder, library and digest must belong to this user or root.
Other users must not be able to write to them or to replace a parent folder (`trust.py`). The bytes
that are loaded are the bytes that were hashed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import fnmatch
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kvpager.errors import KVPagerError
from kvpager.kernels.cpu.trust import Untrusted, opened_file, opened_folder, read

VARIABLE = "KVPAGER_CACHE"
UNUSED_SECONDS_MAX = 30 * 24 * 3600
PART_SECONDS_MAX = 24 * 3600
LIBRARY_BYTES_MAX = 256 << 20
_DIGEST_BYTES_MAX = 128

# Files with other names are left alone.
_NAME = re.compile(
    r"(kernels-[0-9a-f]{16}-\w+-[0-9a-f]{8})\.(so|so\.sha256|lock|\w+\.part|\w+\.digest)"
)


class BuildError(KVPagerError):
    """The kernels could not be built; the message says why."""


# -------------------------------------------------------------------- which folder


def writable_folder() -> Path:
    """Return the folder for new libraries, created if missing.

    It is $KVPAGER_CACHE, else `kvpager` in the user's cache folder, else a folder of this user in
    the temporary directory.

    Raises: `BuildError` if no candidate is writable for this user alone.
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
        faults.append(f"{folder} {fault or 'is not writable and holds no library'}")
    raise _refusal("; ".join(faults))


def find(pattern: str) -> Path | None:
    """Return a library built earlier, from a trusted folder. O(bytes of the library).

    The folder need not be writable. Raises: `BuildError` if $KVPAGER_CACHE is not trusted.
    """
    for folder in _folders():
        with contextlib.suppress(OSError, Untrusted), opened_folder(folder) as opened:
            for name in sorted(fnmatch.filter(os.listdir(opened), pattern)):
                with _intact(opened, name) as library:
                    if library is not None:
                        return folder / name
    return None


def _folders() -> list[Path]:
    """Return the folders that may hold libraries, best first, existing or not."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return [_chosen_folder(chosen)]
    folders = [Path(tempfile.gettempdir()) / f"kvpager-{os.getuid()}"]
    with contextlib.suppress(RuntimeError):  # no home folder
        home_cache = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
        base = Path(os.environ.get("XDG_CACHE_HOME") or home_cache)
        folders.insert(0, base.expanduser() / "kvpager")
    return folders


def _chosen_folder(chosen: str) -> Path:
    """Return the folder of $KVPAGER_CACHE. Raises: `BuildError` instead of choosing another one."""
    try:
        folder = Path(chosen).expanduser().absolute()
        fault = _fault(folder)
    except FileNotFoundError:
        return folder
    except OSError as error:
        raise _refusal(f"{folder} cannot be read ({error.strerror})") from error
    except RuntimeError as error:
        raise _refusal(str(error)) from error
    if fault:
        raise _refusal(f"{folder} {fault}")
    return folder


def _refusal(faults: str) -> BuildError:
    chosen = os.environ.get(VARIABLE)
    refused = f"{VARIABLE}={chosen} cannot" if chosen else "no cache folder can"
    return BuildError(
        f"{refused} be used for the CPU kernels: {faults}; "
        f"set {VARIABLE} to a folder that only this user can write"
    )


def _fault(folder: Path) -> str:
    """Say why `folder` must not be trusted; empty if trusted. Raises: `OSError`."""
    try:
        with opened_folder(folder):
            return ""
    except Untrusted as error:
        return str(error).removeprefix(str(folder)).lstrip(": ")
    except NotADirectoryError:
        return "is not a folder"


# -------------------------------------------------------------------- one library


def new_part(path: Path) -> Path:
    """Make an empty file beside the library `path`, to be written and published."""
    handle, name = tempfile.mkstemp(prefix=f"{path.stem}.", suffix=".part", dir=path.parent)
    os.close(handle)
    return Path(name)


def publish(part: Path, path: Path) -> None:
    """Rename a finished library to `path`, after its digest, so that it never lacks one."""
    content = part.read_bytes()
    part.chmod(0o644)  # images are built by one user and run by another
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
    """Return True if a library exists, is trusted, and matches its digest. O(bytes)."""
    with contextlib.suppress(OSError, Untrusted), _opened(path) as library:
        return library is not None
    return False


def load(path: Path) -> ctypes.CDLL:
    """Load an intact library: exactly the bytes that are hashed here. O(bytes).

    Raises: `OSError` if it is not intact or cannot be loaded.
    """
    try:
        with _opened(path) as library:
            if library is not None:
                with contextlib.suppress(OSError):  # read-only in an image
                    os.utime(library)  # `prune` keeps libraries in use
                return _load(library)
    except (OSError, Untrusted) as error:
        raise OSError(f"{path} cannot be loaded: {error}") from error
    raise OSError(f"{path} does not match its digest, or other users can change it")


# Libraries stay loaded under the names of their descriptors, so the descriptors stay open.
_loaded: dict[tuple[int, int], ctypes.CDLL] = {}  # by device and inode


def _load(library: int) -> ctypes.CDLL:
    """Load an open library."""
    status = os.fstat(library)
    identity = (status.st_dev, status.st_ino)  # unique while this file is open
    if identity not in _loaded:
        kept = os.dup(library)
        name = f"/proc/self/fd/{kept}"
        try:
            _loaded[identity] = ctypes.CDLL(name) if os.path.exists(name) else _load_copy(library)
        except OSError:
            os.close(kept)
            raise
    return _loaded[identity]


def _load_copy(library: int) -> ctypes.CDLL:
    """Load a private copy of an open library, for systems without names for descriptors."""
    private = Path(tempfile.mkdtemp())
    try:
        with opened_folder(private):
            copy = private / "kernels.so"
            copy.write_bytes(read(library, LIBRARY_BYTES_MAX))
            return ctypes.CDLL(str(copy))
    except Untrusted as error:
        raise OSError(errno.EPERM, str(error)) from error
    finally:
        shutil.rmtree(private, ignore_errors=True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    with opened_folder(path.parent) as folder, _intact(folder, path.name) as library:
        yield library


@contextlib.contextmanager
def _intact(folder: int, name: str) -> Iterator[int | None]:
    """Open a library of an open folder; None unless it matches its digest. O(bytes)."""
    with contextlib.ExitStack() as stack:
        found = None
        with contextlib.suppress(OSError, Untrusted):
            library = stack.enter_context(opened_file(folder, name))
            with opened_file(folder, _digest_path(Path(name)).name) as file:
                expected = read(file, _DIGEST_BYTES_MAX).strip()
            content = read(library, LIBRARY_BYTES_MAX)
            if hashlib.sha256(content).hexdigest().encode() == expected:
                found = library
        yield found


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".so.sha256")


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Lock `path` against other processes that build or remove it.

    On file systems without locks two processes may build at once, and the last one wins.
    Raises: `OSError` if another process holds the lock and `wait` is False.
    """
    name = path.with_suffix(".lock")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        file = os.open(name, flags, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, "not a plain file", str(name))
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if not wait:
                    raise
            # `prune` may have removed the file while this process waited for it.
            if _is_open(file, name):
                yield
                return
        finally:
            os.close(file)


def _is_open(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False


# -------------------------------------------------------------------- pruning


def prune(folder: Path, source: str) -> None:
    """Remove libraries of other sources than `source` that were not loaded for 30 days. O(files).

    Also removes files that killed builds left at least a day ago. Keeps libraries being built.
    Never fails: files that cannot be removed stay.
    """
    with contextlib.suppress(OSError):
        names = filter(None, (_NAME.fullmatch(path.name) for path in folder.iterdir()))
        for stem in sorted({name[1] for name in names}):
            with contextlib.suppress(OSError):
                # Locking creates a file, so check first. Check again under the lock, because the
                # library may have been rebuilt meanwhile.
                if _stale(folder, stem, source):
                    with lock(folder / f"{stem}.so", wait=False):
                        for path in _stale(folder, stem, source):
                            path.unlink()


def _stale(folder: Path, stem: str, source: str) -> list[Path]:
    """Return the files of one library to remove, its lock last."""
    now = time.time()
    ours = (path for path in folder.glob(f"{stem}.*") if _NAME.fullmatch(path.name))
    unused = {path: now - path.lstat().st_mtime for path in ours}
    locks = [path for path in unused if path.suffix == ".lock"]
    others = [path for path in unused if path not in locks]
    is_old = all(unused[path] > UNUSED_SECONDS_MAX for path in others or locks)
    if is_old and not stem.startswith(f"kernels-{source}-"):
        return others + locks
    parts = (path for path in others if path.suffix in (".part", ".digest"))
    return [path for path in parts if unused[path] > PART_SECONDS_MAX]
