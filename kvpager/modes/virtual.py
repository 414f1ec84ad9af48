"""Virtual: blocks anywhere in a pool, and mapped into a range of addresses for each row.

Attention reads a row as one tensor, and sequences share blocks all the same: a shared block is one
page of memory at several addresses. The idea is vAttention's (Prabhu et al. 2024), here for a CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kvpager.modes.page_pool import (
    SYSTEM_PAGE_BYTES,
    AddressRange,
    PagePool,
    check_num_mappings,
)
from kvpager.modes.protocol import Memory, layer_caches
from kvpager.ops import LayerCaches
from kvpager.plans import Int32
from kvpager.storage.layout import StorageLayout

_NONE = -1  # in tables: no block
_UNKNOWN = -2  # in `_mapped`: differs from all blocks


class Virtual:
    """Blocks in pages that can be mapped at several addresses, token-first. Needs Linux, a CPU."""

    name = "virtual"
    token_first = SYSTEM_PAGE_BYTES

    def allocate(  # noqa: D102
        self, num_blocks: int, run: int, dtype: torch.dtype, device: torch.device, pinned: bool
    ) -> Memory:
        if device.type != "cpu" or pinned:
            raise ValueError(
                f'mode="virtual": needs device="cpu" and pinned=False, not device={str(device)!r}, '
                f'pinned={pinned}. Take mode="paged".'
            )
        pool = PagePool(num_blocks, run * dtype.itemsize)
        return Memory(pool.pages.view(dtype), pool)

    def resized(self, memory: Memory, num_blocks: int, pinned: bool) -> Memory:  # noqa: D102
        pool = _pool_of(memory)
        pool.resize(num_blocks)
        return Memory(pool.pages.view(memory.tier.dtype), pool)

    def open_rows(  # noqa: D102
        self, memory: Memory, layout: StorageLayout, num_rows: int, num_blocks: int
    ) -> VirtualRows:
        return VirtualRows(memory, layout, num_rows, num_blocks)


class VirtualRows:
    """Rows of addresses, in which `follow` maps the blocks of block tables.

    What no block is mapped to reads as zeros. A write there ends the process with SIGSEGV, so that
    it never changes another row.
    """

    def __init__(
        self, memory: Memory, layout: StorageLayout, num_rows: int, num_blocks: int
    ) -> None:
        """Reserve addresses for rows, which take no memory. O(rows * blocks).

        Raises: `ValueError` if the system allows too few mappings; `OSError` without address space.
        """
        # Each block may be a mapping of its own, and so may the rest of a row.
        check_num_mappings(num_rows * (num_blocks + 1), "Lower the number of rows or their length")
        self.num_rows, self.num_blocks = num_rows, num_blocks
        self._pool = _pool_of(memory)
        self._page_bytes = self._pool.page_bytes
        self._range = AddressRange(num_rows * num_blocks * self._page_bytes)
        self._mapped: Int32 = np.full((num_rows, num_blocks), _NONE, np.int32)
        elements = self._range.tensor.view(memory.tier.dtype).view(num_rows, -1)
        self._caches = [layer_caches(views) for views in layout.views(elements)]

    def caches(self, layer: int) -> LayerCaches:  # noqa: D102
        return self._caches[layer]

    def follow(self, rows: Int32, tables: Int32) -> None:
        """Map what changed, each run of neighbours by one call. O(blocks compared + runs changed).

        A row's blocks behind the columns of `tables` are unmapped. Raises: `OSError` if the system
        refuses; rows that are mapped by then stay so.
        """
        rows, columns = np.asarray(rows), tables.shape[1]
        shown = self._mapped[_as_slice(rows)]
        if np.array_equal(shown[:, :columns], tables) and (shown[:, columns:] == _NONE).all():
            return
        wanted = np.full((len(rows), self.num_blocks), _NONE, np.int32)
        wanted[:, :columns] = np.maximum(tables, _NONE)
        self._map(rows, wanted)

    def release(self, rows: Int32) -> None:
        """Unmap all blocks of rows. O(blocks)."""
        self.follow(rows, np.empty((len(rows), 0), np.int32))

    def _map(self, rows: Int32, wanted: Int32) -> None:
        index, column = np.nonzero(self._mapped[rows] != wanted)
        row, block = rows[index], wanted[index, column]
        place = row.astype(np.int64) * self.num_blocks + column
        for start, stop in _runs(row, column, block):
            count, first = stop - start, int(block[start])
            address = int(place[start]) * self._page_bytes
            mapped = self._mapped[row[start], column[start] : column[start] + count]
            mapped[:] = _UNKNOWN  # if an interrupt comes now, the next call maps them again
            if first == _NONE:
                self._range.unmap(address, count * self._page_bytes)
            else:
                self._pool.map(self._range.address + address, first, count)
            mapped[:] = block[start:stop]


def _pool_of(memory: Memory) -> PagePool:
    assert memory.pool is not None, "the memory of this mode has a pool"
    return memory.pool


def _as_slice(rows: NDArray[np.int32]) -> slice | NDArray[np.int32]:
    """Return consecutive rows as a slice, whose elements NumPy need not copy."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _runs(row: Int32, column: NDArray[np.int64], block: Int32) -> list[tuple[int, int]]:
    """Return the ranges whose places are neighbours, and their blocks too or all none."""
    if not len(row):
        return []
    is_next = (np.diff(row) == 0) & (np.diff(column) == 1)
    is_next &= (np.diff(block) == 1) & (block[:-1] != _NONE) | (block[:-1] == _NONE) & (
        block[1:] == _NONE
    )
    starts = np.flatnonzero(np.concatenate(([True], ~is_next)))
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(row)], strict=True))
