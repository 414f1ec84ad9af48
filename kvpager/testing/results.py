"""Check the properties of a manager one by one, and return the results as data.

A seed determines the random histories, so every machine gives the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Literal

from kvpager._text import counted
from kvpager.testing.adapter_harness import AdapterHarness
from kvpager.testing.histories import Failure, History, Scale, describe, replay, shrink, supported
from kvpager.testing.properties import PROPERTIES, ManagerAdapter, check_adapter, is_supported
from kvpager.testing.rules import RULES

MakeAdapter = Callable[[int, int], ManagerAdapter]
Verdict = Literal["holds", "violated", "unsupported"]


@dataclass(frozen=True)
class PropertyResult:
    """The result of checking one property.

    `num_operations`: operations that were run. If the property is violated, `history` is the
    shortest failing history found, `num_blocks` and `block_size` are the sizes of its manager, and
    `message` describes the failure.
    """

    name: str
    meaning: str
    verdict: Verdict
    num_operations: int = 0
    num_blocks: int = 0
    block_size: int = 0
    message: str = ""
    history: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.verdict != "violated":
            return f"{self.name}: {self.verdict}"
        pool = f"{counted(self.num_blocks, 'block')} of {counted(self.block_size, 'token slot')}"
        return "\n  ".join(
            [f"{self.name}: violated: {self.message}", f"on {pool}, after:", *self.history]
        )


def check_properties(
    make_adapter: MakeAdapter,
    *,
    properties: Iterable[str] = PROPERTIES,
    block_size: int = 4,
    pools: tuple[int, int] = (1, 14),
    histories: int = 100,
    length: int = 40,
    seed: int = 0,
) -> list[PropertyResult]:
    """Check every property of the managers that `make_adapter(num_blocks, block_size)` makes.

    Args:
        make_adapter: returns a `ManagerAdapter` of a new manager.
        properties: names from `PROPERTIES`.
        block_size: token slots of a block.
        pools: minimum and maximum blocks of a manager.
        histories: random histories for each property.
        length: operations of each history.
        seed: equal seeds give equal histories.

    Each property is checked separately, so one violation does not hide another.
    O(properties * histories * length).

    Raises: `ValueError` for an unknown property or an empty range; `TypeError` for an adapter that
    lacks a required member.
    """
    wanted = list(properties)
    unknown = [name for name in wanted if name not in PROPERTIES]
    if unknown or not 1 <= pools[0] <= pools[1] or histories < 1 or length < 1:
        raise ValueError(
            f"properties={unknown}, pools={pools}, histories={histories}, length={length}: "
            "expected names from PROPERTIES, 1 <= least <= most, and at least one operation"
        )
    check_adapter(make_adapter(pools[1], block_size))
    checker = _Checker(make_adapter, block_size, pools, histories, length, seed)
    return [checker.check(name) for name in wanted]


@dataclass(frozen=True)
class _Checker:
    make_adapter: MakeAdapter
    block_size: int
    pools: tuple[int, int]
    histories: int
    length: int
    seed: int

    def check(self, name: str) -> PropertyResult:
        sample = self.make_adapter(self.pools[1], self.block_size)
        if not is_supported(name, sample):
            return PropertyResult(name, PROPERTIES[name], "unsupported")
        table = supported(RULES, sample)
        weights = [one.weight for one in table.values()]
        random = Random(self.seed)
        for number in range(self.histories):
            num_blocks = random.randint(*self.pools)
            scale = Scale(alphabet=2 + number % 2, longest=4 * self.block_size + 2)
            names = random.choices(list(table), weights, k=self.length)
            history: History = [(one, table[one].draw(random, scale)) for one in names]
            failure = self.failure_of(name, num_blocks, history)
            if failure is not None:
                num_operations = number * self.length + failure.at + 1
                return self.violated(name, num_blocks, history[: failure.at + 1], num_operations)
        num_operations = self.histories * self.length
        return PropertyResult(name, PROPERTIES[name], "holds", num_operations)

    def failure_of(self, name: str, num_blocks: int, history: History) -> Failure | None:
        harness = AdapterHarness(self.make_adapter(num_blocks, self.block_size), [name])
        failure = replay(history, RULES, harness)
        if failure is not None and failure.property != name:
            raise RuntimeError(f"the adapter or the kit failed: {failure.message}")
        return failure

    def violated(
        self, name: str, num_blocks: int, history: History, num_operations: int
    ) -> PropertyResult:
        fails = partial(self.failure_of, name, num_blocks)
        short = shrink(history, fails, operations_max=20_000)
        failure = fails(short)
        message = failure.message if failure else "the failure does not repeat"
        return PropertyResult(
            name, PROPERTIES[name], "violated", num_operations, num_blocks, self.block_size,
            message, tuple(describe(short, RULES)),
        )  # fmt: skip
