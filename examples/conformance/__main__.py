"""Run kvpager's conformance suite on the installed block managers.

    python -m examples.conformance                  # a table: which property holds
    python -m examples.conformance --json           # every result, with the shortest history
    python -m examples.conformance vllm_block_pool  # one of them

A manager that is not installed is skipped, with the reason. docs/conformance.md has the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from importlib import import_module

from kvpager.testing.adapters import BlockManagerAdapter
from kvpager.testing.results import PropertyResult, check_properties

ADAPTERS = ("vllm_block_pool", "sglang_allocator", "transformers_continuous", "nano_vllm")
SIGNS = {"holds": "holds", "violated": "VIOLATED", "unsupported": "-"}


def kvpager(num_blocks: int, block_size: int) -> BlockManagerAdapter:
    """Return an adapter of kvpager's own manager."""
    from kvpager import BlockManager

    return BlockManagerAdapter(BlockManager(num_blocks, block_size))


def check(make: object, histories: int) -> list[PropertyResult]:
    # Some managers cannot be made with one block.
    return check_properties(make, pools=(2, 14), histories=histories)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapters", nargs="*", metavar="ADAPTER", help=", ".join(ADAPTERS))
    parser.add_argument("--histories", type=int, default=100, help="random histories per property")
    parser.add_argument("--json", action="store_true", help="a line for each result")
    options = parser.parse_args()
    for name in options.adapters:
        if name not in ADAPTERS:
            parser.error(f"{name}: choose from {', '.join(ADAPTERS)}")
    logging.disable(logging.WARNING)  # some managers log the calls that the suite makes on purpose

    found: dict[str, list[PropertyResult]] = {"kvpager": check(kvpager, options.histories)}
    for name in options.adapters or ADAPTERS:
        peer = import_module(f"examples.conformance.{name}")
        reason = peer.available()
        if reason is not None:
            print(f"{name}: skipped, {reason}")
            continue
        found[name] = check(peer.make, options.histories)
    if options.json:
        for name, results in found.items():
            for result in results:
                print(json.dumps({"manager": name, **dataclasses.asdict(result)}))
        return
    width = max(map(len, found))
    for place, first in enumerate(found["kvpager"]):
        print(f"{first.name}: {first.meaning}")
        for name, results in found.items():
            print(f"    {name:{width}}  {SIGNS[results[place].verdict]}")
    for name, results in found.items():
        for result in results:
            if result.verdict == "violated":
                print(f"\n{name}: {result}")


if __name__ == "__main__":
    main()
