"""More operations of the simulator: speculative tokens, key parts, swaps, pool size, pins."""

from __future__ import annotations

from typing import Any

from kvpager.blocks.manager import BlockManager
from kvpager.blocks.sequences import SequenceHandle
from kvpager.errors import StaleSequence
from kvpager.testing.histories import Choice, Many, Number, Tokens, operation
from kvpager.testing.manager_harness import LiveSequence, ManagerHarness
from kvpager.testing.memory import Content
from kvpager.testing.operations import FLAG, OPERATIONS, PICK, begin, make_room, refused

__all__ = ["OPERATIONS"]

# -------------------------------------------------------------------- speculative tokens


@operation(OPERATIONS, 2, needs=("accept",), pick=PICK, tokens=Tokens(5), by_ids=FLAG)
def append_speculative(harness: ManagerHarness, pick: int, tokens: list[int], by_ids: bool) -> None:
    """Append speculative tokens to a sequence, by ids or by a count."""
    row = harness.pick_speculating(pick) or harness.pick_resident(pick)
    if row is None or not tokens:
        return
    first = len(row.content)
    new = tokens if by_ids else harness.fresh_tokens(len(tokens))
    most = 1 + harness.blocks(len(tokens))
    given: Any = tokens if by_ids else len(tokens)
    step = harness.attempt(most, harness.manager.append, row.handle, given, speculative=True)
    harness.touched.append(row)
    if step is None:
        return
    harness.make_copies(step)
    row.content.extend(new)
    if by_ids and row.num_known == first:
        row.num_known += len(new)
    harness.num_speculating += not row.num_speculative
    row.num_speculative += len(new)
    harness.write(row, first, step.slots)


@operation(OPERATIONS, 2, needs=("accept",), pick=PICK, number=Number())
def accept(harness: ManagerHarness, pick: int, number: int) -> None:
    """Commit, which publishes no speculative token; then accept some of them and drop others."""
    row = harness.pick_speculating(pick)
    if row is None:
        return
    settled = len(row.content) - row.num_speculative
    kept = number % (row.num_speculative + 1)
    if settled + kept < row.start // harness.size * harness.size:
        kept = row.num_speculative  # fewer would end in the dropped blocks
    harness.publish(row, settled)
    harness.manager.commit(row.handle)
    refused(harness, ValueError, lambda: harness.manager.append(row.handle, 1))
    refused(harness, ValueError, lambda: harness.manager.commit(row.handle, settled + 1))
    refused(
        harness, ValueError, lambda: harness.manager.accept(row.handle, row.num_speculative + 1)
    )
    harness.manager.accept(row.handle, kept)
    row.content.truncate(settled + kept)
    row.num_known = min(row.num_known, settled + kept)
    row.start = min(row.start, settled + kept)
    row.num_speculative = 0
    harness.num_speculating -= 1
    harness.touched.append(row)


# -------------------------------------------------------------------- parts of the key


@operation(
    OPERATIONS,
    3,
    needs=("accept",),
    tokens=Tokens(),
    lora=Choice((None, " ", "a", "acme")),
    shown=Many(Number(20), least=0, most=3),
)
def allocate_multimodal(
    harness: ManagerHarness, tokens: list[int], lora: str | None, shown: list[int]
) -> None:
    """Begin a sequence under a LoRA, in which images replace some tokens."""
    mm_hashes, seen, start = [], list(tokens), 0
    for number in shown:
        stop = start + 1 + number % 5
        if stop > len(tokens):
            break
        digest = bytes([number % 2])
        mm_hashes.append((start, stop, digest))
        seen[start:stop] = [token + 1000 * (1 + number % 2) for token in tokens[start:stop]]
        start = stop + number % 3
    make_room(harness)
    options = {"namespace": "multimodal", "lora": lora, "mm_hashes": mm_hashes}
    handle = harness.attempt(
        harness.blocks(len(tokens)), harness.manager.allocate, tokens, **options
    )
    if handle is not None:
        # No other operation uses this namespace.
        content = Content(f"multimodal under {lora!r}", seen)
        begin(harness, handle, content, len(tokens)).is_plain = False


@operation(
    OPERATIONS, 0.3, needs=("clear_prefix_cache",), front=Tokens(), tails=Many(Tokens(), 3, 3)
)
def replace_duplicate(harness: ManagerHarness, front: list[int], tails: list[list[int]]) -> None:
    """Evict the published blocks of two equal sequences; the duplicate continues."""
    if harness.setup.quotas or len(harness.rows) + 4 > harness.setup.num_sequences_max:
        return
    front = front + [0] * (-len(front) % harness.size)
    before = len(harness.rows)
    for tail in ([], tails[0], tails[0]):
        tokens = front + tail
        handle = harness.attempt(harness.blocks(len(tokens)), harness.manager.allocate, tokens)
        if handle is None:
            return
        begin(harness, handle, Content(None, tokens), len(tokens))
        if not tail:
            _commit(harness, harness.rows[-1])
    leaver, duplicate = harness.rows[before + 1 :]
    _commit(harness, leaver)
    _commit(harness, duplicate)
    harness.manager.free(leaver.handle)
    harness.forget(leaver)
    harness.touched.remove(leaver)
    harness.manager.clear_prefix_cache()
    tokens = front + tails[1]
    handle = harness.attempt(harness.blocks(len(tokens)), harness.manager.allocate, tokens)
    if handle is None:
        return
    begin(harness, handle, Content(None, tokens), len(tokens))
    _commit(harness, harness.rows[-1])
    most = 1 + harness.blocks(len(tails[2]))
    step = harness.attempt(most, harness.manager.append, duplicate.handle, tails[2])
    if step is not None:
        harness.make_copies(step)
        first = len(duplicate.content)
        duplicate.content.extend(tails[2])
        duplicate.num_known += len(tails[2])
        harness.write(duplicate, first, step.slots)
        _commit(harness, duplicate)
        harness.manager.check()


