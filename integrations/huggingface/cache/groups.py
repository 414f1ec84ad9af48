"""Groups of layers that share block tables."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpager._atomic import whole
from kvpager.blocks.sequences import SequenceHandle
from kvpager.errors import OutOfBlocks
from kvpager.integrations.huggingface.cache.budget import LayerKind
from kvpager.integrations.huggingface.cache.columns import ColumnMismatch, Columns, Origin
from kvpager.integrations.huggingface.cache.generate_calls import GenerateCall
from kvpager.integrations.huggingface.cache.layer_places import LayerPlaces
from kvpager.integrations.huggingface.cache.mapped_rows import MappedRows
from kvpager.integrations.huggingface.cache.memory import PagedLayers, PagedMemory
from kvpager.integrations.huggingface.cache.paged_view import PagedView, Part, packed
from kvpager.integrations.huggingface.cache.pools import (
    PagedPool,
    Places,
    pool_for,
    waiting_for_room,
)
from kvpager.integrations.huggingface.cache.prompt import PrefixKey, Prompt
from kvpager.integrations.huggingface.cache.rows import BatchRows, Holding
from kvpager.integrations.huggingface.cache.step_tensors import StepTensors
from kvpager.plans import Int32, Int64, Tier

_numbers = itertools.count()


class LayerGroup:
    """The layers of a cache that share the rows' block tables: all with one window, or none.

    `num_layers` is None if it is not known beforehand. A query attends to `window` tokens, itself
    included; to all for None.
    """

    def __init__(self, memory: PagedMemory, num_layers: int | None, window: int | None) -> None:
        self.memory, self.budget = memory, memory.budget
        self.lock, self.uninterrupted = memory.lock, memory.uninterrupted
        self.window = window
        self.members = LayerPlaces(num_layers)
        self.columns = Columns()
        self.rows = BatchRows(memory)
        self.tensors = StepTensors(self.rows, self.columns)
        self.mapped = MappedRows()
        self.views: weakref.WeakSet[PagedView] = weakref.WeakSet()  # that are still in use
        self.pool: PagedPool | None = None  # of the rows; None before a layer is bound
        self.layout: object = None
        self.prompt: Prompt | None = None
        self.holds_text = True  # False if its layers attend to other inputs, such as an image
        self.origin: Origin | None = None  # set if its layers left another group
        self._number = next(_numbers)
        self._num_forgotten: Int64 | None = None  # freed leading blocks of each row
        self._change_place()
        memory.note_group(self)

    def __del__(self) -> None:
        # getattr: the finaliser also runs if `__init__` raised.
        rows = getattr(self, "rows", None)
        if rows is not None:
            rows.discard()
            self.mapped.detach()

    def pool_in(self, tier: Tier) -> PagedPool | None:
        """Return the tier's pool of the rows; None before a layer is bound. O(1)."""
        return self.pool.host if self.pool is not None and tier == "host" else self.pool

    @property
    def num_rows(self) -> int:
        """Rows of the batch; 0 before the first token."""
        return len(self.rows)

    @property
    def num_columns(self) -> int:
        """Columns written so far, padding included."""
        return self.columns.count

    @property
    def dense_bytes(self) -> int:
        """Return the bytes that `DynamicCache` would hold for the group, with padding. O(1)."""
        columns = self.num_columns
        if self.window is not None:
            columns = min(columns, self.window - 1)
        return self.num_rows * columns * self.members.column_bytes

    def full_bytes(self, kind: LayerKind, call: GenerateCall) -> int:
        """Return the bytes of all rows of `call`, if all layers are of `kind`. O(layers)."""
        shapes = [kind.shape] * (self.members.expected or max(self.members.count, 1))
        block_bytes = self.budget.block_bytes(shapes, kind.dtype, kind.device)
        return call.num_blocks(self.budget.block_size, self.window) * block_bytes

    # ---------------------------------------------------------------- a place in the pool

    def bind(self, kind: LayerKind, number: int) -> None:
        """Reserve storage for layer `number` in the pool. Raises: `OutOfBlocks`."""
        if self.pool is None:
            # A cache whose layers are not known beforehand has a pool of its own.
            known = self.members.expected is not None
            self._enter((self.members.expected, self.window, kind) if known else object())
        with self.lock:
            places = waiting_for_room(self.rows.pool, lambda: self._find_places(kind, number))
        count = self.members.place(number, kind, places)
        if count:
            self.memory.note_layers(PagedLayers(kind, self.window), count)

    def _find_places(self, kind: LayerKind, number: int) -> Places:
        rows, num_layers = self.rows, self.members.expected or number + 1
        try:
            return rows.places(kind, number, num_layers)
        except OutOfBlocks:
            if rows.pool.host is None:
                raise
            # The pool was sized while it knew fewer layers: move its rows to host memory.
            self._freeze_views()
            rows.leave_device()
            if not rows.pool.minimise():  # other caches hold blocks
                raise
            return rows.places(kind, number, num_layers)

    def _enter(self, layout: object) -> None:
        """Take the pool of a layout for the rows, of which there are none yet."""
        self.rows.pool = pool_for(self.memory, layout)
        self.layout, self.pool = layout, self.rows.pool

    # ---------------------------------------------------------------- writing

    def extend(self, num_rows: int, start: int, num_new: int, keep_from: int = 0) -> None:
        """Make room for columns `start` to `start + num_new` of every row. O(tokens).

        With `start` 0, blocks wholly before column `keep_from` are left out. The first layer of a
        forward pass does the work; for later layers this returns at once.
        Raises: `OutOfBlocks`, and as `check_takes`.
        """
        self.check_takes(num_rows, start, num_new)
        columns, rows, stop = self.columns, self.rows, start + num_new
        if not columns.agree_with_write(num_rows, start, stop):
            self.prompt = None
        if not len(rows):
            unkept = PrefixKey(self.memory.namespaces.current, None)
            rows.begin(num_rows, self.prompt.key if self.prompt else unkept)
            columns.begin(num_rows)
        if stop <= columns.count:
            return
        if not columns.count:
            self.memory.await_turn(self.members.first_kind)
        ids = self.prompt.ids(columns.padding, start, stop) if self.prompt else []
        # If the token fits into the last blocks, tables and views do not change.
        if num_new != 1 or ids or not rows.fill():
            self._append(start, stop, ids, keep_from)
        columns.add(start, stop)

    def _append(self, start: int, stop: int, ids: list[Int32], keep_from: int) -> None:
        self._freeze_views()
        rows, lengths = self.rows, self.columns.lengths
        if keep_from:
            # A sequence's tokens are consecutive, so append the earlier tokens piece by piece, and
            # free each piece. O(stop / window) calls of the manager.
            piece = max(rows.pool.block_size, stop - keep_from)
            for first in range(0, stop, piece):
                last = min(first + piece, stop)
                rows.append(lengths(last) - lengths(first), [])
                rows.drop_before(lengths(min(last, keep_from)))
        else:
            self.tensors.new = start, stop, rows.append(lengths(stop) - lengths(start), ids)
        if rows.any_on_host:
            self.prompt = None  # blocks in host memory are not published

    def check_takes(self, num_rows: int, start: int, num_new: int) -> None:
        """Check that a layer can write these columns to the group. O(1).

        Raises: `ColumnMismatch`; `ValueError` for another number of rows.
        """
        self.columns.check_takes(self.num_rows, num_rows, start, num_new)

    def see_mask(self, mask: Any) -> None:
        """Compare the mask of a pass with the expected prompt. O(columns).

        Raises: `UnexpectedColumns` if the result of the pass must be discarded.
        """
        if not self.columns.agree_with_mask(mask):
            self.prompt = None

    def write(self, number: int, start: int, key: Tensor, value: Tensor) -> None:
        """Write a layer's new columns, from `start`: [rows, kv_heads, new, dim]. O(tokens)."""
        pool, places = self.rows.pool, self.members.at(number)[1]
        for rows, slots, on_host in self.tensors.slots(start, start + key.shape[2], key.device):
            if not on_host and rows is None:  # the usual case
                pool.write(places.device, packed(key), packed(value), slots)
                continue
            place = places.on(on_host)
            of_rows = (key, value) if rows is None else (key[rows], value[rows])
            keys, values = (packed(states).to(place.storage.device) for states in of_rows)
            pool.write(place, keys, values, slots)

    # ---------------------------------------------------------------- reading

    def view(self, number: int, start: int, stop: int) -> PagedView:
        """Return a layer's keys and values of columns `start` to `stop`. O(1)."""
        parts, kind = self.parts(number, stop), self.members.at(number)[0]
        padding = self.columns.padding
        view = PagedView(kind, parts, padding, start, stop, self.budget, self, self.mapped)
        self.views.add(view)
        return view

    def parts(self, number: int, num_columns: int) -> list[Part]:
        """Return the parts of a view of a layer's first columns, one for each tier. O(1)."""
        kind, places = self.members.at(number)
        return [
            Part(places.on(tables.on_host), tables.rows, tables.tables)
            for tables in self.tensors.tables(num_columns, kind.device)
        ]

    def _freeze_views(self) -> None:
        """Materialise live views and drop tensors, before the blocks or tables change."""
        for view in list(self.views):
            view.dense()
        self.mapped.detach()
        self.views.clear()
        self.tensors.clear()

    def num_blocks_in(self, tier: Tier) -> int:
        """Return the number of blocks that the rows hold in a tier. O(blocks)."""
        on_host = tier == "host"
        return sum(each.num_blocks for each in self.holdings() if each.on_host == on_host)

    def holdings(self) -> list[Holding]:
        """Count the blocks that the rows hold, in each tier. O(blocks)."""
        with self.lock:
            return [partition.holding() for partition in self.rows.partitions()]

    # ---------------------------------------------------------------- prompts

    def adopt(
        self, layout: object, sequences: list[SequenceHandle], key: PrefixKey, num_columns: int
    ) -> None:
        """Begin with sequences whose first `num_columns` columns are cached. O(rows)."""
        self._enter(layout)
        self.rows.adopt(sequences, key)
        self.columns.start_at(num_columns)

    def join(self, parts: list[LayerGroup], order: Int64, padding: Int64) -> None:
        """Take over the rows of `parts` in `order`; the parts are empty afterwards. O(rows).

        The parts have one layout. With `padding` [rows], all rows have one length.
        """
        self._enter(parts[0].layout)
        lengths = np.concatenate([part.columns.lengths(part.num_columns) for part in parts])[order]
        self.rows.join([part.rows for part in parts], order)
        self.columns.padding = padding
        self.columns.start_at(int((padding + lengths).max()))
        assert (padding + lengths == self.num_columns).all()
        known = [part.prompt for part in parts if part.prompt is not None]
        if len(known) == len(parts):
            ids = [row for prompt in known for row in prompt.rows]
            self.prompt = Prompt(ids, known[0].key).of(order)
        for part in parts:
            part.reset()

    def commit(self) -> None:
        """Publish the full blocks of known tokens, which all layers have written. O(blocks)."""
        if self.prompt is not None:
            self.rows.commit()
            self.memory.keep(self.rows.pool)

    def note_next(self, ids: Int32) -> None:
        """Record the ids [rows] of the next tokens. O(tokens).

        Does nothing if the ids of earlier tokens are unknown, or if the number of rows differs.
        """
        if self.prompt is None or len(ids) != self.num_rows:
            return
        known = [len(row) for row in self.prompt.rows]
        if known == self.columns.lengths(self.num_columns).tolist():
            self.prompt = self.prompt.followed_by(ids)

    # ---------------------------------------------------------------- changing the batch

    def select(self, rows: list[int]) -> None:
        """Make row i what row `rows[i]` was; rows may repeat. O(rows + blocks)."""
        if not self.num_rows or rows == list(range(self.num_rows)):
            return
        chosen = np.asarray(rows, np.int64)
        self._change_place()
        self._freeze_views()
        self.rows.select(rows)
        self.columns.select(chosen)
        if self.prompt is not None:
            self.prompt = self.prompt.of(chosen)

    def truncate(self, num_columns: int) -> None:
        """Remove all columns from `num_columns` on. O(rows + blocks)."""
        if not self.num_rows or num_columns >= self.num_columns:
            return
        self._change_place()
        self._freeze_views()
        lengths = self.columns.lengths(num_columns)
        self.rows.truncate(lengths)
        if self.prompt is not None:
            # Other tokens may follow the cut.
            self.prompt = self.prompt.cut(lengths)
        self.columns.truncate(num_columns)

    def forget_before(self, column: int) -> None:
        """Free the blocks wholly before `column`. O(rows + blocks)."""
        if not self.num_rows or column <= 0:
            return
        starts = self.columns.lengths(column)
        blocks = starts // self.rows.pool.block_size
        if self._num_forgotten is not None and np.array_equal(blocks, self._num_forgotten):
            return  # most steps leave no whole block behind the window
        self._freeze_views()
        self.rows.drop_before(starts)
        self._num_forgotten = blocks

    def reset(self) -> None:
        """Remove all rows and free their blocks. O(rows + blocks)."""
        self._change_place()
        self._freeze_views()
        self.rows.free()
        self.columns.reset()
        self.prompt = None

    def leave(self, reason: str) -> None:
        """Record that a layer has left the blocks, for `reason`. The last one frees the rows."""
        self.members.num_left += 1
        self.memory.note_unpaged(reason, self.members.num_left)
        self._free_if_left()

    def _free_if_left(self) -> None:
        if self.members.are_gone:
            self.reset()

    def _change_place(self) -> None:
        """Renew `place`, the tensor with the group's number by which compiled code finds it."""
        # Operators outside of inference mode do not take tensors made in it.
        with torch.inference_mode(False):
            self.place = torch.tensor(self._number, device="cpu")
        self._num_forgotten = None

    # ---------------------------------------------------------------- layers that diverge

    @whole
    def fork(self) -> LayerGroup:
        """Return a fork that shares every block of this group. O(rows + blocks)."""
        fork = LayerGroup(self.memory, self.members.expected, self.window)
        fork.layout, fork.pool, fork.prompt = self.layout, self.pool, self.prompt
        fork.origin, fork.holds_text = self.origin, self.holds_text
        fork.members, fork.columns = self.members.copy(), self.columns.fork()
        fork.rows = self.rows.fork()
        fork.tensors = StepTensors(fork.rows, fork.columns)
        return fork

    def new_apart(self) -> LayerGroup:
        """Return an empty group for layers of this group that have written nothing. O(1)."""
        apart = LayerGroup(self.memory, None, self.window)
        apart.origin, apart.holds_text = Origin(self._number, is_fork=False), False
        return apart

    def fork_apart(self, num_columns: int) -> LayerGroup:
        """Return a group for layers that have written `num_columns` columns. O(rows + blocks)."""
        private = self.columns.first_private
        apart = self.fork()
        apart.truncate(num_columns)
        # The fork shares only the columns before its end.
        self.columns.first_private = max(private, num_columns)
        apart.origin, apart.prompt = Origin(self._number, is_fork=True), None
        apart.members.send_away()
        return apart

    def takes_over(self, other: LayerGroup, num_rows: int, start: int, num_new: int) -> bool:
        """Return True if a layer of group `other` that writes these columns may move here. O(1)."""
        if self.origin != Origin(other._number, is_fork=start > 0):
            return False
        try:
            self.check_takes(num_rows, start, num_new)
        except (ColumnMismatch, ValueError):
            return False
        return True

    def move(self, layer: int, target: LayerGroup) -> int:
        """Move layer number `layer` to `target`. Returns the layer's number there. O(blocks)."""
        assert target.origin is not None
        self.prompt = None  # from now on the pool lacks this layer's keys
        number = self.members.move(layer, target.members, to_fork=target.origin.is_fork)
        self._free_if_left()
        return number
