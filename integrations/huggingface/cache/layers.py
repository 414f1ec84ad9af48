"""A cache's attention layers: written into blocks, read through handles."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.cache import compiled
from kvpager.integrations.huggingface.cache.groups import LayerGroup
from kvpager.integrations.huggingface.cache.paged_tensor import paged_tensors
from kvpager.integrations.huggingface.cache.paged_view import PagedView
from kvpager.integrations.huggingface.cache.pools import LayerKind
from kvpager.storage.block_storage import LayerShape


def _on_the_cache(method: str) -> Any:
    """Return a method that says to call `method` on the cache instead."""

    def refuse(self: PagedLayer, *args: Any, **kwargs: Any) -> None:
        raise KVPagerError(
            f"{method}: the layers of a paged cache share their blocks; call it on the cache "
            "instead"
        )

    return refuse


class PagedLayer(DynamicLayer):
    """A full-attention layer: writes into its group's blocks, returns lazy handles.

    It behaves as the `DynamicLayer` it stands for. Where blocks cannot serve - gradients are
    needed, `torch.export` is tracing, a caller assigns `keys` - it turns into one, for good.
    """

    _layer_type = None

    def __init__(self, group: LayerGroup, number: int) -> None:
        self.group = group
        group.members.count += 1
        self.number = number  # among the layers of the group
        self.num_columns = 0
        self.kind: LayerKind | None = None
        compiled.enter(self)
        self._traced: compiled.Shape | None = None  # of what was written last in a trace
        super().__init__()  # type: ignore[no-untyped-call]

    # `keys` and `values` are made when asked for, so that none is kept that is out of date.
    @property
    def keys(self) -> Tensor | None:
        """The layer's keys [rows, kv_heads, columns, dim] as a lazy handle; None unless
        some were written."""
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
        return self._handles(self._first_stored_column())[which]

    def _assign(self, name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            self._leave_blocks("keys and values that somebody assigned")
            setattr(self, name, tensor)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Find the layer's place in the pool. Raises `OutOfBlocks`."""
        shape = LayerShape(key_states.shape[1], key_states.shape[3], value_states.shape[3])
        self.bind(LayerKind(shape, key_states.dtype, key_states.device))

    def bind(self, kind: LayerKind) -> None:
        """Take the layer's place in the pool. Raises `OutOfBlocks`."""
        self.group.bind(kind, self.number)
        self.kind, self.dtype, self.device = kind, kind.dtype, kind.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens [rows, kv_heads, new, dim]; return handles to all that is visible."""
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
        compiled.write(key, value, self.group.place, self.number, start)
        self.num_columns = start + key.shape[2]
        rows, heads, _, dim = key.shape
        self._traced = compiled.Shape(rows, heads, dim, value.shape[3], key.dtype, key.device)
        return compiled.read(self, self._traced, first, self.num_columns)

    def store(self, key: Tensor, value: Tensor, start: int, keep_from: int = 0) -> None:
        """Write columns from `start` on to the blocks: what `update` does on the host.

        With `start` 0, only those from `keep_from` on are kept. Raises: as `LayerGroup.extend`.
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
        """Go on in another group, see `LayerGroup.move`. O(blocks)."""
        self.group, self.number = group, self.group.move(self.number, group)
        if not self.num_columns:
            self.kind = None
        compiled.enter(self)

    def _obstacle(self, key: Tensor, value: Tensor) -> str | None:
        """Return why these cannot be kept in blocks; None if they can."""
        if key.requires_grad or value.requires_grad:
            return "keys and values that need gradients"
        if compiled.is_exporting():
            return "a program that is exported"
        if key.dtype != value.dtype:
            return "keys and values of two dtypes, as autocast makes them"
        if not key.is_floating_point() or key.shape[:3] != value.shape[:3]:
            return "keys and values of unlike shapes, or of integers"
        kind = self.kind
        if kind is not None and (key.dtype, key.device) != (kind.dtype, kind.device):
            return "keys and values of another dtype or device than before"
        return None

    def _handles(self, start: int) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return compiled.read(self, self._shape(), start, self.num_columns)
        return paged_tensors(self.view(start, self.num_columns))

    def _shape(self) -> compiled.Shape:
        rows = self.group.num_rows
        if self.kind is None or not rows:
            # Nothing was stored before this trace began, so what is there was written in it.
            assert self._traced is not None
            return self._traced
        return compiled.Shape(rows, *self.kind.shape, self.kind.dtype, self.kind.device)

    def view(self, start: int, stop: int) -> PagedView:
        """Return a view of columns `start` to `stop`."""
        return self.group.view(self.number, start, stop)

    def _before_step(self, num_columns: int) -> None:
        """Free blocks that the step does not need: the group's first layer calls this."""

    def _first_visible(self, num_columns: int) -> int:
        return 0

    def _first_visible_column(self) -> int:
        return self._first_visible(self.num_columns)

    _first_stored_column = _first_visible_column

    def get_seq_length(self) -> int:
        """Columns written so far, padding included."""
        return self.num_columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns the next `query_length` queries attend over, and the first of them."""
        first = self._first_visible_column()
        return self.num_columns + query_length - first, first

    def reset(self) -> None:
        """Forget the layer's columns; the cache resets the group."""
        self.num_columns = 0

    def fork(self, group: LayerGroup) -> PagedLayer:
        """The same layer over a fork of its group. O(1)."""
        layer = copy.copy(self)
        layer.group = group
        compiled.enter(layer)
        return layer

    crop = _on_the_cache("crop")
    reorder_cache = _on_the_cache("reorder_cache")
    batch_repeat_interleave = _on_the_cache("batch_repeat_interleave")
    batch_select_indices = _on_the_cache("batch_select_indices")

    def _plain_state(self) -> dict[str, Any]:
        """The attributes of the transformers layer this one turns into."""
        return {}

    _plain_class: type[DynamicLayer] = DynamicLayer

    def _as_plain(self) -> dict[str, Any]:
        """The attributes of a plain transformers layer with the same content. Gathers once."""
        state: dict[str, Any] = {"keys": None, "values": None, "is_initialized": False}
        if self.kind is not None and self.num_columns:
            keys, values = self.view(self._first_stored_column(), self.num_columns).dense()
            state = {"keys": keys, "values": values, "is_initialized": True}
            state |= {"dtype": self.dtype, "device": self.device}
        return state | self._plain_state()

    def plain(self) -> DynamicLayer:
        """A plain transformers layer with the same content; this one stays as it is."""
        layer: DynamicLayer = object.__new__(self._plain_class)
        layer.__dict__.update(self._as_plain())
        return layer

    def _leave_blocks(self, reason: str) -> None:
        """Become the plain transformers layer with the same content, for good."""
        state, group = self._as_plain(), self.group
        self.__dict__.clear()
        self.__class__ = self._plain_class  # type: ignore[assignment]
        self.__dict__.update(state)
        group.leave(reason)


