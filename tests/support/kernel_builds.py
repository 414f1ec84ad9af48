"""Compilers that work, fail or are missing, and folders of built kernels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvpager.kernels import backends
from kvpager.kernels.cpu import compiler
from kvpager.kernels.cpu.cache import BuildError

ROOT = Path(__file__).resolve().parents[2]
PORTABLE = compiler.variant_named("portable")
try:
    REAL: compiler.Compiler | None = compiler.find_compiler()  # before any test hides it
except BuildError:
    REAL = None
OPERATIONS = {"append_kv", "copy_blocks", "gather_kv", "paged_attention"}
DAY_SECONDS = 24 * 3600
STRANGER = 54321  # a user that no machine has
needs_compiler = pytest.mark.skipif(REAL is None, reason="there is no C++ compiler")


@dataclass
class Compiler:
    """A script in place of a compiler that records each call."""

    path: Path
    log: Path

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


def make_compiler(path: Path, action: str) -> Compiler:
    """`action` is shell code; `$out` is the path of the library."""
    log = path.with_suffix(".log")
    path.write_text(
        f'#!/bin/sh\necho "$@" >> "{log}"\nlast=; for word in "$@"; do\n'
        f'if [ "$last" = -o ]; then out="$word"; fi; last="$word"; done\n{action}\n'
    )
    path.chmod(0o755)
    return Compiler(path, log)


def use(made: Compiler, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    monkeypatch.setenv("CXX", str(made.path))
    return made


def kinds(folder: Path) -> list[str]:
    """Return the suffixes of the files in a cache folder, sorted."""
    return sorted("".join(path.suffixes) for path in folder.iterdir())


def served_by() -> set[tuple[str, ...]]:
    """Return backend and reason of the CPU's operations."""
    active = backends.active()["cpu"]
    return {tuple(active[operation]) for operation in OPERATIONS}


def disown(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `path` belong to another user."""
    if os.getuid() == 0:
        os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "getuid", lambda: STRANGER)


COMPLETE = [".lock", ".so", ".so.sha256"]
