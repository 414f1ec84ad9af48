"""Blocks as the cells of a map: a cell is a block, or adds up several blocks.

All cells of all shown steps are planes of bytes, which compress to little: most cells do not change
between two steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CELLS_MAX = 1024  # of a map: more are too small to point at
NO_REQUEST = 0xFFFFFF  # a sequence of no request, or a request with a larger number
PLANES = ("live", "held", "cached", "holders", "low", "middle", "high")
_SUM_PARTS = 64  # of a cell of several blocks: finer shares cannot be seen

Cells = NDArray[np.uint8]  # [planes, cells]
Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Grid:
    """The map of a pool: `num_cells` cells, each of `cell_blocks` blocks of `block_size` slots."""

    num_blocks: int
    block_size: int

    @property
    def cell_blocks(self) -> int:
        """Return the blocks of a cell. O(1)."""
        return max(1, -(-self.num_blocks // CELLS_MAX))

    @property
    def num_cells(self) -> int:
        """Return the number of cells. O(1)."""
        return -(-self.num_blocks // self.cell_blocks)

    @property
    def scale(self) -> int:
        """Return the value of a plane for a cell that is full. O(1)."""
        return min(self.block_size, 255) if self.cell_blocks == 1 else _SUM_PARTS

    def cells(self, blocks: Blocks) -> Cells:
        """Return the planes of the blocks. O(blocks), and O(blocks * log blocks) for sums."""
        live, held, cached = (
            self._shares(slots) for slots in (blocks.live, blocks.held, blocks.cached)
        )
        if self.cell_blocks == 1:
            holders, owners = blocks.holders, blocks.owners
        else:
            holders, owners = self._holders(blocks), self._owners(blocks)
        parts = (live, held, cached, np.minimum(holders, 255))
        return np.stack([*parts, owners & 255, owners >> 8 & 255, owners >> 16]).astype(np.uint8)

    def _rows(self, values: Array) -> Array:
        padded: Array = np.zeros(self.num_cells * self.cell_blocks, np.int64)
        padded[: len(values)] = values
        rows: Array = padded.reshape(self.num_cells, -1)
        return rows

    def _shares(self, slots: Array) -> Array:
        whole = self.cell_blocks * self.block_size
        shares: Array = (self._rows(slots).sum(1) * self.scale + whole // 2) // whole
        return shares

    def _holders(self, blocks: Blocks) -> Array:
        """Return the most holders of a block where most held blocks are shared, else 1 or 0."""
        rows = self._rows(blocks.holders)
        held, shared = (rows > 0).sum(1), (rows > 1).sum(1)
        most: Array = rows.max(1)
        is_shared = 2 * shared >= np.maximum(held, 1)
        holders: Array = np.where(is_shared, most, np.minimum(most, 1))
        return holders

    def _owners(self, blocks: Blocks) -> Array:
        """Return the request with the most blocks of each cell; shared blocks do not count."""
        owners = np.zeros(self.num_cells, np.int64)
        alone = np.flatnonzero((blocks.owners > 0) & (blocks.holders == 1))
        keys = np.sort((alone // self.cell_blocks) << 24 | blocks.owners[alone])
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        counts = np.diff(starts, append=len(keys))
        order = np.argsort(counts, kind="stable")  # the last one written stays
        found = keys[starts[order]]
        owners[found >> 24] = found & NO_REQUEST
        return owners


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a pool at one step, int64 [blocks] each.

    `live`, `held` and `cached` count slots: those with a token, those of held blocks, those of
    blocks that are only cached. `owners` are `request + 1`, 0 for none.
    """

    live: Array
    held: Array
    cached: Array
    holders: Array
    owners: Array


def owner_of(request: int | None) -> int:
    """Return the number that stands for a request in a plane. O(1)."""
    return NO_REQUEST if request is None or request + 1 >= NO_REQUEST else request + 1


def packed(frames: list[Cells]) -> bytes:
    """Return all frames plane by plane, each frame as its difference (XOR) to the one before."""
    planes = np.stack(frames, 1)  # [planes, frames, cells]
    planes[:, 1:] ^= planes[:, :-1]  # NumPy reads before it writes
    return planes.tobytes()
