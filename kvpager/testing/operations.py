"""The operations of the simulator and the state machine on a kvpager manager.

An operation is a function. Its decorator states its weight, the manager's methods that it needs,
and the kinds of its arguments. It makes the call and applies the plan to `harness.memory`. It adds
the sequences that it touched to `harness.touched`, and the harness reads them back.
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
from kvpager.testing.manager_harness import LiveSequence, ManagerHarness
from kvpager.testing.memory import Content

OPERATIONS: Table = {}

PICK = Pick()
FLAG = Choice((False, True))


def begin(harness: ManagerHarness, handle: Any, content: Content, num_known: int) -> LiveSequence:
    """Add a new sequence, and write its tokens that were not cached. O(tokens)."""
    num_cached = handle.num_cached_tokens
    if not 0 <= num_cached <= max(len(content) - 1, 0):
        raise Violation("last token", f"{num_cached} of {len(content)} tokens reported as cached")
    if num_cached:
        if content.values[num_cached - 1] not in harness.published:
            raise Violation(
                "nothing before commit",
                f"{num_cached} tokens of {content.tokens} were reused, but never committed in "
                f"full blocks under {content.namespace!r}",
            )
        harness.counts["hits"] += 1
    row = LiveSequence(handle, content, num_known, num_cached)
    harness.rows.append(row)
    harness.touched.append(row)
    harness.make_copies(handle)
    harness.write(row, num_cached, harness.manager.slots(handle, num_cached))
    return row


@operation(OPERATIONS, 5, tokens=Tokens(), namespace=Number())
def allocate(harness: ManagerHarness, tokens: list[int], namespace: int) -> None:
    """Begin a sequence of known tokens."""
    name = harness.setup.namespaces[namespace % len(harness.setup.namespaces)]
    make_room(harness)
    most = harness.blocks(len(tokens))
    handle = harness.attempt(most, harness.manager.allocate, tokens, namespace=name)
    if handle is not None:
        begin(harness, handle, Content(name, tokens), len(tokens))


def make_room(harness: ManagerHarness, count: int = 1) -> None:
    """Free the oldest sequences until there is room for `count` more."""
    while len(harness.rows) + count > harness.setup.num_sequences_max:
        row = harness.rows[0]
        harness.manager.free(row.handle)
        harness.forget(row)


@operation(OPERATIONS, 1, count=Number(18))
def allocate_unknown(harness: ManagerHarness, count: int) -> None:
    """Begin a sequence of `count` tokens of unknown ids."""
    make_room(harness)
    prompt: Any = count or []  # 0 is no valid count, but [] is a valid prompt
    handle = harness.attempt(harness.blocks(count), harness.manager.allocate, prompt)
    if handle is not None:
        begin(harness, handle, Content(None, harness.fresh_tokens(count)), 0)


@operation(
    OPERATIONS,
    8,
    picks=Many(PICK, most=3),
    new=Many(Tokens(4), most=3),
    by_ids=FLAG,
    as_batch=FLAG,
)
def append(
    harness: ManagerHarness, picks: list[int], new: list[list[int]], by_ids: bool, as_batch: bool
) -> None:
    """Append to a batch of sequences, by ids or by counts."""
    rows = list(dict.fromkeys(filter(None, map(harness.pick_resident, picks))))
    if not rows:
        return
    tokens = [new[at % len(new)] for at in range(len(rows))]
    if by_ids:
        options: dict[str, Any] = {"tokens": tokens}
    else:
        options = {"counts": [len(ids) for ids in tokens]}
        tokens = [harness.fresh_tokens(len(ids)) for ids in tokens]
    # One block more for each sequence, for the copy of a shared tail.
    most = sum(1 + harness.blocks(len(ids)) for ids in tokens)
    target: Any = [row.handle for row in rows]
    if as_batch and hasattr(harness.manager, "batch"):
        target = harness.manager.batch(target)
    step = harness.attempt(most, harness.manager.append, target, **options)
    harness.touched += rows
    if step is None:
        return
    harness.make_copies(step)
    start = 0
    for row, ids in zip(rows, tokens, strict=True):
        first = len(row.content)
        row.content.extend(ids)
        if by_ids and row.num_known == first:
            row.num_known += len(ids)
        harness.write(row, first, step.slots[start : start + len(ids)])
        start += len(ids)
    harness.require("a slot for each token", start == len(step.slots), "slots are left over")


@operation(OPERATIONS, 2, needs=("fork",), pick=PICK, count=Number(2))
def fork(harness: ManagerHarness, pick: int, count: int) -> None:
    """Fork a sequence once or several times."""
    row = harness.pick_resident(pick)
    if row is None or len(harness.rows) + count >= harness.setup.num_sequences_max:
        return
    before = harness.manager.num_free_blocks
    children = [row.child(handle) for handle in harness.manager.fork(row.handle, count + 1)]
    harness.rows += children
    harness.touched += [row, *children]
    after = harness.manager.num_free_blocks
    harness.require("a fork takes no block", after == before, f"{before - after} were taken")


@operation(OPERATIONS, 5, pick=PICK)
def free(harness: ManagerHarness, pick: int) -> None:
    """End a sequence."""
    row = harness.pick(pick)
    if row is not None:
        harness.manager.free(row.handle)
        harness.forget(row)


@operation(OPERATIONS, 4, needs=("commit",), pick=PICK, length=Number(), whole=FLAG)
def commit(harness: ManagerHarness, pick: int, length: int, whole: bool) -> None:
    """Commit a sequence, wholly or in part."""
    row = harness.pick_resident(pick)
    if row is None:
        return
    number = len(row.content) if whole else length % (len(row.content) + 1)
    harness.publish(row, number)
    harness.manager.commit(row.handle, None if whole else number)
    harness.touched.append(row)


@operation(OPERATIONS, 2, needs=("truncate",), pick=PICK, length=Number())
def truncate(harness: ManagerHarness, pick: int, length: int) -> None:
    """Truncate a sequence, but not into its dropped blocks."""
    row = harness.pick_resident(pick)
    if row is None:
        return
    length %= len(row.content) + 1
    harness.touched.append(row)
    if length < row.start // harness.size * harness.size:
        refused(harness, ValueError, lambda: harness.manager.truncate(row.handle, length))
        return
    harness.manager.truncate(row.handle, length)
    row.content.truncate(length)
    row.num_known = min(row.num_known, length)
    row.num_committed = min(row.num_committed, length)
    row.start = min(row.start, length)


@operation(OPERATIONS, 1, needs=("drop_before",), pick=PICK, start=Number())
def drop_before(harness: ManagerHarness, pick: int, start: int) -> None:
    """Drop the blocks before a token, as a window does."""
    row = harness.pick_resident(pick)
    if row is not None:
        start %= len(row.content) + 1
        harness.manager.drop_before(row.handle, start)
        row.start = max(start, row.start)
        harness.touched.append(row)


@operation(OPERATIONS, 3, needs=("swap",), pick=PICK, later=FLAG)
def swap(harness: ManagerHarness, pick: int, later: bool) -> None:
    """Move a sequence to the host, or back."""
    row = harness.pick(pick)
    if row is None:
        return
    to = "device" if row.is_swapped else "host"
    most = harness.manager.num_blocks + 1  # the host may always refuse: it is not modelled
    plan = harness.attempt(most, harness.manager.swap, row.handle, to)
    if plan is not None:
        harness.carry_out(plan, later)
        row.is_swapped = to == "host"
        harness.num_swapped += 1 if row.is_swapped else -1
    harness.touched.append(row)


@operation(OPERATIONS, 0.1, needs=("grow",), extra=Number(3))
def grow(harness: ManagerHarness, extra: int) -> None:
    """Raise the pool by a few blocks, up to twice its first size."""
    num_blocks = harness.manager.num_blocks + extra
    if num_blocks <= 2 * harness.setup.num_blocks:
        harness.manager.grow(num_blocks)
        harness.memory.resize(num_blocks)


@operation(OPERATIONS, 0.1, needs=("clear_prefix_cache",))
def clear_prefix_cache(harness: ManagerHarness) -> None:
    """Evict all cached blocks that no sequence holds."""
    cached = harness.manager.stats().num_cached
    dropped = harness.manager.clear_prefix_cache()
    left = harness.manager.stats().num_cached
    harness.require(
        "clearing evicts all", dropped == cached and not left, f"{dropped} of {cached} evicted"
    )


@operation(OPERATIONS, 1, needs=("commit",), pick=PICK)
def reuse(harness: ManagerHarness, pick: int) -> None:
    """Commit a sequence and allocate its tokens again: all full blocks are hits."""
    row = harness.pick_resident(pick)
    if (
        row is None
        or row.start
        or not row.is_plain
        or len(harness.rows) >= harness.setup.num_sequences_max
    ):
        return
    harness.publish(row, len(row.content))
    harness.manager.commit(row.handle)
    tokens = [*row.content.tokens[: row.num_known], 0]
    most = harness.blocks(len(tokens))
    name = row.content.namespace
    handle = harness.attempt(most, harness.manager.allocate, tokens, namespace=name)
    if handle is None:
        return
    begin(harness, handle, Content(name, tokens), len(tokens))
    full = row.num_known // harness.size * harness.size
    harness.require(
        "a committed prefix is reused",
        handle.num_cached_tokens >= full,
        f"{handle.num_cached_tokens} of {full} tokens in full blocks",
    )


@operation(
    OPERATIONS, 1, pick=PICK, verb=Choice(("append", "block_tables", "commit", "fork", "free"))
)
def use_freed(harness: ManagerHarness, pick: int, verb: str) -> None:
    """Use a freed handle: every verb refuses it."""
    if harness.freed:
        handle = harness.freed[pick % len(harness.freed)]
        refused(harness, StaleSequence, lambda: getattr(harness.manager, verb)(handle))


@operation(OPERATIONS, 1, pick=PICK, number=Number(3))
def misuse(harness: ManagerHarness, pick: int, number: int) -> None:
    """Make an invalid call: it is refused."""
    row, manager = harness.pick(pick), harness.manager
    if row is None:
        return
    handle, beyond = row.handle, len(row.content) + 1
    harness.touched.append(row)
    if row.is_swapped:
        verb = (manager.append, manager.commit, manager.fork, manager.slots)[number]
        refused(harness, SequenceSwapped, lambda: verb(handle))
    elif number == 0:
        refused(harness, ValueError, lambda: manager.append([handle, handle], 1))
    elif number == 1:
        refused(harness, ValueError, lambda: manager.commit(handle, beyond))
    elif number == 2:
        refused(harness, ValueError, lambda: manager.truncate(handle, beyond))
    else:
        refused(harness, ValueError, lambda: manager.swap(handle, "moon"))


def refused(harness: ManagerHarness, expected: type[Exception], call: Callable[[], object]) -> None:
    """Make a call that must raise `expected` and change nothing."""
    before = harness.state()
    outcome = "was served"
    try:
        call()
    except expected:
        harness.require("refusal changes nothing", harness.state() == before, "the state changed")
        return
    except (KVPagerError, ValueError, TypeError) as error:
        outcome = f"raised {error!r}"
    raise Violation("invalid call refused", f"the call {outcome}, expected {expected.__name__}")
