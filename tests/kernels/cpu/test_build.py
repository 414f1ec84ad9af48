"""Building the native CPU kernels: once, never partly, and fallbacks if building fails."""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpager.kernels import backends, reference
from kvpager.kernels.cpu import __main__ as command_line
from kvpager.kernels.cpu import cache, compiler, provider
from kvpager.kernels.cpu.cache import BuildError
from kvpager.kernels.cpu.library import Library
from kvpager.storage.block_storage import BlockStorage, LayerShape
from tests.support.kernel_cases import Unpacked

ROOT = Path(__file__).resolve().parents[3]
PORTABLE = compiler.variant_named("portable")
try:
    REAL: compiler.Compiler | None = compiler.find_compiler()  # before any test hides it
except BuildError:
    REAL = None
OPERATIONS = {"append_kv", "copy_blocks", "gather_kv", "paged_attention"}
DAY_SECONDS = 24 * 3600
STRANGER = 54321  # a user that no machine has

needs_compiler = pytest.mark.skipif(REAL is None, reason="there is no C++ compiler")


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


def kinds(folder: Path) -> list[str]:
    """Return the suffixes of the files in a cache folder, sorted."""
    return sorted("".join(path.suffixes) for path in folder.iterdir())


@pytest.fixture
def nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every path unwritable, for root too."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))


def served_by() -> set[tuple[str, ...]]:
    """Return backend and reason of the CPU's operations."""
    active = backends.active()["cpu"]
    return {tuple(active[operation]) for operation in OPERATIONS}


COMPLETE = [".lock", ".so", ".so.sha256"]


# -------------------------------------------------------------------- once


def test_a_library_is_built_once_and_then_found(folder: Path, copying: Compiler) -> None:
    first, second = compiler.ensure(PORTABLE), compiler.ensure(PORTABLE)
    assert (first.origin, second.origin) == ("built with quick++", "found in the cache")
    assert first.path == second.path
    assert len(copying.calls) == 1
    assert kinds(folder) == COMPLETE
    assert folder.stat().st_mode & 0o022 == 0
    assert compiler.ensure(PORTABLE, rebuild=True).origin == "built with quick++"
    assert len(copying.calls) == 2


