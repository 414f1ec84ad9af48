"""Pauses of an engine. An interrupted pause always ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from kvpager._atomic import Condition
from kvpager.engine.processes import Process
from kvpager.errors import KVPagerError


class Pauses:
    """The steps of one thread, and the pauses of other threads that hold them.

    Args:
        process: the process of the engine; pauses are refused in its forks.
        on_end: callback invoked at the end of each pause, before steps continue.
        defer: calls a function soon, on any thread.
    """

    def __init__(
        self,
        process: Process,
        on_end: Callable[[], None],
        defer: Callable[[Callable[[], object]], None],
    ) -> None:
        self._process = process
        self._on_end = on_end
        self._defer = defer
        self._changed = Condition()
        self._holders: dict[object, threading.Thread] = {}  # the thread of each pause
        self._steps = threading.Lock()  # held during a step
        self._stepping: threading.Thread | None = None

    @property
    def is_mine(self) -> bool:
        """True inside a pause of the current thread. O(pauses)."""
        with self._changed:
            return threading.current_thread() in self._holders.values()

    @property
    def is_any(self) -> bool:
        """True while any pause holds steps. O(1)."""
        return bool(self._holders)

    def wait(self, is_over: Callable[[], bool]) -> None:
        """Wait until no pause holds steps or `is_over()`, which `wake` evaluates again."""
        with self._changed:
            self._changed.wait_for(lambda: not self._holders or is_over())

    def wake(self) -> None:
        """Make `wait` evaluate its condition again. O(1)."""
        with self._changed:
            self._changed.notify_all()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Return a context manager; a pause that begins waits for its end. O(1)."""
        with self._steps:
            self._stepping = threading.current_thread()
            try:
                yield
            finally:
                self._stepping = None

    def begin(self, pause: object) -> None:
        """Hold steps, after the current step has ended. Raises: as `Pause`."""
        self._process.refuse_fork()
        if threading.current_thread() is self._stepping:
            raise KVPagerError(
                "pause: called within a step, on the engine's own thread. That thread would wait "
                "for itself. Call it on another thread."
            )
        with self._changed:
            self._holders[pause] = threading.current_thread()
        with self._steps:
            pass

    def end(self, pause: object) -> None:
        """End a pause; steps continue unless another pause holds them. Idempotent.

        Does nothing in a fork.
        """
        if self._process.is_current and pause in self._holders:
            try:
                self._on_end()
            finally:
                with self._changed:
                    self._holders.pop(pause, None)
                    self._changed.notify_all()

    def drop(self, pause: object) -> None:
        """Ask for the end of a pause soon. O(1); safe in a finaliser, and in a fork."""
        if self._process.is_current and pause in self._holders:
            self._defer(partial(self.end, pause))


class Pause:
    """A context manager during which no step is computed. Pauses of several threads may overlap.

    Raises: `KVPagerError` within a step on the engine's own thread; `EngineClosed` in a fork.
    """

    def __init__(self, pauses: Pauses) -> None:
        self._key = object()  # the engine refers to the key, so a dropped pause is finalised
        self._pauses = pauses

    def __enter__(self) -> None:
        try:
            self._pauses.begin(self._key)
        except BaseException:
            self._pauses.end(self._key)
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._pauses.end(self._key)
        except BaseException:  # an interrupt may have come before it began
            self._pauses.end(self._key)
            raise

    def __del__(self) -> None:
        # An interrupt may have come before `__exit__` began, or before the constructor ended.
        pauses = getattr(self, "_pauses", None)
        if pauses is not None:
            pauses.drop(self._key)
