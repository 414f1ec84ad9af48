"""Layers that share one block table, and what an attention function reads through it.

    columns        0  1  2  3  4  5  6  7        a batch as transformers sees it: one length,
    row 0          .  .  .  t0 t1 t2 t3 t4       left-padded
    row 1          t0 t1 t2 t3 t4 t5 t6 t7
    sequences      row 0: t0..t4 in 2 blocks of 4; row 1: t0..t7 in 2 blocks

Columns are transformers' view, tokens are the block manager's: a row's token is its column less
its padding. So padding is never stored, and equal prompts have equal blocks however padded.

Padding is known from the arguments of `generate`, before the model runs. A model may put columns of
its own before the prompt: soft prompts, an image. So the first write of a prompt is compared with
what was announced. Where they differ, every column is stored.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpager._atomic import whole
from kvpager.blocks.sequences import Sequence
from kvpager.errors import OutOfBlocks
from kvpager.integrations.huggingface.cache.columns import (
    Announced,
    Origin,
    OtherColumns,
    Unannounced,
)
from kvpager.integrations.huggingface.cache.memory import PagedLayers, PagedMemory
from kvpager.integrations.huggingface.cache.pools import (
    LayerKind,
    PagedPool,
    Places,
    waiting_for_room,
)
from kvpager.integrations.huggingface.cache.rows import BatchRows, Share
from kvpager.integrations.huggingface.cache.views import PagedView, Part, Tables, packed
from kvpager.kernels.host_rows import to_device
from kvpager.ops import HostRows
from kvpager.storage.block_storage import BlockStorage

_CPU = torch.device("cpu")

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


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
        self.lock, self.uninterrupted = memory.lock, memory.uninterrupted
        self.num_layers = num_layers
        self.window = window
        self.pool: PagedPool | None = None
        self.rows: BatchRows | None = None  # with a pool
        self.layout: object = None
        self.num_columns = 0
        self.padding: Int64 = np.zeros(0, np.int64)
        self.prompt: Prompt | None = None
        self.announced: Announced | None = None  # while the prompt is computed
        self.holds_text = True  # False: its layers attend to something else, such as an image
        self.origin: Origin | None = None  # of a group whose layers left another
        self._step = 0, 0  # the first and the last column that were added last
        self._first_private_column = 0  # from it on, no block is shared with another group
        self.num_members = 0  # layers made so far
        self._number = next(_numbers)
        self._num_forgotten: Int64 | None = None  # blocks of each row, when they last were
        self._change_place()
        self._column_bytes = 0  # of a row, over all layers, as DynamicCache would keep it
        self._places: dict[int, tuple[LayerKind, Places]] = {}
        self._bound: dict[PagedLayers, int] = {}
        memory.note_group(self)
        self._num_left = 0  # layers that live in blocks no longer
        self._num_away = 0  # layers that another group keeps
        self._views: weakref.WeakSet[PagedView] = weakref.WeakSet()
        self._parts: dict[tuple[int, int], list[Part]] = {}
        self._tables: dict[tuple[torch.device, int], list[Tables]] = {}
        self._new: tuple[int, int, list[Int64]] | None = None  # the last columns and their slots
        self._slots: dict[tuple[torch.device, int, int], list[Slots]] = {}

    def __del__(self) -> None:
        # getattr: a half-made group is finalised as well.
        rows = getattr(self, "rows", None)
        if rows is not None:
            rows.discard()

    @property
    def num_rows(self) -> int:
        """Rows of the batch; 0 before the first token."""
        return len(self.rows) if self.rows is not None else 0

    # ---------------------------------------------------------------- writing

    def bind(self, kind: LayerKind, number: int) -> None:
        """Find the group's layer `number` a place in the pool. Raises `OutOfBlocks`."""
        if self.pool is None:
            if self.num_layers is None:
                self._enter(self.memory.new_pool())
            else:
                self.layout = (self.num_layers, self.window, kind)
                self._enter(self.memory.pool(self.layout))
        assert self.pool is not None
        with self.pool.lock:
            places = waiting_for_room(self.pool, lambda: self._find_places(kind, number))
        is_new = number not in self._places
        self._places[number] = kind, places
        if not is_new:  # the cache begins again
            return
        self._column_bytes += kind.shape.elements_per_token * kind.dtype.itemsize
        layers = PagedLayers(kind, self.window)
        self._bound[layers] = self._bound.get(layers, 0) + 1
        self.memory.note_layers(layers, self._bound[layers])

    def _find_places(self, kind: LayerKind, number: int) -> Places:
        assert self.pool is not None
        num_layers = self.num_layers or number + 1
        try:
            return self.pool.places(kind, number, num_layers)
        except OutOfBlocks:
            if not self._leave_device():
                raise
            return self.pool.places(kind, number, num_layers)

    def _leave_device(self) -> bool:
        """Make room there for layers that nobody knew of; whether that was possible.

        The pool has as many blocks as it had room for while it knew fewer layers.
        """
        if self.pool is None or self.pool.host is None or self.rows is None:
            return False
        with self.pool.lock:
            self._freeze_views()
            self.rows.leave_device()
            return self.pool.minimise()

    def _enter(self, pool: PagedPool) -> None:
        self.pool, self.rows = pool, BatchRows(pool)

    @property
    def dense_bytes(self) -> int:
        """Bytes that `DynamicCache` would hold in place of the group: padding and all. O(1)."""
        columns = self.num_columns
        if self.window is not None:
            columns = min(columns, self.window - 1)
        return self.num_rows * columns * self._column_bytes

    def full_bytes(self, kind: LayerKind, num_rows: int, num_columns: int) -> int:
        """Return the bytes of `num_rows` full rows, if all layers are of `kind`. O(layers)."""
        size = self.memory.block_size
        if self.window is not None:
            num_columns = min(num_columns, self.window + 2 * size)
        block_bytes = BlockStorage.bytes_of_a_block(
            size,
            [kind.shape] * (self.num_layers or max(self.num_members, 1)),
            dtype=kind.dtype,
            kv_dtype=self.memory.kv_dtype,
        )
        return num_rows * -(-num_columns // size) * block_bytes

    def extend(self, num_rows: int, start: int, num_new: int, keep_from: int = 0) -> None:
        """Make room for columns `start` to `start + num_new` of every row.

        With `start` 0, what lies wholly before column `keep_from` gets no blocks. The first layer
        of a forward pass does the work, the others find it done.
        Raises: `OutOfBlocks`, and as `check_takes`.
        """
        self.check_takes(num_rows, start, num_new)
        assert self.rows is not None
        stop = start + num_new
        if self.announced is not None and stop > self.num_columns:
            self._compare(self.announced, num_rows, start, stop)
        if not self.num_rows:
            self._begin(self.rows, num_rows)
        if stop <= self.num_columns:
            return
        self._step = start, stop
        if not self.num_columns:
            self.memory.await_turn(next(iter(self._places.values()))[0])
        ids = self.prompt.ids(self.padding, start, stop) if self.prompt else []
        # Where last blocks are filled, tables stay as they are, and views show what they did.
        if num_new != 1 or ids or not self.rows.fill():
            self._freeze_views()
            if keep_from:
                self._extend_end(self.rows, stop, keep_from)
            else:
                counts = self.lengths(stop) - self.lengths(start)
                self._new = start, stop, self.rows.append(counts, ids)
            if self.rows.any_on_host:
                self.prompt = None  # what is not on the device is not offered to others
        self.num_columns = stop

    def check_takes(self, num_rows: int, start: int, num_new: int) -> None:
        """Raise `OtherColumns` unless a layer can write these columns to the group. O(1).

        Raises: `ValueError` for another number of rows.
        """
        stop = start + num_new
        if start == self.num_columns:
            if self.num_rows not in (0, num_rows):
                raise ValueError(
                    f"the cache holds {self.num_rows} rows, but {num_rows} are written"
                )
            return
        # Another layer has added the columns already, in this pass or in an earlier one.
        private = start >= self._first_private_column and num_rows == self.num_rows
        if private and (start, stop) == self._step:
            return
        late = start > 0 and stop <= self.num_columns
        if private and late and start >= int(self.padding.max(initial=0)):
            return
        raise OtherColumns(
            f"a layer writes columns {start} to {stop} of {num_rows} rows, but its group has "
            f"{self.num_columns} columns of {self.num_rows} rows, copied or reordered at column "
            f"{self._first_private_column}. Compiled code needs layers that write the same columns."
        )

    def announce(self, padding: Int64, announced: Announced) -> None:
        """Expect a prompt with `padding` [rows] columns before its tokens. O(1)."""
        self.padding, self.announced = padding, announced

    def see_mask(self, mask: Any) -> None:
        """Compare the mask of a pass with what was announced. O(columns).

        Raises: `Unannounced` where the pass is no use.
        """
        announced, start = self.announced, self.num_columns
        if announced is None or start >= announced.columns:
            return
        if not announced.shows(mask, self.padding, start):
            self._distrust(announced, start)

    def _compare(self, announced: Announced, num_rows: int, start: int, stop: int) -> None:
        """Compare new columns with those announced. Raises `Unannounced`."""
        if start < announced.columns and not announced.holds(num_rows, start, stop):
            self._distrust(announced, start)

    def _distrust(self, announced: Announced, start: int) -> None:
        """Assume nothing about columns from `start` on."""
        if announced.is_binding:
            raise Unannounced(f"the pass from column {start} on does not match {announced}")
        self.padding = np.minimum(self.padding, start)
        self.prompt = self.announced = None

    def _extend_end(self, rows: BatchRows, stop: int, keep_from: int) -> None:
        """Make room for the columns from `keep_from` on, giving back piece by piece what is before.

        A sequence's tokens are consecutive, so those before have been there for a moment.
        O(stop / window) calls of the manager.
        """
        assert self.pool is not None
        piece = max(self.pool.block_size, stop - keep_from)
        for first in range(0, stop, piece):
            last = min(first + piece, stop)
            rows.append(self.lengths(last) - self.lengths(first), [])
            rows.slide(self.lengths(min(last, keep_from)))

    def _begin(self, rows: BatchRows, num_rows: int) -> None:
        rows.begin(num_rows, self.prompt.namespace if self.prompt else None)
        if len(self.padding) != num_rows:
            self.padding = np.zeros(num_rows, np.int64)

    def adopt(self, layout: object, sequences: list[Sequence], num_columns: int) -> None:
        """Begin with sequences whose first `num_columns` columns are in the pool already."""
        self.layout = layout
        self._enter(self.memory.pool(layout))
        assert self.rows is not None
        self.rows.adopt(sequences)
        self.num_columns = self._first_private_column = num_columns

    def join(self, parts: list[LayerGroup], order: Int64, padding: Int64) -> None:
        """Begin with the rows of `parts`, one after the other, put in `order`; they are left empty.

        They are of the same layout, and with `padding` [rows] as long as each other. O(rows).
        """
        first = parts[0]
        assert first.pool is not None
        self.layout = first.layout
        self._enter(first.pool)
        assert self.rows is not None
        lengths = np.concatenate([part.lengths(part.num_columns) for part in parts])[order]
        self.rows.join([part.rows for part in parts if part.rows is not None], order)
        self.padding = padding
        self.num_columns = self._first_private_column = int((padding + lengths).max())
        assert (padding + lengths == self.num_columns).all()
        known = [part.prompt for part in parts if part.prompt is not None]
        if len(known) == len(parts):
            rows = [row for prompt in known for row in prompt.rows]
            self.prompt = Prompt(rows, known[0].namespace).of(order)
        for part in parts:
            part.reset()

    def commit(self) -> None:
        """Every layer has written all columns: full blocks of known tokens become reusable."""
        if self.rows is not None and self.prompt is not None:
            self.rows.commit()
            self.memory.keep(self.rows.pool)

    def note_next(self, ids: Int32) -> None:
        """All columns are written, and `ids` [rows] come next. O(tokens).

        Does nothing where the ids of some column are not known, or other rows are meant.
        """
        if self.prompt is None or len(ids) != self.num_rows:
            return
        known = [len(row) for row in self.prompt.rows]
        if known == self.lengths(self.num_columns).tolist():
            self.prompt = self.prompt.followed_by(ids)

    def write(self, number: int, start: int, key: Tensor, value: Tensor) -> None:
        """Write a layer's new columns, from `start`: [rows, kv_heads, new, dim]. O(tokens)."""
        assert self.pool is not None
        places = self._places[number][1]
        for rows, slots, on_host in self._slots_of(start, start + key.shape[2], key.device):
            if not on_host and rows is None:  # as a rule
                self.pool.write(places.device, packed(key), packed(value), slots)
                continue
            pool, place = (self.pool.host, places.host) if on_host else (self.pool, places.device)
            assert pool is not None
            assert place is not None
            of_rows = (key, value) if rows is None else (key[rows], value[rows])
            keys, values = (packed(states).to(place.storage.device) for states in of_rows)
            pool.write(place, keys, values, slots)

    def _slots_of(self, start: int, stop: int, device: torch.device) -> list[Slots]:
        """Where columns `start` to `stop` go, for each pool that has rows."""
        slots = self._slots.get((device, start, stop))
        if slots is None:
            assert self.rows is not None
            slots = self._slots[device, start, stop] = []
            for number, share in enumerate(self.rows.shares()):
                if self._new is not None and self._new[:2] == (start, stop):
                    flat = self._with_padding(self._new[2][number], share, start, stop)
                else:  # a layer that was late
                    flat = self._written(share, start, stop)
                on_host = share.pool is not self.pool
                tensor = to_device(flat, _CPU if on_host else device)
                slots.append(Slots(self._numbers(share, device), tensor, on_host))
            if stop == self.num_columns:
                ahead = to_device(self.rows.ahead(), device).unbind()
                for column, tensor in enumerate(ahead, start=stop):
                    self._slots[device, column, column + 1] = [Slots(None, tensor, False)]
        return slots

    def _with_padding(self, slots: Int64, share: Share, start: int, stop: int) -> Int64:
        """`slots` of the tokens among the columns, with -1 for those that are padding."""
        num_columns = len(share.rows) * (stop - start)
        if len(slots) == num_columns:
            return slots
        padded = np.full(num_columns, -1, np.int64)
        padded[(np.arange(start, stop) >= self.padding[share.rows, None]).reshape(-1)] = slots
        return padded

    def _written(self, share: Share, start: int, stop: int) -> Int64:
        """The same for columns that are there already, by the block tables."""
        assert self.rows is not None
        self.rows.settle()
        slots_of = share.pool.manager.slots
        ranges = (self.lengths(column)[share.rows].tolist() for column in (start, stop))
        slots = [slots_of(*each) for each in zip(share.sequences, *ranges, strict=True)]
        return self._with_padding(np.concatenate(slots), share, start, stop)

    def _numbers(self, share: Share, device: torch.device) -> Tensor | None:
        """The rows' numbers, or None where it is all of them."""
        if len(share.rows) == self.num_rows:
            return None
        return to_device(share.rows, device)

    # ---------------------------------------------------------------- reading

    def lengths(self, num_columns: int) -> Int64:
        """Tokens of each row among the first `num_columns` columns, int64 [rows]."""
        return np.maximum(num_columns - self.padding, 0)

    def kind(self, number: int) -> LayerKind:
        """What the group's layer `number` computes, and where."""
        return self._places[number][0]

    def view(self, number: int, start: int, stop: int) -> PagedView:
        """A layer's keys and values of columns `start` to `stop`."""
        view = PagedView(self, number, start, stop)
        self._views.add(view)
        return view

    def parts(self, number: int, num_columns: int) -> list[Part]:
        """Where the rows of a layer's first columns are: in one storage, or in two. O(1)."""
        parts = self._parts.get((number, num_columns))
        if parts is None:
            kind, places = self._places[number]
            parts = self._parts[number, num_columns] = []
            for each in self._tables_of(kind.device, num_columns):
                place = places.host if each.on_host else places.device
                assert place is not None
                parts.append(Part(place, each.rows, each.tables, each.lengths, each.host_rows))
        return parts

    def _tables_of(self, device: torch.device, num_columns: int) -> list[Tables]:
        """Block tables and lengths for each pool that has rows, those on the device there."""
        # One tensor for all layers of a step, so that a plan made for it serves them all.
        found = self._tables.get((device, num_columns))
        if found is None:
            assert self.rows is not None
            # Until a table changes, the steps that follow differ in lengths alone.
            columns = range(num_columns, num_columns + self.rows.pool.block_size)
            for column in columns:
                self._tables[device, column] = []
            lengths = np.stack([self.lengths(column) for column in columns]).astype(np.int32)
            for share in self.rows.shares():
                on_host = share.pool is not self.pool
                here = share.pool.manager.block_tables(share.batch)
                theirs = lengths[:, share.rows]
                there = _CPU if on_host else device
                tables, each = to_device(here, there), to_device(theirs, there).unbind()
                rows = self._numbers(share, device)
                for column, lens, tensor in zip(columns, theirs, each, strict=True):
                    host_rows = HostRows(here, lens)
                    self._tables[device, column].append(
                        Tables(rows, tables, tensor, host_rows, on_host)
                    )
            found = self._tables[device, num_columns]
        return found

    def holdings(self) -> list[Holding]:
        """Count the blocks that the rows hold, for each pool that has rows. O(blocks)."""
        if self.rows is None or self.pool is None:
            return []
        with self.pool.lock:
            self.rows.settle()
            return [Holding.of(share, share.pool is not self.pool) for share in self.rows.shares()]

    def settle(self) -> None:
        """Let the block manager know all tokens that there are. O(rows)."""
        if self.rows is not None:
            self.rows.settle()

    def count_gather(self) -> None:
        """One more view was read the slow way."""
        self.memory.counters.gathers += 1

    # ---------------------------------------------------------------- changing the batch

    def select(self, rows: list[int]) -> None:
        """Make the batch the given rows of it, each as often as it is named. O(rows + blocks)."""
        if self.rows is None or not self.num_rows or rows == list(range(self.num_rows)):
            return
        self._change_place()
        self._freeze_views()
        self.rows.select(rows)
        self.padding = self.padding[np.asarray(rows, np.int64)]
        if self.prompt is not None:
            self.prompt = self.prompt.of(np.asarray(rows, np.int64))
        self._first_private_column = self.num_columns

    def truncate(self, num_columns: int) -> None:
        """Forget all columns from `num_columns` on. O(rows + blocks)."""
        if self.rows is None or not self.num_rows or num_columns >= self.num_columns:
            return
        self._change_place()
        self._freeze_views()
        lengths = self.lengths(num_columns)
        self.rows.truncate(lengths)
        if self.prompt is not None:
            # What comes after the cut need not be what was there before.
            pairs = zip(self.prompt.rows, lengths.tolist(), strict=True)
            rows = [row[:length] for row, length in pairs]
            self.prompt = Prompt(rows, self.prompt.namespace)
        self.padding = np.minimum(self.padding, num_columns)
        self.num_columns = num_columns
        self._first_private_column = min(self._first_private_column, num_columns)

    def forget_before(self, column: int) -> None:
        """Give back the blocks that lie wholly before `column`. O(rows + blocks)."""
        if self.rows is None or not self.num_rows or column <= 0:
            return
        starts = self.lengths(column)
        blocks = starts // self.rows.pool.block_size
        if self._num_forgotten is not None and np.array_equal(blocks, self._num_forgotten):
            return  # most steps of a window leave no whole block behind
        self._freeze_views()
        self.rows.slide(starts)
        self._num_forgotten = blocks

    def reset(self) -> None:
        """Forget everything and give the blocks back. O(rows + blocks)."""
        self._change_place()
        self._freeze_views()
        if self.rows is not None:
            self.rows.free()
        self.padding = np.zeros(0, np.int64)
        self.num_columns = self._first_private_column = 0
        self._step = 0, 0
        self.prompt = self.announced = None

    def leave(self, reason: str) -> None:
        """One layer keeps its content elsewhere from now on; the last one frees the blocks."""
        self._num_left += 1
        self.memory.note_left_alone(reason, self._num_left)
        self._free_if_left()

    def _free_if_left(self) -> None:
        if self._num_left + self._num_away == self.num_members:
            self.reset()

    # ---------------------------------------------------------------- layers that part

    def new_apart(self) -> LayerGroup:
        """Make an empty group for layers of this one that have written nothing. O(1)."""
        apart = LayerGroup(self.memory, None, self.window)
        apart.origin, apart.holds_text = Origin(self._number, is_fork=False), False
        return apart

    def fork_apart(self, num_columns: int) -> LayerGroup:
        """Make a group for layers that have written `num_columns` columns. O(rows + blocks)."""
        private = self._first_private_column
        apart = self.fork()
        apart.truncate(num_columns)
        # Of the shared blocks, the copy shows what is before its end alone.
        self._first_private_column = max(private, num_columns)
        apart.origin, apart.prompt = Origin(self._number, is_fork=True), None
        apart._num_away, apart._column_bytes = apart.num_members, 0
        return apart

    def takes_over(self, other: LayerGroup, num_rows: int, start: int, num_new: int) -> bool:
        """True if a layer of group `other` that writes these columns may go on here. O(1)."""
        if self.origin != Origin(other._number, is_fork=start > 0):
            return False
        try:
            self.check_takes(num_rows, start, num_new)
        except (OtherColumns, ValueError):
            return False
        return True

    def move(self, layer: int, target: LayerGroup) -> int:
        """Let `target` keep layer number `layer`. Returns the layer's number there. O(blocks)."""
        assert target.origin is not None
        self.prompt = None  # the pool has not all layers' keys of these tokens
        self._num_away += 1
        place = self._places.pop(layer, None)
        size = 0 if place is None else place[0].shape.elements_per_token * place[0].dtype.itemsize
        self._column_bytes -= size
        if target.origin.is_fork:
            target._num_away -= 1
            target._column_bytes += size
        else:
            layer, target.num_members = target.num_members, target.num_members + 1
        self._free_if_left()
        return layer

    @whole
    def fork(self) -> LayerGroup:
        """A second batch that shares every block of this one. O(rows + blocks)."""
        twin = LayerGroup(self.memory, self.num_layers, self.window)
        twin.pool, twin.layout, twin.prompt = self.pool, self.layout, self.prompt
        twin.num_members, twin._num_left = self.num_members, self._num_left
        twin._num_away, twin.origin, twin.holds_text = self._num_away, self.origin, self.holds_text
        twin.announced, twin._step = self.announced, self._step
        twin._column_bytes, twin._bound = self._column_bytes, dict(self._bound)
        twin._places = dict(self._places)
        twin.padding = self.padding.copy()
        twin.num_columns = twin._first_private_column = self.num_columns
        self._first_private_column = self.num_columns
        if self.rows is not None:
            twin.rows = self.rows.fork()
        return twin

    def _change_place(self) -> None:
        """`place`, by which compiled code knows the group, is another tensor with its number."""
        # One made in inference mode could not be passed to operators outside of it.
        with torch.inference_mode(False):
            self.place = torch.tensor(self._number, device="cpu")
        self._num_forgotten = None

    def _freeze_views(self) -> None:
        """Let views still held elsewhere keep what they show; forget what was derived."""
        for view in list(self._views):
            view.materialise()
        self._views.clear()
        self._parts.clear()
        self._tables.clear()
        self._slots.clear()
        self._new = None


class Holding(NamedTuple):
    """Blocks of one pool that the rows of a group hold."""

    num_blocks: int
    num_shared_blocks: int  # in the tables of several rows
    held_bytes: int
    on_host: bool

    @classmethod
    def of(cls, share: Share, on_host: bool) -> Holding:
        """Count the blocks of rows that are in one pool. O(blocks)."""
        tables = share.pool.manager.block_tables(share.batch)
        blocks, holders = np.unique(tables[tables >= 0], return_counts=True)
        num_bytes = len(blocks) * share.pool.block_bytes
        return cls(len(blocks), int(np.count_nonzero(holders > 1)), num_bytes, on_host)


class Slots(NamedTuple):
    """Where new tokens of some rows go."""

    rows: Tensor | None  # their numbers in the batch; None: all
    slots: Tensor  # int64 [rows * columns], in the order of rows; -1 for padding
    on_host: bool


class Prompt:
    """The token ids of a batch's rows without their padding, for prefix reuse in a namespace."""

    def __init__(self, rows: list[Int32], namespace: str) -> None:
        self.rows = rows
        self.namespace = namespace

    def of(self, rows: Int64) -> Prompt:
        """The same of these rows only. O(rows)."""
        return Prompt([self.rows[row] for row in rows], self.namespace)

    def followed_by(self, ids: Int32) -> Prompt:
        """The same with one more token for each row: `ids` [rows]. O(tokens)."""
        return Prompt([np.append(row, ids[i]) for i, row in enumerate(self.rows)], self.namespace)

    def ids(self, padding: Int64, start: int, stop: int) -> list[Int32]:
        """Each row's ids in columns `start` to `stop`, or nothing beyond the prompt."""
        first, last = np.maximum(start - padding, 0), np.maximum(stop - padding, 0)
        if any(len(row) < end for row, end in zip(self.rows, last, strict=True)):
            return []
        return [row[a:b] for row, a, b in zip(self.rows, first, last, strict=True)]
