"""Changes that are whole: signals wait for their end, and an error in the middle is remembered.

Python runs the handlers of signals on the main thread, between any two instructions. A handler may
raise: that of Ctrl-C raises `KeyboardInterrupt`. A change of several arrays would stay half done.
So each method that changes something is written

    with lock, change:          # signals wait
        ...                     # check the arguments, make what is returned
        change.begin()          # an error before this line leaves all as it was
        ...                     # an error after this line breaks the object

While signals wait, a handler that only takes notes replaces each handler written in Python. At the
end the handlers are put back, and those that are due are called in order. Other threads never run
handlers, so they do nothing here. Some errors cannot wait, such as `PyThreadState_SetAsyncExc` or
memory that runs out. After one of them in the middle of a change, the lock refuses every call.
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
from types import FrameType, TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from kvpager.errors import KVPagerError

Handler = Callable[[int, FrameType | None], object]
_Object = TypeVar("_Object", bound="Guarded")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_get_ident = _thread.get_ident
_get_handler: Callable[[int], Any] = _signal.getsignal
_set_handler: Callable[[int, Any], Any] = _signal.signal
_main_ident = threading.main_thread().ident


class Owner(Protocol):
    """An object that is changed under a lock of its own."""

    _lock: AbstractContextManager[Any]


class BrokenLock:
    """Takes the place of the lock of a broken object, and refuses every call."""

    def __init__(self, what: str, failure: BaseException | None) -> None:
        self._what = what
        self._failure = failure

    def __enter__(self) -> None:
        raise _refusal(self._what) from self._failure

    def __exit__(self, *_: object) -> None:
        """Never called."""


def _refusal(what: str) -> KVPagerError:
    return KVPagerError(
        f"{what}: an error cut a change short, so its counts and tables may be wrong. Drop this "
        f"{what} and make a new one."
    )


class Uninterrupted:
    """A section in which signals wait. `lock` is held around it, and while it is not, they do not.

    It makes one of several calls, each of which is complete or changes nothing.
    """

    __slots__ = ("_lock",)

    def __init__(self, lock: AbstractContextManager[Any]) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if _get_ident() == _main_ident:
            _signals.hold(self._lock)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if _get_ident() == _main_ident:
            _signals.release()


class Change(Uninterrupted):
    """The section of a method that must not be cut short. The lock of `owner` is held around it."""

    __slots__ = ("_begun", "_name", "_owner")

    def __init__(self, owner: Owner, name: str = "") -> None:
        """Call `owner` by `name` in errors, or by its class."""
        super().__init__(owner._lock)
        self._owner = weakref.ref(owner)
        self._name = name or type(owner).__name__
        self._begun = False

    def begin(self) -> None:
        """Mark the point from which on an error leaves the object broken. O(1)."""
        self._begun = True

    def end(self) -> None:
        """Take `begin` back: what began is complete, or has changed nothing. O(1)."""
        self._begun = False

    def __enter__(self) -> None:
        if self._begun:  # a finaliser calls in the middle of a change, or its end was cut off
            raise _refusal(self._name)
        if _get_ident() == _main_ident:
            _signals.hold(self._lock)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
    """Return the numbers of the signals, or of those with these names, that may have handlers."""
    fixed = {getattr(_signal, name, None) for name in ("SIGKILL", "SIGSTOP")}
    found = {int(number) for number in _signal.valid_signals()} - fixed
    if names is not None:
        found &= {getattr(_signal, name, None) for name in names}
    return sorted(found)


# Signals that programs give handlers to. Others are watched once they have one, which is noticed
# within some changes: to look at all signals takes as long as a small change.
_USUAL = _catchable(
    ("SIGINT", "SIGALRM", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGVTALRM", "SIGPROF",
     "SIGCHLD", "SIGBREAK")
)  # fmt: skip
_CHANGES_PER_LOOK = 64


class Condition(threading.Condition):
    """A condition whose lock no signal leaves locked. Signals do not wait while `wait` does."""

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
            if lock._is_owned():  # no more, if a handler raised in the middle of `wait`
                self.release()
        finally:
            if _get_ident() == _main_ident:
                _signals.release()


class _AlwaysOwned:
    """Takes the place of a lock that a wait gives away meanwhile."""

    @staticmethod
    def _is_owned() -> bool:
        return True


class Deferral:
    """A short wait that gives locks away. Signals wait for its end, when the locks are back."""

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


class Guarded(Protocol):
    """An object whose methods are `whole`."""

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held around each method. O(1)."""

    @property
    def uninterrupted(self) -> Uninterrupted:
        """The section that each method is, with this lock. O(1)."""


