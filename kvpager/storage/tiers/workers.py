"""Threads that call stores. If a store does not return, another thread replaces its thread."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

from kvpager.storage.tiers.calls import StoreCalls

_T = TypeVar("_T")
_PAUSE_S = 0.05  # that a thread may take between two calls of stores
_END = None

_Work = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class Workers:
    """Runs work in the order of `submit`, on `count` threads. Any thread may call any method.

    `ThreadPoolExecutor` counts a thread that hangs as usable, and waits for it when the interpreter
    ends. `Workers` starts another thread in its place, and does not wait.
    """

    def __init__(self, count: int, name: str, calls: StoreCalls) -> None:
        """Start threads when they are needed. `calls` tells which of them hang."""
        self._count, self._name, self._calls = count, name, calls
        self._lock = threading.Lock()
        work: SimpleQueue[_Work | None] = SimpleQueue()
        self._work = work
        self._me = weakref.ref(self, lambda _: work.put(_END))
        self._threads: list[threading.Thread] = []
        self._process = os.getpid()
        self._last: Future[int] | None = None
        self._is_open = True
        _all.add(self)

    def submit(self, call: Callable[..., _T], *arguments: Any) -> Future[_T]:
        """Call a function on a thread soon. O(threads + calls of stores).

        Raises: `RuntimeError` if the workers are shut down, or the interpreter ends.
        """
        with self._lock:
            if not self._is_open:
                raise RuntimeError("the workers are shut down")
            self._fill_up()
            return self._put(call, *arguments)

    def _put(self, call: Callable[..., _T], *arguments: Any) -> Future[_T]:
        future = Future[_T]()
        self._work.put((future, call, arguments))
        return future

    def replace_lost(self) -> None:
        """Start a thread if fewer than `count` are usable. O(threads + calls of stores)."""
        with self._lock:
            if self._is_open:
                self._fill_up()

    def shutdown(self) -> None:
        """Wait for all work that does not hang. Idempotent. Does nothing in a forked process."""
        if self._process != os.getpid():
            return
        with self._lock:
            if self._is_open and self._threads:
                self._last = self._put(int)  # when this is done, all earlier work has begun
            self._is_open = False
        while self._last is not None and not self._last.done():
            left_s = max(map(self._calls.left_s, [thread.ident for thread in self._threads]))
            wait([self._last], timeout=left_s + _PAUSE_S)
            with self._lock, contextlib.suppress(RuntimeError):  # the interpreter ends
                self._fill_up()
        for _ in self._threads:
            self._work.put(_END)
        for thread in list(self._threads):
            while thread.is_alive() and thread.ident not in self._calls.lost_threads():
                thread.join(self._calls.left_s(thread.ident) + _PAUSE_S)

    def _fill_up(self) -> None:
        """Start a thread if fewer than `count` are usable: alive, and not in a call that hangs."""
        num_usable = self._num_usable()
        if num_usable >= self._count:
            return
        # A daemon: a store that never returns must not keep the process alive.
        name = f"{self._name}-{len(self._threads)}"
        thread = threading.Thread(
            target=_serve, args=(self._work, self._me), name=name, daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # no more threads, or the interpreter ends
            if not num_usable:
                raise
        else:
            self._threads.append(thread)

    def _num_usable(self) -> int:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        lost = self._calls.lost_threads()
        return sum(thread.ident not in lost for thread in self._threads)

    def _is_replaced(self) -> bool:
        """Return True if this thread is one too many: it hung, and another took its place."""
        with self._lock:
            if not self._is_open or self._num_usable() <= self._count:
                return False
            self._threads.remove(threading.current_thread())
            return True


def _serve(work: SimpleQueue[_Work | None], owner: weakref.ref[Workers]) -> None:
    """Do the work of a queue. While it waits, the thread does not keep its owner alive."""
    while (item := work.get()) is not _END:
        future, call, arguments = item
        if future.set_running_or_notify_cancel():
            try:
                result = call(*arguments)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
        del item, future, call, arguments
        workers = owner()
        if workers is not None and workers._is_replaced():
            return
        del workers
    if owner() is None:
        work.put(_END)  # for the other threads


_all: weakref.WeakSet[Workers] = weakref.WeakSet()


@atexit.register
def _shut_down_all() -> None:
    # At exit Python stops daemon threads anywhere, and C++ code does not survive that.
    for workers in list(_all):
        workers.shutdown()
