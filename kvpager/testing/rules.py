"""The operations of the conformance suite, one small function each.

The `AdapterHarness` makes the call, simulates memory and checks the properties.
"""

from __future__ import annotations

from typing import Any

from kvpager.testing.adapter_harness import AdapterHarness, LiveSequence
from kvpager.testing.histories import Choice, Ended, Number, Pick, Table, Tokens, operation
from kvpager.testing.memory import Content

RULES: Table = {}

PICK = Pick()
LIVE = Pick(("live",))
RESIDENT = Pick(("resident",))
VERBS = Choice(("append", "block_table", "commit", "fork", "truncate"))
NAMES = Choice((None, "acme", "umbrella"))


def _begin(harness: AdapterHarness, handle: Any, content: Content) -> None:
    """Add a sequence that the manager allocated, and write its new tokens."""
    adapter, tokens = harness.adapter, content.tokens
    num_cached = harness.call("reads_back", lambda: adapter.num_cached_tokens(handle))
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
    if hasattr(adapter, "copies"):
        harness.copy(harness.call("reads_back", lambda: list(adapter.copies(handle))))
    harness.write(row, num_cached)


def _blocks(harness: AdapterHarness, num_tokens: int) -> int:
    return -(-num_tokens // harness.size)


@operation(RULES, 4, tokens=Tokens())
def allocate(harness: AdapterHarness, tokens: list[int]) -> None:
    """Begin a sequence."""
    most = _blocks(harness, len(tokens))
    served, handle = harness.attempt(
        lambda: harness.adapter.allocate(list(tokens)), most, is_empty=not tokens
    )
    if served:
        _begin(harness, handle, Content(None, tokens))


@operation(RULES, 2, needs=("allocate_in",), tokens=Tokens(), namespace=NAMES)
def allocate_in(harness: AdapterHarness, tokens: list[int], namespace: str | None) -> None:
    """Begin a sequence in a namespace."""
    adapter: Any = harness.adapter
    most = _blocks(harness, len(tokens))
    served, handle = harness.attempt(
        lambda: adapter.allocate_in(list(tokens), namespace), most, is_empty=not tokens
    )
    if served:
        _begin(harness, handle, Content(namespace, tokens))


@operation(RULES, 1, extra=Number(9))
def overfill(harness: AdapterHarness, extra: int) -> None:
    """Allocate more than the whole pool."""
    length = harness.adapter.num_blocks * harness.size + 1 + extra
    served, _ = harness.attempt(
        lambda: harness.adapter.allocate([0] * length), _blocks(harness, length)
    )
    if served:
        harness.report("full_pool_refused", f"{length} tokens were accepted")
        raise Ended


@operation(RULES, 5, pick=RESIDENT, tokens=Tokens(5))
def append(harness: AdapterHarness, row: LiveSequence, tokens: list[int]) -> None:
    """Append to a sequence."""
    first = len(row.content)
    # One block more than the tokens fill, for the copy of a shared one.
    most = _blocks(harness, first + len(tokens)) - first // harness.size
    served, copies = harness.attempt(
        lambda: list(harness.adapter.append(row.handle, list(tokens))),
        most,
        is_empty=not tokens,
    )
    if served:
        harness.copy(copies)
        row.content.extend(tokens)
        harness.write(row, first)


@operation(RULES, 2, needs=("fork",), pick=RESIDENT)
def fork(harness: AdapterHarness, row: LiveSequence) -> None:
    """Fork a sequence."""
    adapter: Any = harness.adapter
    free = harness.num_free()
    # One block for managers that copy the partly filled block at once.
    served, handle = harness.attempt(lambda: adapter.fork(row.handle), 1)
    if served:
        harness.rows.append(LiveSequence(handle, row.content.copy()))
        if hasattr(adapter, "copies"):
            harness.copy(harness.call("reads_back", lambda: list(adapter.copies(handle))))
        now = harness.num_free()
        if now != free:
            harness.report("fork_takes_no_block", f"a fork took {free - now} blocks")


@operation(RULES, 2, pick=LIVE)
def free(harness: AdapterHarness, row: LiveSequence) -> None:
    """End a sequence."""
    harness.attempt(lambda: harness.adapter.free(row.handle), 0)
    harness.rows.remove(row)
    harness.freed.append(row.handle)


@operation(RULES, 2, needs=("commit",), pick=RESIDENT)
def commit(harness: AdapterHarness, row: LiveSequence) -> None:
    """Commit a sequence."""
    adapter: Any = harness.adapter
    # Note the tokens first: the manager may publish them at any moment from here on.
    harness.committed.update(row.content.values)
    harness.attempt(lambda: adapter.commit(row.handle), 0)


@operation(RULES, 1, needs=("truncate",), pick=RESIDENT, length=Number())
def truncate(harness: AdapterHarness, row: LiveSequence, length: int) -> None:
    """Truncate a sequence."""
    adapter: Any = harness.adapter
    length %= len(row.content) + 1
    harness.attempt(lambda: adapter.truncate(row.handle, length), 0)
    row.content.truncate(length)


@operation(RULES, 1, needs=("swap", "num_host_blocks"), pick=LIVE)
def swap(harness: AdapterHarness, row: LiveSequence) -> None:
    """Move a sequence to the host, or back."""
    adapter: Any = harness.adapter
    to, other = ("device", "host") if row.is_swapped else ("host", "device")
    # The adapter does not show the host's free blocks, so the host may always refuse.
    most = _blocks(harness, len(row.content)) if to == "device" else harness.adapter.num_blocks + 1
    served, copies = harness.attempt(lambda: list(adapter.swap(row.handle, to)), most)
    if served:
        harness.copy(copies, other, to)
        row.is_swapped = to == "host"


def _stale(harness: AdapterHarness, pick: int) -> Any:
    """Return a freed handle that is not live again, or None."""
    live = [row.handle for row in harness.rows]
    stale = [handle for handle in harness.freed if handle not in live]
    return stale[pick % len(stale)] if stale else None


@operation(RULES, 1, pick=PICK)
def free_again(harness: AdapterHarness, pick: int) -> None:
    """Free a sequence a second time."""
    handle = _stale(harness, pick)
    if handle is not None and "double_free_refused" in harness.watch:
        harness.must_refuse(
            "double_free_refused", "a second free", lambda: harness.adapter.free(handle)
        )


@operation(RULES, 1, pick=PICK, verb=VERBS)
def use_freed(harness: AdapterHarness, pick: int, verb: str) -> None:
    """Use a freed handle with a verb other than free."""
    handle = _stale(harness, pick)
    function = getattr(harness.adapter, verb, None)
    if handle is None or function is None or "stale_handle_refused" not in harness.watch:
        return
    more = {"append": ([1],), "truncate": (0,)}.get(verb, ())
    harness.must_refuse(
        "stale_handle_refused", f"{verb} of a freed handle", lambda: function(handle, *more)
    )
