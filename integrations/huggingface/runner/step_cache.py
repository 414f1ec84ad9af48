"""The cache through which a model executes a step plan.

It serves both kinds of forward pass:

    packed        all rows in one forward pass, concatenated along the token axis:
                      ids        [r0 r0 r0 | r1 | r2 | r3 r3]     no padding
                      positions  [ 0  1  2 |  9 | 40 |  7  8]
                  The attention function reads each row's blocks in place. For models that call a
                  registered attention function and place tokens by `position_ids`.
    per sequence  one forward pass for each row, as in `generate`. For all other models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvpager.blocks.windows import first_visible
from kvpager.integrations.huggingface.attention import packed_custom_ops
from kvpager.integrations.huggingface.attention.packed import PackedView
from kvpager.integrations.huggingface.cache.budget import Budget, LayerKind
from kvpager.integrations.huggingface.cache.paged_tensor import paged_tensors
from kvpager.integrations.huggingface.cache.paged_view import PagedView, Part, packed
from kvpager.integrations.huggingface.cache.pools import Place
from kvpager.integrations.huggingface.cache.row_tables import RowTables
from kvpager.integrations.huggingface.runner.sequence_rows import SequenceRows
from kvpager.kernels.host_rows import to_device
from kvpager.ops import HostRows, append
from kvpager.plans import GroupStep, Int32, Int64, StepPlan
from kvpager.storage.block_storage import BlockStorage, LayerShape


class GroupRows(NamedTuple):
    """The slots and block tables of rows in one group of layers, on the model's device."""

    slots: Tensor  # int64 [tokens]
    tables: RowTables  # from each row's first block on, new tokens included

    @classmethod
    def of(
        cls,
        group: GroupStep,
        seq_lens: Int32,
        starts: tuple[Int32, Tensor] | None,
        block_size: int,
        device: torch.device,
    ) -> GroupRows:
        """Return the slots and tables of all rows. O(tokens + rows * blocks)."""
        tables, seq_lens = _from_first_block(group.block_tables, seq_lens, block_size)
        on_host, there = starts or (None, None)
        host = HostRows(tables, seq_lens, on_host)
        rows = RowTables(to_device(tables, device), to_device(seq_lens, device), host, there)
        return cls(to_device(group.slot_mapping, device), rows)

    def row(self, number: int, first: int, last: int) -> GroupRows:
        """Return row `number` alone, with tokens `first` to `last`. O(1)."""
        return GroupRows(self.slots[first:last], self.tables.row(number))


class StepRows(NamedTuple):
    """The rows of a step, on the device of the model."""

    ids: Tensor  # int64 [1, tokens]
    positions: Tensor  # int64 [1, tokens]
    groups: tuple[GroupRows, ...]
    longest: int  # tokens of the longest row

    @classmethod
    def of(cls, plan: StepPlan, block_size: int, device: torch.device) -> StepRows:
        """Return all rows of `plan`. O(tokens + rows * blocks * groups)."""
        counts = plan.num_scheduled.astype(np.int64)
        ends = np.cumsum(counts)
        positions = np.arange(len(plan.token_ids)) + np.repeat(
            plan.num_computed - (ends - counts), counts
        )
        starts = None
        if len(plan.token_ids) != len(counts):
            on_host = np.concatenate([[0], ends]).astype(np.int32)
            starts = on_host, to_device(on_host, device)
        return cls(
            to_device(plan.token_ids.astype(np.int64), device)[None],
            to_device(positions, device)[None],
            tuple(
                GroupRows.of(group, plan.seq_lens, starts, block_size, device)
                for group in plan.groups
            ),
            int(plan.seq_lens.max(initial=0)),
        )

    def row(self, number: int, first: int, last: int, length: int) -> StepRows:
        """Return row `number`: new tokens `first` to `last`, `length` tokens in total. O(groups).

        The caller has these numbers from the plan. Reading a tensor would wait for its device.
        """
        return StepRows(
            self.ids[:, first:last],
            self.positions[:, first:last],
            tuple(group.row(number, first, last) for group in self.groups),
            length,
        )


_NO_PADDING = np.zeros(1, np.int64)  # of a pass with one row