class PagedSlidingWindowLayer(PagedLayer):
    """A layer that looks back over a window: blocks behind it go back to the pool."""

    is_sliding = True
    _plain_class = DynamicSlidingWindowLayer

    def __init__(self, group: LayerGroup, number: int, sliding_window: int) -> None:
        super().__init__(group, number)
        self.sliding_window = sliding_window
        self._sliding_window_tensor = torch.tensor(sliding_window, dtype=torch.long)
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Keep blocks behind the window until the next `crop`, which may step back into them."""
        self.record_past = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `PagedLayer.update`. Of a prompt longer than the window, only its end takes blocks."""
        first = key_states.shape[2] - self.sliding_window + 1
        if not self._is_beginning(first) or self._obstacle(key_states, value_states) is not None:
            return super().update(key_states, value_states, *args, **kwargs)
        self.store(key_states, value_states, 0, keep_from=first)
        self.num_columns = key_states.shape[2]
        # These queries see all that is here. Later ones see nothing before the window.
        return key_states, value_states

    def _is_beginning(self, first: int) -> bool:
        # Numbers that are rounded as they are stored have to be read as they were stored.
        exact = self.group.memory.kv_cache_dtype is None
        return (
            first > 0
            and self.num_columns == 0
            and exact
            and not self.record_past
            and not torch.compiler.is_compiling()
        )

    def _first_visible(self, num_columns: int) -> int:
        return max(num_columns - self.sliding_window + 1, 0)

    def _before_step(self, num_columns: int) -> None:
        if not self.record_past:
            self.group.forget_before(self._first_visible(num_columns))

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    def _plain_state(self) -> dict[str, Any]:
        return {
            "sliding_window": self.sliding_window,
            "cumulative_length": self.num_columns,
            "_sliding_window_tensor": self._sliding_window_tensor,
            "record_past": self.record_past,
        }
