"""Every operation that changes a manager, with a manager to run it on."""

from __future__ import annotations

from kvpager import BlockManager
from tests.support.block_histories import policy_of
from tests.support.block_scenarios import (
    SCENARIOS,
    Operation,
    committed,
    family,
    find_victims,
    full_of_cached,
    manager_with_rows,
    name_all,
)
from tests.support.clock import Clock


def free_several() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    members = family(manager)
    manager.commit(members)
    return manager, lambda: manager.free(members)


def free_published() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    members = family(manager)
    return manager, lambda: manager.free(members[:2], publish=True)


def free_swapped() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    members = family(manager)
    manager.swap(members, "host")
    return manager, lambda: manager.free(members)


def commit_batch() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows(num_events=100)
    members = [manager.allocate(range(9)), manager.allocate([*range(4), 50, 51, 52, 53])]
    return manager, lambda: manager.commit(manager.batch(members))


def commit_into_a_run() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    committed(manager, range(12))
    sequence = manager.allocate([*range(4), 50, 51, 52, 53, 54])
    return manager, lambda: manager.commit(sequence)


def commit_pictures() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = manager.allocate(range(16), mm_hashes=[(5, 7, b"cat"), (9, 14, b"dog")])
    return manager, lambda: manager.commit(sequence)


def truncate_far() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = committed(manager, range(20))
    return manager, lambda: manager.truncate(sequence, 5)


def drop_far() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    pair = [committed(manager, range(12)), manager.allocate(12)]
    return manager, lambda: manager.drop_before(pair, 9)


def complete_copies() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows(fences=True)
    sequence = committed(manager, range(12))
    plan = manager.swap(sequence, "host")
    return manager, lambda: manager.copies.complete(plan)


def pin_a_prefix() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = committed(manager, range(12))
    return manager, lambda: manager.pins.pin(sequence)


def unpin_a_prefix() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    sequence = committed(manager, range(12))
    ticket = manager.pins.pin(sequence)
    manager.free(sequence)
    return manager, lambda: manager.pins.unpin(ticket)


def retain_a_prefix() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows(eviction=policy_of("priority", 12, Clock()))
    manager.free(committed(manager, range(12)))
    sequence = manager.allocate(range(8))
    return manager, lambda: manager.pins.retain(sequence, 80, 5.0)


def set_a_quota() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    manager.free(committed(manager, range(12), "a"))
    return manager, lambda: manager.quotas.set("a", ceiling=1)


def drop_a_quota() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows()
    manager.quotas.set("a", floor=1)
    manager.free(committed(manager, range(12), "a"))
    return manager, lambda: manager.quotas.drop("a")


def clear_prefix_cache() -> tuple[BlockManager, Operation]:
    manager = full_of_cached()
    return manager, manager.clear_prefix_cache


def grow() -> tuple[BlockManager, Operation]:
    manager = full_of_cached()
    return manager, lambda: manager.grow(20)


def fetch_events() -> tuple[BlockManager, Operation]:
    manager = manager_with_rows(num_events=100)
    committed(manager, range(8))
    return manager, manager.events.fetch


CHANGES = [
    *(scenario for scenario in SCENARIOS if scenario not in (name_all, find_victims)),
    free_several, free_published, free_swapped, commit_batch, commit_into_a_run, commit_pictures,
    truncate_far, drop_far, complete_copies, pin_a_prefix, unpin_a_prefix, retain_a_prefix,
    set_a_quota, drop_a_quota, clear_prefix_cache, grow, fetch_events,
]  # fmt: skip
