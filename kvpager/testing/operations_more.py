"""More operations of the simulator: speculative tokens, key parts, swaps, pool size."""

from __future__ import annotations

from typing import Any

from kvpager.blocks.manager import BlockManager
from kvpager.blocks.sequences import SequenceHandle
from kvpager.errors import StaleSequence
from kvpager.testing.histories import Choice, Many, Number, Tokens, operation
from kvpager.testing.manager_harness import Live, World
from kvpager.testing.memory import Content
from kvpager.testing.operations import FLAG, OPERATIONS, PICK, begin, make_room, refused

__all__ = ["OPERATIONS"]

# -------------------------------------------------------------------- speculative tokens


@operation(OPERATIONS, 2, needs=("accept",), pick=PICK, tokens=Tokens(5), by_ids=FLAG)
def append_speculative(world: World, pick: int, tokens: list[int], by_ids: bool) -> None:
    """Append speculative tokens to a sequence, by ids or by a count."""
    row = world.pick_speculating(pick) or world.pick_resident(pick)
    if row is None or not tokens:
        return
    first = len(row.content)
    new = tokens if by_ids else world.fresh_tokens(len(tokens))
    most = 1 + world.blocks(len(tokens))
    given: Any = tokens if by_ids else len(tokens)
    step = world.attempt(most, world.manager.append, row.handle, given, speculative=True)
    world.touched.append(row)
    if step is None:
        return
    world.copied(step)
    row.content.extend(new)
    if by_ids and row.num_known == first:
        row.num_known += len(new)
    world.num_speculating += not row.num_speculative
    row.num_speculative += len(new)
    world.write(row, first, step.slots)


@operation(OPERATIONS, 2, needs=("accept",), pick=PICK, number=Number())
def accept(world: World, pick: int, number: int) -> None:
    """Commit, which publishes no speculative token, then keep some of them and drop the rest."""
    row = world.pick_speculating(pick)
    if row is None:
        return
    settled = len(row.content) - row.num_speculative
    kept = number % (row.num_speculative + 1)
    if settled + kept < row.start // world.size * world.size:
        kept = row.num_speculative  # the dropped blocks forbid fewer
    world.publish(row, settled)
    world.manager.commit(row.handle)
    refused(world, ValueError, lambda: world.manager.append(row.handle, 1))
    refused(world, ValueError, lambda: world.manager.commit(row.handle, settled + 1))
    refused(world, ValueError, lambda: world.manager.accept(row.handle, row.num_speculative + 1))
    world.manager.accept(row.handle, kept)
    row.content.truncate(settled + kept)
    row.num_known = min(row.num_known, settled + kept)
    row.start = min(row.start, settled + kept)
    row.num_speculative = 0
    world.num_speculating -= 1
    world.touched.append(row)


# -------------------------------------------------------------------- parts of the key


@operation(
    OPERATIONS,
    3,
    needs=("accept",),
    tokens=Tokens(),
    lora=Choice((None, " ", "a", "acme")),
    shown=Many(Number(20), least=0, most=3),
)
def allocate_shown(world: World, tokens: list[int], lora: str | None, shown: list[int]) -> None:
    """Begin a sequence under a LoRA, with images behind some of its tokens."""
    mm_hashes, seen, start = [], list(tokens), 0
    for number in shown:
        stop = start + 1 + number % 5
        if stop > len(tokens):
            break
        digest = bytes([number % 2])
        mm_hashes.append((start, stop, digest))
        seen[start:stop] = [token + 1000 * (1 + number % 2) for token in tokens[start:stop]]
        start = stop + number % 3
    make_room(world)
    options = {"namespace": "shown", "lora": lora, "mm_hashes": mm_hashes}
    handle = world.attempt(world.blocks(len(tokens)), world.manager.allocate, tokens, **options)
    if handle is not None:
        # No setup has a namespace of that name.
        content = Content(f"shown under {lora!r}", seen)
        begin(world, handle, content, len(tokens)).is_plain = False


