"""Pauses of an engine, which no interrupt leaves on."""

from __future__ import annotations

from typing import Protocol


class Pausable(Protocol):
    """A loop that computes no step while any thread is in a pause."""

    def begin_pause(self, pause: object) -> None:
        """Hold steps from now on; the one under way ends first."""

    def end_pause(self, pause: object) -> None:
        """Let steps go on unless another pause holds them. Does nothing for an unknown pause."""

    def drop_pause(self, pause: object) -> None:
        """End a pause whose owner is gone, without waiting."""


class Pause:
    """No step is computed inside; pauses of several threads may overlap.

    Its end gives cached prompts up. Raises: `KVPagerError` on the engine's own thread, which would
    wait for its own step; `EngineClosed` in a fork.
    """

    def __init__(self, loop: Pausable) -> None:
        self._loop = loop
        self._key = object()  # the loop does not keep a pause that is dropped

    def __enter__(self) -> None:
        try:
            self._loop.begin_pause(self._key)
        except BaseException:
            self._loop.end_pause(self._key)
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._loop.end_pause(self._key)
        except BaseException:  # an interrupt may have come before it began
            self._loop.end_pause(self._key)
            raise

    def __del__(self) -> None:
        # An interrupt may have come before `__exit__` began.
        self._loop.drop_pause(self._key)
