"""A transformers cache whose attention layers live in blocks."""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from packaging.version import Version
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface import compiled
from kvpager.integrations.huggingface.groups import LayerGroup
from kvpager.integrations.huggingface.handles import paged_pair
from kvpager.integrations.huggingface.pools import LayerKind, PagedMemory
from kvpager.integrations.huggingface.views import PagedView
from kvpager.storage import KVDtype, LayerShape

# The constructor as transformers has it, whatever is patched over it later.
_DYNAMIC_CACHE_INIT = DynamicCache.__init__
# Before 5.20, a positive number given to `crop` is the length to crop to.
_CROPS_TO_A_LENGTH = Version(transformers.__version__) < Version("5.20")


class PagedLayer(DynamicLayer):
    """A full-attention layer: writes into its group's blocks, returns lazy handles.

    It behaves as the `DynamicLayer` it stands for. Where blocks cannot serve - gradients are
    needed, `torch.export` is tracing, somebody assigns `keys` - it turns into one, for good.
    """

    _layer_type = None

    def __init__(self, group: LayerGroup, number: int) -> None:
        self.group = group
        group.num_members += 1
        self.number = number  # among the layers of the group
        self.num_columns = 0
        self.kind: LayerKind | None = None
        compiled.enter(self)
        self._traced: compiled.Shape | None = None  # of what was written last in a trace
        super().__init__()  # type: ignore[no-untyped-call]

    # `keys` and `values` are made when asked for, so that nobody holds on to stale ones.
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
            self._leave_blocks()
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
        if torch.compiler.is_exporting() or not self._can_store(key_states, value_states):
            self._leave_blocks()
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

    def store(self, key: Tensor, value: Tensor, start: int) -> None:
        """Write columns from `start` on to the blocks: what `update` does on the host."""
        if self.kind is None:
            self.lazy_initialization(key, value)
        rows, _, num_new, _ = key.shape
        if start == self.group.num_columns:
            self._before_step(start)
        self.group.extend(rows, start, num_new)
        self.group.write(self.number, start, key, value)
        if self.number == self.group.num_members - 1:
            self.group.memory.note_dense()

    def _can_store(self, key: Tensor, value: Tensor) -> bool:
        if key.requires_grad or value.requires_grad or key.dtype != value.dtype:
            return False
        if not key.is_floating_point() or key.shape[:3] != value.shape[:3]:
            return False
        return self.kind is None or (key.dtype, key.device) == (self.kind.dtype, self.kind.device)

    def _handles(self, start: int) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return compiled.read(self, self._shape(), start, self.num_columns)
        return paged_pair(self.view(start, self.num_columns))

    def _shape(self) -> compiled.Shape:
        rows = self.group.num_rows
        if self.kind is None or not rows:
            # Nothing was stored before this trace began, so what is there was written in it.
            assert self._traced is not None
            return self._traced
        return compiled.Shape(rows, *self.kind.shape, self.kind.dtype, self.kind.device)

    def view(self, start: int, stop: int) -> PagedView:
        """What columns `start` to `stop` show."""
        return self.group.view(self.number, start, stop)

    def _before_step(self, num_columns: int) -> None:
        """What the group's first layer does before a step adds columns."""

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

    def twin(self, group: LayerGroup) -> PagedLayer:
        """The same layer over a fork of its group. O(1)."""
        layer = copy.copy(self)
        layer.group = group
        compiled.enter(layer)
        return layer

    def crop(self, tokens_to_remove: int) -> None:
        raise _on_the_cache("crop")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise _on_the_cache("reorder_cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise _on_the_cache("batch_repeat_interleave")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise _on_the_cache("batch_select_indices")

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

    def _leave_blocks(self) -> None:
        """Become the plain transformers layer with the same content, for good."""
        state, group = self._as_plain(), self.group
        self.__dict__.clear()
        self.__class__ = self._plain_class  # type: ignore[assignment]
        self.__dict__.update(state)
        group.leave()


def _on_the_cache(method: str) -> KVPagerError:
    return KVPagerError(
        f"{method}: the layers of a paged cache share their blocks; call it on the cache instead"
    )


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


class PagedCache(DynamicCache):
    """A `DynamicCache` that keeps attention layers in blocks of a pool that sizes itself.

        model.generate(**inputs, past_key_values=kvpager.PagedCache(model.config))

    Layers of other kinds (linear attention, indexed, model-specific) stay transformers' own.
    Reordering, repeating and copying share blocks instead of moving bytes, and `copy.deepcopy` is a
    fork. Dropping the last reference gives the blocks back.

    Args:
        config: the model's configuration; without one, all layers are full attention.
        memory: the most bytes to reserve, such as `"4GiB"`; None for no bound.
        block_size: token slots of a block, a power of two.
        kv_dtype: "int8" or "fp8_e4m3" to keep keys and values in eight bits, which rounds them.
        host_memory: bytes of host memory for rows that `memory`, or the device, has no room for.
        offloading: False; here for code that makes another cache of a cache's class (T5Gemma).

    Raises: `ValueError`, `TypeError`; `OutOfBlocks` from a forward pass that finds no room.
    """

    def __init__(
        self,
        config: Any = None,
        *,
        memory: int | str | None = None,
        block_size: int = 16,
        kv_dtype: KVDtype | None = None,
        host_memory: int | str | None = None,
        offloading: bool = False,
    ) -> None:
        if offloading:
            raise ValueError("offloading True: blocks are not offloaded; use DynamicCache for that")
        paged_memory = PagedMemory(memory, block_size, kv_dtype=kv_dtype, host_memory=host_memory)
        _DYNAMIC_CACHE_INIT(self, config=config)
        self._page(paged_memory)

    @classmethod
    def convert(cls, cache: DynamicCache, memory: PagedMemory) -> None:
        """Make an empty `DynamicCache` a paged one, in place. O(layers)."""
        cache.__class__ = cls
        cache._page(memory)  # type: ignore[attr-defined]

    def _page(self, memory: PagedMemory) -> None:
        self.memory = memory
        self.groups: list[LayerGroup] = []
        if self.layer_class_to_replicate is not None:
            self._page_lazily(LayerGroup(memory, None, None))
            return
        members: dict[int | None, list[int]] = {}
        others: dict[str, int] = {}
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                members.setdefault(None, []).append(index)
            elif type(layer) is DynamicSlidingWindowLayer:
                members.setdefault(layer.sliding_window, []).append(index)
            else:
                others[type(layer).__name__] = others.get(type(layer).__name__, 0) + 1
        for layer_class, count in others.items():
            memory.note_left_alone(layer_class, count)
        for window, indices in members.items():
            group = LayerGroup(memory, len(indices), window)
            self.groups.append(group)
            for number, index in enumerate(indices):
                if window is None:
                    self.layers[index] = PagedLayer(group, number)
                else:
                    sliding = PagedSlidingWindowLayer(group, number, window)
                    sliding.record_past = getattr(self.layers[index], "record_past", False)
                    self.layers[index] = sliding

    def _page_lazily(self, group: LayerGroup) -> None:
        """Layers come as they are first written, all into one group."""
        self.groups = [group]
        layers = self.layers  # not self: a cycle would keep the blocks until the next collection
        make: Any = lambda: PagedLayer(group, len(layers))  # noqa: E731
        self.layer_class_to_replicate = compiled.on_the_host(make)

    # ---------------------------------------------------------------- operations on the batch

    def _plain_layers(self) -> Iterable[Any]:
        return (layer for layer in self.layers if not isinstance(layer, PagedLayer))

    def paged_layers(self) -> list[PagedLayer]:
        """The layers that are kept in blocks. O(layers)."""
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    @property
    def is_fully_paged(self) -> bool:
        """Whether every layer is kept in blocks."""
        return all(isinstance(layer, PagedLayer) for layer in self.layers)

    @property
    def is_compileable(self) -> bool:
        """Never: the blocks are not where a compiled step would expect them."""
        return False

    @compiled.on_the_host
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row `beam_idx[i]` was. O(rows + blocks), no bytes move."""
        self._select(beam_idx.tolist())
        for layer in self._plain_layers():
            layer.reorder_cache(beam_idx)

    @compiled.on_the_host
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times. O(rows + blocks), no bytes move."""
        self._select([row for row in range(self._num_rows()) for _ in range(repeats)])
        for layer in self._plain_layers():
            layer.batch_repeat_interleave(repeats)

    @compiled.on_the_host
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows named by `indices` (numbers or a truth mask). O(rows + blocks)."""
        if self._num_rows():
            self._select(torch.arange(self._num_rows())[indices.cpu()].tolist())
        for layer in self._plain_layers():
            layer.batch_select_indices(indices)

    def _select(self, rows: list[int]) -> None:
        for group in self.groups:
            group.select(rows)

    def _num_rows(self) -> int:
        return max((group.num_rows for group in self.groups), default=0)

    @compiled.on_the_host
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` columns of every row. O(rows + blocks)."""
        tokens_to_remove = int(tokens_to_remove)  # some callers pass a tensor
        if tokens_to_remove > 0 and _CROPS_TO_A_LENGTH:
            tokens_to_remove = min(tokens_to_remove - self.get_seq_length(), 0)
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): expected a negative number, how many tokens to remove"
            )
        paged = self.paged_layers()
        for layer in paged:
            self._check_crop(layer)
        for layer in paged:
            layer.num_columns = max(layer.num_columns + tokens_to_remove, 0)
        for group in self.groups:
            group.truncate(max(group.num_columns + tokens_to_remove, 0))
        for layer in {id(layer.group): layer for layer in paged}.values():
            layer.group.forget_before(layer._first_visible_column())
        for layer in self._plain_layers():
            layer.crop(tokens_to_remove)

    @staticmethod
    def _check_crop(layer: PagedLayer) -> None:
        if not isinstance(layer, PagedSlidingWindowLayer) or layer.record_past:
            return
        if layer.num_columns >= layer.sliding_window:
            raise RuntimeError(
                f"crop: the blocks behind the window of {layer.sliding_window} tokens are gone; "
                "call activate_past_recording() before the tokens to remove are added"
            )

    def join(
        self, parts: list[PagedCache], order: NDArray[np.int64], padding: NDArray[np.int64]
    ) -> None:
        """Begin with the rows of `parts`, put in `order`: copies of this empty cache, left empty.

        They may have less `padding` [rows] than they get. O(rows). For fully paged caches.
        """
        for number, group in enumerate(self.groups):
            group.join([part.groups[number] for part in parts], order, padding)
        for layer, other in zip(self.paged_layers(), parts[0].paged_layers(), strict=True):
            assert other.kind is not None
            layer.bind(other.kind)
            layer.num_columns = layer.group.num_columns

    @compiled.on_the_host
    def reset(self) -> None:
        """Forget all tokens and give the blocks back."""
        for group in self.groups:
            group.reset()
        for layer in self.layers:
            layer.reset()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Serialised as the plain `DynamicCache` it stands for: blocks are of this process."""
        state = {name: self.__dict__.get(name) for name in ("layers", "offloading")}
        state["layers"] = [
            layer.plain() if isinstance(layer, PagedLayer) else layer for layer in self.layers
        ]
        lazily = self.layer_class_to_replicate is not None
        state["layer_class_to_replicate"] = DynamicLayer if lazily else None
        return copyreg._reconstructor, (DynamicCache, object, None), state  # type: ignore[attr-defined]

    def __copy__(self) -> PagedCache:
        """A shallow copy: the same layers in the same blocks."""
        twin: PagedCache = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    @compiled.on_the_host
    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        """A second cache that shares every block of this one: copy-on-write, no bytes move."""
        twin: PagedCache = object.__new__(type(self))
        memo[id(self)] = twin
        forks = {id(group): group.fork() for group in self.groups}
        for name, value in self.__dict__.items():
            if name not in ("layers", "groups", "memory", "layer_class_to_replicate"):
                twin.__dict__[name] = copy.deepcopy(value, memo)
        twin.memory = self.memory
        twin.groups = list(forks.values())
        twin.layers = [
            layer.twin(forks[id(layer.group)]) if isinstance(layer, PagedLayer)
            else copy.deepcopy(layer, memo)
            for layer in self.layers
        ]  # fmt: skip
        twin.layer_class_to_replicate = None
        if self.layer_class_to_replicate is not None:
            twin._page_lazily(twin.groups[0])
        return twin


def unpaged(cache: Any) -> bool:
    """Whether `cache` is a plain `DynamicCache` that holds nothing yet, so that it can be paged."""
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and not any(getattr(layer, "is_initialized", False) for layer in _holding(cache.layers))
    )


def _holding(layers: list[Any]) -> Iterable[Any]:
    """Layers that may hold something: those that stand for none say that they are initialized."""
    return (layer for layer in layers if type(layer).__name__ != "DummyLayer")
