"""A cache's attention layers: they write into blocks and return paged tensors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvpager.blocks.windows import first_visible
from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.cache import custom_ops
from kvpager.integrations.huggingface.cache.budget import LayerKind
from kvpager.integrations.huggingface.cache.groups import LayerGroup
from kvpager.integrations.huggingface.cache.paged_tensor import paged_tensors
from kvpager.integrations.huggingface.cache.paged_view import PagedView
from kvpager.storage.block_storage import LayerShape


def _on_the_cache(method: str) -> Any:
    """Return a method that refuses a call of `method`, which belongs to the cache."""

    def refuse(self: PagedLayer, *args: Any, **kwargs: Any) -> None:
        raise KVPagerError(
            f"{method}: the layers of a paged cache share their blocks. "
            f"Call {method} of the cache instead."
        )

    return refuse


def _kind_of(key: Tensor, value: Tensor) -> LayerKind:
    return LayerKind(LayerShape(key.shape[1], key.shape[3], value.shape[3]), key.dtype, key.device)


class PagedLayer(DynamicLayer):
    """A full-attention layer, which writes into its group's blocks and returns paged tensors.

    It behaves like a `DynamicLayer`. If blocks cannot serve it, it turns into a `DynamicLayer` for
    good: when gradients are needed, `torch.export` traces, or a caller assigns `keys`.
    """

    _layer_type = None

    def __init__(self, group: LayerGroup) -> None:
        self.group = group
        self.number = group.members.add()  # index in the group
        self.num_columns = 0
        self.kind: LayerKind | None = None
        custom_ops.enter(self)
        self._traced: tuple[int, LayerKind] | None = None  # the last write in a trace: its rows
        super().__init__()  # type: ignore[no-untyped-call]

    # `keys` and `values` are made at each read, so that they are never out of date.
    @property
    def keys(self) -> Tensor | None:
        """The layer's keys [rows, kv_heads, columns, dim], a paged tensor; None before a write."""
        return self._stored(0)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._assign("keys", keys)

    @property
    def values(self) -> Tensor | None:
        """The layer's values, like `keys`."""
        return self._stored(1)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._assign("values", values)

    def _stored(self, which: int) -> Tensor | None:
        if not self.num_columns and (self.kind is None or not self.group.num_rows):
            return None
        return self._handles(self._first_visible_column())[which]

    def _assign(self, name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            self._leave_blocks("keys or values that a caller assigned")
            setattr(self, name, tensor)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve storage for the layer in the pool. Raises: `OutOfBlocks`."""
        self.bind(_kind_of(key_states, value_states))

    def bind(self, kind: LayerKind) -> None:
        """Reserve storage for the layer, which is of `kind`, in the pool. Raises: `OutOfBlocks`."""
        self.group.bind(kind, self.number)
        self.kind, self.dtype, self.device = kind, kind.dtype, kind.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens [rows, kv_heads, new, dim]; return all visible columns. O(tokens)."""
        obstacle = self._obstacle(key_states, value_states)
        if obstacle is not None:
            self._leave_blocks(obstacle)
            return self.update(key_states, value_states, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self._trace_update(key_states, value_states)
        start, first = self.num_columns, self._first_visible_column()
        self.store(key_states, value_states, start)
        self.num_columns = start + key_states.shape[2]
        return self._handles(first)

    def _trace_update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        start, first = self.num_columns, self._first_visible_column()
        custom_ops.write(key, value, self.group.place, self.number, start)
        self.num_columns = start + key.shape[2]
        self._traced = key.shape[0], _kind_of(key, value)
        return custom_ops.read(self, *self._traced, first, self.num_columns)

    def store(self, key: Tensor, value: Tensor, start: int, keep_from: int = 0) -> None:
        """Write columns from `start` on to the blocks. O(tokens).

        With `start` 0, keeps only columns from `keep_from` on. Raises: as `LayerGroup.extend`.
        """
        rows, _, num_new, _ = key.shape
        if self.kind is None:
            self.group.check_takes(rows, start, num_new)
            self.lazy_initialization(key, value)
        if start == self.group.num_columns:
            self._before_step(start)
        self.group.extend(rows, start, num_new, keep_from)
        if keep_from:
            start, key, value = keep_from, key[:, :, keep_from:], value[:, :, keep_from:]
        self.group.write(self.number, start, key, value)
        if self.number == self.group.members.count - 1 or self.group.origin is not None:
            self.group.memory.note_dense()

    def move(self, group: LayerGroup) -> None:
        """Move to another group; see `LayerGroup.move`. O(blocks)."""
        self.group, self.number = group, self.group.move(self.number, group)
        if not self.num_columns:
            self.kind = None
        custom_ops.enter(self)

    def _obstacle(self, key: Tensor, value: Tensor) -> str | None:
        """Return why these keys and values cannot be kept in blocks; None if they can."""
        if key.requires_grad or value.requires_grad:
            return "keys and values that need gradients"
        if custom_ops.is_exporting():
            return "a program under torch.export"
        if key.dtype != value.dtype:
            return "keys and values of two dtypes, as under autocast"
        if not key.is_floating_point() or key.shape[:3] != value.shape[:3]:
            return "keys and values of different shapes, or of integers"
        kind = self.kind
        if kind is not None and (key.dtype, key.device) != (kind.dtype, kind.device):
            return "keys and values of another dtype or device than before"
        return None

    def _handles(self, start: int) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            if self.kind is not None and self.group.num_rows:
                return custom_ops.read(
                    self, self.group.num_rows, self.kind, start, self.num_columns
                )
            # Nothing was stored before this trace, so all columns were written in it.
            assert self._traced is not None
            return custom_ops.read(self, *self._traced, start, self.num_columns)
        return paged_tensors(self.view(start, self.num_columns))

    def view(self, start: int, stop: int) -> PagedView:
        """Return a view of columns `start` to `stop`. O(1)."""
        return self.group.view(self.number, start, stop)

    def _before_step(self, num_columns: int) -> None:
        """Free blocks that the step does not need. The first layer of a pass calls it."""

    def _first_visible_column(self) -> int:
        return first_visible(self.num_columns, self.group.window)

    def get_seq_length(self) -> int:
        return self.num_columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self._first_visible_column()
        return self.num_columns + query_length - first, first

    def reset(self) -> None:
        """Remove the layer's columns; the cache resets the group."""
        self.num_columns = 0

    def fork(self, group: LayerGroup) -> PagedLayer:
        """Return a copy of this layer over a fork of its group. O(1)."""
        layer = copy.copy(self)
        layer.group = group
        custom_ops.enter(layer)
        return layer

    crop = _on_the_cache("crop")
    reorder_cache = _on_the_cache("reorder_cache")
    batch_repeat_interleave = _on_the_cache("batch_repeat_interleave")
    batch_select_indices = _on_the_cache("batch_select_indices")

    _plain_class: type[DynamicLayer] = DynamicLayer

    def _as_plain(self) -> dict[str, Any]:
        """Return the attributes of the equivalent transformers layer. Gathers once."""
        state: dict[str, Any] = {"keys": None, "values": None, "is_initialized": False}
        if self.kind is not None and self.num_columns:
            keys, values = self.view(self._first_visible_column(), self.num_columns).dense()
            state = {"keys": keys, "values": values, "is_initialized": True}
            state |= {"dtype": self.dtype, "device": self.device}
        return state

    def plain(self) -> DynamicLayer:
        """Return a plain transformers layer with the same content. O(bytes)."""
        layer: DynamicLayer = object.__new__(self._plain_class)
        layer.__dict__.update(self._as_plain())
        return layer

    def _leave_blocks(self, reason: str) -> None:
        """Turn into a plain transformers layer with the same content, for good. O(bytes)."""
        state, group = self._as_plain(), self.group
        self.__dict__.clear()
        self.__class__ = self._plain_class  # type: ignore[assignment]
        self.__dict__.update(state)
        group.leave(reason)


class PagedSlidingWindowLayer(PagedLayer):
    """A layer with a sliding window, which frees the blocks behind the window."""

    is_sliding = True
    _plain_class = DynamicSlidingWindowLayer

    def __init__(self, group: LayerGroup, sliding_window: int) -> None:
        super().__init__(group)
        self.sliding_window = sliding_window
        self._sliding_window_tensor = torch.tensor(sliding_window, dtype=torch.long)
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Keep blocks behind the window from now on, since a later `crop` may need them."""
        self.record_past = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens as `PagedLayer.update` does. A long prompt takes blocks for its end."""
        num_new = key_states.shape[2]
        if (
            num_new < self.sliding_window
            or self.num_columns
            or self.record_past
            or torch.compiler.is_compiling()
            # With quantisation, the prompt must attend to the rounded values.
            or self.group.budget.kv_cache_dtype is not None
            or self._obstacle(key_states, value_states) is not None
        ):
            return super().update(key_states, value_states, *args, **kwargs)
        first = first_visible(num_new, self.sliding_window)
        self.store(key_states, value_states, 0, keep_from=first)
        self.num_columns = num_new
        # The prompt's queries see all its keys. Later queries see only the window.
        return key_states, value_states

    def _before_step(self, num_columns: int) -> None:
        if not self.record_past:
            self.group.forget_before(first_visible(num_columns, self.sliding_window))

    def get_max_length(self) -> int:
        return self.sliding_window

    def _as_plain(self) -> dict[str, Any]:
        return super()._as_plain() | {
            "sliding_window": self.sliding_window,
            "cumulative_length": self.num_columns,
            "_sliding_window_tensor": self._sliding_window_tensor,
            "record_past": self.record_past,
        }
