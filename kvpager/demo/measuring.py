"""Bytes that tokens need and caches take, and the state of every block.

A row's tokens that an earlier row begins with as well are *duplicates*: a token needs its key and
value once, however many rows begin with it. `needed_bytes` counts it once, for both sides.
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
    """A row of a cache at the end: its tokens, and how many of the first are duplicates."""

    length: int
    duplicates: int


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """What a layer of transformers' cache stores: bytes per token, tokens per row."""

    token_bytes: int
    columns: int


# -------------------------------------------------------------------- transformers' cache


def _layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the attention layers, [rows, kv_heads, columns, dim] each."""
    pairs = [
        (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers
    ]
    return [
        (key, value)
        for key, value in pairs
        if isinstance(key, Tensor) and isinstance(value, Tensor) and key.dim() == 4
    ]


def reserved_bytes(cache: Any) -> int:
    """Bytes of all keys and values that transformers' cache holds. O(layers)."""
    return sum(key.nbytes + value.nbytes for key, value in _layers(cache))


def layer_bytes(cache: Any) -> list[LayerBytes]:
    """Each attention layer of transformers' cache. O(layers)."""
    return [
        LayerBytes((key.nbytes + value.nbytes) // (key.shape[0] * key.shape[2]), key.shape[2])
        for key, value in _layers(cache)
        if key.shape[0] and key.shape[2]
    ]


def needed_bytes(layers: Iterable[LayerBytes], rows: Sequence[HeldRow]) -> int:
    """Bytes of the rows' tokens, each prefix once. A windowed layer needs its last columns only."""
    return sum(
        layer.token_bytes * (row.length - max(row.duplicates, row.length - layer.columns, 0))
        for layer in layers
        for row in rows
    )


def contiguous_bytes(layers: Iterable[LayerBytes], num_rows: int, length: int, held: int) -> int:
    """Bytes of one buffer of `length` tokens per row; `held` tokens tell windowed layers apart."""
    return sum(
        layer.token_bytes * num_rows * (length if layer.columns >= held else layer.columns)
        for layer in layers
    )


# -------------------------------------------------------------------- rows


def rows_by_ids(rows: Sequence[Sequence[int]]) -> list[HeldRow]:
    """Duplicates found by comparing token ids. O(rows^2 * tokens)."""
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
    """The beams of one prompt; duplicates found by comparing keys. O(rows^2 * new tokens).

    `generate` does not say which tokens its running beams hold, but a key in a deep layer tells:
    beams that begin alike got its bytes copied, and any other beginning gives other bytes.
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
    """The `BlockStatus` of every block, uint8 [blocks] for each pool of the caches. O(blocks)."""
    groups = [group for cache in caches for group in getattr(cache, "groups", [])]
    pools = {id(group.pool): group.pool for group in groups if group.pool is not None}
    return [pool.manager.queries.block_statuses() for pool in pools.values()]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
