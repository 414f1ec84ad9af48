"""Run Python programs as processes of their own that need not import torch and transformers again.

A server imports them once in a test session. Each program runs in a fork of it: nothing that
tests or programs before it changed is there.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

# `transformers` imports its modules when they are first used: these are the expensive ones.
PRELOADED = [
    "torch",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
]


def run_program(
    program: str | Path, *arguments: str, cwd: Path, **environment: str
) -> CompletedProcess[str]:
    """Run a .py file, or the main module of a package, and return its exit code and output."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    argv = [str(program), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = processes.Process(target=_run, args=(argv, cwd, environment, files))
        process.start()
        process.join()
        stdout, stderr = (file.read_text(encoding="utf-8") for file in files)
    assert process.exitcode is not None
    return CompletedProcess(argv, process.exitcode, stdout, stderr)


def _run(argv: list[str], cwd: Path, environment: dict[str, str], files: list[Path]) -> None:
    """Become the program: its working directory, its environment, its arguments, its output."""
    for number, file in enumerate(files, start=1):
        with file.open("w") as output:
            os.dup2(output.fileno(), number)
    os.chdir(cwd)
    os.environ.update(environment)
    sys.argv[:] = argv
    if argv[0].endswith(".py"):
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))  # as the interpreter does
        runpy.run_path(argv[0], run_name="__main__")
    else:
        sys.path.insert(0, "")
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


def outputs_by_hash_seed(code: str) -> set[str]:
    """Return what a program prints in processes with different PYTHONHASHSEEDs."""
    return {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
