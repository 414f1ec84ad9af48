"""The operations of the simulator and the state machine on a kvpager manager.

A new operation is a function with the decorator: its weight, the methods that the manager needs,
and the kinds of its arguments. It makes the call, applies the plan to `world.memory`, and adds the
touched sequences to `world.touched`, to be read back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvpager.errors import KVPagerError, SequenceSwapped, StaleSequence
from kvpager.testing.histories import (
    Choice,
    Many,
    Number,
    Pick,
    Table,
    Tokens,
    Violation,
    operation,
)
from kvpager.testing.manager_harness import Live, World
from kvpager.testing.memory import Content

OPERATIONS: Table = {}

PICK = Pick()
FLAG = Choice((False, True))


def begin(world: World, handle: Any, content: Content, num_known: int) -> Live:
    """Add a new sequence, and write its tokens that were not cached. O(tokens)."""
    num_cached = handle.num_cached_tokens
    if not 0 <= num_cached <= max(len(content) - 1, 0):
        raise Violation("last token", f"{num_cached} of {len(content)} tokens reported as cached")
    if num_cached:
        if content.values[num_cached - 1] not in world.published:
            raise Violation(
                "nothing before commit",
                f"{num_cached} tokens of {content.tokens} were reused, but never committed in "
                f"full blocks under {content.namespace!r}",
            )
        world.counts["hits"] += 1
    row = Live(handle, content, num_known, num_cached)
    world.rows.append(row)
    world.touched.append(row)
    world.copied(handle)
    world.write(row, num_cached, world.manager.slots(handle, num_cached))
    return row


@operation(OPERATIONS, 5, tokens=Tokens(), namespace=Number())
def allocate(world: World, tokens: list[int], namespace: int) -> None:
    """Begin a sequence of known tokens."""
    name = world.setup.namespaces[namespace % len(world.setup.namespaces)]
    make_room(world)
    most = world.blocks(len(tokens))
    handle = world.attempt(most, world.manager.allocate, tokens, namespace=name)
    if handle is not None:
        begin(world, handle, Content(name, tokens), len(tokens))


def make_room(world: World, count: int = 1) -> None:
    """Free the oldest sequences if there are too many to read back each time."""
    while len(world.rows) + count > world.setup.num_sequences_max:
        row = world.rows[0]
        world.manager.free(row.handle)
        world.forget(row)


@operation(OPERATIONS, 1, count=Number(18))
def allocate_unknown(world: World, count: int) -> None:
    """Begin a sequence of `count` tokens of unknown ids."""
    make_room(world)
    prompt: Any = count or []  # no tokens is an empty prompt, not a count
    handle = world.attempt(world.blocks(count), world.manager.allocate, prompt)
    if handle is not None:
        begin(world, handle, Content(None, world.fresh_tokens(count)), 0)


@operation(
    OPERATIONS,
    8,
    picks=Many(PICK, most=3),
    new=Many(Tokens(4), most=3),
    by_ids=FLAG,
    as_batch=FLAG,
)
def append(
    world: World, picks: list[int], new: list[list[int]], by_ids: bool, as_batch: bool
) -> None:
    """Append to a batch of sequences, by ids or by counts."""
    rows = list(dict.fromkeys(filter(None, map(world.pick_resident, picks))))
    if not rows:
        return
    tokens = [new[at % len(new)] for at in range(len(rows))]
    if by_ids:
        options: dict[str, Any] = {"tokens": tokens}
    else:
        options = {"counts": [len(ids) for ids in tokens]}
        tokens = [world.fresh_tokens(len(ids)) for ids in tokens]
    # One block more for each sequence, for the copy of a shared tail.
    most = sum(1 + world.blocks(len(ids)) for ids in tokens)
    target: Any = [row.handle for row in rows]
    if as_batch and hasattr(world.manager, "batch"):
        target = world.manager.batch(target)
    step = world.attempt(most, world.manager.append, target, **options)
    world.touched += rows
    if step is None:
        return
    world.copied(step)
    start = 0
    for row, ids in zip(rows, tokens, strict=True):
        first = len(row.content)
        row.content.extend(ids)
        if by_ids and row.num_known == first:
            row.num_known += len(ids)
        world.write(row, first, step.slots[start : start + len(ids)])
        start += len(ids)
    world.require("a slot for each token", start == len(step.slots), "slots are left over")


@operation(OPERATIONS, 2, needs=("fork",), pick=PICK, count=Number(2))
def fork(world: World, pick: int, count: int) -> None:
    """Fork a sequence once or several times."""
    row = world.pick_resident(pick)
    if row is None or len(world.rows) + count >= world.setup.num_sequences_max:
        return
    free = world.manager.num_free_blocks
    children = [row.child(handle) for handle in world.manager.fork(row.handle, count + 1)]
    world.rows += children
    world.touched += [row, *children]
    world.require("a fork takes no block", world.manager.num_free_blocks == free, "it did")


@operation(OPERATIONS, 5, pick=PICK)
def free(world: World, pick: int) -> None:
    """End a sequence."""
    row = world.pick(pick)
    if row is not None:
        world.manager.free(row.handle)
        world.forget(row)


@operation(OPERATIONS, 4, needs=("commit",), pick=PICK, length=Number(), whole=FLAG)
def commit(world: World, pick: int, length: int, whole: bool) -> None:
    """Commit a sequence, wholly or in part."""
    row = world.pick_resident(pick)
    if row is None:
        return
    number = len(row.content) if whole else length % (len(row.content) + 1)
    world.publish(row, number)
    world.manager.commit(row.handle, None if whole else number)
    world.touched.append(row)


@operation(OPERATIONS, 2, needs=("truncate",), pick=PICK, length=Number())
def truncate(world: World, pick: int, length: int) -> None:
    """Truncate a sequence, but not into its dropped blocks."""
    row = world.pick_resident(pick)
    if row is None:
        return
    length %= len(row.content) + 1
    world.touched.append(row)
    if length < row.start // world.size * world.size:
        refused(world, ValueError, lambda: world.manager.truncate(row.handle, length))
        return
    world.manager.truncate(row.handle, length)
    row.content.truncate(length)
    row.num_known = min(row.num_known, length)
    row.num_committed = min(row.num_committed, length)
    row.start = min(row.start, length)


@operation(OPERATIONS, 1, needs=("drop_before",), pick=PICK, start=Number())
def drop_before(world: World, pick: int, start: int) -> None:
    """Drop the blocks before a token, as a window does."""
    row = world.pick_resident(pick)
    if row is not None:
        start %= len(row.content) + 1
        world.manager.drop_before(row.handle, start)
        row.start = max(start, row.start)
        world.touched.append(row)


@operation(OPERATIONS, 3, needs=("swap",), pick=PICK, later=FLAG)
def swap(world: World, pick: int, later: bool) -> None:
    """Move a sequence to the host, or back."""
    row = world.pick(pick)
    if row is None:
        return
    to = "device" if row.is_swapped else "host"
    most = world.manager.num_blocks + 1  # the host may always refuse: it is not modelled
    plan = world.attempt(most, world.manager.swap, row.handle, to)
    if plan is not None:
        world.carry_out(plan, later)
        row.is_swapped = to == "host"
        world.num_swapped += 1 if row.is_swapped else -1
    world.touched.append(row)


@operation(OPERATIONS, 0.1, needs=("grow",), extra=Number(3))
def grow(world: World, extra: int) -> None:
    """Raise the pool by a few blocks, up to twice its first size."""
    num_blocks = world.manager.num_blocks + extra
    if num_blocks <= 2 * world.setup.num_blocks:
        world.manager.grow(num_blocks)
        world.memory.resize(num_blocks)


@operation(OPERATIONS, 0.1, needs=("clear_prefix_cache",))
def clear_prefix_cache(world: World) -> None:
    """Evict all cached blocks that no sequence holds."""
    cached = world.manager.stats().num_cached
    dropped = world.manager.clear_prefix_cache()
    left = world.manager.stats().num_cached
    world.require(
        "all cached are dropped", dropped == cached and not left, f"{dropped} of {cached}"
    )


@operation(OPERATIONS, 1, needs=("commit",), pick=PICK)
def reuse(world: World, pick: int) -> None:
    """Commit a sequence and allocate its tokens again: all full blocks are hits."""
    row = world.pick_resident(pick)
    if (
        row is None
        or row.start
        or not row.is_plain
        or len(world.rows) >= world.setup.num_sequences_max
    ):
        return
    world.publish(row, len(row.content))
    world.manager.commit(row.handle)
    tokens = [*row.content.tokens[: row.num_known], 0]
    most = world.blocks(len(tokens))
    name = row.content.namespace
    handle = world.attempt(most, world.manager.allocate, tokens, namespace=name)
    if handle is None:
        return
    begin(world, handle, Content(name, tokens), len(tokens))
    full = row.num_known // world.size * world.size
    world.require(
        "what is committed is reused",
        handle.num_cached_tokens >= full,
        f"{handle.num_cached_tokens} of {full} tokens in full blocks",
    )


@operation(
    OPERATIONS, 1, pick=PICK, verb=Choice(("append", "block_tables", "commit", "fork", "free"))
)
def use_freed(world: World, pick: int, verb: str) -> None:
    """Use a freed handle: every verb refuses it."""
    if world.freed:
        handle = world.freed[pick % len(world.freed)]
        refused(world, StaleSequence, lambda: getattr(world.manager, verb)(handle))


@operation(OPERATIONS, 1, pick=PICK, number=Number(3))
def misuse(world: World, pick: int, number: int) -> None:
    """Make an invalid call: it is refused."""
    row, manager = world.pick(pick), world.manager
    if row is None:
        return
    handle, beyond = row.handle, len(row.content) + 1
    world.touched.append(row)
    if row.is_swapped:
        verb = (manager.append, manager.commit, manager.fork, manager.slots)[number]
        refused(world, SequenceSwapped, lambda: verb(handle))
    elif number == 0:
        refused(world, ValueError, lambda: manager.append([handle, handle], 1))
    elif number == 1:
        refused(world, ValueError, lambda: manager.commit(handle, beyond))
    elif number == 2:
        refused(world, ValueError, lambda: manager.truncate(handle, beyond))
    else:
        refused(world, ValueError, lambda: manager.swap(handle, "moon"))


def refused(world: World, expected: type[Exception], call: Callable[[], object]) -> None:
    """Make a call that must raise `expected` and change nothing."""
    before = world.state()
    try:
        call()
    except expected:
        world.require("refusal changes nothing", world.state() == before, "it did")
        return
    except (KVPagerError, ValueError, TypeError) as error:
        world.require("a refusal of its kind", False, f"{error!r}, not {expected.__name__}")
    world.require("a refusal of its kind", False, f"accepted, not {expected.__name__}")
