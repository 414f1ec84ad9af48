"""Reserved: one region for each row, as long as the longest sequence, as before paging."""

from __future__ import annotations

import numpy as np

from kvpager.modes.plain_memory import PlainMemory
from kvpager.modes.protocol import Memory, layer_caches
from kvpager.ops import LayerCaches
from kvpager.plans import Int32
from kvpager.storage.layout import PART_ALIGNMENT_BYTES, StorageLayout


class Reserved(PlainMemory):
    """Blocks in ordinary memory, token-first. Row r is the r-th region of consecutive blocks."""

    name = "reserved"
    token_first = PART_ALIGNMENT_BYTES

    def open_rows(  # noqa: D102
        self, memory: Memory, layout: StorageLayout, num_rows: int, num_blocks: int
    ) -> ReservedRows:
        return ReservedRows(memory, layout, num_rows, num_blocks)


class ReservedRows:
    """Rows whose blocks lie in their regions. `follow` checks that they do."""

    def __init__(
        self, memory: Memory, layout: StorageLayout, num_rows: int, num_blocks: int
    ) -> None:
        """Show the first `num_rows` regions of `num_blocks` blocks. O(layers).

        Raises: `ValueError` if the memory has fewer blocks.
        """
        available = len(memory.tier)
        if num_rows * num_blocks > available:
            raise ValueError(
                f"num_rows={num_rows}: {num_blocks} blocks are reserved for each row, and there "
                f"are {available}. Lower num_rows or max_length."
            )
        self.num_rows, self.num_blocks = num_rows, num_blocks
        regions = memory.tier[: num_rows * num_blocks].view(num_rows, -1)
        self._caches = [layer_caches(views) for views in layout.views(regions)]

    def caches(self, layer: int) -> LayerCaches:  # noqa: D102
        return self._caches[layer]

    def follow(self, rows: Int32, tables: Int32) -> None:
        """Check that each table lists the blocks of its row's region. O(blocks).

        Raises: `ValueError` for another block.
        """
        own = np.asarray(rows)[:, None] * self.num_blocks + np.arange(tables.shape[1])
        wrong = (tables >= 0) & (tables != own)
        if wrong.any():
            index, column = np.argwhere(wrong)[0]
            raise ValueError(
                f"tables[{index}, {column}]={tables[index, column]}: expected "
                f"{own[index, column]}, the block of the row's region"
            )

    def detach(self) -> None:
        """Do nothing: a tensor always shows its region."""

    def release(self, rows: Int32) -> None:
        """Do nothing: a region belongs to its row."""
