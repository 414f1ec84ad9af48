"""Rows of a group as runs of memory, where its storages map blocks: mode "virtual"."""

from __future__ import annotations

import logging
import weakref

import numpy as np
from torch import Tensor

from kvpager.integrations.huggingface.cache.pools import Place
from kvpager.modes.protocol import Rows
from kvpager.plans import Int32
from kvpager.storage.block_storage import BlockStorage

logger = logging.getLogger("kvpager")


class MappedRows:
    """The rows of a batch in each storage that maps blocks.

    Rows are opened at the first read, and again when the batch outgrows them. Tensors are views of
    the blocks until `detach`. After that, those still in use keep their content.
    """

    def __init__(self) -> None:
        self._has_warned = False
        self._rows: weakref.WeakKeyDictionary[BlockStorage, tuple[object, Rows]]
        self._rows = weakref.WeakKeyDictionary()

    def tensors(self, place: Place, tables: Int32, start: int, stop: int) -> list[Tensor] | None:
        """Return a layer's keys and values of columns `start` to `stop`; None if not mapped.

        [rows, kv_heads, columns, dim] each, for rows without padding, whose blocks are `tables`,
        int32 [rows, blocks]. O(layers) if the tables changed, else O(tables compared).
        """
        storage, layer = place
        if storage.mode != "virtual" or storage.kv_cache_dtype is not None:
            return None
        rows = self._of(storage, tables)
        if rows is None:
            return None
        rows.follow(np.arange(len(tables), dtype=np.int32), tables)
        caches = rows.caches(layer)
        return [
            cache[: len(tables), start:stop].transpose(1, 2) for cache in (caches.key, caches.value)
        ]

    def detach(self) -> None:
        """Let tensors that are still in use keep their content, before blocks change. O(1).

        O(bytes) if there are any.
        """
        for _, rows in list(self._rows.values()):
            rows.detach()

    def _of(self, storage: BlockStorage, tables: Int32) -> Rows | None:
        num_rows, num_blocks = tables.shape
        layers, rows = self._rows.get(storage, (None, None))
        # `keep_layers` makes another tuple of layers, and ends the use of older rows.
        if rows is not None:
            fits = num_rows <= rows.num_rows and num_blocks <= rows.num_blocks
            if fits and layers is storage.layers:
                return rows
            rows.detach()
        try:
            rows = storage.open_rows(num_rows, 2 * num_blocks * storage.block_size)
        except ValueError as error:  # too few mappings
            if not self._has_warned:
                logger.warning("kvpager: keys and values are gathered. %s", error)
            self._has_warned = True
            return None
        self._rows[storage] = storage.layers, rows
        return rows
