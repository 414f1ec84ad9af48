"""Mutation tests of the kit: known bugs, each of which the kit must detect.

A mutant replaces one exact fragment of a module's source. A new interpreter imports the module with
the replacement; no file changes. Then it runs a bounded simulation, the properties of the
conformance suite and the isolation probes. The first check that fails kills the mutant.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import kvpager


@dataclass(frozen=True)
class Mutant:
    """A known bug, and the fragment of source to replace for it.

    `property`: the property it violates. `original` must be in the source of `module` exactly once.
    """

    name: str
    property: str
    module: str
    original: str
    replacement: str


@dataclass(frozen=True)
class Outcome:
    """The result of one mutant: killed or survived.

    `by`: the check that failed, and its message. `operations`: the number that was simulated.
    """

    mutant: Mutant
    killed: bool
    by: str
    operations: int
    seconds: float


# The unchanged source: if the kit kills it, the kit or the manager is wrong.
UNCHANGED = Mutant("unchanged", "none", "kvpager.blocks.manager", "", "")


def mutated_source(mutant: Mutant) -> str:
    """Return the module's source with the fragment replaced. O(source).

    Raises: `LookupError` unless the source has the original fragment exactly once.
    """
    spec = find_spec(mutant.module)
    if spec is None or spec.origin is None:
        raise LookupError(f"mutant {mutant.name!r}: no module {mutant.module!r}")
    source = Path(spec.origin).read_text(encoding="utf-8")
    if mutant == UNCHANGED:
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
    seeds: Iterable[int] = (0,),
    processes: int = 2,
    timeout_seconds: float = 120.0,
    progress: Callable[[int], object] | None = None,
) -> list[Outcome]:
    """Run the kit on each mutant; return outcomes in order. O(mutants * operations).

    Args:
        mutants: the bugs, with different names.
        operations: maximum operations to simulate for each mutant and seed.
        seeds: one simulation each.
        processes: mutants to run at a time.
        timeout_seconds: a mutant that runs longer counts as killed.
        progress: called with 1 after each mutant, such as `tqdm(...).update`.

    Raises: `LookupError` if a fragment does not occur exactly once; `RuntimeError` if the unchanged
    source fails, or a mutant cannot be imported.
    """
    names = [mutant.name for mutant in mutants]
    if len(set(names)) != len(names):
        raise ValueError("two mutants have the same name")
    for mutant in mutants:
        mutated_source(mutant)
    limits = {"operations": operations, "seeds": list(seeds)}
    unchanged = _try(UNCHANGED, limits, timeout_seconds)
    if unchanged.killed:
        raise RuntimeError(f"the unchanged source fails, so mutants prove nothing: {unchanged.by}")
    outcomes: dict[str, Outcome] = {}
    with ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(_try, mutant, limits, timeout_seconds) for mutant in mutants]
        for future in as_completed(futures):
            outcome = future.result()
            outcomes[outcome.mutant.name] = outcome
            if progress is not None:
                progress(1)
    return [outcomes[name] for name in names]


def table(outcomes: Sequence[Outcome]) -> str:
    """Return outcomes as lines of text, survivors first. O(outcomes)."""
    width = max((len(outcome.mutant.name) for outcome in outcomes), default=0)
    lines = []
    for outcome in sorted(outcomes, key=lambda outcome: outcome.killed):
        status = f"killed by {outcome.by}" if outcome.killed else "SURVIVED"
        lines.append(f"{outcome.mutant.name:{width}}  {status}")
    killed = sum(outcome.killed for outcome in outcomes)
    return "\n".join([*lines, f"{killed} of {len(outcomes)} killed"])


def _try(mutant: Mutant, limits: dict[str, object], timeout_seconds: float) -> Outcome:
    """Run the kit against one mutant in a new interpreter."""
    root = str(Path(kvpager.__file__).resolve().parent.parent)
    begin = perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kvpager.testing.mutant_child"],
            input=json.dumps({"mutant": asdict(mutant), **limits}),
            # Import the same kvpager, whatever the current folder is.
            cwd=root,
            env={**os.environ, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )
    except subprocess.TimeoutExpired:
        by = f"timeout after {timeout_seconds:g} s"
        return Outcome(mutant, True, by, 0, perf_counter() - begin)
    if done.returncode:
        raise RuntimeError(f"mutant {mutant.name!r} did not run:\n{done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1])
    seconds = perf_counter() - begin
    return Outcome(mutant, bool(result["by"]), result["by"], result["operations"], seconds)
