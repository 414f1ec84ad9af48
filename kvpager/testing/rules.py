"""The operations of the conformance suite, one small function each.

The `AdapterHarness` makes the call, simulates memory and checks the properties.
"""

from __future__ import annotations

from typing import Any

from kvpager.testing.adapter_harness import AdapterHarness, LiveSequence, copies_of
from kvpager.testing.histories import Choice, Ended, Number, Pick, Table, Tokens, operation
from kvpager.testing.memory import Content

RULES: Table = {}

LIVE = Pick(("live",))
RESIDENT = Pick(("resident",))
VERBS = Choice(("append", "block_table", "commit", "fork", "truncate"))
NAMES = Choice((None, "acme", "umbrella"))


def _blocks(harness: AdapterHarness, num_tokens: int) -> int:
    return -(-num_tokens // harness.size)


def _allocate(harness: AdapterHarness, content: Content, call: Any, *arguments: Any) -> None:
    """Allocate a sequence, and write its new tokens."""
    tokens = content.tokens
    if tokens:
        served, handle = harness.attempt(_blocks(harness, len(tokens)), call, *arguments)
    else:
        served, handle = harness.attempt_empty(call, *arguments)
    if not served:
        return
    num_cached = harness.call("reads_back", harness.adapter.num_cached_tokens, handle)
    if not 0 <= num_cached <= len(tokens):
        harness.report("reads_back", f"{num_cached} of {len(tokens)} tokens reported as cached")
        raise Ended
    if num_cached:
        last = content.values[num_cached - 1]
        what = f"{num_cached} tokens of {tokens} were reused"
        if last not in harness.committed:
            harness.report("nothing_before_commit", f"{what}, which were never committed")
        if last not in harness.written:
            message = f"{what}, which were never written in {content.namespace!r}"
            harness.report("namespaces_isolated", message)
    row = LiveSequence(handle, content)
    harness.rows.append(row)
    harness.copy_for(handle)
    harness.write(row, num_cached)


@operation(RULES, 4, tokens=Tokens())
def allocate(harness: AdapterHarness, tokens: list[int]) -> None:
    """Begin a sequence."""
    _allocate(harness, Content(None, tokens), harness.adapter.allocate, list(tokens))


@operation(RULES, 2, needs=("allocate_in",), tokens=Tokens(), namespace=NAMES)
def allocate_in(harness: AdapterHarness, tokens: list[int], namespace: str | None) -> None:
    """Begin a sequence in a namespace."""
    content = Content(namespace, tokens)
    _allocate(harness, content, harness.adapter.allocate_in, list(tokens), namespace)


@operation(RULES, 1, extra=Number(9))
def overfill(harness: AdapterHarness, extra: int) -> None:
    """Allocate more than the whole pool."""
    length = harness.adapter.num_blocks * harness.size + 1 + extra
    most = _blocks(harness, length)
    served, _ = harness.attempt(most, harness.adapter.allocate, [0] * length)
    if served:
        harness.report("full_pool_refused", f"{length} tokens were accepted")
        raise Ended


@operation(RULES, 5, pick=RESIDENT, tokens=Tokens(5))
def append(harness: AdapterHarness, row: LiveSequence, tokens: list[int]) -> None:
    """Append to a sequence."""
    first, call = len(row.content), harness.adapter.append
    # One block more than the tokens fill, for the copy of a shared one.
    most = _blocks(harness, first + len(tokens)) - first // harness.size
    if tokens:
        served, copies = harness.attempt(most, copies_of, call, row.handle, list(tokens))
    else:
        served, copies = harness.attempt_empty(copies_of, call, row.handle, [])
    if served:
        harness.copy(copies)
        row.content.extend(tokens)
        harness.write(row, first)


@operation(RULES, 2, needs=("fork",), pick=RESIDENT)
def fork(harness: AdapterHarness, row: LiveSequence) -> None:
    """Fork a sequence."""
    free = harness.num_free()
    # One block for managers that copy the partly filled block at once.
    served, handle = harness.attempt(1, harness.adapter.fork, row.handle)
    if served:
        harness.rows.append(LiveSequence(handle, row.content.copy()))
        harness.copy_for(handle)
        now = harness.num_free()
        if now != free:
            harness.report("fork_takes_no_block", f"a fork took {free - now} blocks")


@operation(RULES, 2, pick=LIVE)
def free(harness: AdapterHarness, row: LiveSequence) -> None:
    """End a sequence."""
    harness.attempt(0, harness.adapter.free, row.handle)
    harness.rows.remove(row)
    harness.freed.append(row.handle)


@operation(RULES, 2, needs=("commit",), pick=RESIDENT)
def commit(harness: AdapterHarness, row: LiveSequence) -> None:
    """Commit a sequence."""
    # Note the tokens first: the manager may publish them at any moment from here on.
    harness.committed.update(row.content.values)
    harness.attempt(0, harness.adapter.commit, row.handle)


@operation(RULES, 1, needs=("truncate",), pick=RESIDENT, length=Number())
def truncate(harness: AdapterHarness, row: LiveSequence, length: int) -> None:
    """Truncate a sequence."""
    length %= len(row.content) + 1
    harness.attempt(0, harness.adapter.truncate, row.handle, length)
    row.content.truncate(length)


@operation(RULES, 1, needs=("swap", "num_host_blocks"), pick=LIVE)
def swap(harness: AdapterHarness, row: LiveSequence) -> None:
    """Move a sequence to the host, or back."""
    to, other = ("device", "host") if row.is_swapped else ("host", "device")
    # The adapter does not show the host's free blocks, so the host may always refuse.
    most = _blocks(harness, len(row.content)) if to == "device" else harness.adapter.num_blocks + 1
    served, copies = harness.attempt(most, copies_of, harness.adapter.swap, row.handle, to)
    if served:
        harness.copy(copies, other, to)
        row.is_swapped = to == "host"


def _stale(harness: AdapterHarness, pick: int) -> Any:
    """Return a freed handle that is not live again, or None."""
    live = [row.handle for row in harness.rows]
    stale = [handle for handle in harness.freed if handle not in live]
    return stale[pick % len(stale)] if stale else None


@operation(RULES, 1, pick=Pick())
def free_again(harness: AdapterHarness, pick: int) -> None:
    """Free a sequence a second time."""
    name, handle = "double_free_refused", _stale(harness, pick)
    if handle is not None and name in harness.watch:
        harness.must_refuse(name, "a second free", harness.adapter.free, handle)


@operation(RULES, 1, pick=Pick(), verb=VERBS)
def use_freed(harness: AdapterHarness, pick: int, verb: str) -> None:
    """Use a freed handle with a verb other than free."""
    name, handle = "stale_handle_refused", _stale(harness, pick)
    function = getattr(harness.adapter, verb, None)
    if handle is not None and function is not None and name in harness.watch:
        more = {"append": ([1],), "truncate": (0,)}.get(verb, ())
        harness.must_refuse(name, f"{verb} of a freed handle", function, handle, *more)
