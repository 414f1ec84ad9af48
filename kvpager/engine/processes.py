"""Engines and forks: a forked process has a copy of an engine, without its threads."""

from __future__ import annotations

import os

from kvpager.errors import EngineClosed


class Process:
    """The process that something belongs to.

    Args:
        what: is named in errors, such as "engine".
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._id = os.getpid()

    @property
    def is_current(self) -> bool:
        """True in that process, False in a fork of it. O(1)."""
        return os.getpid() == self._id

    def refuse_fork(self) -> None:
        """Raise `EngineClosed` in a fork. Its locks may be held by threads that are not there."""
        if not self.is_current:
            raise EngineClosed(
                f"this {self._what} belongs to process {self._id}, and process {os.getpid()} was "
                f"forked from that one; make a new {self._what} after the fork"
            )
