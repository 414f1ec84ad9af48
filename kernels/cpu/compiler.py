"""Build the CPU kernels with the system's C++ compiler, once per user and after an upgrade.

    source + variant + compiler  ──▶  <cache>/kernels-<source>-<variant>-<compiler>.so
                                      (and its SHA-256 beside it)

A variant is the source compiled for one set of CPU instructions; each CPU uses its best variant.
The name holds a digest of source and flags and a digest of the compiler. So a new release, a new
compiler or another CPU with the same home folder gets its own library. If building fails, a library
of the same source from another compiler serves. A library gets its name only when complete
(written, synced, renamed) and is checked against its digest before loading. Two processes that
need the same library build it once (`cache.py`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from kvpager._text import listed
from kvpager.kernels.cpu import cache
from kvpager.kernels.cpu.cache import BuildError

logger = logging.getLogger("kvpager")

FLAGS = (
    "-O3", "-std=gnu++17", "-shared", "-fPIC",
    # Needed to vectorise. Not -ffast-math: it assumes that there are no infinities, and with some
    # compilers loading the library flushes subnormal numbers to zero.
    "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-fvisibility=hidden",
)  # fmt: skip
THREAD_FLAGS = ("-fopenmp",)
BUILD_SECONDS_MAX = 300
# Compiler and linker errors for missing OpenMP.
_NO_OPENMP = re.compile(r"openmp|omp\.h|-l(g|i)?omp|library '?omp", re.IGNORECASE)


class Variant(NamedTuple):
    """Compiler flags of the kernels, and the CPU flags they need (by Linux's names)."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_AVX2_NEEDS = frozenset({"avx2", "fma", "f16c"})
_AVX512_NEEDS = _AVX2_NEEDS | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}

# Best first. The last runs everywhere: SSE2 on x86-64, NEON on 64-bit ARM.
_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vnni")
_BF16_NEEDS = _AVX512_NEEDS | {"avx512_bf16", "avx512_vnni"}
VARIANTS = (
    Variant("amx", (*_BF16, "-mamx-tile", "-mamx-bf16"), _BF16_NEEDS | {"amx_tile", "amx_bf16"}),
    Variant("avx512bf16", _BF16, _BF16_NEEDS),
    Variant("avx512", _AVX512, _AVX512_NEEDS),
    Variant("avx2", _AVX2, _AVX2_NEEDS),
    Variant("portable", (), frozenset()),
)


class Compiler(NamedTuple):
    """The compiler command: a program and its leading arguments."""

    program: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join([str(self.program), *self.words])

    @property
    def name(self) -> str:
        """The command without its folder, for display."""
        return shlex.join([self.program.name, *self.words])

    def digest(self) -> str:
        """Return the compiler's part of a library's name. O(words)."""
        # A new compiler is a new file, and asking for its version takes as long as loading the
        # library. With a wrapper such as ccache, the compiler is one of the words.
        identity = str(self)
        for path in filter(None, map(shutil.which, (str(self.program), *self.words))):
            status = os.stat(path)
            identity += f"\0{os.path.realpath(path)}\0{status.st_size}\0{status.st_mtime_ns}"
        return hashlib.sha256(identity.encode()).hexdigest()[:8]


# -------------------------------------------------------------------- CPU and compiler


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the CPU's instruction sets by Linux's names; empty if unknown. O(1)."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    # On other systems torch knows the two most important ones.
    import torch

    known = {"AVX2": _AVX2_NEEDS, "AVX512": _AVX512_NEEDS}
    return known.get(torch.backends.cpu.get_cpu_capability(), frozenset())


def variants() -> list[Variant]:
    """Return the variants that this CPU can run, best first."""
    return [variant for variant in VARIANTS if variant.needs <= cpu_flags()]


def variant_named(name: str) -> Variant:
    """Return the variant `name`. Raises: `ValueError` if unknown or unsupported by this CPU."""
    known = {variant.name: variant for variant in VARIANTS}
    if name not in known:
        raise ValueError(f"variant {name!r}: expected one of {listed(known)}")
    missing = sorted(known[name].needs - cpu_flags())
    if missing:
        raise ValueError(f"variant {name!r} needs a CPU with {', '.join(missing)}")
    return known[name]


