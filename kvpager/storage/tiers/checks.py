"""Check the arguments of a store, alike in all stores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvpager import _validate as arguments
from kvpager._text import size
from kvpager.storage.keys import KEY_BYTES


def check_keys(keys: Sequence[bytes]) -> None:
    """Raise `ValueError` for a key of another length than `content_keys` makes. O(keys)."""
    for key in keys:
        if len(key) != KEY_BYTES:
            raise ValueError(f"keys: expected {KEY_BYTES} bytes each, got {len(key)}")


def check_blocks(
    name: str, keys: Sequence[bytes], buffers: Sequence[memoryview], block_bytes: int
) -> None:
    """Check the keys and the buffers of `load` or `save`. O(keys).

    `name` is the argument: the buffers of `into` must be writable. Raises: `ValueError`.
    """
    check_keys(keys)
    if len(buffers) != len(keys):
        raise ValueError(f"{name}: expected a buffer for each of {len(keys)} keys")
    for buffer in buffers:
        if buffer.nbytes != block_bytes or not buffer.c_contiguous:
            raise ValueError(f"{name}: expected contiguous buffers of {block_bytes} bytes")
        if name == "into" and buffer.readonly:
            raise ValueError(f"{name}: expected writable buffers")


def check_outcomes(outcomes: object, count: int) -> None:
    """Check what the `load` or `save` of a store returned: an integer for each key. O(1).

    Booleans are refused, because False equals `Loaded.HIT`. Raises: `TypeError`.
    """
    if not (
        isinstance(outcomes, np.ndarray)
        and outcomes.dtype.kind in "iu"
        and outcomes.shape == (count,)
    ):
        raise TypeError(
            f"outcomes={arguments.shown(outcomes)}: expected a uint8 array [{count}] of outcomes"
        )


def blocks_in(capacity: int | str, block_bytes: int) -> int:
    """Return how many blocks `capacity` bytes hold. O(1). Raises: `ValueError`, `TypeError`."""
    num_bytes = arguments.parse_memory(capacity, "capacity")
    if num_bytes is None:
        raise TypeError("capacity=None: expected bytes or a text such as '200GiB'")
    if num_bytes < block_bytes:
        raise ValueError(
            f"capacity={capacity!r}: room for no block. "
            f"Expected at least {size(block_bytes, round_up=True)}."
        )
    return num_bytes // block_bytes
