"""Mutation tests of the kit: known bugs, each of which the kit must detect.

A mutant replaces one exact fragment of a module's source. A new interpreter, which runs this module
as a program, imports the changed source; no file changes. Then it runs a bounded simulation and
checks the properties of the conformance suite. A mutant of `kvpager.storage.tiers` runs through the
suite of stores instead, in host memory. The first check that fails kills the mutant.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import kvpager


@dataclass(frozen=True)
class Mutant:
    """A known bug, and the fragment of source to replace for it.

    `original` must be in the source of `module` exactly once.
    """

    name: str
    module: str
    original: str
    replacement: str


@dataclass(frozen=True)
class Outcome:
    """The result of one mutant. `by`: the check that failed; "" if the mutant survived."""

    mutant: Mutant
    by: str

    @property
    def killed(self) -> bool:
        """True if a check failed."""
        return bool(self.by)


_OF_STORES = "kvpager.storage.tiers."
_STORE_SUITE = """
from kvpager.storage.tiers.host import HostStore
from kvpager.testing.stores import StoreConformance

class TestHostStore(StoreConformance):
    def make_store(self, layout, num_blocks):
        return HostStore(num_blocks * layout.block_bytes, layout=layout)
"""


def mutated_source(mutant: Mutant) -> str:
    """Return the module's source with the fragment replaced; unchanged for no fragment. O(source).

    Raises: `LookupError` unless the source has the original fragment exactly once.
    """
    spec = find_spec(mutant.module)
    if spec is None or spec.origin is None:
        raise LookupError(f"mutant {mutant.name!r}: no module {mutant.module!r}")
    source = Path(spec.origin).read_text(encoding="utf-8")
    if not mutant.original:
        return source
    count = source.count(mutant.original)
    if count != 1:
        raise LookupError(
            f"mutant {mutant.name!r}: the fragment occurs {count} times in {mutant.module}, "
            "expected once"
        )
    return source.replace(mutant.original, mutant.replacement)


def kill(
    mutants: Sequence[Mutant],
    *,
    operations: int = 20_000,
    processes: int = 2,
    timeout_seconds: float = 300.0,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Outcome]:
    """Run the kit on each mutant; return outcomes in order. O(mutants * operations).

    Args:
        mutants: the bugs.
        operations: maximum operations to simulate for each mutant.
        processes: mutants to run at a time.
        timeout_seconds: a mutant that runs longer counts as killed.
        progress: called with 1 after each mutant, such as `tqdm(...).update`.

    Raises: `LookupError` if a fragment does not occur exactly once; `RuntimeError` if the unchanged
    source fails, or a mutant cannot be imported.
    """
    for mutant in mutants:
        mutated_source(mutant)
    # If a kit kills the unchanged source, the kit or the source is wrong.
    for module in {each.module.startswith(_OF_STORES): each.module for each in mutants}.values():
        unchanged = _try(Mutant("unchanged", module, "", ""), operations, timeout_seconds)
        if unchanged.killed:
            raise RuntimeError(
                f"the unchanged source fails, so mutants prove nothing: {unchanged.by}"
            )
    with ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(_try, mutant, operations, timeout_seconds) for mutant in mutants]
        for future in as_completed(futures):
            future.result()
            progress(1)
    return [future.result() for future in futures]


def table(outcomes: Sequence[Outcome]) -> str:
    """Return outcomes as lines of text, survivors first. O(outcomes)."""
    width = max((len(outcome.mutant.name) for outcome in outcomes), default=0)
    lines = []
    for outcome in sorted(outcomes, key=lambda outcome: outcome.killed):
        status = f"killed by {outcome.by}" if outcome.killed else "SURVIVED"
        lines.append(f"{outcome.mutant.name:{width}}  {status}")
    killed = sum(outcome.killed for outcome in outcomes)
    return "\n".join([*lines, f"{killed} of {len(outcomes)} killed"])


def _try(mutant: Mutant, operations: int, timeout_seconds: float) -> Outcome:
    """Run the kit against one mutant in a new interpreter."""
    root = str(Path(kvpager.__file__).resolve().parent.parent)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kvpager.testing.mutants"],
            input=json.dumps({"mutant": asdict(mutant), "operations": operations}),
            # Import the same kvpager, whatever the current folder is.
            cwd=root,
            env={**os.environ, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )
    except subprocess.TimeoutExpired:
        return Outcome(mutant, f"timeout after {timeout_seconds:g} s")
    if done.returncode:
        raise RuntimeError(f"mutant {mutant.name!r} did not run:\n{done.stderr}")
    return Outcome(mutant, json.loads(done.stdout.splitlines()[-1]))


# -------------------------------------------------------------------- the new interpreter


def install(mutant: Mutant) -> None:
    """Import the mutated source as `mutant.module`. Raises `RuntimeError` if it is imported."""
    spec = find_spec(mutant.module)
    if spec is None or mutant.module in sys.modules:
        raise RuntimeError(f"{mutant.module} is imported already. Install the mutant before.")
    module = sys.modules[mutant.module] = module_from_spec(spec)
    exec(compile(mutated_source(mutant), str(spec.origin), "exec"), module.__dict__)


def detect_in_stores() -> str:
    """Return the first test of the suite of stores that fails, or ""."""
    import pytest

    class First:
        failed = ""

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            self.failed = self.failed or (report.nodeid.rpartition("::")[2] * report.failed)

    first = First()
    with TemporaryDirectory() as folder:
        file = Path(folder, "test_host_store.py")
        file.write_text(_STORE_SUITE, encoding="utf-8")
        options = ["-x", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={folder}"]
        with redirect_stdout(sys.stderr):
            status = pytest.main([*options, str(file)], plugins=[first])
    return f"test {first.failed}" if first.failed else "" if status == 0 else f"pytest: {status!r}"


def detect(operations: int) -> str:
    """Return the first check of block managers that fails, or ""."""
    # Imported here: the mutant must be installed first.
    from kvpager.blocks.manager import BlockManager
    from kvpager.testing.adapters import BlockManagerAdapter
    from kvpager.testing.properties import PROPERTIES
    from kvpager.testing.results import check_properties
    from kvpager.testing.simulator import OPERATIONS_PER_SEED, simulate

    # Many short runs: most bugs show early, but each in other setups.
    length = OPERATIONS_PER_SEED // 5
    for seed in range(max(operations // length, 1)):
        failure = simulate(seed, length, shrinking=False).failure
        if failure is not None:
            return f"simulator, seed {seed}: {failure.property}: {failure.message}"

    def adapter(num_blocks: int, block_size: int) -> Any:
        return BlockManagerAdapter(BlockManager(num_blocks, block_size, 6))

    for name in PROPERTIES:
        [result] = check_properties(adapter, properties=[name], histories=20)
        if result.verdict == "violated":
            return f"property {name}: {result.message}"
    return ""


def main() -> None:
    """Read a mutant from stdin, install it, and print the check that failed."""
    job = json.load(sys.stdin)
    mutant = Mutant(**job["mutant"])
    install(mutant)
    is_of_stores = mutant.module.startswith(_OF_STORES)
    print(json.dumps(detect_in_stores() if is_of_stores else detect(job["operations"])))


if __name__ == "__main__":
    main()
