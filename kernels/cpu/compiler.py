"""Building the native CPU kernels with the system's C++ compiler, once per machine.

    source + variant + compiler  ──▶  <cache>/kernels-<source>-<variant>-<compiler>.so
                                      (and its SHA-256 beside it)

A variant is one text compiled for one set of CPU instructions; the CPU at hand picks the best one.
The name holds a digest of the source and the flags and one of the compiler, so a new release, a new
compiler or another CPU behind a shared home each get a library of their own. A library appears
under its name only when it is complete (written beside it, synced, renamed), is checked against its
digest before it is loaded, and two processes that want one at the same time build it once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from kvpager.errors import KVPagerError

FLAGS = (
    "-O3", "-std=gnu++17", "-shared", "-fPIC",
    # What vectorising needs. Not -ffast-math: it would assume that there are no infinities, and
    # some compilers then make a process that loads the library lose subnormal numbers.
    "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi",
)  # fmt: skip
THREAD_FLAGS = ("-fopenmp",)
BUILD_SECONDS_MAX = 300


class Variant(NamedTuple):
    """One way to compile the kernels, and the CPU flags (as Linux names them) that it needs."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_AVX2_NEEDS = frozenset({"avx2", "fma", "f16c"})
_AVX512_NEEDS = _AVX2_NEEDS | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}

# Best first. The last one needs nothing: SSE2 on x86-64, NEON on 64-bit ARM.
VARIANTS = (
    Variant("avx512bf16", (*_AVX512, "-mavx512bf16"), _AVX512_NEEDS | {"avx512_bf16"}),
    Variant("avx512", _AVX512, _AVX512_NEEDS),
    Variant("avx2", _AVX2, _AVX2_NEEDS),
    Variant("portable", (), frozenset()),
)


class BuildError(KVPagerError):
    """The kernels could not be built; the message says why."""


# -------------------------------------------------------------------- what there is


@cache
def cpu_flags() -> frozenset[str]:
    """The CPU's instruction sets, by Linux's names; empty where they cannot be told. O(1)."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    # Elsewhere torch knows the two that matter most.
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    known = {"AVX2": _AVX2_NEEDS, "AVX512": _AVX512_NEEDS}
    return known.get(capability, frozenset())


def variants() -> list[Variant]:
    """The variants that this CPU can run, best first."""
    return [variant for variant in VARIANTS if variant.needs <= cpu_flags()]


def variant_named(name: str) -> Variant:
    """The variant of that name. `ValueError` for one that does not exist or this CPU cannot run."""
    for variant in VARIANTS:
        if variant.name == name:
            if variant.needs <= cpu_flags():
                return variant
            missing = ", ".join(sorted(variant.needs - cpu_flags()))
            raise ValueError(f"variant {name!r} needs a CPU with {missing}")
    raise ValueError(f"variant {name!r}: expected one of {[v.name for v in VARIANTS]}")


def find_compiler() -> Path | None:
    """The C++ compiler: $CXX, or the first of c++, g++ and clang++ on the path."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        found = shutil.which(name)
        if found:
            return Path(found)
    return None


def source_folder() -> Path:
    """Where the C++ sources are."""
    return Path(__file__).resolve().parent