@pytest.mark.slow
@needs_compiler
def test_the_command_builds_what_another_process_finds(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["build", "--variant", "portable"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("portable: built with ")
    assert "building the CPU kernels (portable)" in said.err
    assert kinds(folder) == COMPLETE
    again = subprocess.run(
        [sys.executable, "-m", "kvpager.kernels.cpu", "build", "--variant", "portable"],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
    )
    assert again.stdout == said.out.replace(said.out.split(",")[0], "portable: found in the cache")
    assert again.stderr == ""
    library = Library(next(folder.glob("*.so")))
    assert library.lanes == 4
    assert not library.bf16_dots


def test_every_process_looks_for_the_same_name() -> None:
    code = "from kvpager.kernels.cpu import compiler; print(compiler.source_digest())"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(digests) == 1


def test_two_processes_at_once_build_once(folder: Path, tmp_path: Path, prebuilt: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    made = make_compiler(tmp_path / "slow++", f'cat "{gate}"; cp "{prebuilt}" "$out"')
    code = (
        "from kvpager.kernels.cpu import compiler\n"
        "print('ready', flush=True); input()\n"
        "print(compiler.ensure(compiler.variant_named('portable')).path)"
    )
    environment = {**os.environ, "CXX": str(made.path), "KVPAGER_CACHE": str(folder)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        gate.write_text("")  # waits until the compiler waits
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert said[0] == said[1] != ""
    assert len(made.calls) == 1
    assert kinds(folder) == COMPLETE


# -------------------------------------------------------------------- never partial, never stale


@pytest.mark.parametrize("damage", ["truncated", "garbled", "no digest", "another digest", "open"])
def test_a_damaged_library_is_rebuilt(damage: str, folder: Path, copying: Compiler) -> None:
    path = compiler.ensure(PORTABLE).path
    digest = path.with_suffix(".so.sha256")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "garbled":
        content[1000] ^= 1
        path.write_bytes(content)
    elif damage == "no digest":
        digest.unlink()
    elif damage == "another digest":
        digest.write_text(hashlib.sha256(b"something else").hexdigest())
    else:
        path.chmod(0o666)  # others may have written into it
    assert compiler.ensure(PORTABLE).origin == "built with quick++"
    assert len(copying.calls) == 2
    assert compiler.ensure(PORTABLE).origin == "found in the cache"
    Library(path)


def test_another_compiler_or_source_makes_a_library_of_its_own(
    folder: Path, copying: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {compiler.ensure(PORTABLE).path}
    copying.path.write_text(copying.path.read_text() + "# newer\n")
    paths.add(compiler.ensure(PORTABLE).path)
    changed = tmp_path / "sources"
    shutil.copytree(compiler.source_folder(), changed)
    with (changed / "simd.h").open("a") as file:
        file.write("// newer\n")
    monkeypatch.setattr(compiler, "source_folder", lambda: changed)
    compiler.source_digest.cache_clear()
    try:
        paths.add(compiler.ensure(PORTABLE).path)
    finally:
        compiler.source_digest.cache_clear()
    assert len(paths) == len(copying.calls) == 3
    assert all(path.exists() for path in paths)


def test_each_variant_has_a_library_of_its_own(folder: Path, copying: Compiler) -> None:
    paths = {compiler.ensure(variant).path for variant in compiler.VARIANTS}
    assert len(paths) == len(copying.calls) == len(compiler.VARIANTS)
    for variant, call in zip(compiler.VARIANTS, copying.calls, strict=True):
        assert set(variant.flags) <= set(call.split())
        assert "-ffast-math" not in call


# -------------------------------------------------------------------- building fails


@pytest.mark.usefixtures("no_compiler", "registry")
def test_without_a_compiler_torch_runs_and_logs_the_reason(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found; install g\+\+ or clang\+\+"):
        compiler.ensure(PORTABLE)
    with caplog.at_level(logging.DEBUG, logger="kvpager"):
        for operation in sorted(OPERATIONS):
            expected = getattr(reference, operation)
            assert backends.select(operation, torch.device("cpu")) is expected
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no C++ compiler found" in record.getMessage()
    (entry,) = served_by()
    assert entry[0] == "reference"
    assert "no C++ compiler found" in entry[1]


def test_a_library_built_ahead_needs_no_compiler(
    folder: Path, copying: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = compiler.ensure(PORTABLE).path
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert compiler.ensure(PORTABLE) == (built, PORTABLE, "found in the cache")
    built.write_bytes(b"damaged")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found"):
        compiler.ensure(PORTABLE)


@pytest.mark.parametrize("compiler_at_hand", ["the same", "another", "none"])
def test_a_prebuilt_library_is_found_on_a_read_only_system(
    compiler_at_hand: str,
    folder: Path,
    copying: Compiler,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = compiler.ensure(PORTABLE).path
    before = sorted(folder.iterdir())
    folder.chmod(0o555)
    request.getfixturevalue("nothing_can_be_written")
    if compiler_at_hand == "another":
        use(make_compiler(tmp_path / "other++", "exit 1"), monkeypatch)
    elif compiler_at_hand == "none":
        request.getfixturevalue("no_compiler")
    try:
        assert compiler.ensure(PORTABLE) == (built, PORTABLE, "found in the cache")
        Library(built)
    finally:
        folder.chmod(0o755)
    assert sorted(folder.iterdir()) == before
    assert len(copying.calls) == 1


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("how", ["fails", "is not there", "is no command"])
def test_if_the_compiler_fails_a_library_of_another_compiler_serves(
    how: str,
    folder: Path,
    copying: Compiler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    best = compiler.variants()[0]
    built = compiler.ensure(best).path
    chosen = {"fails": "false", "is not there": str(tmp_path / "no++"), "is no command": "c++ '"}
    monkeypatch.setenv("CXX", chosen[how])
    with caplog.at_level(logging.INFO, logger="kvpager"):
        backends.select("append_kv", torch.device("cpu"))
    assert served_by() == {
        ("cpu.attention", f"{best.name}, found in the cache"),
        ("cpu.copies", f"{best.name}, found in the cache"),
    }
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert str(built) in record.getMessage()
    assert chosen[how] in record.getMessage()
    with pytest.raises(BuildError):  # chosen by the user, so not replaced
        compiler.ensure(best, rebuild=True)


@pytest.mark.parametrize("other", ["another variant", "another source", "damaged"])
def test_if_the_compiler_fails_no_other_library_serves(
    other: str, folder: Path, copying: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = compiler.VARIANTS[0] if other == "another variant" else PORTABLE
    built = compiler.ensure(variant).path
    if other == "damaged":
        built.write_bytes(b"damaged")
    elif other == "another source":
        monkeypatch.setattr(compiler, "source_digest", lambda: "0" * 16)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BuildError, match="false failed: exit status 1"):
        compiler.ensure(PORTABLE)


@pytest.mark.usefixtures("registry")
def test_a_compiler_that_fails_is_quoted_and_torch_runs(
    folder: Path, failing: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BuildError, match=r"broken\+\+ failed: kernels.cpp:7: error: no such vect"):
        compiler.ensure(PORTABLE)
    assert kinds(folder) == [".lock"]
    backends.select("gather_kv", torch.device("cpu"))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    ((backend, reason),) = served_by()
    assert backend == "reference"
    assert "kernels.cpp:7: error: no such vector" in reason


@pytest.mark.usefixtures("registry")
def test_a_compiler_that_makes_nonsense_does_not_stop_the_program(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(make_compiler(tmp_path / "odd++", 'echo nonsense > "$out"'), monkeypatch)
    backends.select("gather_kv", torch.device("cpu"))
    ((backend, reason),) = served_by()
    assert backend == "reference"
    assert str(folder) in reason
    assert len(caplog.records) == 1


def test_a_killed_compiler_leaves_no_single_threaded_library(
    folder: Path, tmp_path: Path, prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    action = (
        'case "$*" in *-fopenmp*) echo "g++: fatal error: Killed signal" >&2; exit 1;; esac\n'
        f'cp "{prebuilt}" "$out"'
    )
    killed = use(make_compiler(tmp_path / "killed++", action), monkeypatch)
    with pytest.raises(BuildError, match="fatal error: Killed signal"):
        compiler.ensure(PORTABLE)
    assert len(killed.calls) == 1
    assert not list(folder.glob("*.so"))


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("registry")
def test_a_compiler_without_openmp_makes_kernels_for_one_thread(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    action = (
        'case "$*" in *-fopenmp*) echo "error: unsupported option -fopenmp" >&2; exit 1;; esac\n'
        f'exec {REAL} "$@"'
    )
    made = use(make_compiler(tmp_path / "single++", action), monkeypatch)
    monkeypatch.setenv("KVPAGER_CPU_KERNELS", "portable")
    copy = backends.select("copy_blocks", torch.device("cpu"))
    assert len(made.calls) == 2
    assert kinds(folder) == COMPLETE
    (reason,) = {reason for _, reason in served_by()}
    assert reason == "portable, built with single++, one thread: the compiler has no OpenMP"
    storage = torch.arange(6.0).view(3, 2)
    copy(storage, torch.tensor([[0, 1], [1, 2]]))
    assert storage.tolist() == [[0, 1], [0, 1], [2, 3]]
    attend = Unpacked(backends.select("paged_attention", torch.device("cpu")))
    query, cache = torch.ones(1, 2, 8), torch.ones(1, 4, 1, 8)
    tables, lens = torch.zeros(1, 1).int(), torch.tensor([3])
    torch.testing.assert_close(attend(query, cache, cache, tables, lens), query)


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


def disown(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `path` belong to another user."""
    if os.getuid() == 0:
        os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "getuid", lambda: STRANGER)


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


# -------------------------------------------------------------------- compiler


def test_a_compiler_may_be_several_words(
    folder: Path, copying: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    make_compiler(tmp_path / "wrap", 'exec "$@"')
    paths = set()
    for command in ("quick++", "quick++ -m64", "quick++ '-DNAME=a b'", "wrap quick++"):
        monkeypatch.setenv("CXX", command)
        built = compiler.ensure(PORTABLE)
        assert built.origin == f"built with {command}"
        paths.add(built.path)
    assert len(paths) == len(copying.calls) == 4
    assert copying.calls[1].startswith("-m64 ")
    assert copying.calls[2].startswith("-DNAME=a b ")
    # The wrapper calls the compiler.
    copying.path.write_text(copying.path.read_text() + "# newer\n")
    assert compiler.ensure(PORTABLE).path not in paths


@pytest.mark.parametrize("command", ["no-such++", "/nowhere/g++ -m64", "g++ 'unfinished"])
def test_a_missing_chosen_compiler_is_reported_and_not_replaced(
    command: str, folder: Path, tmp_path: Path, prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_compiler(tmp_path / "c++", f'cp "{prebuilt}" "$out"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CXX", command)
    with pytest.raises(BuildError) as error:
        compiler.ensure(PORTABLE)
    assert f"CXX={command}" in str(error.value)
    assert other.calls == []
    monkeypatch.setenv("CXX", "")
    assert compiler.ensure(PORTABLE).origin == "built with c++"


# -------------------------------------------------------------------- choosing


@pytest.mark.usefixtures("registry", "copying")
@pytest.mark.parametrize("choice", ["auto", "Auto", "", None])
def test_the_best_variant_is_the_default(
    choice: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if choice is not None:
        monkeypatch.setenv("KVPAGER_CPU_KERNELS", choice)
    best = compiler.variants()[0].name
    native = {type(backends.select(name, torch.device("cpu"))).__name__ for name in OPERATIONS}
    assert native == {"AppendKV", "CopyBlocks", "GatherKV", "PagedAttention"}
    assert {reason for _, reason in served_by()} == {f"{best}, built with quick++"}
    assert {backend for backend, _ in served_by()} == {"cpu.attention", "cpu.copies"}
    assert caplog.records == []


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("choice", ["off", "OFF"])
def test_off_uses_torch_without_a_warning(
    choice: str,
    copying: Compiler,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("KVPAGER_CPU_KERNELS", choice)
    assert backends.select("append_kv", torch.device("cpu")) is reference.append_kv
    assert served_by() == {("reference", "KVPAGER_CPU_KERNELS=off")}
    assert copying.calls == []
    assert caplog.records == []


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("choice", ["portable", "Portable"])
def test_a_variant_may_be_named(
    choice: str, copying: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVPAGER_CPU_KERNELS", choice)
    backends.select("append_kv", torch.device("cpu"))
    assert {reason for _, reason in served_by()} == {"portable, built with quick++"}
    assert "-mavx2" not in copying.calls[0]


@pytest.mark.usefixtures("registry")
def test_an_unknown_variant_is_named_and_torch_runs(
    copying: Compiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KVPAGER_CPU_KERNELS", "AVX1024")
    backends.select("append_kv", torch.device("cpu"))
    ((backend, reason),) = served_by()
    assert backend == "reference"
    assert reason.startswith("KVPAGER_CPU_KERNELS=AVX1024: ")
    for choice in ("auto", "off", *(variant.name for variant in compiler.VARIANTS)):
        assert choice in reason
    assert len(caplog.records) == 1
    assert copying.calls == []


def test_a_variant_that_this_cpu_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "cpu_flags", lambda: frozenset({"avx2", "fma", "f16c"}))
    assert [variant.name for variant in compiler.variants()] == ["avx2", "portable"]
    with pytest.raises(ValueError, match="variant 'avx512' needs a CPU with avx512bw, avx512dq"):
        compiler.variant_named("avx512")


@pytest.mark.usefixtures("registry", "copying")
def test_the_environment_shows_which_kernels_run_and_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    environment = pytest.importorskip("kvpager.bench.environment")
    found = environment.collect()
    entry = found["kernels"]["cpu"]["paged_attention"]
    best = compiler.variants()[0].name
    assert entry == {"backend": "cpu.attention", "reason": f"{best}, built with quick++"}
    environment.show(found)
    assert "cpu.attention" in capsys.readouterr().out


# -------------------------------------------------------------------- the command, the package


@pytest.mark.usefixtures("copying")
def test_the_command_builds_every_variant_of_this_cpu(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command_line.main(["build", "--variant", "all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [v.name for v in compiler.variants()]
    assert command_line.main(["build"]) == 0
    assert capsys.readouterr().out.startswith(f"{compiler.variants()[0].name}: found in the cach")
    assert command_line.main(["build", "--rebuild"]) == 0
    assert capsys.readouterr().out.startswith(f"{compiler.variants()[0].name}: built with quick++")


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Return the output of `status` by the first words of each line."""
    assert command_line.main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:13].strip(): line[13:] for line in lines}


def test_the_status_command_shows_libraries_and_builds_nothing(
    folder: Path,
    copying: Compiler,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiler, "cpu_flags", lambda: frozenset({"avx2", "fma", "f16c"}))
    assert shown(capsys) == {
        "avx512bf16": "not on this CPU",
        "avx512": "not on this CPU",
        "avx2": "runs here, not built",
        "portable": "runs here, not built",
        "in use": f"avx2, after building it with quick++ in {folder}",
        "compiler": str(copying.path),
        "cache": str(folder),
    }
    assert copying.calls == []
    built = compiler.ensure(PORTABLE).path
    monkeypatch.setenv("KVPAGER_CPU_KERNELS", "Portable")
    found = shown(capsys)
    assert found["avx2"] == "runs here, not built"
    assert found["portable"] == f"runs here, built: {built}"
    assert found["in use"] == "portable"
    assert found["chosen"] == "KVPAGER_CPU_KERNELS=Portable"
    monkeypatch.setenv("KVPAGER_CPU_KERNELS", "off")
    assert shown(capsys)["in use"] == "torch"
    assert len(copying.calls) == 1


def test_the_command_shows_the_library_of_the_compiler_at_hand(
    copying: Compiler,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = make_compiler(tmp_path / "other++", copying.path.read_text())
    built = {}
    for made in (copying, other):
        use(made, monkeypatch)
        built[made.path] = compiler.ensure(PORTABLE).path
    for path, library in built.items():
        monkeypatch.setenv("CXX", str(path))
        assert shown(capsys)["portable"] == f"runs here, built: {library}"
    assert len(set(built.values())) == 2


def test_the_command_shows_what_is_wrong(
    folder: Path,
    copying: Compiler,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = compiler.ensure(PORTABLE).path
    monkeypatch.setenv("KVPAGER_CPU_KERNELS", "portable")
    monkeypatch.setenv("CXX", "no-such++")
    found = shown(capsys)
    assert found["compiler"].startswith("none: CXX=no-such++: ")
    assert found["portable"] == f"runs here, built: {built}"
    assert found["in use"] == "portable"
    built.unlink()
    assert shown(capsys)["in use"].startswith("torch: CXX=no-such++: ")
    monkeypatch.setenv("KVPAGER_CACHE", os.devnull)
    monkeypatch.setenv("CXX", str(copying.path))
    found = shown(capsys)
    assert found["cache"].startswith("none: KVPAGER_CACHE=/dev/null cannot be used")
    assert found["portable"] == "runs here, not built"
    assert found["in use"].startswith("torch: KVPAGER_CACHE=/dev/null cannot be used")
    monkeypatch.setenv("KVPAGER_CPU_KERNELS", "avx1024")
    assert shown(capsys)["in use"].startswith("torch: KVPAGER_CPU_KERNELS=avx1024: ")


def test_the_command_reports_errors(failing: Compiler, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["build", "--variant", "portable"]) == 1
    assert "error: no such vector" in capsys.readouterr().err
    assert command_line.main(["build", "--variant", "avx1024"]) == 1
    assert "error: variant 'avx1024': expected one of" in capsys.readouterr().err


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line.main(["--help"])
    assert stop.value.code == 0
    assert "build" in capsys.readouterr().out


def test_every_source_is_packaged() -> None:
    pyproject: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = pyproject["tool"]["setuptools"]["package-data"]["kvpager.kernels.cpu"]
    sources = [path for path in compiler.source_folder().iterdir() if path.is_file()]
    assert any(path.name == "kernels.cpp" for path in sources)
    for path in sources:
        matches = any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
        assert path.suffix == ".py" or matches, path.name


def test_the_provider_registers_every_operation() -> None:
    assert set(provider.OPERATIONS) == OPERATIONS


def test_one_layer_shape_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(TypeError, match=r"layers\[0\]=2: must be a LayerShape. Pass a list with"):
        BlockStorage(8, 16, LayerShape(2, 8, 8), dtype=torch.float32)
