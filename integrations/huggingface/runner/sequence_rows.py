"""Sequences of an engine as runs of memory, where the storage has rows: all modes but "paged"."""

from __future__ import annotations

import logging
from collections import OrderedDict

import numpy as np
from torch import Tensor

from kvpager.integrations.huggingface.cache.pools import Place
from kvpager.modes.protocol import Rows
from kvpager.plans import Int32
from kvpager.storage.block_storage import BlockStorage

logger = logging.getLogger("kvpager")


class SequenceRows:
    """The rows that show the sequences of a group of layers, one at a time.

    A row follows the same sequence from step to step, so that only new blocks are mapped. If there
    are more sequences than rows, the least recently shown one loses its row. In mode "reserved" the
    region of a sequence is its row.

    Args:
        storage: the blocks.
        num_rows: the most rows to open. Fewer are opened if the system allows fewer mappings.
        max_length: the most tokens of a sequence. Rows begin shorter, and are opened again when a
            sequence outgrows them.
    """

    def __init__(self, storage: BlockStorage, num_rows: int, max_length: int) -> None:
        self._storage, self._max_length, self._most = storage, max_length, num_rows
        self._rows: Rows | None = None
        self._row_of: OrderedDict[int, int] = OrderedDict()  # sequence -> row, last used last
        self._free: list[int] = []
        self._sequence = 0

    def show(self, sequence: int) -> None:
        """Set the sequence that `tensors` returns. O(1)."""
        self._sequence = sequence

    def forget(self, sequences: Int32) -> None:
        """Let other sequences have the rows of ended ones. O(sequences)."""
        for sequence in sequences.tolist() if self._row_of else ():
            row = self._row_of.pop(sequence, None)
            if row is not None:
                self._free.append(row)

    def tensors(self, place: Place, tables: Int32, start: int, stop: int) -> list[Tensor] | None:
        """Return the keys and values of the sequence's tokens; None if there are no rows.

        [1, kv_heads, tokens, dim] each. `tables` is int32 [1, blocks], the sequence's blocks. O(1)
        if they are those of the last call, else O(blocks compared).
        """
        rows = self._fitting(tables.shape[1])
        if rows is None:
            return None
        row = self._row(rows, tables)
        rows.follow(np.array([row], np.int32), tables)
        caches = rows.caches(place.layer)
        return [
            cache[row : row + 1, start:stop].transpose(1, 2) for cache in (caches.key, caches.value)
        ]

    def _row(self, rows: Rows, tables: Int32) -> int:
        if self._storage.mode == "reserved":
            return int(tables[0, 0]) // rows.num_blocks
        row = self._row_of.pop(self._sequence, None)
        if row is None:
            row = self._free.pop() if self._free else self._row_of.popitem(last=False)[1]
        self._row_of[self._sequence] = row
        return row

    def _fitting(self, num_blocks: int) -> Rows | None:
        """Return rows of at least `num_blocks` blocks, opened again if they are too short."""
        if self._storage.kv_cache_dtype is not None:
            return None
        if self._rows is None or num_blocks > self._rows.num_blocks:
            self._rows = None
            length = self._max_length
            if self._storage.mode != "reserved":
                length = min(length, 2 * num_blocks * self._storage.block_size)
            self._open(length)
        return self._rows

    def _open(self, length: int) -> None:
        while self._most:
            try:
                self._rows = self._storage.open_rows(self._most, length)
            except ValueError as error:  # too few mappings
                self._most //= 2
                if not self._most:
                    logger.warning("kvpager: keys and values are gathered. %s", error)
            else:
                self._row_of, self._free = OrderedDict(), list(range(self._most))
                return