def find_compiler() -> Compiler:
    """Return the C++ compiler: $CXX, or else the first of c++, g++ and clang++ on the path.

    $CXX may be several words, as in `ccache g++`.
    Raises: `BuildError` if there is none, or the compiler of $CXX is missing.
    """
    chosen = os.environ.get("CXX", "")
    try:
        words = shlex.split(chosen)
    except ValueError as error:
        raise BuildError(f"CXX={chosen} is not a command: {error}") from error
    for command in [words] if words else (["c++"], ["g++"], ["clang++"]):
        program = shutil.which(command[0])
        if program:
            return Compiler(Path(program), tuple(command[1:]))
    if words:
        raise BuildError(f"CXX={chosen}: {words[0]} was not found; set CXX to a C++ compiler")
    raise BuildError("no C++ compiler found; install g++ or clang++, or set CXX to one")


def source_folder() -> Path:
    """Return the folder of the C++ sources."""
    return Path(__file__).resolve().parent


@functools.cache
def source_digest() -> str:
    """Return a digest of all inputs of a build but the compiler: sources, flags and machine."""
    # Without the variants' sets, whose order differs between processes.
    flags = (FLAGS, THREAD_FLAGS, [(variant.name, variant.flags) for variant in VARIANTS])
    digest = hashlib.sha256(repr((flags, platform.machine())).encode())
    for path in sorted(source_folder().glob("*.[ch]*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# -------------------------------------------------------------------- building


class Built(NamedTuple):
    """A library ready to load, and its origin."""

    path: Path
    variant: Variant
    origin: str  # for display: "built with g++" or "found in the cache"


def ensure(variant: Variant, *, rebuild: bool = False) -> Built:
    """Return the library of `variant` from the cache, or build it with a message on stderr.

    A cached library takes O(1), about a millisecond; a build takes seconds. If building fails, a
    library of the same source from any compiler serves.
    Raises: `BuildError` or `OSError` if there is none either.
    """
    if rebuild:
        return _build(variant)
    try:
        return find(variant) or _build(variant, unless_there=True)
    except (BuildError, OSError) as error:
        other = find(variant, by_any_compiler=True)
        if other is None:
            raise
        logger.info("kvpager: building the CPU kernels failed, using %s: %s", other.path, error)
        return other


def find(variant: Variant, *, by_any_compiler: bool = False) -> Built | None:
    """Return a cached library of the current compiler, or of any compiler. O(bytes of the library).

    An image may have removed the compiler after the build.
    Raises: `BuildError` if a compiler is needed and missing, or $KVPAGER_CACHE is not trusted.
    """
    digest = "*" if by_any_compiler else find_compiler().digest()
    found = cache.find(f"{_stem(variant)}{digest}.so")
    return Built(found, variant, "found in the cache") if found else None


def _stem(variant: Variant) -> str:
    return f"kernels-{source_digest()}-{variant.name}-"


def _build(variant: Variant, *, unless_there: bool = False) -> Built:
    compiler = find_compiler()
    folder = cache.writable_folder()
    path = folder / f"{_stem(variant)}{compiler.digest()}.so"
    with cache.lock(path):
        # Another process may have built it while this one waited.
        if not (unless_there and cache.is_intact(path)):
            what = f"building the CPU kernels ({variant.name}) with {compiler.name}"
            print(f"kvpager: {what}: once, some 10 s ...", file=sys.stderr, flush=True)
            _compile_to(path, compiler, variant)
    cache.prune(folder, source_digest())
    return Built(path, variant, f"built with {compiler.name}")


def _compile_to(path: Path, compiler: Compiler, variant: Variant) -> None:
    flags = (*compiler.words, *FLAGS, *variant.flags)
    errors = ""
    # A compiler without OpenMP still builds kernels, for one thread.
    for threads in (THREAD_FLAGS, ()):
        part = cache.new_part(path)
        try:
            errors = _compile([str(compiler.program), *flags, *threads, "-o", str(part)])
            if not errors:
                cache.publish(part, path)
                return
            # Retry without OpenMP only if OpenMP is missing. After a killed build or a full disk it
            # would leave kernels for one thread behind.
            if not _NO_OPENMP.search(errors):
                break
        except OSError as error:
            raise BuildError(f"{path.parent} cannot be written: {error}") from error
        finally:
            part.unlink(missing_ok=True)
    lines = [line for line in errors.splitlines() if "error" in line.lower()]
    raise BuildError(f"{compiler} failed: {' | '.join(lines[:3]) or errors.strip()[-300:]}")


def _compile(command: list[str]) -> str:
    """Run the compiler; return its errors (never empty) if it failed, else an empty string."""
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
    return done.stderr.strip() or f"exit status {done.returncode}"
