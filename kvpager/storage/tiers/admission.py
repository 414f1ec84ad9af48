"""Which blocks a store takes: all of them, or those that are offered twice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal, get_args

from kvpager import _validate as arguments
from kvpager._text import listed
from kvpager.storage.tiers.asking import is_bypassed, stats_of
from kvpager.storage.tiers.protocol import BlockStore

Admit = Literal["auto", "always", "second"]

_LARGE = 4  # times the device's blocks: from here on, fewer writes cost too many hits
# Refused keys to remember, for each block of the store. On the Mooncake trace "auto" then keeps
# 97 % of the hits of "always" with 42 % of its writes, in a store of twice the device's blocks.
_REMEMBERED = 4
_REMEMBERED_MAX = 1 << 19  # about 100 MB


def admission(store: BlockStore, admit: Admit, num_device_blocks: int) -> Admission | None:
    """Return what chooses the blocks of a store; None if the store takes all or chooses itself.

    O(1). Raises: `ValueError` for another `admit`.
    """
    capacity = store.stats().capacity
    rule = Admission(admit, capacity or num_device_blocks)
    if hasattr(store, "admit") or admit == "always":
        return None
    is_large = capacity is None or capacity >= _LARGE * num_device_blocks
    return None if admit == "auto" and is_large else rule


def has_free_room(store: BlockStore, besides: int = 0) -> bool:
    """Return True if a store takes more blocks, `besides` others, without an eviction. O(1)."""
    stats = stats_of(store)
    return stats.capacity is None or (stats.num_blocks or 0) + besides < stats.capacity


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
        """Return True if the store is to take `key` now, and remember the answer. O(1)."""
        is_taken = self.would_admit(key, has_room=has_room)
        self.note(key, is_taken=is_taken)
        return is_taken

    def would_admit(self, key: bytes, *, has_room: bool) -> bool:
        """Return what `admits` would, and remember nothing. O(1)."""
        is_free = self._admit == "always" or (self._admit == "auto" and has_room)
        return is_free or key in self._refused

    def note(self, key: bytes, *, is_taken: bool) -> None:
        """Remember a key that was refused; forget one that the store is offered. O(1)."""
        if is_taken:
            self._refused.pop(key, None)
            return
        self._refused[key] = None
        if len(self._refused) > self._remembered:
            self._refused.popitem(last=False)


class Admissions:
    """The rules of several stores."""

    def __init__(
        self,
        stores: Sequence[BlockStore],
        admit: Admit,
        num_device_blocks: int,
        shared: BlockStore | None = None,
        hangs: Callable[[int], bool] = lambda number: False,
    ) -> None:
        """See `admission`. Blocks pass through the slots of the store `shared`.

        A store is offered nothing while its number `hangs`.
        Raises: `ValueError` for another `admit`.
        """
        self._shared, self._hangs = shared, hangs
        self._rules = [(store, admission(store, admit, num_device_blocks)) for store in stores]

    def wanted(self, keys: Collection[bytes]) -> list[list[int]]:
        """Return the numbers of the stores that each block is to be offered. O(keys * stores).

        Call `note` for the blocks that were copied or refused, not for those without a slot.
        """
        offered = [
            (number, rule, rule is None or self._has_room(store, len(keys)))
            for number, store, rule in self._asked()
        ]
        return [
            [
                number
                for number, rule, has_room in offered
                if rule is None or rule.would_admit(key, has_room=has_room)
            ]
            for key in keys
        ]

    def note(self, keys: Iterable[bytes], wanted: Iterable[Sequence[int]]) -> None:
        """Remember what `wanted` returned for these blocks. O(keys * stores)."""
        rules = [(number, rule) for number, _, rule in self._asked() if rule is not None]
        for key, stores in zip(keys, wanted, strict=False):
            for number, rule in rules:
                rule.note(key, is_taken=number in stores)

    def _asked(self) -> list[tuple[int, BlockStore, Admission | None]]:
        return [
            (number, store, rule)
            for number, (store, rule) in enumerate(self._rules)
            if not self._hangs(number) and not is_bypassed(store)
        ]

    def _has_room(self, store: BlockStore, num_blocks: int) -> bool:
        # Blocks that pass through the shared slots take room in that store.
        return has_free_room(store, besides=num_blocks if store is self._shared else 0)
