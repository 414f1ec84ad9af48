"""The rules of the conformance suite: one small function each.

A rule uses the `Session`, which makes the call, simulates memory and checks the properties.
"""

from __future__ import annotations

from typing import Any

from kvpager.testing.histories import Choice, Ended, Number, Pick, Table, Tokens, operation
from kvpager.testing.memory import Content
from kvpager.testing.properties import Row, Session

RULES: Table = {}

PICK = Pick()
VERBS = Choice(("append", "block_table", "commit", "fork", "truncate"))
NAMES = Choice((None, "acme", "umbrella"))


def _begin(session: Session, handle: Any, content: Content) -> None:
    """Add a sequence that the manager allocated, and write its new tokens."""
    adapter, tokens = session.adapter, content.tokens
    num_cached = session.call("reads_back", lambda: adapter.num_cached_tokens(handle))
    if not 0 <= num_cached <= len(tokens):
        session.report("reads_back", f"{num_cached} of {len(tokens)} tokens are cached, it says")
        raise Ended
    if num_cached:
        last = content.values[num_cached - 1]
        what = f"{num_cached} tokens of {tokens} were reused"
        if last not in session.committed:
            session.report("nothing_before_commit", f"{what}, which nobody committed")
        if last not in session.written:
            message = f"{what}, which {content.namespace!r} never wrote"
            session.report("namespaces_apart", message)
    row = Row(handle, content)
    session.rows.append(row)
    if hasattr(adapter, "copies"):
        session.copy(session.call("reads_back", lambda: list(adapter.copies(handle))))
    session.write(row, num_cached)


def _blocks(session: Session, num_tokens: int) -> int:
    return -(-num_tokens // session.size)


@operation(RULES, 4, tokens=Tokens())
def allocate(session: Session, tokens: list[int]) -> None:
    """Begin a sequence."""
    most = _blocks(session, len(tokens))
    served, handle = session.attempt(
        lambda: session.adapter.allocate(list(tokens)), most, is_empty=not tokens
    )
    if served:
        _begin(session, handle, Content(None, tokens))


@operation(RULES, 2, needs=("allocate_in",), tokens=Tokens(), namespace=NAMES)
def allocate_in(session: Session, tokens: list[int], namespace: str | None) -> None:
    """Begin a sequence of one tenant."""
    adapter: Any = session.adapter
    most = _blocks(session, len(tokens))
    served, handle = session.attempt(
        lambda: adapter.allocate_in(list(tokens), namespace), most, is_empty=not tokens
    )
    if served:
        _begin(session, handle, Content(namespace, tokens))


@operation(RULES, 1, extra=Number(9))
def overfill(session: Session, extra: int) -> None:
    """Allocate more than the whole pool."""
    length = session.adapter.num_blocks * session.size + 1 + extra
    served, _ = session.attempt(
        lambda: session.adapter.allocate([0] * length), _blocks(session, length)
    )
    if served:
        session.report("full_pool_refused", f"{length} tokens were accepted")
        raise Ended


@operation(RULES, 5, pick=PICK, tokens=Tokens(5))
def append(session: Session, pick: int, tokens: list[int]) -> None:
    """Append to a sequence."""
    row = session.pick(pick)
    if row is None:
        return
    first = len(row.content)
    # One block more than the tokens fill, for the copy of a shared one.
    most = _blocks(session, first + len(tokens)) - first // session.size
    served, copies = session.attempt(
        lambda: list(session.adapter.append(row.handle, list(tokens))),
        most,
        is_empty=not tokens,
    )
    if served:
        session.copy(copies)
        row.content.extend(tokens)
        session.write(row, first)


@operation(RULES, 2, needs=("fork",), pick=PICK)
def fork(session: Session, pick: int) -> None:
    """Fork a sequence."""
    row = session.pick(pick)
    if row is None:
        return
    adapter: Any = session.adapter
    free = session.num_free()
    # One block for managers that copy the partly filled block at once.
    served, handle = session.attempt(lambda: adapter.fork(row.handle), 1)
    if served:
        session.rows.append(Row(handle, row.content.copy()))
        if hasattr(adapter, "copies"):
            session.copy(session.call("reads_back", lambda: list(adapter.copies(handle))))
        now = session.num_free()
        if now != free:
            session.report("fork_moves_nothing", f"a fork took {free - now} blocks")


@operation(RULES, 2, pick=PICK)
def free(session: Session, pick: int) -> None:
    """End a sequence."""
    row = session.pick(pick, resident=False)
    if row is None:
        return
    session.attempt(lambda: session.adapter.free(row.handle), 0)
    session.rows.remove(row)
    session.freed.append(row.handle)


@operation(RULES, 2, needs=("commit",), pick=PICK)
def commit(session: Session, pick: int) -> None:
    """Commit a sequence."""
    row = session.pick(pick)
    if row is None:
        return
    adapter: Any = session.adapter
    # Note the tokens first: the manager may publish them at any moment from here on.
    session.committed.update(row.content.values)
    session.attempt(lambda: adapter.commit(row.handle), 0)


@operation(RULES, 1, needs=("truncate",), pick=PICK, length=Number())
def truncate(session: Session, pick: int, length: int) -> None:
    """Truncate a sequence."""
    row = session.pick(pick)
    if row is None:
        return
    adapter: Any = session.adapter
    length %= len(row.content) + 1
    session.attempt(lambda: adapter.truncate(row.handle, length), 0)
    row.content.truncate(length)


@operation(RULES, 1, needs=("swap", "num_host_blocks"), pick=PICK)
def swap(session: Session, pick: int) -> None:
    """Move a sequence to the host, or back."""
    row = session.pick(pick, resident=False)
    if row is None:
        return
    adapter: Any = session.adapter
    to, other = ("device", "host") if row.is_swapped else ("host", "device")
    # The adapter does not show the host's free blocks, so the host may always refuse.
    most = _blocks(session, len(row.content)) if to == "device" else session.adapter.num_blocks + 1
    served, copies = session.attempt(lambda: list(adapter.swap(row.handle, to)), most)
    if served:
        session.copy(copies, other, to)
        row.is_swapped = to == "host"


def _stale(session: Session, pick: int) -> Any:
    """Return a freed handle that is not live again, or None."""
    live = [row.handle for row in session.rows]
    stale = [handle for handle in session.freed if handle not in live]
    return stale[pick % len(stale)] if stale else None


@operation(RULES, 1, pick=PICK)
def free_again(session: Session, pick: int) -> None:
    """Free a sequence a second time."""
    handle = _stale(session, pick)
    if handle is not None and "double_free_refused" in session.watch:
        session.must_refuse(
            "double_free_refused", "a second free", lambda: session.adapter.free(handle)
        )


@operation(RULES, 1, pick=PICK, verb=VERBS)
def use_freed(session: Session, pick: int, verb: str) -> None:
    """Use a freed handle with any verb but free."""
    handle = _stale(session, pick)
    function = getattr(session.adapter, verb, None)
    if handle is None or function is None or "stale_handle_refused" not in session.watch:
        return
    more = {"append": ([1],), "truncate": (0,)}.get(verb, ())
    session.must_refuse(
        "stale_handle_refused", f"{verb} of a freed handle", lambda: function(handle, *more)
    )
