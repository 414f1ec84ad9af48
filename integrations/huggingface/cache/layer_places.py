"""The layers that share a block table: how many there are, and where each of them is kept."""

from __future__ import annotations

import copy
from collections import Counter

from kvpager.integrations.huggingface.cache.pools import LayerKind, Places


class LayerPlaces:
    """The layers of a group.

    Args:
        expected: how many layers the model has for the group; None if that is not known.
    """

    def __init__(self, expected: int | None) -> None:
        self.expected = expected
        self.count = 0  # layers made so far
        self.column_bytes = 0  # of a row, over all layers, as `DynamicCache` would keep it
        self._places: dict[int, tuple[LayerKind, Places]] = {}
        self._bound: Counter[LayerKind] = Counter()
        self._num_left = 0  # layers that live in blocks no longer
        self._num_away = 0  # layers that another group keeps

    @property
    def num_left(self) -> int:
        """Layers that live in blocks no longer."""
        return self._num_left

    @property
    def are_gone(self) -> bool:
        """True if no layer keeps its content here."""
        return self._num_left + self._num_away == self.count

    @property
    def first_kind(self) -> LayerKind:
        """The kind of the layer that was placed first."""
        return next(iter(self._places.values()))[0]

    def at(self, number: int) -> tuple[LayerKind, Places]:
        """Return what layer `number` stores, and where. O(1)."""
        return self._places[number]

    def place(self, number: int, kind: LayerKind, places: Places) -> int:
        """Keep layer `number` at `places`.

        Returns how many layers of this kind have a place; 0 if the layer had one already. O(1).
        """
        is_new = number not in self._places
        self._places[number] = kind, places
        if not is_new:
            return 0
        self.column_bytes += _column_bytes(kind)
        self._bound[kind] += 1
        return self._bound[kind]

    def leave(self) -> None:
        """Note that one more layer keeps its content elsewhere. O(1)."""
        self._num_left += 1

    def move(self, number: int, target: LayerPlaces, *, to_fork: bool) -> int:
        """Let `target` have layer `number`. Returns the layer's number there. O(1).

        `to_fork` says that `target` is a copy of this group, with a place for each layer.
        """
        self._num_away += 1
        found = self._places.pop(number, None)
        size = 0 if found is None else _column_bytes(found[0])
        self.column_bytes -= size
        if to_fork:
            target._num_away -= 1
            target.column_bytes += size
            return number
        target.count += 1
        return target.count - 1

    def copy(self) -> LayerPlaces:
        """Return the same layers for a fork of the group. O(layers)."""
        copied = copy.copy(self)
        copied._places, copied._bound = dict(self._places), self._bound.copy()
        return copied

    def send_away(self) -> None:
        """Note that another group keeps every layer, for now. O(1)."""
        self._num_away, self.column_bytes = self.count, 0


def _column_bytes(kind: LayerKind) -> int:
    return kind.shape.elements_per_token * kind.dtype.itemsize
