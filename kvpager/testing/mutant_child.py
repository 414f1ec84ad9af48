"""A program that runs the kit on one mutant; `kvpager.testing.mutants` starts it.

It reads the mutant and the limits as JSON from standard input. It prints, as JSON on its last line,
the check that failed ("" if none did) and the number of simulated operations.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from types import ModuleType
from typing import Any

from kvpager.testing.mutants import Mutant, mutated_source


class _MutantFinder(MetaPathFinder, Loader):
    """Imports the mutated module from its changed source, and no other module."""

    def __init__(self, mutant: Mutant) -> None:
        self.module = mutant.module
        spec = find_spec(mutant.module)
        self.origin = "" if spec is None else str(spec.origin)
        self.source = mutated_source(mutant)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.module:
            return None
        return spec_from_file_location(name, self.origin, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.source, self.origin, "exec"), module.__dict__)


def install(mutant: Mutant) -> None:
    """Make later imports of `mutant.module` use the mutated source.

    Raises: `RuntimeError` if the module is imported already.
    """
    if mutant.module in sys.modules:
        raise RuntimeError(f"{mutant.module} is imported already. Install the mutant before.")
    sys.meta_path.insert(0, _MutantFinder(mutant))


def detect(operations: int, seeds: Iterable[int]) -> tuple[str, int]:
    """Return the first check that fails, or "", and the number of operations."""
    # Imported here: the mutant must be installed first.
    from kvpager.blocks.manager import BlockManager
    from kvpager.testing.adapters import BlockManagerAdapter
    from kvpager.testing.isolation import isolation
    from kvpager.testing.properties import PROPERTIES
    from kvpager.testing.results import check_properties
    from kvpager.testing.setups import eviction_policies
    from kvpager.testing.simulator import OPERATIONS_PER_SEED, simulate

    done = 0
    for first in seeds:
        for seed in range(first, first + max(operations // OPERATIONS_PER_SEED * 5, 1)):
            # Many short runs: most bugs show early, but each in other setups.
            report = simulate(seed, OPERATIONS_PER_SEED // 5, shrinking=False)
            done += report.num_operations
            if report.failure is not None:
                failure = report.failure
                return f"simulator, seed {seed}: {failure.property}: {failure.message}", done

    def adapter(num_blocks: int, block_size: int) -> Any:
        return BlockManagerAdapter(BlockManager(num_blocks, block_size, 6))

    for name in PROPERTIES:
        for result in check_properties(adapter, properties=[name], histories=20):
            if result.verdict == "violated":
                return f"property {result.name}: {result.message}", done
    for number, policy in enumerate(eviction_policies() or (None,)):
        probed = isolation(number, 1_000, policy)
        if not probed.ok:
            return f"isolation: {probed.failure}", done
    return "", done


def main() -> None:
    """Read a mutant, install it, and print the check that failed."""
    job = json.load(sys.stdin)
    install(Mutant(**job["mutant"]))
    by, operations = detect(job["operations"], job["seeds"])
    print(json.dumps({"by": by, "operations": operations}))


if __name__ == "__main__":
    main()
