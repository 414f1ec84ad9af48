"""The layers of a group, and the storage of each layer."""

from __future__ import annotations

import copy
from collections import Counter

from kvpager.integrations.huggingface.cache.budget import LayerKind
from kvpager.integrations.huggingface.cache.pools import Places


class LayerPlaces:
    """The layers of a group, of which the model has `expected`; None if that is unknown."""

    def __init__(self, expected: int | None) -> None:
        self.expected = expected
        self.count = 0  # layers made so far
        self.column_bytes = 0  # bytes of a column of a row in all layers, in `DynamicCache`
        self._places: dict[int, tuple[LayerKind, Places]] = {}
        self._bound: Counter[LayerKind] = Counter()
        self.num_left = 0  # layers that are no longer kept in blocks
        self._num_away = 0  # layers that moved to another group

    def add(self) -> int:
        """Add a layer. Returns its number. O(1)."""
        self.count += 1
        return self.count - 1

    @property
    def are_gone(self) -> bool:
        """Return True if no layer is kept in this group's blocks."""
        return self.num_left + self._num_away == self.count

    @property
    def first_kind(self) -> LayerKind:
        """The kind of the layer that was placed first."""
        return next(iter(self._places.values()))[0]

    def at(self, number: int) -> tuple[LayerKind, Places]:
        """Return the kind and the storages of layer `number`. O(1)."""
        return self._places[number]

    def place(self, number: int, kind: LayerKind, places: Places) -> int:
        """Record the storages of layer `number`. O(1).

        Returns the number of layers of this kind with storages; 0 if the layer had some already.
        """
        is_new = number not in self._places
        self._places[number] = kind, places
        if not is_new:
            return 0
        self.column_bytes += _column_bytes(kind)
        self._bound[kind] += 1
        return self._bound[kind]

    def move(self, number: int, target: LayerPlaces, *, to_fork: bool) -> int:
        """Move layer `number` to `target`. Returns the layer's number there. O(1).

        `to_fork` is true if `target` is a fork of this group, which has storages for each layer.
        """
        self._num_away += 1
        found = self._places.pop(number, None)
        size = 0 if found is None else _column_bytes(found[0])
        self.column_bytes -= size
        if to_fork:
            target._num_away -= 1
            target.column_bytes += size
            return number
        return target.add()

    def copy(self) -> LayerPlaces:
        """Return a copy for a fork of the group. O(layers)."""
        copied = copy.copy(self)
        copied._places, copied._bound = dict(self._places), self._bound.copy()
        return copied

    def send_away(self) -> None:
        """Record that every layer is kept by another group until `move` is called. O(1)."""
        self._num_away, self.column_bytes = self.count, 0


def _column_bytes(kind: LayerKind) -> int:
    return kind.shape.elements_per_token * kind.dtype.itemsize
