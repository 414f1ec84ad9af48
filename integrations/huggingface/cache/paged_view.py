"""Views of a layer's keys and values, which read blocks through block tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kvpager.integrations.huggingface.cache.budget import Budget, LayerKind
from kvpager.integrations.huggingface.cache.pools import Place
from kvpager.integrations.huggingface.cache.row_tables import RowTables
from kvpager.kernels.host_rows import to_device
from kvpager.ops import HostRows, LayerCaches, gather_kv
from kvpager.ops import attend as attend_in_place
from kvpager.plans import Int32, Int64


class TensorRows(Protocol):
    """Rows of a batch that a storage shows as tensors; `MappedRows` documents the member."""

    def tensors(self, place: Place, tables: Int32, start: int, stop: int) -> list[Tensor] | None:
        """Return a layer's keys and values of columns `start` to `stop`; None if it cannot."""


class Part(NamedTuple):
    """Rows of a view whose blocks are in one storage."""

    place: Place
    rows: Tensor | None  # indices in the batch, int64 on the layer's device; None for all
    tables: RowTables

    def caches(self) -> LayerCaches:
        """Return the layer's blocks."""
        return self.place.storage.caches(self.place.layer)

    def dense(self, which: int, num_columns: int) -> Tensor:
        """Gather the last columns of keys (0) or values (1): [rows, columns, kv_heads, dim]."""
        cache, *scales = self.caches().tensors[which::2]
        scale, dtype = scales[0] if scales else None, self.place.storage.dtype
        rows = self.tables.block_tables, self.tables.seq_lens
        return gather_kv(cache, *rows, num_columns, scales=scale, dtype=dtype)

    def attend(
        self, query: Tensor, mask: Tensor | None, sinks: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """Return the output of these rows among the rows of `query`; see `PagedView.attend`."""
        if self.rows is not None:
            query = query[self.rows]
            mask = mask if mask is None or len(mask) == 1 else mask[self.rows]
        rows, query_heads, q_len, _ = query.shape
        is_here = self.place.storage.device == query.device
        caches, tables = (self.caches(), self.tables) if is_here else self.staged(query.device)
        args = tables.args(q_len, mask=mask, **options)
        output = attend_in_place(packed(query), caches, args, sinks=sinks)
        return output.view(rows, q_len, query_heads, -1)

    def staged(self, device: torch.device) -> tuple[LayerCaches, RowTables]:
        """Copy the part's blocks of this layer to `device`. O(bytes)."""
        theirs = self.tables.block_tables
        used = theirs >= 0
        blocks = theirs[used].long()
        tables = torch.full_like(theirs, -1)
        tables[used] = torch.arange(len(blocks), dtype=tables.dtype)
        key, value, *scales = (to_device(cache[blocks], device) for cache in self.caches().tensors)
        host = HostRows(tables.numpy(), self.tables.host.seq_lens)
        return (
            LayerCaches(key, value, (scales[0], scales[1]) if scales else None),
            RowTables(to_device(host.block_tables, device), to_device(host.seq_lens, device), host),
        )


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

    It reads the blocks in place until they change. Before a change, the group calls `dense`, so
    that a live view keeps its content.
    """

    __slots__ = (
        "__weakref__", "_dense", "_owner", "_rows", "budget", "device", "dtype", "kind", "num_rows",
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
        rows: TensorRows | None = None,
    ) -> None:
        """Make a view of `parts`, whose rows begin with `padding` [rows] columns. O(1).

        The view counts its reads in `budget`. It keeps `owner`, which holds the blocks, alive.
        `rows` are the owner's, if its storages show rows as tensors.
        """
        self.kind, self.parts, self.padding = kind, parts, padding
        self.shape, self.dtype, self.device = kind
        self.num_rows, self.start, self.stop = len(padding), start, stop
        self.budget, self._owner, self._rows = budget, owner, rows
        self._dense: tuple[Tensor, Tensor] | None = None

    def shows_the_same_as(self, other: PagedView) -> bool:
        """Return True if both views can be read in place, and show the same columns. O(parts)."""
        if self._dense is not None or other._dense is not None:
            return False
        return self is other or self._shown() == other._shown()

    def _shown(self) -> tuple[int, int, list[tuple[Place, int]]]:
        # Views of one group share its tables until the group changes.
        return self.start, self.stop, [(part.place, id(part.tables)) for part in self.parts]

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return keys and values [rows, kv_heads, columns, dim]. Gathers once; padding is zero."""
        if self._dense is None:
            self.budget.counters.gathers += 1
            self._dense = self._gathered(0), self._gathered(1)
        return self._dense

    def _gathered(self, which: int) -> Tensor:
        heads, *dims = self.shape
        num_columns = self.stop - self.start
        parts = (part.dense(which, num_columns).to(self.device) for part in self.parts)
        # Contiguous like a result of `torch.cat`, since some models call `view` on it.
        return self._joined(parts, num_columns, heads, dims[which]).transpose(1, 2).contiguous()

    def mapped(self) -> list[Tensor] | None:
        """Return keys and values like `dense`, as views of the blocks; None if they cannot be.

        The blocks must be mapped in order (mode "virtual"), and no row padded. Counts as a read in
        place. O(1) for an unchanged step.
        """
        part = self.parts[0]
        if self._dense is not None or self._rows is None or len(self.parts) > 1:
            return None
        if part.rows is not None or self.padding.any():
            return None
        tables, seq_lens = part.tables.host.block_tables, part.tables.host.seq_lens
        num_missing = self.stop - int(seq_lens[0])  # leading tokens whose blocks were freed
        columns = self.start - num_missing, self.stop - num_missing
        tensors = self._rows.tensors(part.place, tables, *columns)
        self.budget.counters.in_place_reads += tensors is not None
        return tensors

    def attend(
        self, query: Tensor, mask: Tensor | None, sinks: Tensor | None, **options: Any
    ) -> Tensor:
        """Return the output [rows, q_len, query_heads, value_dim].

        `query` is [rows, query_heads, q_len, dim]; `options` are those of `RowTables.args`. Reads
        the blocks in place, and counts the read. O(queries * kv tokens * heads * dims).
        """
        self.budget.counters.in_place_reads += 1
        if self.start:
            options["num_columns"] = self.stop - self.start
        outputs = (part.attend(query, mask, sinks, options) for part in self.parts)
        return self._joined(outputs, query.shape[2], query.shape[1], self.shape.value_head_dim)

    def _joined(self, of_parts: Iterator[Tensor], *shape: int) -> Tensor:
        """Return the rows of all parts, of `shape` each, in the order of the batch."""
        if len(self.parts) == 1:
            return next(of_parts)
        joined = torch.empty(self.num_rows, *shape, dtype=self.dtype, device=self.device)
        for part, of_part in zip(self.parts, of_parts, strict=True):
            joined[part.rows] = of_part
        return joined