def _commit(harness: ManagerHarness, row: LiveSequence) -> None:
    harness.publish(row, len(row.content))
    harness.manager.commit(row.handle)


# -------------------------------------------------------------------- swaps, preemption


@operation(OPERATIONS, 2, needs=("victims",), picks=Many(PICK, most=5), number=Number(), later=FLAG)
def swap_some(harness: ManagerHarness, picks: list[int], number: int, later: bool) -> None:
    """Swap several sequences out or in, wholly or in part."""
    rows = list(dict.fromkeys(filter(None, map(harness.pick, picks))))
    if not rows:
        return
    to = "host" if not rows[0].is_swapped else "device"
    rows = [row for row in rows if row.is_swapped == (to == "device")]
    at_most = None if number % 3 else number % 7
    handles = [row.handle for row in rows]
    most = harness.manager.num_blocks + 1
    others = [row for row in harness.rows if not row.is_swapped and row not in rows]
    staying = {
        block for row in others for block in harness.manager.block_tables(row.handle)[0].tolist()
    }
    before = [harness.manager.block_tables(row.handle)[0].tolist() for row in rows]
    plan = harness.attempt(most, harness.manager.swap, handles, to, at_most=at_most)
    harness.touched += rows
    if plan is None:
        return
    for row, table in zip(rows, before, strict=True):
        now = harness.manager.block_tables(row.handle)[0].tolist()
        kept = all(new == old for old, new in zip(table, now, strict=True) if old in staying - {-1})
        harness.require("shared blocks stay", kept, f"{table} became {now}, others hold {staying}")
    if at_most is not None:
        harness.require("at_most is respected", len(plan) <= at_most, f"{len(plan)} of {at_most}")
    harness.carry_out(plan, later)
    for row in rows:
        row.is_swapped = to == "host" or _is_away(harness, row)
    harness.num_swapped = sum(row.is_swapped for row in harness.rows)


def _is_away(harness: ManagerHarness, row: LiveSequence) -> bool:
    table = harness.manager.block_tables(row.handle)[0]
    return bool((table[row.start // harness.size :] < 0).any())


@operation(OPERATIONS, 1, needs=("victims",), need=Number(12))
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


# -------------------------------------------------------------------- pool size


@operation(OPERATIONS, 0.2, needs=("shrink",), number=Number())
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


@operation(OPERATIONS, 1, needs=("pins",), pick=PICK, number=Number())
def pin(harness: ManagerHarness, pick: int, number: int) -> None:
    """Pin a sequence's prefix, or unpin one."""
    if len(harness.pins) < 3 and number % 2:
        row = harness.pick_resident(pick)
        if row is not None:
            try:
                harness.pins.append(harness.manager.pins.pin(row.handle))
            except ValueError:  # floors need the blocks
                harness.require(
                    "a pin is refused only for floors", harness.setup.quotas, "no floor is set"
                )
    elif harness.pins:
        ticket = harness.pins.pop(number % len(harness.pins))
        harness.manager.pins.unpin(ticket)
        refused(harness, ValueError, lambda: harness.manager.pins.unpin(ticket))


@operation(OPERATIONS, 0.3, needs=("copies",))
def complete(harness: ManagerHarness) -> None:
    """Make and complete all pending copies."""
    harness.complete_all()


@operation(OPERATIONS, 0.3, needs=("quotas",), pick=Number(), floor=Number(6), more=Number(12))
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


@operation(OPERATIONS, 0.5, needs=("pins",), pick=PICK, priority=Number(100), ends=FLAG)
def retain(harness: ManagerHarness, pick: int, priority: int, ends: bool) -> None:
    """Retain a sequence's prefix by priority, without a time to live or with 0 seconds."""
    row = harness.pick_resident(pick)
    if row is None:
        return
    ttl_s = 0.0 if ends else None
    if harness.setup.eviction == "priority":
        harness.manager.pins.retain(row.handle, priority, ttl_s)
    else:
        refused(
            harness, ValueError, lambda: harness.manager.pins.retain(row.handle, priority, ttl_s)
        )


# -------------------------------------------------------------------- handles


@operation(OPERATIONS, 0.1, needs=("victims",), pick=PICK, verb=Choice(("append", "free", "fork")))
def foreign(harness: ManagerHarness, pick: int, verb: str) -> None:
    """Use a handle of another manager with the same row: it is refused."""
    row = harness.pick(pick)
    if row is not None:
        other = harness.setup.num_blocks, harness.setup.block_size
        mine = row.handle
        handle = SequenceHandle(BlockManager(*other)._state, mine._row, mine._generation)
        refused(harness, StaleSequence, lambda: getattr(harness.manager, verb)(handle))


@operation(OPERATIONS, 0.5, needs=("batch",), picks=Many(PICK, least=2, most=3))
def use_old_batch(harness: ManagerHarness, picks: list[int]) -> None:
    """Step a batch, free one of its sequences, step it again: it is refused."""
    rows = list(dict.fromkeys(filter(None, map(harness.pick_resident, picks))))
    if not rows:
        return
    batch = harness.manager.batch([row.handle for row in rows])
    harness.manager.append(batch, counts=0)
    harness.manager.free(rows[0].handle)
    harness.forget(rows[0])
    refused(harness, StaleSequence, lambda: harness.manager.append(batch, counts=0))
