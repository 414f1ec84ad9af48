"""The simulator's operations on the tokens of sequences: begin, append, fork, commit, drop, free.

An operation is a function. Its decorator states its weight, the manager's methods that it needs,
and the kinds of its arguments. It makes the call and applies the plan to `harness.memory`. The
harness then reads back the sequences that the operation picked or began.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvpager.errors import KVPagerError
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

SEQUENCE_OPERATIONS: Table = {}

LIVE = Pick(("live",))
SETTLED = Pick(("settled",))  # on the device, without speculative tokens
SPECULATING = Pick(("speculating",))
FLAG = Choice((False, True))


# -------------------------------------------------------------------- begin


def begin(
    harness: ManagerHarness, prompt: Any, content: Content, num_known: int, **options: Any
) -> LiveSequence | None:
    """Allocate a sequence and write its tokens that were not cached; None if refused. O(tokens)."""
    most = harness.blocks(len(content))
    handle = harness.attempt(most, harness.manager.allocate, prompt, **options)
    if handle is None:
        return None
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
    row = LiveSequence(handle, content, num_known)
    harness.rows.append(row)
    harness.touched.append(row)
    harness.make_copies(handle)
    harness.write(row, num_cached, harness.manager.slots(handle, num_cached))
    return row


def begin_known(
    harness: ManagerHarness, tokens: list[int], namespace: str | None = None
) -> LiveSequence | None:
    """Allocate a sequence of known tokens in a namespace; None if refused. O(tokens)."""
    return begin(harness, tokens, Content(namespace, tokens), len(tokens), namespace=namespace)


def make_room(harness: ManagerHarness) -> None:
    """Free the oldest sequences until there is room for another."""
    while len(harness.rows) >= harness.setup.num_sequences_max:
        harness.free(harness.rows[0])


@operation(SEQUENCE_OPERATIONS, 5, tokens=Tokens(), namespace=Number())
def allocate(harness: ManagerHarness, tokens: list[int], namespace: int) -> None:
    """Begin a sequence of known tokens."""
    make_room(harness)
    names = harness.setup.namespaces
    begin_known(harness, tokens, names[namespace % len(names)])


@operation(SEQUENCE_OPERATIONS, 1, count=Number(18))
def allocate_unknown(harness: ManagerHarness, count: int) -> None:
    """Begin a sequence of `count` tokens of unknown ids."""
    make_room(harness)
    # 0 is no valid count, but [] is a valid prompt.
    begin(harness, count or [], Content(None, harness.fresh_tokens(count)), 0)


@operation(
    SEQUENCE_OPERATIONS,
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
        mm_hashes.append((start, stop, bytes([number % 2])))
        seen[start:stop] = [token + 1000 * (1 + number % 2) for token in tokens[start:stop]]
        start = stop + number % 3
    make_room(harness)
    content = Content(f"multimodal under {lora!r}", seen)
    # No other operation uses this namespace.
    options = {"namespace": "multimodal", "lora": lora, "mm_hashes": mm_hashes}
    row = begin(harness, tokens, content, len(tokens), **options)
    if row is not None:
        row.is_plain = False


@operation(SEQUENCE_OPERATIONS, 1, needs=("commit",), pick=SETTLED)
def reuse(harness: ManagerHarness, row: LiveSequence) -> None:
    """Commit a sequence and allocate its tokens again: all full blocks are hits."""
    is_full = len(harness.rows) >= harness.setup.num_sequences_max
    if row.start or not row.is_plain or is_full:
        return
    harness.commit(row)
    again = begin_known(harness, [*row.content.tokens[: row.num_known], 0], row.content.namespace)
    if again is not None:
        full, found = row.num_known // harness.size * harness.size, again.handle.num_cached_tokens
        message = f"{found} of {full} tokens in full blocks"
        harness.require("a committed prefix is reused", found >= full, message)


@operation(
    SEQUENCE_OPERATIONS,
    0.3,
    needs=("clear_prefix_cache",),
    front=Tokens(),
    tails=Many(Tokens(), 3, 3),
)
def replace_duplicate(harness: ManagerHarness, front: list[int], tails: list[list[int]]) -> None:
    """Evict the published blocks of two equal sequences; the duplicate continues."""
    if harness.setup.quotas or len(harness.rows) + 4 > harness.setup.num_sequences_max:
        return
    front = front + [0] * (-len(front) % harness.size)
    if (first := begin_known(harness, front)) is None:
        return
    harness.commit(first)
    leaver = begin_known(harness, front + tails[0])
    duplicate = begin_known(harness, front + tails[0]) if leaver is not None else None
    if leaver is None or duplicate is None:
        return
    harness.commit(leaver)
    harness.commit(duplicate)
    harness.free(leaver)
    harness.manager.clear_prefix_cache()
    if (other := begin_known(harness, front + tails[1])) is None:
        return
    harness.commit(other)
    if extend(harness, [duplicate], [tails[2]], duplicate.handle, tokens=tails[2]):
        harness.commit(duplicate)
        harness.manager.check()


# -------------------------------------------------------------------- append


def extend(
    harness: ManagerHarness,
    rows: list[LiveSequence],
    new: list[list[int]],
    target: Any,
    **options: Any,
) -> bool:
    """Append `new` to sequences, and write it; return False if refused. O(tokens).

    The manager gets `target`, the sequences as it knows them, and `options`.
    """
    # One block more for each sequence, for the copy of a shared tail.
    most = sum(1 + harness.blocks(len(ids)) for ids in new)
    step = harness.attempt(most, harness.manager.append, target, **options)
    if step is None:
        return False
    harness.make_copies(step)
    start = 0
    for row, ids in zip(rows, new, strict=True):
        first = len(row.content)
        row.content.extend(ids)
        if isinstance(options.get("tokens"), list) and row.num_known == first:
            row.num_known += len(ids)
        harness.write(row, first, step.slots[start : start + len(ids)])
        start += len(ids)
    harness.require("a slot for each token", start == len(step.slots), "slots are left over")
    return True


@operation(
    SEQUENCE_OPERATIONS,
    8,
    picks=Many(SETTLED, most=3),
    new=Many(Tokens(4), most=3),
    by_ids=FLAG,
    as_batch=FLAG,
)
def append(
    harness: ManagerHarness,
    rows: list[LiveSequence],
    new: list[list[int]],
    by_ids: bool,
    as_batch: bool,
) -> None:
    """Append to a batch of sequences, by ids or by counts."""
    tokens = [new[at % len(new)] for at in range(len(rows))]
    options: dict[str, Any] = {"tokens": tokens}
    if not by_ids:
        options = {"counts": [len(ids) for ids in tokens]}
        tokens = [harness.fresh_tokens(len(ids)) for ids in tokens]
    target: Any = [row.handle for row in rows]
    if as_batch and hasattr(harness.manager, "batch"):
        target = harness.manager.batch(target)
    extend(harness, rows, tokens, target, **options)


@operation(
    SEQUENCE_OPERATIONS,
    2,
    needs=("accept",),
    pick=Pick(("speculating", "settled")),
    tokens=Tokens(5),
    by_ids=FLAG,
)
def append_speculative(
    harness: ManagerHarness, row: LiveSequence, tokens: list[int], by_ids: bool
) -> None:
    """Append speculative tokens to a sequence, by ids or by a count."""
    new = tokens if by_ids else harness.fresh_tokens(len(tokens))
    given: Any = tokens if by_ids else len(tokens)
    if tokens and extend(harness, [row], [new], row.handle, tokens=given, speculative=True):
        row.num_speculative += len(new)


@operation(SEQUENCE_OPERATIONS, 2, needs=("accept",), pick=SPECULATING, number=Number())
def accept(harness: ManagerHarness, row: LiveSequence, number: int) -> None:
    """Commit, which publishes no speculative token; then accept some of them and drop others."""
    manager, handle, most = harness.manager, row.handle, row.num_speculative
    settled, kept = len(row.content) - most, number % (most + 1)
    if settled + kept < row.start // harness.size * harness.size:
        kept = most  # fewer would end in the dropped blocks
    harness.publish(row, settled)
    manager.commit(handle)
    refused(harness, ValueError, lambda: manager.append(handle, 1))
    refused(harness, ValueError, lambda: manager.commit(handle, settled + 1))
    refused(harness, ValueError, lambda: manager.accept(handle, most + 1))
    manager.accept(handle, kept)
    row.truncate(settled + kept)
    row.num_speculative = 0


# -------------------------------------------------------------------- fork, free, commit, drop


@operation(SEQUENCE_OPERATIONS, 2, needs=("fork",), pick=SETTLED, count=Number(2))
def fork(harness: ManagerHarness, row: LiveSequence, count: int) -> None:
    """Fork a sequence once or several times."""
    if len(harness.rows) + count >= harness.setup.num_sequences_max:
        return
    before = harness.manager.num_free_blocks
    children = [row.child(handle) for handle in harness.manager.fork(row.handle, count + 1)]
    harness.rows += children
    harness.touched += children
    after = harness.manager.num_free_blocks
    harness.require("a fork takes no block", after == before, f"{before - after} were taken")


@operation(SEQUENCE_OPERATIONS, 5, pick=LIVE)
def free(harness: ManagerHarness, row: LiveSequence) -> None:
    """End a sequence."""
    harness.free(row)


@operation(SEQUENCE_OPERATIONS, 4, needs=("commit",), pick=SETTLED, length=Number(), whole=FLAG)
def commit(harness: ManagerHarness, row: LiveSequence, length: int, whole: bool) -> None:
    """Commit a sequence, wholly or in part."""
    harness.commit(row, None if whole else length % (len(row.content) + 1))


@operation(SEQUENCE_OPERATIONS, 2, needs=("truncate",), pick=SETTLED, length=Number())
def truncate(harness: ManagerHarness, row: LiveSequence, length: int) -> None:
    """Truncate a sequence, but not into its dropped blocks."""
    length %= len(row.content) + 1
    if length < row.start // harness.size * harness.size:
        refused(harness, ValueError, lambda: harness.manager.truncate(row.handle, length))
        return
    harness.manager.truncate(row.handle, length)
    row.truncate(length)


@operation(SEQUENCE_OPERATIONS, 1, needs=("drop_before",), pick=SETTLED, start=Number())
def drop_before(harness: ManagerHarness, row: LiveSequence, start: int) -> None:
    """Drop the blocks before a token, as a window does."""
    start %= len(row.content) + 1
    harness.manager.drop_before(row.handle, start)
    row.start = max(start, row.start)


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