@cache
def source_digest() -> str:
    """A digest of the sources and the flags: what else the result depends on but the compiler."""
    # Not the variants whole: a set has another order, so another text, in every process.
    flags = (FLAGS, THREAD_FLAGS, [(variant.name, variant.flags) for variant in VARIANTS])
    digest = hashlib.sha256(repr((flags, platform.machine())).encode())
    for path in sorted(source_folder().glob("*.[ch]*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _compiler_digest(compiler: Path) -> str:
    # Asking it for its version would take as long as loading the library; a new one is a new file.
    real = compiler.resolve()
    status = real.stat()
    identity = f"{real}\0{status.st_size}\0{status.st_mtime_ns}"
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


# -------------------------------------------------------------------- the cache folder


def cache_folder() -> Path:
    """Where libraries are kept: $KVPAGER_CACHE, or `kvpager` in the user's cache folder. Made if it
    is not there. Where that cannot be written, a folder of the user's own among temporary files.

    `BuildError` where neither can be had.
    """
    candidates = _cache_folders()
    for folder in candidates:
        if _is_usable(folder):
            return folder
    raise BuildError(
        f"none of {', '.join(map(str, candidates))} is a folder that only this user can write; "
        "set KVPAGER_CACHE to one"
    )


def _cache_folders() -> list[Path]:
    """The folders that may hold libraries, best first, whether or not they are there."""
    chosen = os.environ.get("KVPAGER_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or _home_cache()
    candidates = [Path(tempfile.gettempdir()) / f"kvpager-{os.getuid()}"]
    with contextlib.suppress(RuntimeError):  # ~somebody, whom nobody knows
        if chosen:
            candidates.insert(0, Path(chosen).expanduser())
        elif base is not None:
            candidates.insert(0, Path(base).expanduser() / "kvpager")
    return candidates


def _home_cache() -> Path | None:
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache")


def _is_usable(folder: Path) -> bool:
    """Whether `folder` can be written, and by nobody else: what is in it will be executed."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _is_private(folder) and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def _is_private(path: Path) -> bool:
    status = path.stat(follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        status = path.stat()
    mine = status.st_uid in (os.getuid(), 0)
    return mine and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


# -------------------------------------------------------------------- building


class Built(NamedTuple):
    """A library that is ready to be loaded, and how it came about."""

    path: Path
    variant: Variant
    origin: str  # for people: "built with g++" or "found in the cache"


def ensure(variant: Variant, *, rebuild: bool = False) -> Built:
    """The library of `variant`: from the cache, or built now and said so on stderr.

    O(1) when it is there (about a millisecond), else some seconds. `BuildError` where there is no
    compiler and no library built before, where the compiler fails, or where nothing can be written.
    """
    compiler = find_compiler()
    stem = f"kernels-{source_digest()}-{variant.name}-"
    # Built ahead, perhaps by a compiler that was taken away again to keep an image small.
    name = f"{stem}*.so" if compiler is None else f"{stem}{_compiler_digest(compiler)}.so"
    found = None if rebuild else _find(name)
    if found is not None:
        return Built(found, variant, "found in the cache")
    if compiler is None:
        raise BuildError("no C++ compiler found; install g++ or clang++, or set CXX to one")
    path = cache_folder() / name
    with _lock(path):
        # Another process may have built it while this one waited.
        if rebuild or not _is_intact(path):
            _say(f"building the CPU kernels ({variant.name}) with {compiler.name}: once, some 10 s")
            _build(compiler, variant, path)
    return Built(path, variant, f"built with {compiler.name}")


def _find(pattern: str) -> Path | None:
    """A library that was built before. Its folder has to be private, but need not be writable."""
    for folder in _cache_folders():
        with contextlib.suppress(OSError):
            if _is_private(folder):
                for path in sorted(folder.glob(pattern)):
                    if _is_intact(path):
                        return path
    return None


def _build(compiler: Path, variant: Variant, path: Path) -> None:
    flags = (*FLAGS, *variant.flags)
    errors = ""
    # A compiler without OpenMP still makes kernels, for one thread.
    for threads in (THREAD_FLAGS, ()):
        handle, name = tempfile.mkstemp(suffix=".so.part", dir=path.parent)
        os.close(handle)
        part = Path(name)
        try:
            errors = _compile([str(compiler), *flags, *threads, "-o", name])
            if not errors:
                _publish(part, path)
                return
        except OSError as error:
            raise BuildError(f"{path.parent} cannot be written: {error}") from error
        finally:
            part.unlink(missing_ok=True)
    raise BuildError(f"{compiler} failed: {errors}")


def _compile(command: list[str]) -> str:
    """Run the compiler; what it said if it failed, else nothing."""
    try:
        done = subprocess.run(
            [*command, str(source_folder() / "kernels.cpp")],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=BUILD_SECONDS_MAX,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    return " | ".join(lines[:3]) or f"exit status {done.returncode}"


def _publish(part: Path, path: Path) -> None:
    """Give a finished library its name; its digest first, so that it is never there without."""
    content = part.read_bytes()
    part.chmod(0o600)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    digest = _digest_path(path)
    temporary = part.with_suffix(".digest")
    try:
        temporary.write_text(hashlib.sha256(content).hexdigest() + "\n")
        temporary.replace(digest)
    finally:
        temporary.unlink(missing_ok=True)
    part.replace(path)


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".so.sha256")


def _is_intact(path: Path) -> bool:
    """Whether a library is there, this user's own, and byte for byte what was built. O(bytes)."""
    try:
        if not _is_private(path):
            return False
        expected = _digest_path(path).read_text().strip()
        return hashlib.sha256(path.read_bytes()).hexdigest() == expected
    except OSError:
        return False


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Only one process at a time. Where files cannot be locked, both build, and the last wins."""
    try:
        import fcntl

        with path.with_suffix(".lock").open("w") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except ImportError:
        yield


def _say(message: str) -> None:
    print(f"kvpager: {message} ...", file=sys.stderr, flush=True)
