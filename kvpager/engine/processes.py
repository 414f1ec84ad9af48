"""Detection of forks: a forked process has a copy of an engine, but not its threads."""

from __future__ import annotations

import os

from kvpager.errors import EngineClosed


class Process:
    """The process that an object belongs to.

    Args:
        what: the name of the object in errors, such as "engine".
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._id = os.getpid()

    @property
    def is_current(self) -> bool:
        """True in the process, False in its forks. O(1)."""
        return os.getpid() == self._id

    def refuse_fork(self) -> None:
        """Raise `EngineClosed` in a fork, where missing threads may hold the locks. O(1)."""
        if not self.is_current:
            raise EngineClosed(
                f"this {self._what} belongs to process {self._id}, but the current process "
                f"{os.getpid()} is a fork of it. Make a new {self._what} after the fork."
            )
