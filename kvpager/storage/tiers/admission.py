"""Which blocks a store takes: all of them, or those that are offered twice."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, get_args

from kvpager import _validate as arguments
from kvpager._text import listed

Admit = Literal["auto", "always", "second"]

# Refused keys to remember, for each block of the store. On the Mooncake trace "auto" then keeps
# 97 % of the hits of "always" with 42 % of its writes, in a store of twice the device's blocks.
_REMEMBERED = 4
_REMEMBERED_MAX = 1 << 19  # about 100 MB


class Admission:
    """Decides about a block that the store does not have.

    Most blocks of common traffic are used once. "second" takes a block when it is offered for the
    second time, which saves most writes. "always" takes every block. "auto" takes every block while
    the store has free room, and then those that are offered twice.
    """

    def __init__(self, admit: Admit, num_slots: int) -> None:
        """Decide for a store of `num_slots` blocks. Raises: `ValueError` for another `admit`."""
        if admit not in get_args(Admit):
            names = listed(get_args(Admit))
            raise ValueError(f"admit={arguments.shown(admit)}: expected one of {names}")
        self._admit = admit
        self._remembered = min(_REMEMBERED * num_slots, _REMEMBERED_MAX)
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
