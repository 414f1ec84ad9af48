"""The folder of built kernels: where it is, who may write it, what is removed from it."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpager.kernels import backends
from kvpager.kernels.cpu import cache, compiler
from kvpager.kernels.cpu.cache import BuildError
from kvpager.kernels.cpu.library import Library
from tests.support.kernel_builds import (
    COMPLETE,
    DAY_SECONDS,
    PORTABLE,
    Compiler,
    disown,
    kinds,
    make_compiler,
    served_by,
    use,
)

# -------------------------------------------------------------------- cache folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder among temporary files."""
    monkeypatch.delenv("KVPAGER_CACHE", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"kvpager-{os.getuid()}"


def test_the_users_cache_folder_is_the_usual_place(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.writable_folder() == tmp_path / "xdg" / "kvpager"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.writable_folder().is_relative_to(tmp_path)
    assert cache.writable_folder() != temporary


def test_without_a_writable_home_a_private_temporary_folder_serves(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert cache.writable_folder() == temporary
    assert (
        temporary.stat().st_mode & 0o777 == 0o755
    )  # writable for this user only, readable for all
    temporary.chmod(0o777)  # made by another user before
    with pytest.raises(BuildError, match=r"no cache folder can be used .*; set KVPAGER_CACHE to"):
        cache.writable_folder()


def test_other_users_can_read_libraries_built_into_an_image(
    folder: Path, copying: Compiler
) -> None:
    built = compiler.ensure(PORTABLE).path
    for path in (folder, built, built.with_suffix(".so.sha256")):
        assert path.stat().st_mode & 0o044 == 0o044
        assert not path.stat().st_mode & 0o022


def test_a_relative_folder_is_resolved_at_the_call(
    folder: Path, copying: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("KVPAGER_CACHE", ".")
    built = compiler.ensure(PORTABLE).path
    monkeypatch.chdir(tmp_path)
    assert built.is_absolute()
    assert Library(built).lanes == 4


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_can_write_is_not_used(
    mode: int, temporary: Path, tmp_path: Path, copying: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVPAGER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    library = compiler.ensure(PORTABLE).path
    assert library.parent == tmp_path / "xdg" / "kvpager"
    library.parent.chmod(mode)
    assert cache.writable_folder() == temporary
    assert compiler.ensure(PORTABLE).path.parent == temporary


def test_the_home_of_an_unknown_user_is_no_error(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-that-name/cache")
    assert cache.writable_folder() == temporary


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("a file", "is not a folder"),
        ("below a file", "is not a folder"),
        ("open to others", r"can be written by others \(mode 777\)"),
        ("of another user", r"belongs to another user \(uid \d+\)"),
        ("read-only", "is not writable"),
        ("of nobody", "[hH]ome"),
    ],
)
def test_an_unusable_chosen_folder_is_reported_and_not_replaced(
    wrong: str,
    why: str,
    temporary: Path,
    copying: Compiler,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("KVPAGER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    good = compiler.ensure(compiler.variants()[0])
    assert good.path.parent == temporary
    chosen = tmp_path / "chosen"
    if wrong == "a file":
        chosen.touch()
    elif wrong == "below a file":
        (tmp_path / "file").touch()
        chosen = tmp_path / "file" / "below"
    elif wrong == "of nobody":
        chosen = Path("~nobody-of-that-name/cache")
    else:
        chosen.mkdir()
    if wrong == "open to others":
        chosen.chmod(0o777)
    elif wrong == "of another user":
        disown(chosen, monkeypatch)
    elif wrong == "read-only":
        request.getfixturevalue("nothing_can_be_written")
    monkeypatch.setenv("KVPAGER_CACHE", str(chosen))
    with pytest.raises(BuildError, match=why) as error:
        compiler.ensure(compiler.variants()[0])
    assert f"KVPAGER_CACHE={chosen} cannot be used" in str(error.value)
    assert "; set KVPAGER_CACHE to a folder that only this user can write" in str(error.value)
    backends.select("append_kv", torch.device("cpu"))
    assert served_by() == {("reference", str(error.value))}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert len(copying.calls) == 1


def test_a_chosen_folder_is_the_only_one_looked_in(
    temporary: Path, copying: Compiler, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVPAGER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert compiler.ensure(PORTABLE).path.parent == temporary
    monkeypatch.setenv("KVPAGER_CACHE", str(folder))
    assert compiler.ensure(PORTABLE).path.parent == folder
    assert len(copying.calls) == 2


# -------------------------------------------------------------------- pruning


OTHER_SOURCE = "0123456789abcdef"


def leave(folder: Path, name: str, days: float) -> Path:
    """Make a file in the cache folder that was last used `days` ago."""
    folder.mkdir(exist_ok=True, mode=0o700)
    path = folder / name
    path.write_text("left")
    age(path, days)
    return path


def age(path: Path, days: float) -> None:
    then = path.stat().st_mtime - days * DAY_SECONDS
    os.utime(path, (then, then))


def leave_library(folder: Path, source: str, days: float) -> list[Path]:
    stem = f"kernels-{source}-avx2-01234567"
    return [leave(folder, stem + end, days) for end in (".so", ".so.sha256", ".lock")]


@pytest.mark.usefixtures("copying")
def test_a_build_removes_unused_libraries_of_other_sources(folder: Path) -> None:
    old = leave_library(folder, OTHER_SOURCE, 31)
    unlocked = leave_library(folder, "1" * 16, 31)
    unlocked.pop().unlink()
    lonely = leave(folder, f"kernels-{'2' * 16}-avx512-01234567.lock", 31)
    compiler.ensure(PORTABLE)
    assert [path for path in (*old, *unlocked, lonely) if path.exists()] == []
    assert kinds(folder) == COMPLETE


@pytest.mark.usefixtures("copying")
def test_a_build_keeps_libraries_in_use_and_foreign_files(folder: Path) -> None:
    recent = leave_library(folder, OTHER_SOURCE, 29)
    current = leave_library(folder, compiler.source_digest(), 31)
    loaded = leave_library(folder, "1" * 16, 31)
    age(loaded[0], -31)
    foreign = [
        leave(folder, name, 400)
        for name in ("kernels.so", "kernels-mine.lock", "holiday.part", "notes.digest")
    ]
    removed = leave_library(folder, "3" * 16, 400)
    foreign.append(leave(folder, f"{removed[0].name}.mine", 400))
    kept = [*recent, *current, *loaded, *foreign]
    compiler.ensure(PORTABLE)
    assert [path for path in kept if not path.exists()] == []
    assert [path for path in removed if path.exists()] == []


def test_loading_a_library_counts_as_using_it(folder: Path, copying: Compiler) -> None:
    path = compiler.ensure(PORTABLE).path
    age(path, 31)
    before = path.stat().st_mtime
    Library(path)
    assert path.stat().st_mtime > before + 30 * DAY_SECONDS


def test_a_library_that_cannot_be_touched_is_loaded(
    prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(os, "utime", refuse)
    assert Library(prebuilt).lanes == 4


@pytest.mark.usefixtures("copying")
def test_a_build_removes_files_of_killed_builds(folder: Path) -> None:
    stems = [
        f"kernels-{source}-portable-01234567" for source in (OTHER_SOURCE, compiler.source_digest())
    ]
    ends = (".x_1.part", ".x_1.digest")
    old = [leave(folder, stem + end, 1.1) for stem in stems for end in ends]
    young = [leave(folder, stem + ".y_2.part", 0.9) for stem in stems]
    compiler.ensure(PORTABLE)
    assert [path for path in old if path.exists()] == []
    assert all(path.exists() for path in young)


@pytest.mark.usefixtures("copying")
def test_files_of_a_running_build_stay(folder: Path) -> None:
    left = leave_library(folder, OTHER_SOURCE, 31)
    part = leave(folder, f"kernels-{OTHER_SOURCE}-avx2-01234567.x_1.part", 31)
    free = leave_library(folder, "1" * 16, 31)
    with cache.lock(left[0]):
        compiler.ensure(PORTABLE)
        assert all(path.exists() for path in (*left, part))
        assert not any(path.exists() for path in free)
    compiler.ensure(PORTABLE, rebuild=True)
    assert not any(path.exists() for path in (*left, part))


def test_a_lock_removed_while_waiting_is_recreated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, name = tmp_path / "kernels.so", tmp_path / "kernels.lock"
    flock = fcntl.flock
    calls = []

    def remove_first(file: Any, operation: int) -> None:
        flock(file, operation)
        calls.append(operation)
        if len(calls) == 1:
            name.unlink()

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with cache.lock(path):
        monkeypatch.setattr(fcntl, "flock", flock)
        with pytest.raises(BlockingIOError), cache.lock(path, wait=False):
            pass
    assert len(calls) == 2


def test_a_part_is_named_after_its_library(
    folder: Path, tmp_path: Path, prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_compiler(tmp_path / "seen++", f'cp "{prebuilt}" "$out"; cp "$out" "$out".kept')
    use(made, monkeypatch)
    path = compiler.ensure(PORTABLE).path
    (kept,) = folder.glob("*.kept")
    left = kept.rename(kept.with_suffix(""))
    assert left.name.startswith(f"{path.stem}.")
    age(left, 2)
    cache.prune(folder, compiler.source_digest())
    assert not left.exists()
    assert path.exists()


def test_a_folder_that_cannot_be_tidied_is_no_error(
    folder: Path, copying: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = leave_library(folder, OTHER_SOURCE, 31)
    unlink = Path.unlink

    def refuse(path: Path, **options: Any) -> None:
        if path in left:
            raise PermissionError(path)
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    assert compiler.ensure(PORTABLE).origin == "built with quick++"
