"""Measure bytes needed and held, and the state of every block.

*Duplicates* are leading tokens that a row shares with an earlier row. Both rows can read one copy:
`needed_bytes` counts it once for both caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

States = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class HeldRow:
    """A row of the final cache: its length, and its leading duplicates."""

    length: int
    duplicates: int


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """A layer of DynamicCache: bytes per token, and tokens per row."""

    token_bytes: int
    columns: int


# -------------------------------------------------------------------- transformers' cache


def _layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values by attention layer, [rows, kv_heads, columns, dim] each."""
    found = (layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), Tensor))
    return [(layer.keys, layer.values) for layer in found if layer.keys.dim() == 4]


def reserved_bytes(cache: Any) -> int:
    """Return the bytes of all keys and values in DynamicCache. O(layers)."""
    return sum(key.nbytes + value.nbytes for key, value in _layers(cache))


def layer_bytes(cache: Any) -> list[LayerBytes]:
    """Return the attention layers of DynamicCache. O(layers)."""
    return [
        LayerBytes((key.nbytes + value.nbytes) // (key.shape[0] * key.shape[2]), key.shape[2])
        for key, value in _layers(cache)
        if key.shape[0] and key.shape[2]
    ]


def needed_bytes(layers: Iterable[LayerBytes], rows: Sequence[HeldRow]) -> int:
    """Return the bytes of the rows' tokens, each prefix once. O(layers * rows).

    A windowed layer needs only its last columns.
    """
    return sum(
        layer.token_bytes * (row.length - max(row.duplicates, row.length - layer.columns, 0))
        for layer in layers
        for row in rows
    )


def contiguous_bytes(layers: Iterable[LayerBytes], num_rows: int, length: int, held: int) -> int:
    """Return the bytes of a buffer of `length` tokens per row. O(layers).

    A layer with fewer than `held` columns is windowed, and its buffer stays that short.
    """
    return sum(
        layer.token_bytes * num_rows * (length if layer.columns >= held else layer.columns)
        for layer in layers
    )


# -------------------------------------------------------------------- rows


def rows_by_ids(rows: Sequence[Sequence[int]]) -> list[HeldRow]:
    """Find duplicates by comparing token ids. O(rows^2 * tokens)."""
    arrays = [np.asarray(row) for row in rows]
    return [
        HeldRow(len(row), max((_common(row, other) for other in arrays[:index]), default=0))
        for index, row in enumerate(arrays)
    ]


def _common(row: NDArray[Any], other: NDArray[Any]) -> int:
    length = min(len(row), len(other))
    differs = np.flatnonzero(row[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


def rows_by_keys(cache: Any, prompt_length: int, length: int) -> list[HeldRow]:
    """Find duplicates among the beams of one prompt by comparing keys. O(rows^2 * new tokens).

    `generate` does not return the tokens of running beams. Beams that share a token have equal keys
    in a deep layer, because beam search copied the bytes; other tokens give other keys.
    """
    key = max((key for key, _ in _layers(cache)), key=lambda key: key.shape[2] >= length)
    new = key[:, :, max(key.shape[2] - (length - prompt_length), 0) :]
    rows = []
    for index in range(len(new)):
        same = [
            int((new[index] == new[other]).all(dim=-1).all(dim=0).int().cumprod(0).sum())
            for other in range(index)
        ]
        rows.append(HeldRow(length, prompt_length + max(same) if same else 0))
    return rows


# -------------------------------------------------------------------- kvpager's blocks


def block_states(caches: Sequence[Any]) -> list[States]:
    """Return the `BlockStatus` of every block, uint8 [blocks] per pool. O(blocks)."""
    groups = [group for cache in caches for group in getattr(cache, "groups", [])]
    pools = {id(group.pool): group.pool for group in groups if group.pool is not None}
    return [pool.manager.queries.block_statuses() for pool in pools.values()]


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
