"""The interpreter in which one mutant lives; started by `kvpager.testing.mutants`.

Reads the mutant and the limits as JSON from standard input and prints, as JSON on the last line,
what noticed it ("" if nothing did) and after how many simulated operations.
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


class _Planter(MetaPathFinder, Loader):
    """Imports one module from changed source; all others are left to the usual finders."""

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


def plant(mutant: Mutant) -> None:
    """From now on `mutant.module` is imported with its bug.

    Raises: `RuntimeError` where it is imported already.
    """
    if mutant.module in sys.modules:
        raise RuntimeError(f"{mutant.module} is imported already; plant before that")
    sys.meta_path.insert(0, _Planter(mutant))


def notice(operations: int, seeds: Iterable[int]) -> tuple[str, int]:
    """Return the check that notices the bug, or "", and the number of operations."""
    # Not before the bug is planted.
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
            # Many short runs: most bugs show early, in one setup or another.
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
    """Read one mutant, plant it, and print what noticed it."""
    order = json.load(sys.stdin)
    plant(Mutant(**order["mutant"]))
    by, operations = notice(order["operations"], order["seeds"])
    print(json.dumps({"by": by, "operations": operations}))


if __name__ == "__main__":
    main()
