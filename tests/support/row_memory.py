"""Token slots in the storage of a mode, read back through its rows instead of block tables."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import numpy as np
import torch
from numpy.typing import ArrayLike

from kvpager.modes import ModeName
from kvpager.modes.protocol import Rows
from kvpager.storage.block_storage import BlockStorage
from kvpager.testing.memory import UNWRITTEN, TokenMemory

_NUM_ROWS = 3  # fewer than sequences: rows change hands


class RowMemory(TokenMemory):
    """The device tier is layer 0 of a `BlockStorage`, whose 64-bit numbers are read as integers."""

    mode: ModeName = "virtual"

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        super().__init__(num_blocks, block_size, num_host_blocks)
        self.storage = self.make_storage(num_blocks, block_size)
        self.rows: Rows | None = None
        self._next: Iterator[int] = cycle(range(_NUM_ROWS))
        self._use_storage()
        self.tiers["device"][:] = UNWRITTEN

    def make_storage(self, num_blocks: int, block_size: int) -> BlockStorage:
        return BlockStorage(
            num_blocks, block_size, [(1, 1, 1)] * 2, dtype=torch.float64, mode=self.mode
        )

    def _use_storage(self) -> None:
        """Show the slots of layer 0: [blocks, block_size]."""
        keys, _ = self.storage.layer(0)
        self.tiers["device"] = keys[:, :, 0, 0].view(torch.int64).numpy()

    def write(self, slots: ArrayLike, values: list[int]) -> None:
        if values:
            blocks, offsets = np.divmod(np.asarray(slots, np.intp), self.block_size)
            self.tiers["device"][blocks, offsets] = values

    def read(self, table: ArrayLike, length: int, start: int = 0) -> list[int]:
        blocks = np.asarray(table, np.int32)[None, : -(-length // self.block_size)]
        if self.rows is None or blocks.shape[1] > self.rows.num_blocks:
            self.rows = self.storage.open_rows(_NUM_ROWS, 2 * max(length, 1))
        row = np.array([next(self._next)], np.int32)
        self.rows.follow(row, blocks)
        shown = self.rows.caches(0).key[int(row[0]), start:length, 0, 0]
        values: list[int] = shown.view(torch.int64).tolist()
        return values

    def resize(self, num_blocks: int) -> None:
        more = num_blocks > self.storage.num_blocks
        (self.storage.grow if more else self.storage.shrink)(num_blocks)
        self._use_storage()
