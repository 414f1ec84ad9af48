"""Atomic changes: signals wait for the end of a change, and an error within it breaks the object.

Python runs signal handlers on the main thread, between any two instructions. A handler may raise,
as Ctrl-C raises `KeyboardInterrupt`, and leave a change of several arrays incomplete. So each
method that changes state has this form:

    with lock, change:          # signals wait
        ...                     # check the arguments, make what is returned
        change.begin()          # an error before this line changes nothing
        ...                     # an error after this line breaks the object

While signals wait, a handler that records signals replaces each handler written in Python. At the
end, the original handlers are restored and called for the recorded signals, in order. Other threads
never run handlers and skip all this. Some errors cannot wait, such as `PyThreadState_SetAsyncExc`
or a `MemoryError`. If one interrupts a change, the lock refuses every later call.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the enums of `signal` take microseconds a call
import _thread
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, ParamSpec, Protocol, TypeVar

from kvpager.errors import KVPagerError

Handler = Callable[[int, FrameType | None], object]
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_get_ident = _thread.get_ident
_get_handler: Callable[[int], Any] = _signal.getsignal
_set_handler: Callable[[int, Any], Any] = _signal.signal
_main_ident = threading.main_thread().ident


class Owner(Protocol):
    """An object that changes under its own lock."""

    _lock: AbstractContextManager[Any]


class BrokenLock:
    """Replaces the lock of a broken object, and refuses every call."""

    def __init__(self, what: str, failure: BaseException | None) -> None:
        self._what = what
        self._failure = failure

    def __enter__(self) -> None:
        raise _refusal(self._what) from self._failure

    def __exit__(self, *_: object) -> None:
        """Never called."""


def _refusal(what: str) -> KVPagerError:
    return KVPagerError(
        f"{what}: an error interrupted a change, so its counts and tables may be wrong. Drop this "
        f"{what} and make a new one."
    )


class Uninterrupted:
    """A section in which signals wait, while the thread holds `lock`.

    It joins several atomic calls to one.
    """

    __slots__ = ("_lock",)

    def __init__(self, lock: AbstractContextManager[Any]) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if _get_ident() == _main_ident:
            _signals.hold(self._lock)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if _get_ident() == _main_ident:
            _signals.release()


class Change(Uninterrupted):
    """The section of a method that must be atomic, under the lock of `owner`."""

    __slots__ = ("_begun", "_name", "_owner")

    def __init__(self, owner: Owner, name: str = "") -> None:
        """Make a section. Errors call `owner` by `name`, or by its class."""
        super().__init__(owner._lock)
        self._owner = weakref.ref(owner)
        self._name = name or type(owner).__name__
        self._begun = False

    def begin(self) -> None:
        """Mark the point after which an error breaks the object. O(1)."""
        self._begun = True

    def end(self) -> None:
        """Undo `begin`: the change is complete, or has changed nothing. O(1)."""
        self._begun = False

    def __enter__(self) -> None:
        if self._begun:  # a finaliser called within a change, or the change was interrupted
            raise _refusal(self._name)
        if _get_ident() == _main_ident:
            _signals.hold(self._lock)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._begun:
            if kind is None:
                self._begun = False
            else:
                self._break_down(error)
        if _get_ident() == _main_ident:
            _signals.release()

    def _break_down(self, failure: BaseException | None) -> None:
        owner = self._owner()
        if owner is not None:
            owner._lock = BrokenLock(self._name, failure)


def _catchable(names: Iterable[str] | None = None) -> list[int]:
    """Return the signals that may have handlers; with `names`, only these."""
    fixed = {getattr(_signal, name, None) for name in ("SIGKILL", "SIGSTOP")}
    found = {int(number) for number in _signal.valid_signals()} - fixed
    if names is not None:
        found &= {getattr(_signal, name, None) for name in names}
    return sorted(found)


# Signals that usually have handlers. Others are watched once they have a handler, which is noticed
# after some changes: reading all handlers takes as long as a small change.
_USUAL = _catchable(
    ("SIGINT", "SIGALRM", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGVTALRM", "SIGPROF",
     "SIGCHLD", "SIGBREAK")
)  # fmt: skip
_CHANGES_PER_LOOK = 64


class Condition(threading.Condition):
    """A condition whose lock is released despite signals. During `wait`, signals do not wait."""

    def __enter__(self) -> bool:
        lock: Any = self._lock  # type: ignore[attr-defined]
        if _get_ident() != _main_ident:
            return bool(lock.__enter__())
        _signals.hold(lock)
        try:
            return bool(lock.__enter__())
        except BaseException:
            _signals.release()
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            lock: Any = self._lock  # type: ignore[attr-defined]
            if lock._is_owned():  # False if a handler raised within `wait`
                self.release()
        finally:
            if _get_ident() == _main_ident:
                _signals.release()


class _AlwaysOwned:
    """Replaces a lock that a wait releases meanwhile."""

    @staticmethod
    def _is_owned() -> bool:
        return True


class Deferral:
    """A short wait that releases locks. Signals wait until the locks are held again."""

    __slots__ = ("_outer",)

    def __enter__(self) -> None:
        if _get_ident() == _main_ident:
            _signals.hold(_AlwaysOwned)
            self._outer, _signals._lock = _signals._lock, _AlwaysOwned

    def __exit__(self, *error: object) -> None:
        if _get_ident() == _main_ident:
            _signals._lock = self._outer
            try:
                _signals.release()
            finally:
                _signals.deliver()


def whole(method: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Make a method of several changes atomic against signals: handlers run after it.

    Its object has a `lock`, and the section `uninterrupted` with this lock.
    """

    @functools.wraps(method)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        owner: Any = args[0]
        with owner.lock, owner.uninterrupted:
            return method(*args, **kwargs)

    return call


