"""Only machine code that no other user could have placed is loaded, without waiting for it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpager.kernels import backends
from kvpager.kernels.cpu import cache, compiler
from kvpager.kernels.cpu.library import Library
from tests.support.kernel_builds import (
    COMPLETE,
    OPERATIONS,
    PORTABLE,
    REAL,
    ROOT,
    STRANGER,
    disown,
    kinds,
    make_compiler,
    needs_compiler,
    served_by,
    use,
)

AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")


@pytest.fixture
def library(folder: Path, copying: Any) -> Path:
    """A library in an empty cache."""
    return compiler.ensure(PORTABLE).path


def trusted_by(user: int, libraries: list[str]) -> str:
    """Tell, as text, which libraries are intact for a process of `user`."""
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom kvpager.kernels.cpu import cache\n"
        f"os.setgroups([])\nos.setgid({user})\nos.setuid({user})\n"
        "print(*[cache.is_intact(Path(path)) for path in sys.argv[1:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *libraries],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -------------------------------------------------------------------- other users


@pytest.mark.parametrize(("mode", "is_trusted"), [(0o777, False), (0o775, False), (0o1777, True)])
def test_parent_folders_are_not_writable_by_others_unless_sticky(
    mode: int, is_trusted: bool, library: Path, tmp_path: Path
) -> None:
    tmp_path.chmod(mode)
    assert cache.is_intact(library) == is_trusted
    if is_trusted:
        assert Library(library).lanes == 4
        return
    with pytest.raises(OSError, match=rf"{tmp_path} can be written by others \(mode {mode:o}\)"):
        Library(library)
    with pytest.raises(cache.BuildError, match=f"{tmp_path} can be written by others"):
        compiler.ensure(PORTABLE)


@pytest.mark.parametrize("above", [False, True])
def test_a_users_own_link_may_lead_to_the_folder(
    above: bool, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(".." if above else "cache")
    chosen = link / tmp_path.name / "cache" if above else link
    monkeypatch.setenv("KVPAGER_CACHE", str(chosen))
    assert compiler.ensure(PORTABLE).origin == "found in the cache"
    assert Library(chosen / library.name).lanes == 4


@AS_ROOT
@pytest.mark.parametrize("what", ["folder", "link", "library", "digest", "folder above"])
def test_libraries_of_another_user_are_not_loaded(
    what: str, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = library
    if what == "link":
        (tmp_path / "link").symlink_to("cache")
        chosen = tmp_path / "link" / library.name
    owned = {
        "folder": library.parent,
        "link": tmp_path / "link",
        "library": library,
        "digest": library.with_suffix(".so.sha256"),
        "folder above": tmp_path,
    }[what]
    assert cache.is_intact(chosen)
    disown(owned, monkeypatch)
    assert not cache.is_intact(chosen)
    with pytest.raises(OSError, match=r"other user|another user"):
        Library(chosen)


def test_a_link_to_where_others_write_is_not_followed(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    library.parent.rename(open_to_all / "cache")
    (tmp_path / "cache").symlink_to("open/cache")
    assert cache.is_intact(library)
    open_to_all.chmod(0o777)
    assert not cache.is_intact(library)
    with pytest.raises(cache.BuildError, match=f"{open_to_all} can be written by others"):
        compiler.ensure(PORTABLE)


def test_links_in_a_circle_are_an_error_not_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    monkeypatch.setenv("KVPAGER_CACHE", str(tmp_path / "one"))
    with pytest.raises(cache.BuildError, match="one cannot be"):
        cache.writable_folder()


@pytest.mark.parametrize("exchanged", ["library", "folder"])
def test_the_loaded_bytes_are_the_hashed_bytes(
    exchanged: str, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, loaded = cache._load, []

    def late(descriptor: int) -> Any:
        if exchanged == "folder":
            library.parent.rename(library.parent.with_name("was"))
            library.parent.mkdir()
        else:
            library.unlink()
        library.write_bytes(b"of another user")
        loaded.append(genuine(descriptor))
        return loaded[-1]

    monkeypatch.setattr(cache, "_load", late)
    assert Library(library).lanes == 4
    assert len(loaded) == 1


def test_a_library_that_is_loaded_again_takes_no_descriptor(library: Path) -> None:
    Library(library)
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        Library(library)
    assert len(os.listdir("/dev/fd")) == before


def test_libraries_are_never_mistaken_for_each_other(library: Path) -> None:
    variants = compiler.variants()
    lanes = [Library(compiler.ensure(variant).path).lanes for variant in variants]
    assert lanes == [4] * len(variants)  # the compiler copies one
    real = [os.fstat(_descriptor(handle)).st_ino for handle in cache._loaded.values()]
    assert len(set(real)) == len(real)


def _descriptor(handle: Any) -> int:
    return int(handle._name.rpartition("/")[2])


def test_a_private_copy_serves_where_descriptors_have_no_names(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(private))
    monkeypatch.setattr(cache, "_loaded", {})
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda p: "/proc/" not in str(p) and exists(p))
    assert Library(library).lanes == 4
    assert list(private.iterdir()) == []


@AS_ROOT
def test_users_load_libraries_of_root_but_of_no_other_user(library: Path) -> None:
    shared = Path(tempfile.mkdtemp())
    try:
        shared.chmod(0o755)
        paths = []
        for name, owner in (("root", 0), ("mine", STRANGER), ("theirs", STRANGER + 1)):
            made = shared / name
            shutil.copytree(library.parent, made)
            for path in (made, *made.iterdir()):
                os.chown(path, owner, owner)
            paths.append(str(made / library.name))
        assert trusted_by(STRANGER, paths) == "True True False"
        shared.chmod(0o777)
        assert trusted_by(STRANGER, paths) == "False False False"
        shared.chmod(0o1777)
        assert trusted_by(STRANGER, paths) == "True True False"
    finally:
        shutil.rmtree(shared)


# -------------------------------------------------------------------- not a library


@pytest.fixture
def short_socket() -> Iterator[Path]:
    """Make a socket with a short name."""
    parent = Path(tempfile.mkdtemp())
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(parent / "s"))
        yield parent / "s"
    shutil.rmtree(parent)


def put(kind: str, path: Path, short_socket: Path) -> None:
    """Put a special file at `path`."""
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    elif kind == "socket":
        short_socket.rename(path)
    else:
        path.symlink_to("/dev/zero")


KINDS = ["FIFO", "folder", "link", "socket", "device"]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".so", ".so.sha256", ".lock"])
def test_special_files_are_replaced_or_torch_runs(
    suffix: str, kind: str, library: Path, short_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVPAGER_CPU_KERNELS", "portable")
    if suffix == ".lock":
        library.unlink()  # so that a lock is needed
    put(kind, library.with_suffix(suffix), short_socket)
    backends.select("append_kv", torch.device("cpu"))
    ((backend, reason),) = {(each.split(".")[0], why) for each, why in served_by()}
    if suffix == ".lock" or kind == "folder":
        assert backend == "reference"
        assert str(library.parent) in reason
    else:
        assert (backend, reason) == ("cpu", "portable, built with quick++")
        assert kinds(library.parent) == COMPLETE


@needs_compiler
@pytest.mark.usefixtures("registry")
def test_a_library_without_the_functions_leaves_the_work_to_torch(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    action = f'echo "int nothing;" | {REAL} -shared -x c++ - -o "$out"'
    use(make_compiler(tmp_path / "empty++", action), monkeypatch)
    backends.select("append_kv", torch.device("cpu"))
    ((backend, reason),) = served_by()
    assert backend == "reference"
    assert "lacks a function of the kernels" in reason
    assert len(backends.active()["cpu"]) >= len(OPERATIONS)
