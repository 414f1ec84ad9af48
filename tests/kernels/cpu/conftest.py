"""Compilers and cache folders for tests of the native kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpager.kernels import backends
from kvpager.kernels.cpu import compiler
from kvpager.kernels.cpu.cache import BuildError
from tests.support.kernel_builds import PORTABLE, Compiler, make_compiler, use


@pytest.fixture(scope="session")
def prebuilt() -> Path:
    """A working library from the cache of this machine."""
    try:
        return compiler.ensure(PORTABLE).path
    except BuildError as error:
        pytest.skip(f"no native kernels: {error}")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of its own."""
    monkeypatch.setenv("KVPAGER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KVPAGER_CPU_KERNELS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def copying(
    tmp_path: Path, folder: Path, prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> Compiler:
    """A compiler that succeeds at once."""
    return use(make_compiler(tmp_path / "quick++", f'cp "{prebuilt}" "$out"'), monkeypatch)


@pytest.fixture
def failing(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    action = "echo 'kernels.cpp:7: error: no such vector' >&2; exit 1"
    return use(make_compiler(tmp_path / "broken++", action), monkeypatch)


@pytest.fixture
def no_compiler(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing registered for a CPU yet."""
    monkeypatch.setattr(backends, "_registered", {})
    monkeypatch.setattr(backends, "_provided", {"cuda"})
    return


@pytest.fixture
def nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every path unwritable, for root too."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))