class _Signals:
    """The handlers of the main thread, and their due calls."""

    __slots__ = (
        "_all", "_depth", "_due", "_handlers", "_lock", "_note", "_seen", "_until_look", "_watched",
    )  # fmt: skip

    def __init__(self) -> None:
        self._all = self._watched = _catchable()
        self._seen: list[Any] = []  # the handlers of watched signals when last read
        self._until_look = 0  # changes until all handlers are read again
        self._handlers: list[tuple[int, Handler]] = []  # handlers to replace
        self._due: list[tuple[Handler, int, FrameType | None]] = []
        self._depth = 0
        self._lock: Any = None  # the lock of the outermost change
        self._note = self._take_note  # bound once: handlers are compared by identity

    def hold(self, lock: Any) -> None:
        """Let signals wait until `release`, unless this raises. O(signals)."""
        # An asynchronous exception may have interrupted an earlier `release`. Its lock is free.
        if self._depth and self._lock._is_owned():
            self._depth += 1
            return
        self._until_look -= 1
        if [*map(_get_handler, self._watched)] != self._seen or self._until_look < 0:
            self._look()
        self._lock, self._depth = lock, 1
        try:
            self._replace()
        except BaseException as error:
            self.release()
            if not isinstance(error, ValueError) or "main thread" not in str(error):
                raise
            _forget_main_thread()

    # A separate function: from Python 3.12 on, an interrupt at the end of a loop can bypass the
    # `except` of a `try` block around that loop.
    def _replace(self) -> None:
        """Replace each handler by `_take_note`. O(handlers)."""
        note = self._note
        for number, handler in self._handlers:
            found = _set_handler(number, note)
            if found is not handler and found is not note:  # set by a due handler
                self._handlers = [*(dict(self._handlers) | {number: found}).items()]

    def release(self) -> None:
        """End a `hold`; after the outermost one, call the handlers that are due. O(signals)."""
        if self._depth > 1:
            self._depth -= 1
            return
        try:
            self._put_back()
        except BaseException:  # from a handler that is restored already
            self._put_back()
            raise
        finally:
            self._depth, self._lock = 0, None  # drop the lock now, not in the next `hold`
            self.deliver()

    def _put_back(self) -> None:
        note = self._note
        for number, handler in self._handlers:
            found = _set_handler(number, handler)
            if found is not note:  # set within the change
                _set_handler(number, found)

    def _look(self) -> None:
        """Find the signals with handlers that may raise. O(signals)."""
        harmless = getattr(sys.modules.get("asyncio.unix_events"), "_sighandler_noop", None)
        before, found = dict(self._handlers), []
        for number in self._all:
            handler = _get_handler(number)
            if handler is self._note:  # left by an interrupted `release`
                handler = before[number]
            if callable(handler) and handler is not harmless:
                found.append((number, handler))
        self._watched = sorted({*_USUAL, *(number for number, _ in found)})
        self._handlers, self._until_look = found, _CHANGES_PER_LOOK
        self._seen = [*map(_get_handler, self._watched)]

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        """Record a call of the handler of signal `number`, or call it."""
        handler = dict(self._handlers)[number]
        if self._depth and self._lock._is_owned():
            self._due.append((handler, number, frame))
        else:
            handler(number, frame)

    def deliver(self) -> None:
        """Call all due handlers, even if one raises."""
        if not self._due:
            return
        handler, number, frame = self._due.pop(0)
        try:
            handler(number, frame)
        finally:
            self.deliver()


def _note_main_thread() -> None:
    """Set the main thread of a forked child: the thread that forked."""
    global _main_ident
    _main_ident = _get_ident()
    for lock in list(_locks):
        if not lock._is_owned():  # a thread of the parent may have held it
            lock._at_fork_reinit()


_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def new_lock() -> Any:
    """Return a reentrant lock that is free in a forked child, even if a thread holds it. O(1).

    A change that another thread was making stays incomplete in the child.
    """
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def _forget_main_thread() -> None:
    """Note that no thread of this interpreter runs handlers."""
    global _main_ident
    _main_ident = None


_signals = _Signals()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_main_thread)