@operation(
    OPERATIONS, 0.3, needs=("clear_prefix_cache",), front=Tokens(), tails=Many(Tokens(), 3, 3)
)
def replace_twin(world: World, front: list[int], tails: list[list[int]]) -> None:
    """Evict the published blocks of two equal sequences; the duplicate continues."""
    if world.setup.quotas or len(world.rows) + 4 > world.setup.num_sequences_max:
        return
    front = front + [0] * (-len(front) % world.size)
    before = len(world.rows)
    for tail in ([], tails[0], tails[0]):
        tokens = front + tail
        handle = world.attempt(world.blocks(len(tokens)), world.manager.allocate, tokens)
        if handle is None:
            return
        begin(world, handle, Content(None, tokens), len(tokens))
        if not tail:
            _commit(world, world.rows[-1])
    leaver, duplicate = world.rows[before + 1 :]
    _commit(world, leaver)
    _commit(world, duplicate)
    world.manager.free(leaver.handle)
    world.forget(leaver)
    world.touched.remove(leaver)
    world.manager.clear_prefix_cache()
    tokens = front + tails[1]
    handle = world.attempt(world.blocks(len(tokens)), world.manager.allocate, tokens)
    if handle is None:
        return
    begin(world, handle, Content(None, tokens), len(tokens))
    _commit(world, world.rows[-1])
    most = 1 + world.blocks(len(tails[2]))
    step = world.attempt(most, world.manager.append, duplicate.handle, tails[2])
    if step is not None:
        world.copied(step)
        first = len(duplicate.content)
        duplicate.content.extend(tails[2])
        duplicate.num_known += len(tails[2])
        world.write(duplicate, first, step.slots)
        _commit(world, duplicate)
        world.manager.check()


def _commit(world: World, row: Live) -> None:
    world.publish(row, len(row.content))
    world.manager.commit(row.handle)


# -------------------------------------------------------------------- swaps, preemption


@operation(OPERATIONS, 2, needs=("victims",), picks=Many(PICK, most=5), number=Number(), later=FLAG)
def swap_some(world: World, picks: list[int], number: int, later: bool) -> None:
    """Swap several sequences out or in, wholly or in part."""
    rows = list(dict.fromkeys(filter(None, map(world.pick, picks))))
    if not rows:
        return
    to = "host" if not rows[0].is_swapped else "device"
    rows = [row for row in rows if row.is_swapped == (to == "device")]
    at_most = None if number % 3 else number % 7
    handles = [row.handle for row in rows]
    most = world.manager.num_blocks + 1
    others = [row for row in world.rows if not row.is_swapped and row not in rows]
    staying = {
        block for row in others for block in world.manager.block_tables(row.handle)[0].tolist()
    }
    before = [world.manager.block_tables(row.handle)[0].tolist() for row in rows]
    plan = world.attempt(most, world.manager.swap, handles, to, at_most=at_most)
    world.touched += rows
    if plan is None:
        return
    for row, table in zip(rows, before, strict=True):
        now = world.manager.block_tables(row.handle)[0].tolist()
        kept = all(new == old for old, new in zip(table, now, strict=True) if old in staying - {-1})
        world.require("shared blocks stay", kept, f"{table} became {now}, others hold {staying}")
    if at_most is not None:
        world.require("no more than asked", len(plan) <= at_most, f"{len(plan)} of {at_most}")
    world.carry_out(plan, later)
    for row in rows:
        row.is_swapped = to == "host" or _is_away(world, row)
    world.num_swapped = sum(row.is_swapped for row in world.rows)


