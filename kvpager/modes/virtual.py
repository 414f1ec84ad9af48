"""Virtual: blocks anywhere in a pool, also mapped into a range of addresses for each row.

Attention reads a row as one tensor. Sequences can still share blocks: a shared block is one page
of memory at several addresses. The idea is vAttention's (Prabhu et al. 2024), whose code needs a
GPU. `Virtual` is the mode on a CPU; `VirtualOnGpu` has the same rows over a GPU's pages.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kvpager.modes.page_pool import SYSTEM_PAGE_BYTES, PagePool
from kvpager.modes.protocol import NO_PAGE, Memory, PageRange, Pages, layer_caches
from kvpager.ops import LayerCaches
from kvpager.plans import Int32
from kvpager.storage.layout import StorageLayout

_UNKNOWN = -2  # in `_mapped`: differs from all blocks


class MappedMemory:
    """The part of a mode that has a pool of pages, and rows that show them."""

    name = "virtual"

    def resized(self, memory: Memory, num_blocks: int, pinned: bool) -> Memory:  # noqa: D102
        pool = _pool_of(memory)
        pool.resize(num_blocks)
        return Memory(pool.pages.view(memory.tier.dtype), pool)

    def open_rows(  # noqa: D102
        self, memory: Memory, layout: StorageLayout, num_rows: int, num_blocks: int
    ) -> VirtualRows:
        return VirtualRows(memory, layout, num_rows, num_blocks)


class Virtual(MappedMemory):
    """Blocks in pages that can be mapped at several addresses, token-first. Needs Linux."""

    token_first = SYSTEM_PAGE_BYTES

    def allocate(  # noqa: D102
        self,
        num_blocks: int,
        layout: StorageLayout,
        dtype: torch.dtype,
        device: torch.device,
        pinned: bool,
    ) -> Memory:
        if device.type != "cpu" or pinned:
            raise ValueError(
                f'mode="virtual": needs an NVIDIA GPU, or device="cpu" and pinned=False, not '
                f'device={str(device)!r}, pinned={pinned}. Take mode="paged", or no host_memory.'
            )
        pool = PagePool(num_blocks, layout.num_elements * dtype.itemsize)
        return Memory(pool.pages.view(dtype), pool)


class VirtualRows:
    """Rows of addresses, in which `follow` maps the blocks of block tables.

    On a CPU, addresses without a block read as zeros. A write to them ends the process with
    SIGSEGV, so that it never changes another row. On a GPU they must not be read either.
    """

    def __init__(
        self, memory: Memory, layout: StorageLayout, num_rows: int, num_blocks: int
    ) -> None:
        """Reserve addresses for rows, which take no memory. O(rows * blocks).

        Raises: `ValueError` if the system allows too few mappings; `OSError` without address space.
        """
        self.num_rows, self.num_blocks = num_rows, num_blocks
        self._pool, self._layout, self._dtype = _pool_of(memory), layout, memory.tier.dtype
        self._range, self._is_detached = self._new_range(), False
        self._begin()

    def _new_range(self) -> PageRange:
        num_blocks = self.num_rows * self.num_blocks
        # Each block may be a mapping of its own, and so may the rest of each row.
        return self._pool.open_range(num_blocks, num_blocks + self.num_rows)

    def _take_range(self) -> None:
        if self._is_detached:
            self._range, self._is_detached = self._new_range(), False

    def _begin(self) -> None:
        """Reset the record of mappings: nothing is mapped."""
        self._mapped: Int32 = np.full((self.num_rows, self.num_blocks), NO_PAGE, np.int32)
        self._last: tuple[bytes, tuple[int, ...], bytes] | None = None  # the call of `follow`
        self._num_drops = self._pool.num_drops
        self._caches: list[LayerCaches] = []

    def caches(self, layer: int) -> LayerCaches:  # noqa: D102
        self._take_range()
        if not self._caches:
            elements = self._range.tensor().view(self._dtype).view(self.num_rows, -1)
            self._caches = [layer_caches(views) for views in self._layout.views(elements)]
        return self._caches[layer]

    def detach(self) -> None:
        """Copy the content of tensors that callers still have, so that they keep it.

        O(blocks mapped); O(1) in the usual case that there are none.
        """
        self._caches = []
        if not self._range.is_in_use:
            return
        mapped = np.flatnonzero(self._mapped.ravel() != NO_PAGE)
        self._begin()
        self._is_detached = True  # the range belongs to those tensors: take another one when needed
        for start, count in _runs_of(mapped):
            self._range.part_from_pages(start, count)

    def follow(self, rows: Int32, tables: Int32) -> None:
        """Map what changed, each run of neighbours by one call. O(blocks compared + runs changed).

        A row's blocks beyond the columns of `tables` are unmapped. `rows` must be distinct. A call
        with the arguments of the last one only compares them. Raises: `OSError` if the system
        refuses; then the next call maps the rest.
        """
        self._take_range()
        self._range.enter()
        if self._num_drops != self._pool.num_drops:
            self._mapped[self._mapped != NO_PAGE] = _UNKNOWN
            self._last, self._num_drops = None, self._pool.num_drops
        call = rows.tobytes(), tables.shape, tables.tobytes()
        if call == self._last:
            return
        self._last = None
        wanted = np.full((len(rows), self.num_blocks), NO_PAGE, np.int32)
        wanted[:, : tables.shape[1]] = np.maximum(tables, NO_PAGE)
        index, column = np.nonzero(self._mapped[rows] != wanted)
        if len(index):
            self._map(rows[index], column, wanted[index, column])
        self._last = call

    def release(self, rows: Int32) -> None:
        """Unmap all blocks of rows. O(blocks)."""
        self.follow(rows, np.empty((len(rows), 0), np.int32))

    def _map(self, rows: Int32, columns: NDArray[np.int64], blocks: Int32) -> None:
        """Map a block, or none, at each place. Runs of places and blocks take one call."""
        places = rows.astype(np.int64) * self.num_blocks + columns
        is_none = blocks == NO_PAGE
        step = np.diff(blocks)
        is_next = np.diff(places) == 1
        is_next &= np.where(is_none[:-1], is_none[1:], (step == 1) & ~is_none[1:])
        starts = np.flatnonzero(np.concatenate(([True], ~is_next)))
        counts = np.diff(starts, append=len(rows))
        self._mapped[rows, columns] = _UNKNOWN  # after an interrupt, the next call maps all
        self._range.show(
            zip(places[starts].tolist(), blocks[starts].tolist(), counts.tolist(), strict=True)
        )
        self._mapped[rows, columns] = blocks


def _pool_of(memory: Memory) -> Pages:
    assert memory.pool is not None, "the memory of this mode has a pool"
    return memory.pool


def _runs_of(numbers: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return ascending numbers as runs: the first number of each, and its length."""
    starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
    counts = np.diff(starts, append=len(numbers))
    return list(zip(numbers[starts].tolist(), counts.tolist(), strict=True))
