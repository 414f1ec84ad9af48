"""Which blocks a store takes: all of them, or those that are offered twice."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, get_args

from kvpager import _validate as arguments

Admit = Literal["auto", "always", "second"]


class Admission:
    """Decides about a block that the store does not have.

    Most blocks of common traffic are used once. "second" takes a block when it is offered for the
    second time, which saves most writes. "always" takes every block. "auto" takes every block while
    the store has free room, and then those that are offered twice.
    """

    def __init__(self, admit: Admit, remembered: int) -> None:
        """Remember the last `remembered` refused keys. Raises: `ValueError` for another `admit`."""
        if admit not in get_args(Admit):
            names = ", ".join(get_args(Admit))
            raise ValueError(f"admit={arguments.shown(admit)}: expected one of {names}")
        self._admit = admit
        self._remembered = max(1, remembered)
        self._refused: OrderedDict[bytes, None] = OrderedDict()

    def admits(self, key: bytes, *, has_room: bool) -> bool:
        """Return True if the store is to take `key` now. O(1)."""
        if self._admit == "always" or (self._admit == "auto" and has_room):
            return True
        if key in self._refused:
            del self._refused[key]
            return True
        self._refused[key] = None
        if len(self._refused) > self._remembered:
            self._refused.popitem(last=False)
        return False
