"""Managers, and an operation to run on each, for tests of calls that fail or are interrupted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvpager import BlockManager
from kvpager.blocks.sequences import SequenceHandle
from tests.support.manager_state import handles_of

Operation = Callable[[], object]


def manager_with_rows(**options: Any) -> BlockManager:
    """A small manager in which idle rows wait for the next sequences."""
    manager = BlockManager(12, 4, 12, **options)
    manager.free(manager.allocate(1))
    return manager


def committed(manager: BlockManager, ids, namespace: str | None = None) -> SequenceHandle:
    sequence = manager.allocate(ids, namespace=namespace)
    manager.commit(sequence)
    return sequence


def full_of_cached(**options: Any) -> BlockManager:
    manager = manager_with_rows(**options)
    for first in (0, 100, 200):
        manager.free(committed(manager, range(first, first + 16)))
    return manager


def family(manager: BlockManager) -> list[SequenceHandle]:
    parent = manager.allocate(range(6))
    members = [parent, *manager.fork(parent, 2)]
    manager.append(members, [[6], [7], [8]])
    return members


def allocate_cold() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    return manager, lambda: manager.allocate(range(9))


def allocate_hit() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    committed(manager, range(8))
    return manager, lambda: manager.allocate(range(12))


def allocate_revived() -> tuple[BlockManager, Operation]:
    manager = full_of_cached()
    return manager, lambda: manager.allocate([*range(16), *range(50, 60)])


def allocate_evicting() -> tuple[BlockManager, Operation]:
    manager = full_of_cached()
    return manager, lambda: manager.allocate(40)


def append_growing() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = manager.allocate(range(8))
    return manager, lambda: manager.append(sequence, [8, 9])


def append_in_place() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = manager.allocate(range(6))
    return manager, lambda: manager.append(sequence, [8])


def append_evicting() -> tuple[BlockManager, Operation]:
    manager = full_of_cached()
    pair = [manager.allocate(range(300, 304)), manager.allocate(4)]
    return manager, lambda: manager.append(pair, 20)


def append_batch_under_quotas() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    manager.quotas.set("a", floor=2, ceiling=5)
    manager.quotas.set("b", floor=1)
    for first, namespace in ((0, "a"), (100, "b"), (200, None)):
        manager.free(committed(manager, range(first, first + 8), namespace))
    names: list[str | None] = ["a", "b", None]
    batch = manager.batch([manager.allocate(4, namespace=name) for name in names])
    return manager, lambda: manager.append(batch, 5)


def append_speculative() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = manager.allocate(range(6))
    return manager, lambda: manager.append(sequence, 7, speculative=True)


def accept_speculative() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = manager.allocate(range(6))
    manager.append(sequence, 7, speculative=True)
    return manager, lambda: manager.accept(sequence, 3, [6, 7, 8])


def fork_many() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = manager.allocate(range(6))
    return manager, lambda: manager.fork(sequence, 4)


def swap_out() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    members = family(manager)
    manager.commit(members[0])
    return manager, lambda: manager.swap(members, "host")


def swap_out_in_part() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows(fences=True)
    sequence = committed(manager, range(20))
    return manager, lambda: manager.swap(sequence, "host", at_most=2)


def swap_in() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    members = family(manager)
    manager.swap(members, "host")
    return manager, lambda: manager.swap(members, "device")


def swap_in_evicting() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = manager.allocate(range(300, 312))
    manager.swap(sequence, "host")
    for first in (0, 100, 200):
        manager.free(committed(manager, range(first, first + 16)))
    return manager, lambda: manager.swap(sequence, "device")


def swap_in_under_quotas() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    manager.quotas.set("a", floor=2, ceiling=4)
    sequence = manager.allocate(range(12), namespace="a")
    manager.swap(sequence, "host")
    manager.free(committed(manager, range(50, 66), "a"))
    return manager, lambda: manager.swap(sequence, "device")


def shrink() -> tuple[BlockManager, Operation]:
    manager = full_of_cached()
    pair = [manager.allocate(7), manager.allocate(range(100, 110))]
    manager.free(pair[0])
    return manager, lambda: manager.shrink(6)


def name_all() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    family(manager)
    return manager, lambda: (handles_of(manager), manager.batch(handles_of(manager).values()))


def find_victims() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    members = family(manager)
    return manager, lambda: manager.victims(members, 3)


SCENARIOS = [
    allocate_cold, allocate_hit, allocate_revived, allocate_evicting,
    append_growing, append_in_place, append_evicting, append_batch_under_quotas, append_speculative,
    accept_speculative, fork_many, swap_out, swap_out_in_part, swap_in, swap_in_evicting,
    swap_in_under_quotas, shrink, name_all, find_victims,
]  # fmt: skip
