"""Layers that share one block table, and what an attention function reads through it.

    columns        0  1  2  3  4  5  6  7        a batch as transformers sees it: one length,
    row 0          .  .  .  t0 t1 t2 t3 t4       left-padded
    row 1          t0 t1 t2 t3 t4 t5 t6 t7
    sequences      row 0: t0..t4 in 2 blocks of 4; row 1: t0..t7 in 2 blocks

Columns are transformers' view, tokens are the block manager's: a row's token is its column less
its padding. So padding is never stored, and equal prompts have equal blocks however padded.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence as Rows

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.pools import (
    LayerKind,
    PagedLayers,
    PagedMemory,
    PagedPool,
)
from kvpager.kernels.gather_kv import gather_kv
from kvpager.sequences import Sequence
from kvpager.storage import BlockStorage

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


class PagedView:
    """A layer's keys and values of columns `start` to `stop`, as they are now.

    Reads the blocks in place while nothing has changed; just before something does, the group
    calls `materialise`, so that whoever still holds the view keeps what it saw.
    """

    __slots__ = (
        "__weakref__", "_dense", "group", "kv_lens", "layer", "start", "stop", "storage", "tables"
    )  # fmt: skip

    def __init__(
        self, group: LayerGroup, storage: BlockStorage, layer: int, start: int, stop: int
    ) -> None:
        self.group = group  # keeps the blocks alive
        self.storage = storage
        self.layer = layer
        self.start = start
        self.stop = stop
        self.tables, self.kv_lens = group.device_tables(storage.device, stop)
        self._dense: tuple[Tensor, Tensor] | None = None

    def shows_the_same_as(self, other: PagedView) -> bool:
        """Whether both may be read in place still, and read the same. O(1)."""
        if self._dense is not None or other._dense is not None:
            return False
        # Of one group, with nothing changed since: then the tables are one tensor.
        return self is other or (
            self.tables is other.tables
            and self.storage is other.storage
            and (self.layer, self.start, self.stop) == (other.layer, other.start, other.stop)
        )

    def caches(self) -> tuple[Tensor, Tensor]:
        """The layer's key and value blocks, [blocks, block_size, kv_heads, dim] each."""
        return self.storage.layer(self.layer)

    def scales(self) -> tuple[Tensor, Tensor] | None:
        """Their scales, [blocks, block_size, kv_heads] each; None unless kept in eight bits."""
        return self.storage.scales(self.layer)

    def kv_starts(self) -> Tensor | None:
        """The first token to read of each row, int32 [rows]; None for the first of all."""
        if self.start == 0:
            return None
        return (self.kv_lens - (self.stop - self.start)).clamp_(min=0)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values as [rows, kv_heads, columns, dim]; padding is zero. Gathers once."""
        if self._dense is None:
            self.group.count_gather()
            length = self.stop - self.start
            # Contiguous like the result of `torch.cat`, since some models call `view` on it.
            dtype, scales = self.storage.dtype, self.scales() or (None, None)
            key, value = (
                gather_kv(cache, self.tables, self.kv_lens, length, scales=scale, dtype=dtype)
                .transpose(1, 2)
                .contiguous()
                for cache, scale in zip(self.caches(), scales, strict=True)
            )
            self._dense = key, value
        return self._dense

    materialise = dense


_numbers = itertools.count()


class LayerGroup:
    """Block tables for the rows of one cache, shared by every layer of one kind of attention.

    Args:
        memory: where its pool comes from.
        num_layers: how many layers share it; None where that is not known beforehand.
        window: tokens its layers look back, themselves included; None for all.
    """

    def __init__(self, memory: PagedMemory, num_layers: int | None, window: int | None) -> None:
        self.memory = memory
        self.num_layers = num_layers
        self.window = window
        self.pool: PagedPool | None = None
        self.layout: object = None
        self.num_columns = 0
        self.padding: Int64 = np.zeros(0, np.int64)
        self.sequences: list[Sequence] = []
        self.prompt: Prompt | None = None
        self._first_private_column = 0  # from it on, no block is shared with another group
        self.num_members = 0  # layers made so far
        self._number = next(_numbers)
        self._change_place()
        self._column_bytes = 0  # of a row, over all layers, as DynamicCache would keep it
        self._bound: dict[PagedLayers, int] = {}
        memory.note_group(self)
        self._num_left = 0  # layers that live in blocks no longer
        self._views: weakref.WeakSet[PagedView] = weakref.WeakSet()
        self._tables: dict[torch.device, Tensor] = {}
        self._lengths: dict[tuple[torch.device, int], Tensor] = {}
        self._slots: tuple[object, Tensor] | None = None

    def __del__(self) -> None:
        # getattr: a half-made group is finalised as well.
        if getattr(self, "pool", None) is not None and self.sequences:
            self.pool.discard(self.sequences)  # type: ignore[union-attr]

    @property
    def num_rows(self) -> int:
        """Rows of the batch; 0 before the first token."""
        return len(self.sequences)

    # ---------------------------------------------------------------- writing

    def storage(self, kind: LayerKind, layer: int) -> tuple[BlockStorage, int]:
        """Where the group's layer number `layer` lives. Binds the group to its pool."""
        if self.pool is None:
            if self.num_layers is None:
                self.pool = self.memory.new_pool()
            else:
                self.layout = (self.num_layers, self.window, kind)
                self.pool = self.memory.pool(self.layout)
        place = self.pool.storage(kind, layer, self.num_layers or layer + 1)
        self._column_bytes += kind.shape.elements_per_token * kind.dtype.itemsize
        layers = PagedLayers(kind, self.window)
        self._bound[layers] = self._bound.get(layers, 0) + 1
        self.memory.note_layers(layers, self._bound[layers])
        return place

    @property
    def dense_bytes(self) -> int:
        """Bytes that `DynamicCache` would hold in place of the group: padding and all. O(1)."""
        columns = self.num_columns
        if self.window is not None:
            columns = min(columns, self.window - 1)
        return self.num_rows * columns * self._column_bytes

    def extend(self, num_rows: int, start: int, num_new: int) -> None:
        """Make room for columns `start` to `start + num_new` of every row.

        The first layer of a forward pass does the work, the others find it done. Raises:
        `OutOfBlocks`, with nothing changed; `ValueError` for another number of rows.
        """
        assert self.pool is not None
        if not self.sequences:
            self._begin(num_rows)
        if num_rows != self.num_rows:
            raise ValueError(f"the cache holds {self.num_rows} rows, but {num_rows} are written")
        stop = start + num_new
        if stop <= self.num_columns:
            if start < self._first_private_column:
                raise KVPagerError(
                    f"a layer writes column {start}, but the cache was copied or reordered at "
                    f"column {self._first_private_column}; all layers must write before that"
                )
            return
        if start != self.num_columns:
            raise KVPagerError(
                f"a layer writes column {start}, but the layers before it ended at column "
                f"{self.num_columns}"
            )
        counts = np.maximum(stop - self.padding, 0) - self.lengths(self.num_columns)
        ids = self.prompt.ids(self.padding, self.num_columns, stop) if self.prompt else []
        self._freeze_views()
        self.pool.append(self.sequences, counts, ids)
        self.num_columns = stop

    def _begin(self, num_rows: int) -> None:
        assert self.pool is not None
        namespace = self.prompt.namespace if self.prompt else None
        self.sequences.extend(
            self.pool.allocate(np.empty(0, np.int32), namespace) for _ in range(num_rows)
        )
        if len(self.padding) != num_rows:
            self.padding = np.zeros(num_rows, np.int64)

    def adopt(self, layout: object, sequences: list[Sequence], num_columns: int) -> None:
        """Begin with sequences whose first `num_columns` columns are in the pool already."""
        self.layout, self.pool = layout, self.memory.pool(layout)
        self.sequences.extend(sequences)
        self.num_columns = self._first_private_column = num_columns

    def commit(self) -> None:
        """Every layer has written all columns: full blocks of known tokens become reusable."""
        if self.pool is not None and self.prompt is not None:
            self.pool.manager.commit(self.sequences)

    def note_next(self, ids: Int32) -> None:
        """All columns are written, and `ids` [rows] come next. O(tokens).

        Does nothing where the ids of some column are not known, or other rows are meant.
        """
        if self.prompt is None or len(ids) != self.num_rows:
            return
        known = [len(row) for row in self.prompt.rows]
        if known == self.lengths(self.num_columns).tolist():
            self.prompt = self.prompt.followed_by(ids)

    def slots(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Where columns `start` to `stop` go, int64 [rows * columns]; -1 for padding."""
        key = (start, stop, device)
        if self._slots is None or self._slots[0] != key:
            assert self.pool is not None
            size = self.pool.block_size
            tokens = np.arange(start, stop) - self.padding[:, None]
            tables = self.pool.manager.block_tables(self.sequences)
            slots = np.full(tokens.shape, -1, np.int64)
            rows, columns = np.nonzero(tokens >= 0)
            tokens = tokens[rows, columns]
            slots[rows, columns] = tables[rows, tokens // size].astype(np.int64) * size
            slots[rows, columns] += tokens % size
            self._slots = key, torch.from_numpy(slots.reshape(-1)).to(device)
        return self._slots[1]

    # ---------------------------------------------------------------- reading

    def lengths(self, num_columns: int) -> Int64:
        """Tokens of each row among the first `num_columns` columns, int64 [rows]."""
        return np.maximum(num_columns - self.padding, 0)

    def view(self, storage: BlockStorage, layer: int, start: int, stop: int) -> PagedView:
        """A layer's keys and values of columns `start` to `stop`."""
        view = PagedView(self, storage, layer, start, stop)
        self._views.add(view)
        return view

    def device_tables(self, device: torch.device, num_columns: int) -> tuple[Tensor, Tensor]:
        """Block tables int32 [rows, blocks] and token counts int32 [rows], on `device`."""
        tables = self._tables.get(device)
        if tables is None:
            assert self.pool is not None
            host = torch.from_numpy(self.pool.manager.block_tables(self.sequences))
            tables = self._tables[device] = host.to(device)
        # One tensor for all layers of a step, so that a plan made for it serves them all.
        lengths = self._lengths.get((device, num_columns))
        if lengths is None:
            counts = self.lengths(num_columns).astype(np.int32)
            lengths = self._lengths[device, num_columns] = torch.from_numpy(counts).to(device)
        return tables, lengths

    def count_gather(self) -> None:
        """One more view was read the slow way."""
        self.memory.counters.gathers += 1

    # ---------------------------------------------------------------- changing the batch

    def select(self, rows: Rows[int]) -> None:
        """Make the batch the given rows of it, each as often as it is named. O(rows + blocks)."""
        if not self.sequences or list(rows) == list(range(self.num_rows)):
            return
        assert self.pool is not None
        manager = self.pool.manager
        self._change_place()
        self._freeze_views()
        unused = dict(enumerate(self.sequences))
        # The first to name a row takes it over, further ones fork it.
        chosen = [
            unused.pop(row) if row in unused else manager.fork(self.sequences[row]) for row in rows
        ]
        manager.free(unused.values())
        self.sequences[:] = chosen
        self.padding = self.padding[np.asarray(rows, np.int64)]
        if self.prompt is not None:
            self.prompt = Prompt([self.prompt.rows[row] for row in rows], self.prompt.namespace)
        self._first_private_column = self.num_columns

    def truncate(self, num_columns: int) -> None:
        """Forget all columns from `num_columns` on. O(rows + blocks)."""
        if not self.sequences or num_columns >= self.num_columns:
            return
        assert self.pool is not None
        self._change_place()
        self._freeze_views()
        lengths = self.lengths(num_columns).tolist()
        for sequence, length in zip(self.sequences, lengths, strict=True):
            self.pool.manager.truncate(sequence, length)
        if self.prompt is not None:
            # What comes after the cut need not be what was there before.
            rows = [row[:length] for row, length in zip(self.prompt.rows, lengths, strict=True)]
            self.prompt = Prompt(rows, self.prompt.namespace)
        self.padding = np.minimum(self.padding, num_columns)
        self.num_columns = num_columns
        self._first_private_column = min(self._first_private_column, num_columns)

    def forget_before(self, column: int) -> None:
        """Give back the blocks that lie wholly before `column`. O(rows + blocks)."""
        if self.sequences and column > 0:
            assert self.pool is not None
            self._freeze_views()
            self.pool.manager.slide(self.sequences, self.lengths(column))

    def reset(self) -> None:
        """Forget everything and give the blocks back. O(rows + blocks)."""
        self._change_place()
        self._freeze_views()
        if self.pool is not None:
            self.pool.manager.free(self.sequences)
        self.sequences.clear()
        self.padding = np.zeros(0, np.int64)
        self.num_columns = self._first_private_column = 0
        self.prompt = None

    def leave(self) -> None:
        """One layer keeps its content elsewhere from now on; the last one frees the blocks."""
        self._num_left += 1
        if self._num_left == self.num_members:
            self.reset()

    def fork(self) -> LayerGroup:
        """A second batch that shares every block of this one. O(rows + blocks)."""
        twin = LayerGroup(self.memory, self.num_layers, self.window)
        twin.pool, twin.layout, twin.prompt = self.pool, self.layout, self.prompt
        twin.num_members, twin._num_left = self.num_members, self._num_left
        twin._column_bytes, twin._bound = self._column_bytes, dict(self._bound)
        twin.padding = self.padding.copy()
        twin.num_columns = twin._first_private_column = self.num_columns
        self._first_private_column = self.num_columns
        if self.pool is not None:
            twin.sequences.extend(map(self.pool.manager.fork, self.sequences))
        return twin

    def _change_place(self) -> None:
        """`place`, by which compiled code knows the group, is another tensor with its number."""
        # One made in inference mode could not be passed to operators outside of it.
        with torch.inference_mode(False):
            self.place = torch.tensor(self._number, device="cpu")

    def _freeze_views(self) -> None:
        """Let views still held elsewhere keep what they show; forget what was derived."""
        for view in list(self._views):
            view.materialise()
        self._views.clear()
        self._tables.clear()
        self._lengths.clear()
        self._slots = None


class Prompt:
    """The token ids of a batch's rows without their padding, for prefix reuse in a namespace."""

    def __init__(self, rows: list[Int32], namespace: str) -> None:
        self.rows = rows
        self.namespace = namespace

    def followed_by(self, ids: Int32) -> Prompt:
        """The same with one more token for each row: `ids` [rows]. O(tokens)."""
        return Prompt([np.append(row, ids[i]) for i, row in enumerate(self.rows)], self.namespace)

    def ids(self, padding: Int64, start: int, stop: int) -> list[Int32]:
        """Each row's ids in columns `start` to `stop`, or nothing beyond the prompt."""
        first, last = np.maximum(start - padding, 0), np.maximum(stop - padding, 0)
        if any(len(row) < end for row, end in zip(self.rows, last, strict=True)):
            return []
        return [row[a:b] for row, a, b in zip(self.rows, first, last, strict=True)]