def whole(
    method: Callable[Concatenate[_Object, _Arguments], _Result],
) -> Callable[Concatenate[_Object, _Arguments], _Result]:
    """Make a method of several changes atomic against signals: handlers run after it."""

    @functools.wraps(method)
    def call(self: _Object, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with self.lock, self.uninterrupted:
            return method(self, *args, **kwargs)

    return call


class _Signals:
    """The handlers of the main thread, and the calls of them that are due."""

    __slots__ = (
        "_all", "_depth", "_due", "_handlers", "_lock", "_note", "_seen", "_until_look", "_watched",
    )  # fmt: skip

    def __init__(self) -> None:
        self._all = self._watched = _catchable()
        self._seen: list[Any] = []  # the handlers of those watched, when last looked at
        self._until_look = 0  # changes before all signals are looked at again
        self._handlers: list[tuple[int, Handler]] = []  # those to replace
        self._due: list[tuple[Handler, int, FrameType | None]] = []
        self._depth = 0
        self._lock: Any = None  # of the outermost change
        self._note = self._take_note  # the one object that stands for handlers

    def hold(self, lock: Any) -> None:
        """Let signals wait until `release`. O(signals). They do not wait if this raises."""
        # An asynchronous exception may have cut an earlier `release` short. Its lock is free.
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

    # A function of its own: from Python 3.12 on, an interrupt where a loop jumps back can miss the
    # `except` of a `try` block around that loop.
    def _replace(self) -> None:
        """Put `_take_note` in the place of each handler. O(handlers)."""
        note = self._note
        for number, handler in self._handlers:
            found = _set_handler(number, note)
            if found is not handler and found is not note:  # set by a handler that was due
                self._handlers = [*(dict(self._handlers) | {number: found}).items()]

    def release(self) -> None:
        """End a `hold`; after the outermost one, call the handlers that are due. O(signals)."""
        if self._depth > 1:
            self._depth -= 1
            return
        try:
            self._put_back()
        except BaseException:  # from a handler that is back already
            self._put_back()
            raise
        finally:
            self._depth, self._lock = 0, None  # the next `hold` is not to be where this lock dies
            self.deliver()

    def _put_back(self) -> None:
        note = self._note
        for number, handler in self._handlers:
            found = _set_handler(number, handler)
            if found is not note:  # set in the middle of the change
                _set_handler(number, found)

    def _look(self) -> None:
        """Find the signals with handlers that may raise. O(signals)."""
        harmless = getattr(sys.modules.get("asyncio.unix_events"), "_sighandler_noop", None)
        before, found = dict(self._handlers), []
        for number in self._all:
            handler = _get_handler(number)
            if handler is self._note:  # left where a `release` was cut short
                handler = before[number]
            if callable(handler) and handler is not harmless:
                found.append((number, handler))
        self._watched = sorted({*_USUAL, *(number for number, _ in found)})
        self._handlers, self._until_look = found, _CHANGES_PER_LOOK
        self._seen = [*map(_get_handler, self._watched)]

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        """Stand for the handler of signal `number`."""
        handler = dict(self._handlers)[number]
        if self._depth and self._lock._is_owned():
            self._due.append((handler, number, frame))
        else:
            handler(number, frame)

    def deliver(self) -> None:
        """Call the handlers that are due, all of them even if one raises."""
        if not self._due:
            return
        handler, number, frame = self._due.pop(0)
        try:
            handler(number, frame)
        finally:
            self.deliver()


def _note_main_thread() -> None:
    """After a fork, the thread that forked is the main thread of the child."""
    global _main_ident
    _main_ident = _get_ident()
    for lock in list(_locks):
        if not lock._is_owned():  # another thread held it perhaps, which the child does not have
            lock._at_fork_reinit()


_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def new_lock() -> Any:
    """Return a reentrant lock that a fork frees in the child, even if a thread holds it here. O(1).

    A change that another thread was making remains as it was: half done.
    """
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def _forget_main_thread() -> None:
    """Python runs no handlers on any thread of this interpreter."""
    global _main_ident
    _main_ident = None


_signals = _Signals()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_main_thread)
