"""Which compiler and variant are chosen, and what the commands show."""

from __future__ import annotations

import fnmatch
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpager.kernels import backends, reference
from kvpager.kernels.cpu import __main__ as command_line
from kvpager.kernels.cpu import compiler, provider
from kvpager.kernels.cpu.cache import BuildError
from kvpager.storage.block_storage import BlockStorage, LayerShape
from tests.support.kernel_builds import (
    OPERATIONS,
    PORTABLE,
    ROOT,
    Compiler,
    make_compiler,
    served_by,
    use,
)

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
        "amx": "not on this CPU",
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
    assert set(provider.KERNELS) == OPERATIONS


def test_one_layer_shape_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(TypeError, match=r"layers\[0\]=2: expected a LayerShape. Pass a list with"):
        BlockStorage(8, 16, LayerShape(2, 8, 8), dtype=torch.float32)
