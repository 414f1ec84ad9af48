"""Divide a model's layers into groups with block tables of their own.

    gpt-oss    12 full, 12 of window 128        2 groups of 12
    gemma 3    10 full, 52 of window 1024       1 group of 10, 6 of 8 or 9
    mistral    32 of window 4096                1 group of 32
    llama      32 full                          1 group, as a `BlockManager` has it

A block has room for the layers of one group, so all groups should have about as many layers. If
layers differ in shape, or would need too many groups, all layers form one group. That group keeps
every token, regardless of windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvpager.storage.block_storage import LayerShape

_GROUPS_MAX = 16  # each step makes a table for each group
_WASTE_MAX = 0.25  # unused room in blocks, as a fraction of the windowed layers


class LayerGroups(NamedTuple):
    """The groups of a model's layers, and the place of each layer."""

    windows: tuple[int | None, ...]  # of each group
    shapes: tuple[LayerShape, ...]  # of the layers that a block has room for
    places: tuple[tuple[int, int], ...]  # of each layer: its group, and its number in a block


def group_layers(
    shapes: Sequence[LayerShape], windows: Sequence[int | None], max_length: int | None
) -> LayerGroups:
    """Return the groups of layers with these shapes and windows. O(layers^2).

    A window of at least `max_length` tokens counts as full attention.
    """
    members: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        is_short = window is not None and (max_length is None or window < max_length)
        members.setdefault(window if is_short else None, []).append(layer)
    size = _size(members) if len(set(shapes)) == 1 and any(members) else None
    if size is None:
        return LayerGroups((None,), tuple(shapes), tuple((0, at) for at in range(len(shapes))))
    found: list[int | None] = []
    places = [(0, 0)] * len(shapes)
    # Layers with full attention come first.
    for window, layers in sorted(members.items(), key=lambda item: item[0] or 0):
        for part in np.array_split(layers, -(-len(layers) // size)):
            for number, layer in enumerate(part.tolist()):
                places[layer] = len(found), number
            found.append(window)
    return LayerGroups(tuple(found), tuple(shapes[:size]), tuple(places))


def _size(members: dict[int | None, list[int]]) -> int | None:
    """Return the number of layers per block; None if no number is good enough.

    Full-attention layers hold the most tokens, so their groups must waste nothing.
    """
    counts = {window: len(layers) for window, layers in members.items()}
    windowed = [count for window, count in counts.items() if window is not None]
    leading = counts.get(None, max(windowed))
    for size in range(leading, 0, -1):
        num_groups = sum(-(-count // size) for count in counts.values())
        waste = sum(-count % size for count in windowed)
        if leading % size == 0 and waste <= _WASTE_MAX * sum(windowed):
            return size if num_groups <= _GROUPS_MAX else None
    return None
