"""Run the tests on the releases of Python, torch and transformers that kvpager supports.

    python tests/matrix.py                             # every environment, every test
    python tests/matrix.py py3.13 -- tests/storage/test_block_storage.py -k grow

The first arguments select environments by a part of their names. Arguments after `--` go to pytest.
Each environment is a folder in `.venv-matrix/`, made when it is missing, and filled again when its
requirements or pyproject.toml change. Beside it are the output of pytest (`NAME.log`) and its
results (`NAME.xml`). A torch with CUDA takes some 6 GB.
The exit status is 1 if a test failed, or if an environment could not be made.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-matrix"
SHOWN = ("torch", "transformers", "triton", "numpy")


class Environment(NamedTuple):
    """A Python and the releases to install into it."""

    python: str
    requirements: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the name of its folder, such as py3.11-torch2.13-transformers5.23."""
        parts = (requirement.split("==") for requirement in self.requirements)
        releases = [f"{name}{'.'.join(version.split('.')[:2])}" for name, version in parts]
        return "-".join([f"py{self.python}", *releases])

    @property
    def folder(self) -> Path:
        """Return its folder."""
        return FOLDER / self.name

    @property
    def interpreter(self) -> Path:
        """Return its Python."""
        return self.folder / "bin" / "python"


# The newest and the oldest of each, and what most people have. Everything else is the newest
# release that pip finds for them.
ENVIRONMENTS = (
    Environment("3.11", ("torch==2.13.0", "transformers==5.23.0")),
    Environment("3.11", ("torch==2.13.0", "transformers==5.17.0")),
    Environment("3.12", ("torch==2.11.0", "transformers==5.17.0", "triton==3.6.0")),
    Environment("3.13", ("torch==2.14.1", "transformers==5.24.0")),
)


class Result(NamedTuple):
    """The tests of one environment."""

    name: str
    versions: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    failures: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        """True if tests ran and none failed."""
        return self.passed > 0 and self.failed == 0


def main(arguments: Sequence[str]) -> int:
    """Run the matrix. Return the exit status."""
    own, pytest_arguments = split(arguments)
    parser = argparse.ArgumentParser(
        description="Run the tests on the releases that kvpager supports.",
        epilog="Arguments after -- go to pytest.",
    )
    parser.add_argument("names", nargs="*", help="parts of the names of environments; none: all")
    parser.add_argument("--processes", type=int, default=2, help="of pytest, per environment")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args(own)
    chosen = choose(options.names)
    if options.list:
        print("\n".join(environment.name for environment in chosen))
        return 0
    FOLDER.mkdir(exist_ok=True)
    results = []
    for environment in chosen:
        print(f"{environment.name} ...", file=sys.stderr, flush=True)
        results.append(run(environment, pytest_arguments, options.processes))
    print(table(results))
    return 0 if all(result.is_good for result in results) else 1


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what stands before the first `--`, and what stands after it."""
    arguments = list(arguments)
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def choose(names: Sequence[str]) -> list[Environment]:
    """Return the environments whose names contain one of `names`; all of them if there is none."""
    chosen = [e for e in ENVIRONMENTS if not names or any(name in e.name for name in names)]
    for name in names:
        if not any(name in environment.name for environment in chosen):
            known = ", ".join(environment.name for environment in ENVIRONMENTS)
            raise SystemExit(f"matrix: no environment is called {name!r}. There are: {known}")
    return chosen


def run(environment: Environment, arguments: list[str], processes: int) -> Result:
    """Make the environment if need be, and run the tests in it."""
    start = time.monotonic()
    try:
        make(environment)
    except (OSError, subprocess.CalledProcessError) as error:
        return Result(environment.name, "not made", 0, 0, 0, 0.0, (str(error),))
    report = FOLDER / f"{environment.name}.xml"
    report.unlink(missing_ok=True)
    parallel = ["-n", str(processes), "--dist", "loadfile"] if processes > 1 else []
    command = [environment.interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    with (FOLDER / f"{environment.name}.log").open("w", encoding="utf-8") as log:
        ended = subprocess.run(
            [*command, *parallel, f"--junitxml={report}", *arguments],
            cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if not report.exists():
        why = f"pytest ended with status {ended.returncode}; see {log.name}"
        return Result(environment.name, versions(environment), 0, 0, 0, 0.0, (why,))
    return summary(environment.name, versions(environment), report, time.monotonic() - start)


def make(environment: Environment) -> None:
    """Make the environment's folder unless it holds these requirements already."""
    stamp = environment.folder / "ready"
    own = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    # The folder of the checkout is part of it, since the environment refers to that folder.
    wanted = "\n".join([str(ROOT), environment.python, *environment.requirements, own])
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    if not environment.interpreter.exists():
        subprocess.run([python(environment.python), "-m", "venv", environment.folder], check=True)
    pip = [environment.interpreter, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, *environment.requirements, "-e", f"{ROOT}[dev]"], check=True)
    # As `make` does: this folder comes before one named kvpager where a program was started.
    (packages,) = environment.folder.glob("lib/python*/site-packages")
    (packages / "kvpager-checkout.pth").write_text(f"{ROOT}\n", encoding="utf-8")
    stamp.write_text(wanted, encoding="utf-8")


def python(version: str) -> str:
    """Return a Python of this version: `python3.12` of the path, or one that pyenv keeps."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [f"python{version}", *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    for candidate in candidates:
        try:
            subprocess.run([candidate, "-c", ""], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):  # a shim of pyenv may lead nowhere
            continue
        return candidate
    raise OSError(f"Python {version} was not found. Install it as python{version}, or with pyenv")


def versions(environment: Environment) -> str:
    """Return the releases that the environment holds."""
    script = (
        "import importlib.metadata as m, platform as p, sys; print('Python', p.python_version(), "
        "*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep=', ')"
    )
    command = [environment.interpreter, "-c", script, *SHOWN]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return found.stdout.strip().replace("Python, ", "Python ")


def summary(name: str, releases: str, report: Path, seconds: float) -> Result:
    """Count the results in pytest's report."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failures = tuple(
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    )
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failures) - skipped
    return Result(name, releases, passed, len(failures), skipped, seconds, failures)


def table(results: Sequence[Result]) -> str:
    """Return a Markdown table of the results, and the names of failed tests below it."""
    lines = ["| releases | passed | failed | skipped | minutes |", "|---|---|---|---|---|"]
    for result in results:
        counts = (result.passed, result.failed, result.skipped, round(result.seconds / 60))
        lines.append(f"| {result.versions} | {' | '.join(map(str, counts))} |")
    for result in results:
        lines += [f"{result.name}: {failure}" for failure in result.failures]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
