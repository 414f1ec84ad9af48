"""Views of a layer's keys and values, which read blocks through block tables."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from kvpager.integrations.huggingface.cache.budget import Budget, LayerKind
from kvpager.integrations.huggingface.cache.pools import Place
from kvpager.integrations.huggingface.cache.row_tables import RowTables
from kvpager.kernels.host_rows import to_device
from kvpager.ops import HostRows, LayerCaches, gather_kv
from kvpager.plans import Int64


class Part(NamedTuple):
    """Rows of a view whose blocks are in one storage."""

    place: Place
    rows: Tensor | None  # indices in the batch, int64 on the layer's device; None for all
    tables: RowTables

    def caches(self) -> LayerCaches:
        """Return the layer's blocks."""
        return self.place.storage.caches(self.place.layer)

    def dense(self, num_columns: int) -> tuple[Tensor, Tensor]:
        """Gather the last columns as [rows, columns, kv_heads, dim]; padding is zero."""
        dtype, caches = self.place.storage.dtype, self.caches()
        rows = self.tables.block_tables, self.tables.seq_lens
        key, value = (
            gather_kv(cache, *rows, num_columns, scales=scale, dtype=dtype)
            for cache, scale in zip(
                (caches.key, caches.value), caches.scales or (None, None), strict=True
            )
        )
        return key, value

    def on(self, device: torch.device) -> Blocks:
        """Return the blocks for a kernel on `device`. O(1), or O(bytes) for a copy to it."""
        if self.place.storage.device == device:
            return Blocks(self.caches(), self.tables)
        return self.staged(device)

    def staged(self, device: torch.device) -> Blocks:
        """Copy the part's blocks of this layer to `device`. O(bytes)."""
        theirs = self.tables.block_tables
        used = theirs >= 0
        blocks = theirs[used].long()
        tables = torch.full_like(theirs, -1)
        tables[used] = torch.arange(len(blocks), dtype=tables.dtype)
        key, value, *scales = (to_device(cache[blocks], device) for cache in self.caches().tensors)
        host = HostRows(tables.numpy(), self.tables.host.seq_lens)
        return Blocks(
            LayerCaches(key, value, (scales[0], scales[1]) if scales else None),
            RowTables(to_device(host.block_tables, device), to_device(host.seq_lens, device), host),
        )


class Blocks(NamedTuple):
    """A layer's blocks and the rows' block tables, as kernels take them."""

    caches: LayerCaches
    tables: RowTables


def packed(states: Tensor) -> Tensor:
    """Reshape [rows, heads, columns, dim] to the kernels' [rows * columns, heads, dim].

    Returns a view if strides allow it. The elements of a head are always contiguous.
    """
    rows, heads, columns, dim = states.shape
    if columns == 1:
        tokens = states.squeeze(2)
    else:
        tokens = states.transpose(1, 2).reshape(rows * columns, heads, dim)
    return tokens if tokens.stride(-1) == 1 else tokens.contiguous()


class PagedView:
    """A layer's keys and values of columns `start` to `stop` at the time it was made.

    It reads the blocks in place until they change. Before a change, the group calls `materialise`,
    so that a live view keeps its content.
    """

    __slots__ = (
        "__weakref__", "_dense", "_owner", "budget", "device", "dtype", "kind", "num_rows",
        "padding", "parts", "shape", "start", "stop",
    )  # fmt: skip

    def __init__(
        self,
        kind: LayerKind,
        parts: list[Part],
        padding: Int64,
        start: int,
        stop: int,
        budget: Budget,
        owner: object = None,
    ) -> None:
        """Make a view of `parts`, whose rows begin with `padding` [rows] columns. O(1).

        The view counts its reads in `budget`. It keeps `owner`, which holds the blocks, alive.
        """
        self.kind, self.parts, self.padding = kind, parts, padding
        self.shape, self.dtype, self.device = kind
        self.num_rows, self.start, self.stop = len(padding), start, stop
        self.budget, self._owner = budget, owner
        self._dense: tuple[Tensor, Tensor] | None = None

    def shows_the_same_as(self, other: PagedView) -> bool:
        """Return True if both views can be read in place, and show the same columns. O(1)."""
        if self._dense is not None or other._dense is not None:
            return False
        # Views of one group share one list of parts until the group changes.
        return self is other or (
            self.parts is other.parts and (self.start, self.stop) == (other.start, other.stop)
        )

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return keys and values [rows, kv_heads, columns, dim]. Gathers once; padding is zero."""
        if self._dense is None:
            self.budget.counters.gathers += 1
            num_columns = self.stop - self.start
            if len(self.parts) == 1:
                key, value = (each.to(self.device) for each in self.parts[0].dense(num_columns))
            else:
                key, value = self._joined(num_columns)
            # Contiguous like a result of `torch.cat`, since some models call `view` on it.
            self._dense = key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous()
        return self._dense

    def _joined(self, num_columns: int) -> tuple[Tensor, Tensor]:
        heads, key_dim, value_dim = self.shape
        key, value = (
            torch.empty(
                self.num_rows, num_columns, heads, dim, dtype=self.dtype, device=self.device
            )
            for dim in (key_dim, value_dim)
        )
        for part in self.parts:
            for whole, of_part in zip((key, value), part.dense(num_columns), strict=True):
                whole[part.rows] = of_part.to(self.device)
        return key, value

    materialise = dense


class Views(weakref.WeakSet[PagedView]):
    """The live views of a group."""

    def freeze(self) -> None:
        """Materialise and forget all views, before the blocks change. O(bytes shown)."""
        for view in list(self):
            view.materialise()
        self.clear()