def _from_first_block(tables: Int32, seq_lens: Int32, block_size: int) -> tuple[Int32, Int32]:
    """Return tables and lengths without the leading blocks that rows freed. O(rows * blocks).

    Kernels count queries and windows from a row's end, so the result is the same.
    """
    if not tables.size or tables[:, 0].min() >= 0:
        return tables, seq_lens
    firsts = (tables >= 0).argmax(axis=1).astype(np.int32)
    seq_lens = seq_lens - firsts * np.int32(block_size)
    width = -(-int(seq_lens.max()) // block_size)
    columns = np.minimum(firsts[:, None] + np.arange(width), tables.shape[1] - 1)
    shown = np.take_along_axis(tables, columns, axis=1)
    shown[np.arange(width) * block_size >= seq_lens[:, None]] = -1
    return shown, seq_lens


class LayerInfo(NamedTuple):
    """A layer of the model and its place in the blocks."""

    number: int  # index in the cache
    shape: LayerShape
    window: int | None
    group: int  # index of the group of layers that share block tables
    place: int  # index among the layers of a block


class StepCache(DynamicCache):
    """A cache over a storage of blocks that shows the rows of the current step.

    `layers` are kept in blocks. `others` are transformers' own layers by index, for the rest.
    """

    def __init__(
        self,
        storage: BlockStorage,
        layers: Sequence[LayerInfo],
        others: dict[int, Any],
        budget: Budget,
        sequences: Sequence[SequenceRows] = (),
    ) -> None:
        """Make a cache; `sequences` are the rows of each group of layers. O(layers)."""
        super().__init__()
        self.layer_class_to_replicate = None
        self.sequences = sequences
        self.budget = budget
        self.place = packed_custom_ops.enter(self)
        self.rows: StepRows | None = None
        self.is_packed = False
        kept = {plan.number: StepLayer(self, Place(storage, plan.place), plan) for plan in layers}
        self.layers = [kept.get(i) or others[i] for i in range(len(kept) + len(others))]

    def begin(self, rows: StepRows, *, is_packed: bool) -> None:
        """Set the rows of the next pass: all rows if packed, otherwise a single row. O(layers)."""
        self.rows, self.is_packed = rows, is_packed
        for layer in self.layers:
            if isinstance(layer, StepLayer):
                layer.is_written = False


class StepLayer(DynamicLayer):
    """A layer that writes and reads the blocks in the step's plan."""

    _layer_type = None

    def __init__(self, cache: StepCache, place: Place, plan: LayerInfo) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = plan.number
        self.place = place
        self.group = plan.group
        self.window = plan.window
        self.is_sliding = plan.window is not None
        self.is_written = False
        self.is_initialized = True
        self.budget = cache.budget
        self.dtype, self.device = place.storage.dtype, place.storage.device
        self._kind = LayerKind(plan.shape, self.dtype, self.device)
        # Some models test these for the presence of image states. This layer holds text only.
        self.keys = self.values = torch.empty(0, dtype=self.dtype, device=self.device)
        self._cache = cache
        self._caches = place.storage.caches(place.layer)

    @property
    def rows(self) -> StepRows:
        """Return the rows of the step."""
        assert self._cache.rows is not None
        return self._cache.rows

    @property
    def group_rows(self) -> GroupRows:
        """Return the slots and tables of the step in this layer's group."""
        return self.rows.groups[self.group]

    def packed_view(self) -> PackedView:
        """Return the keys and values of all rows in a packed pass. O(1)."""
        return PackedView(self._caches, self.window, *self._shown(0, self.rows.ids.shape[1]))

    def _shown(
        self, start: int, stop: int
    ) -> tuple[LayerKind, list[Part], Int64, int, int, Budget]:
        parts = [Part(self.place, None, self.group_rows.tables)]
        return self._kind, parts, _NO_PADDING, start, stop, self.budget

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens [1, kv_heads, tokens, dim]; return paged tensors of the row."""
        if torch.compiler.is_compiling():
            return packed_custom_ops.marked(
                key_states, value_states, self._cache.place, self.number
            )
        self.write(key_states, value_states)
        if self._cache.is_packed:
            view: PagedView = self.packed_view()
        else:
            sequences = self._cache.sequences
            of_group = sequences[self.group] if sequences else None
            shown = self._shown(self._first_visible(), self.rows.longest)
            view = PagedView(*shown, rows=of_group)
        return paged_tensors(view)

    def write(self, key: Tensor, value: Tensor) -> None:
        """Write the new tokens [1, kv_heads, tokens, dim] to the slots of the step. O(tokens)."""
        append(packed(key), packed(value), self._caches, self.group_rows.slots)
        self.is_written = True

    def _first_visible(self) -> int:
        return first_visible(self.rows.longest - self.rows.ids.shape[1], self.window)

    def get_seq_length(self) -> int:
        """Return the row's tokens so far; 0 for packed rows, whose positions are given."""
        if self._cache.is_packed or self._cache.rows is None:
            return 0
        return self.rows.longest - (0 if self.is_written else self.rows.ids.shape[1])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns that the next queries attend to, and the first column."""
        if self._cache.is_packed or self._cache.rows is None:
            return query_length, 0
        first = self._first_visible()
        return self.rows.longest - first, first
