"""Building the native CPU kernels: once, never partly, and fallbacks if building fails."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvpager.kernels import backends, reference
from kvpager.kernels.cpu import __main__ as command_line
from kvpager.kernels.cpu import compiler
from kvpager.kernels.cpu.cache import BuildError
from kvpager.kernels.cpu.library import Library
from tests.support.kernel_builds import (
    COMPLETE,
    OPERATIONS,
    PORTABLE,
    REAL,
    ROOT,
    Compiler,
    kinds,
    make_compiler,
    needs_compiler,
    served_by,
    use,
)
from tests.support.kernel_cases import Unpacked

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