def _is_away(world: World, row: Live) -> bool:
    table = world.manager.block_tables(row.handle)[0]
    return bool((table[row.start // world.size :] < 0).any())


@operation(OPERATIONS, 1, needs=("victims",), need=Number(12))
def preempt(world: World, need: int) -> None:
    """Free the oldest sequences until `need` blocks are free; publish them first."""
    rows = [row for row in world.rows if not (row.is_swapped or row.num_speculative)]
    handles = [row.handle for row in rows]
    victims = world.attempt(1 << 30, world.manager.victims, handles, need)
    if victims is None:
        return
    chosen = rows[: len(victims)]
    held = world.manager.num_held_blocks
    for row in chosen:
        world.publish(row, len(row.content))
    world.manager.free(victims, publish=True)
    for row in chosen:
        world.forget(row)
    freed = held - world.manager.num_held_blocks
    world.require("victims free enough", freed >= need, f"{freed} of {need} blocks")


# -------------------------------------------------------------------- pool size


@operation(OPERATIONS, 0.2, needs=("shrink",), number=Number())
def shrink(world: World, number: int) -> None:
    """Lower the pool, down to half its first size."""
    least = max(world.setup.num_blocks // 2, 1 + world.setup.null_block)
    num_blocks = least + number % (world.manager.num_blocks - least + 1)
    world.complete_all()
    try:
        plan = world.attempt(1 << 30, world.manager.shrink, num_blocks)
    except ValueError:
        return  # a higher block is pinned
    if plan is not None:
        world.carry_out(plan)
        world.memory.resize(num_blocks)
        world.touched += world.rows


@operation(OPERATIONS, 1, needs=("pins",), pick=PICK, number=Number())
def pin(world: World, pick: int, number: int) -> None:
    """Pin a sequence's prefix, or end a pin."""
    if len(world.pins) < 3 and number % 2:
        row = world.pick_resident(pick)
        if row is not None:
            try:
                world.pins.append(world.manager.pins.pin(row.handle))
            except ValueError:  # floors need the blocks
                world.require("pins refused for floors", world.setup.quotas, "there is no floor")
    elif world.pins:
        ticket = world.pins.pop(number % len(world.pins))
        world.manager.pins.unpin(ticket)
        refused(world, ValueError, lambda: world.manager.pins.unpin(ticket))


@operation(OPERATIONS, 0.3, needs=("copies",))
def complete(world: World) -> None:
    """Make and complete all pending copies."""
    world.complete_all()


@operation(OPERATIONS, 0.3, needs=("quotas",), pick=Number(), floor=Number(6), more=Number(12))
def quota(world: World, pick: int, floor: int, more: int) -> None:
    """Set or remove the quota of a namespace."""
    if not world.setup.quotas:
        return
    namespace = world.setup.namespaces[pick % len(world.setup.namespaces)]
    ceiling = None if more % 3 == 0 else max(floor + more, 1)
    try:
        if more == 12:
            world.manager.quotas.drop(namespace)
        else:
            world.manager.quotas.set(namespace, floor=floor, ceiling=ceiling)
    except ValueError:
        world.counts["refused"] += 1


@operation(OPERATIONS, 0.5, needs=("pins",), pick=PICK, priority=Number(100), ends=FLAG)
def retain(world: World, pick: int, priority: int, ends: bool) -> None:
    """Retain a sequence's prefix by priority, for ever or for no time."""
    row = world.pick_resident(pick)
    if row is None:
        return
    ttl_s = 0.0 if ends else None
    if world.setup.eviction == "priority":
        world.manager.pins.retain(row.handle, priority, ttl_s)
    else:
        refused(world, ValueError, lambda: world.manager.pins.retain(row.handle, priority, ttl_s))


# -------------------------------------------------------------------- handles


@operation(OPERATIONS, 0.1, needs=("victims",), pick=PICK, verb=Choice(("append", "free", "fork")))
def foreign(world: World, pick: int, verb: str) -> None:
    """Use an equal handle of another manager: it is refused."""
    row = world.pick(pick)
    if row is not None:
        other = world.setup.num_blocks, world.setup.block_size
        mine = row.handle
        handle = SequenceHandle(BlockManager(*other)._state, mine._row, mine._generation)
        refused(world, StaleSequence, lambda: getattr(world.manager, verb)(handle))


@operation(OPERATIONS, 0.5, needs=("batch",), picks=Many(PICK, least=2, most=3))
def use_old_batch(world: World, picks: list[int]) -> None:
    """Step a batch, free one of its sequences, step it again: it is refused."""
    rows = list(dict.fromkeys(filter(None, map(world.pick_resident, picks))))
    if not rows:
        return
    batch = world.manager.batch([row.handle for row in rows])
    world.manager.append(batch, counts=0)
    world.manager.free(rows[0].handle)
    world.forget(rows[0])
    refused(world, StaleSequence, lambda: world.manager.append(batch, counts=0))
