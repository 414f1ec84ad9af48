"""Make environments in which other engines run over the packages of `.venv`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def environment(name: str, engine: str, path: Sequence[str]) -> Iterator[str | None]:
    """Make an empty environment in the folder `name`, to be filled by the caller.

    Yields its Python, or None if it has `engine` already. `path` are the lines of its `.pth` file.
    """
    folder = ROOT / name
    ready = folder / "ready"
    if ready.exists() and ready.read_text() == engine:
        yield None
        return
    print(f"Setting up {name} with {engine} (once; it takes minutes) ...", flush=True)
    venv.create(folder, clear=True, symlinks=True, with_pip=False)
    # Behind its own packages, where pip finds what is installed already.
    packages(folder).joinpath("kvpager-base.pth").write_text("".join(f"{line}\n" for line in path))
    yield str(folder / "bin" / "python")
    ready.write_text(engine)


def packages(folder: Path | str) -> Path:
    """Return the folder of an environment's packages."""
    return Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))


@contextmanager
def wheel_of(requirement: str) -> Iterator[Path]:
    """Download a wheel without what it needs."""
    with tempfile.TemporaryDirectory() as folder:
        pip(sys.executable, "download", "--no-deps", "--dest", folder, requirement)
        [wheel] = Path(folder).glob("*.whl")
        yield wheel


def pip(python: str, command: str, *arguments: str) -> None:
    """Run pip for an environment that may have none itself. Ends the program if that fails."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, command, "--quiet", *arguments],
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise SystemExit(f"pip {command}: {(errors or ['it failed'])[-1]}")


def requirements(wheel: Path, left_out: re.Pattern[str]) -> list[str]:
    """Return what a wheel needs, without its extras and the packages in `left_out`."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    prefix = "Requires-Dist: "
    needed = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
    return [each for each in needed if "extra ==" not in each and not left_out.match(each)]
