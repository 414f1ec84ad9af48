"""Building the native CPU kernels: once, never half, and what happens where it cannot be done."""

from __future__ import annotations

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
from kvpager.kernels.cpu import compiler, provider
from kvpager.kernels.cpu.compiler import BuildError
from kvpager.kernels.cpu.library import Library

ROOT = Path(__file__).resolve().parent.parent
PORTABLE = compiler.variant_named("portable")
REAL = compiler.find_compiler()  # before any test hides it
OPERATIONS = {"append_kv", "copy_blocks", "gather_kv", "paged_attention"}

needs_compiler = pytest.mark.skipif(REAL is None, reason="there is no C++ compiler")


@pytest.fixture(scope="session")
def prebuilt() -> Path:
    """A library that works, from the cache of this machine."""
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
    """A script in a compiler's place; it notes each call."""

    path: Path
    log: Path

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


def make_compiler(path: Path, action: str) -> Compiler:
    """`action` is shell; `$out` is where the library has to go."""
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
    """What is in a cache folder, by suffix."""
    return sorted("".join(path.suffixes) for path in folder.iterdir())


def served_by() -> set[tuple[str, ...]]:
    """Backend and reason of the CPU's operations."""
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
    assert folder.stat().st_mode & 0o077 == 0
    assert compiler.ensure(PORTABLE, rebuild=True).origin == "built with quick++"
    assert len(copying.calls) == 2


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
        said = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert said[0] == said[1] != ""
    assert len(made.calls) == 1
    assert kinds(folder) == COMPLETE


# -------------------------------------------------------------------- never half, never stale


@pytest.mark.parametrize("damage", ["truncated", "garbled", "no digest", "another digest", "open"])
def test_a_damaged_library_is_built_anew(damage: str, folder: Path, copying: Compiler) -> None:
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


# -------------------------------------------------------------------- where it cannot be done


@pytest.mark.usefixtures("no_compiler", "registry")
def test_without_a_compiler_torch_runs_and_one_line_says_why(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found; install g\+\+ or clang\+\+"):
        compiler.ensure(PORTABLE)
    with caplog.at_level(logging.DEBUG, logger="kvpager"):
        for operation in sorted(OPERATIONS):
            twin = getattr(reference, operation)
            assert backends.select(operation, torch.device("cpu")) is twin
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


def test_a_library_built_ahead_is_found_where_nothing_can_be_written(
    folder: Path, copying: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = compiler.ensure(PORTABLE).path
    folder.chmod(0o555)
    access = os.access
    # The superuser may write everywhere; anybody else may not.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))
    try:
        assert compiler.ensure(PORTABLE) == (built, PORTABLE, "found in the cache")
    finally:
        folder.chmod(0o755)


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


@needs_compiler
@pytest.mark.usefixtures("registry")
def test_a_compiler_without_openmp_makes_kernels_for_one_thread(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    action = (
        'case "$*" in *-fopenmp*) echo "error: unsupported option -fopenmp" >&2; exit 1;; esac\n'
        f'exec "{REAL}" "$@"'
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
    attend = backends.select("paged_attention", torch.device("cpu"))
    query, cache = torch.ones(1, 2, 8), torch.ones(1, 4, 1, 8)
    tables, lens = torch.zeros(1, 1).int(), torch.tensor([3])
    torch.testing.assert_close(attend(query, cache, cache, tables, lens), query)


# -------------------------------------------------------------------- where libraries are kept


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
    assert compiler.cache_folder() == tmp_path / "xdg" / "kvpager"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compiler.cache_folder().is_relative_to(tmp_path)
    assert compiler.cache_folder() != temporary


def test_where_home_cannot_be_written_a_private_temporary_folder_serves(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert compiler.cache_folder() == temporary
    assert temporary.stat().st_mode & 0o777 == 0o700
    temporary.chmod(0o777)  # made by somebody else, before us
    with pytest.raises(BuildError, match="is a folder that only this user can write; set KVPAGER"):
        compiler.cache_folder()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_can_write_is_not_used(
    mode: int, temporary: Path, folder: Path, copying: Compiler
) -> None:
    planted = compiler.ensure(PORTABLE).path
    assert planted.parent == folder
    folder.chmod(mode)
    assert compiler.cache_folder() == temporary
    assert compiler.ensure(PORTABLE).path.parent == temporary


@pytest.mark.parametrize("name", ["KVPAGER_CACHE", "XDG_CACHE_HOME"])
def test_the_home_of_a_user_who_does_not_exist_is_no_error(
    name: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "~nobody-of-that-name/cache")
    assert compiler.cache_folder() == temporary


# -------------------------------------------------------------------- choosing


@pytest.mark.usefixtures("registry", "copying")
@pytest.mark.parametrize("choice", ["auto", "", None])
def test_the_best_variant_is_the_default(
    choice: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if choice is not None:
        monkeypatch.setenv("KVPAGER_CPU_KERNELS", choice)
    best = compiler.variants()[0].name
    native = {type(backends.select(name, torch.device("cpu"))).__name__ for name in OPERATIONS}
    assert native == {"AppendKV", "CopyBlocks", "GatherKV", "PagedAttention"}
    assert {reason for _, reason in served_by()} == {f"{best}, built with quick++"}
    assert {backend for backend, _ in served_by()} == {"cpu.attention", "cpu.moves"}
    assert caplog.records == []


@pytest.mark.usefixtures("registry")
def test_off_leaves_everything_to_torch_without_a_word(
    copying: Compiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KVPAGER_CPU_KERNELS", "off")
    assert backends.select("append_kv", torch.device("cpu")) is reference.append_kv
    assert served_by() == {("reference", "KVPAGER_CPU_KERNELS=off")}
    assert copying.calls == []
    assert caplog.records == []


@pytest.mark.usefixtures("registry")
def test_a_variant_may_be_named(copying: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPAGER_CPU_KERNELS", "portable")
    backends.select("append_kv", torch.device("cpu"))
    assert {reason for _, reason in served_by()} == {"portable, built with quick++"}
    assert "-mavx2" not in copying.calls[0]


@pytest.mark.usefixtures("registry")
def test_a_variant_that_does_not_exist_is_named_and_torch_runs(
    copying: Compiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KVPAGER_CPU_KERNELS", "avx1024")
    backends.select("append_kv", torch.device("cpu"))
    ((backend, reason),) = served_by()
    assert backend == "reference"
    assert reason.startswith("variant 'avx1024': expected one of ['avx512bf16'")
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
    environment = pytest.importorskip("kvpager.environment")
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


def test_the_command_shows_what_there_is(
    folder: Path, copying: Compiler, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["status"]) == 0
    out = capsys.readouterr().out
    assert f"cache        {folder}" in out
    assert f"compiler     {copying.path}" in out
    assert "portable     runs here" in out


def test_the_command_says_what_went_wrong(
    failing: Compiler, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_what_the_provider_registers_is_what_there_is() -> None:
    assert set(provider.OPERATIONS) == OPERATIONS
