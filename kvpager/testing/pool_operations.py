"""The simulator's operations on blocks: tiers, loans, pool size, pins, quotas; invalid calls."""

from __future__ import annotations

from kvpager.blocks.manager import BlockManager
from kvpager.blocks.sequences import SequenceHandle
from kvpager.errors import SequenceSwapped, StaleSequence
from kvpager.testing.histories import Choice, Many, Number, Pick, Table, operation
from kvpager.testing.manager_harness import LiveSequence, ManagerHarness
from kvpager.testing.operations import FLAG, LIVE, SETTLED, refused

POOL_OPERATIONS: Table = {}

# -------------------------------------------------------------------- swaps, preemption


@operation(POOL_OPERATIONS, 3, needs=("swap",), pick=LIVE, later=FLAG)
def swap(harness: ManagerHarness, row: LiveSequence, later: bool) -> None:
    """Move a sequence to the host, or back."""
    to = "device" if row.is_swapped else "host"
    most = harness.manager.num_blocks + 1  # the host may always refuse: it is not modelled
    plan = harness.attempt(most, harness.manager.swap, row.handle, to)
    if plan is not None:
        harness.carry_out(plan, later)
        row.is_swapped = to == "host"


@operation(
    POOL_OPERATIONS, 2, needs=("victims",), picks=Many(LIVE, most=5), number=Number(), later=FLAG
)
def swap_some(harness: ManagerHarness, rows: list[LiveSequence], number: int, later: bool) -> None:
    """Swap several sequences out or in, wholly or in part."""
    to = "host" if not rows[0].is_swapped else "device"
    rows = [row for row in rows if row.is_swapped == (to == "device")]
    at_most = None if number % 3 else number % 7
    handles = [row.handle for row in rows]
    most = harness.manager.num_blocks + 1
    others = [row for row in harness.rows if not row.is_swapped and row not in rows]
    staying = {block for row in others for block in harness.table(row)} - {-1}
    before = [harness.table(row) for row in rows]
    plan = harness.attempt(most, harness.manager.swap, handles, to, at_most=at_most)
    if plan is None:
        return
    for row, table in zip(rows, before, strict=True):
        now = harness.table(row)
        kept = all(new == old for old, new in zip(table, now, strict=True) if old in staying)
        harness.require("shared blocks stay", kept, f"{table} became {now}, others hold {staying}")
    if at_most is not None:
        harness.require("at_most is respected", len(plan) <= at_most, f"{len(plan)} of {at_most}")
    harness.carry_out(plan, later)
    for row in rows:
        is_away = -1 in harness.table(row)[row.start // harness.size :]
        row.is_swapped = to == "host" or is_away


@operation(POOL_OPERATIONS, 1, needs=("victims",), need=Number(12))
def preempt(harness: ManagerHarness, need: int) -> None:
    """Free the oldest sequences until `need` blocks are free; publish them first."""
    rows = [row for row in harness.rows if not (row.is_swapped or row.num_speculative)]
    handles = [row.handle for row in rows]
    victims = harness.attempt(1 << 30, harness.manager.victims, handles, need)
    if victims is None:
        return
    chosen = rows[: len(victims)]
    held = harness.manager.num_held_blocks
    for row in chosen:
        harness.publish(row, len(row.content))
    harness.manager.free(victims, publish=True)
    for row in chosen:
        harness.forget(row)
    freed = held - harness.manager.num_held_blocks
    harness.require("victims free enough", freed >= need, f"{freed} of {need} blocks")


@operation(POOL_OPERATIONS, 0.5, needs=("host",), number=Number())
def lend(harness: ManagerHarness, number: int) -> None:
    """Lend the free host blocks to a borrower, which cannot spare some of them."""
    harness.lend()
    harness.borrower.num_busy = number % (len(harness.borrower.blocks) + 1)


# -------------------------------------------------------------------- pool size, cache


@operation(POOL_OPERATIONS, 0.1, needs=("grow",), extra=Number(3))
def grow(harness: ManagerHarness, extra: int) -> None:
    """Raise the pool by a few blocks, up to twice its first size."""
    num_blocks = harness.manager.num_blocks + extra
    if num_blocks <= 2 * harness.setup.num_blocks:
        harness.manager.grow(num_blocks)
        harness.memory.resize(num_blocks)


@operation(POOL_OPERATIONS, 0.2, needs=("shrink",), number=Number())
def shrink(harness: ManagerHarness, number: int) -> None:
    """Lower the pool, down to half its first size."""
    least = max(harness.setup.num_blocks // 2, 1 + harness.setup.null_block)
    num_blocks = least + number % (harness.manager.num_blocks - least + 1)
    harness.complete_all()
    try:
        plan = harness.attempt(1 << 30, harness.manager.shrink, num_blocks)
    except ValueError:
        return  # a block of the cut part is pinned
    if plan is not None:
        harness.carry_out(plan)
        harness.memory.resize(num_blocks)
        harness.touched += harness.rows


@operation(POOL_OPERATIONS, 0.1, needs=("clear_prefix_cache",))
def clear_prefix_cache(harness: ManagerHarness) -> None:
    """Evict all cached blocks that no sequence holds."""
    cached = harness.manager.stats().num_cached
    dropped = harness.manager.clear_prefix_cache()
    left = harness.manager.stats().num_cached
    message = f"{dropped} of {cached} evicted"
    harness.require("clearing evicts all", dropped == cached and not left, message)


# -------------------------------------------------------------------- pins, fences, quotas


@operation(POOL_OPERATIONS, 1, needs=("pins",), pick=Pick(), number=Number())
def pin(harness: ManagerHarness, pick: int, number: int) -> None:
    """Pin a sequence's prefix, or unpin one."""
    pins = harness.manager.pins
    if len(harness.pins) < 3 and number % 2:
        row = harness.pick(pick, "settled")
        try:
            harness.pins += [] if row is None else [pins.pin(row.handle)]
        except ValueError:  # floors need the blocks
            has_quotas = harness.setup.quotas
            harness.require("a pin is refused only for floors", has_quotas, "no floor is set")
    elif harness.pins:
        ticket = harness.pins.pop(number % len(harness.pins))
        pins.unpin(ticket)
        refused(harness, ValueError, lambda: pins.unpin(ticket))


@operation(POOL_OPERATIONS, 0.3, needs=("copies",))
def complete(harness: ManagerHarness) -> None:
    """Make and complete all pending copies."""
    harness.complete_all()


@operation(POOL_OPERATIONS, 0.3, needs=("quotas",), pick=Number(), floor=Number(6), more=Number(12))
def quota(harness: ManagerHarness, pick: int, floor: int, more: int) -> None:
    """Set or remove the quota of a namespace."""
    if not harness.setup.quotas:
        return
    namespace = harness.setup.namespaces[pick % len(harness.setup.namespaces)]
    ceiling = None if more % 3 == 0 else max(floor + more, 1)
    try:
        if more == 12:
            harness.manager.quotas.drop(namespace)
        else:
            harness.manager.quotas.set(namespace, floor=floor, ceiling=ceiling)
    except ValueError:
        harness.counts["refused"] += 1


@operation(POOL_OPERATIONS, 0.5, needs=("pins",), pick=SETTLED, priority=Number(100), ends=FLAG)
def retain(harness: ManagerHarness, row: LiveSequence, priority: int, ends: bool) -> None:
    """Retain a sequence's prefix by priority, without a time to live or with 0 seconds."""
    given = row.handle, priority, 0.0 if ends else None
    if harness.setup.eviction == "priority":
        harness.manager.pins.retain(*given)
    else:
        refused(harness, ValueError, lambda: harness.manager.pins.retain(*given))


# -------------------------------------------------------------------- invalid calls


@operation(
    POOL_OPERATIONS,
    1,
    pick=Pick(),
    verb=Choice(("append", "block_tables", "commit", "fork", "free")),
)
def use_freed(harness: ManagerHarness, pick: int, verb: str) -> None:
    """Use a freed handle: every verb refuses it."""
    if harness.freed:
        handle = harness.freed[pick % len(harness.freed)]
        refused(harness, StaleSequence, lambda: getattr(harness.manager, verb)(handle))


@operation(POOL_OPERATIONS, 1, pick=LIVE, number=Number(3))
def misuse(harness: ManagerHarness, row: LiveSequence, number: int) -> None:
    """Make an invalid call: it is refused."""
    manager, handle, beyond = harness.manager, row.handle, len(row.content) + 1
    if row.is_swapped:
        verb = (manager.append, manager.commit, manager.fork, manager.slots)[number]
        refused(harness, SequenceSwapped, lambda: verb(handle))
        return
    calls = (
        lambda: manager.append([handle, handle], 1),
        lambda: manager.commit(handle, beyond),
        lambda: manager.truncate(handle, beyond),
        lambda: manager.swap(handle, "moon"),
    )
    refused(harness, ValueError, calls[number])


@operation(
    POOL_OPERATIONS, 0.1, needs=("victims",), pick=LIVE, verb=Choice(("append", "free", "fork"))
)
def foreign(harness: ManagerHarness, row: LiveSequence, verb: str) -> None:
    """Use a handle of another manager with the same row: it is refused."""
    other = BlockManager(harness.setup.num_blocks, harness.setup.block_size)
    handle = SequenceHandle(other._state, row.handle._row, row.handle._generation)
    refused(harness, StaleSequence, lambda: getattr(harness.manager, verb)(handle))


@operation(POOL_OPERATIONS, 0.5, needs=("batch",), picks=Many(SETTLED, least=2, most=3))
def use_old_batch(harness: ManagerHarness, rows: list[LiveSequence]) -> None:
    """Step a batch, free one of its sequences, step it again: it is refused."""
    batch = harness.manager.batch([row.handle for row in rows])
    harness.manager.append(batch, counts=0)
    harness.free(rows[0])
    refused(harness, StaleSequence, lambda: harness.manager.append(batch, counts=0))
