"""A transformers cache that keeps its attention layers in blocks."""

from __future__ import annotations

import copy
import copyreg
import functools
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvpager import _validate as arguments
from kvpager._text import counted
from kvpager.errors import OutOfBlocks
from kvpager.integrations.huggingface.cache import custom_ops
from kvpager.integrations.huggingface.cache.budget import Budget
from kvpager.integrations.huggingface.cache.columns import ColumnMismatch
from kvpager.integrations.huggingface.cache.groups import LayerGroup
from kvpager.integrations.huggingface.cache.layers import PagedLayer, PagedSlidingWindowLayer
from kvpager.integrations.huggingface.cache.memory import PagedMemory
from kvpager.integrations.huggingface.releases import warn_if_untested
from kvpager.modes import ModeName
from kvpager.plans import Int64
from kvpager.storage.block_storage import LayerShape
from kvpager.storage.layout import KVCacheDtype

# transformers' constructor, even if a patch replaces it later.
_DYNAMIC_CACHE_INIT = DynamicCache.__init__
# Before transformers 5.20, a positive argument of `crop` is the length to keep.
_CROPS_TO_A_LENGTH = Version(transformers.__version__) < Version("5.20")
# Attributes that `__deepcopy__` does not copy.
_NOT_COPIED = {
    "layers", "groups", "memory", "layer_class_to_replicate", "_before", "_last_written",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The current contents of one cache. A block counts once, however many rows share it.

    `num_tokens` is the number of columns of the batch, padding included. `dense_bytes` is what
    `DynamicCache` would hold for the paged layers. Apart from `num_layers`, the figures do not
    include layers that are not paged.
    """

    num_rows: int
    num_tokens: int
    num_layers: int
    num_paged_layers: int
    num_blocks: int
    num_shared_blocks: int  # held by several rows of the cache
    held_bytes: int
    dense_bytes: int
    num_host_blocks: int
    host_held_bytes: int


class PagedCache(DynamicCache):
    """A `DynamicCache` that keeps attention layers in blocks of a growing pool.

        model.generate(**inputs, cache=kvpager.PagedCache(model.config))

    Before transformers 5.24 the argument is called `past_key_values`.

    Layers of other kinds (linear attention, indexed, model-specific) stay transformers' own.
    Reordering, repeating and copying share blocks instead of moving bytes, and `copy.deepcopy` is a
    fork. Dropping the last reference frees the blocks.

    Args:
        config: the model's configuration; None means that all layers are full attention.
        memory: the most bytes to reserve, such as `"4GiB"`; None for no bound.
        block_size: token slots of a block, a power of two.
        kv_cache_dtype: "int8" or "fp8_e4m3" keeps keys and values in eight bits, rounded.
        host_memory: bytes of host memory for rows that `memory`, or the device, has no room for.
        mode: "virtual" maps blocks so that all attention code reads them without a gather.
        offloading: False; here for code that makes another cache of a cache's class (T5Gemma).

    Raises: `ValueError`, `TypeError`; `OutOfBlocks` from a forward pass that finds no room.
    """

    def __init__(
        self,
        config: Any = None,
        *,
        memory: int | str | None = None,
        block_size: int = 16,
        kv_cache_dtype: KVCacheDtype | None = None,
        host_memory: int | str | None = None,
        offloading: bool = False,
        mode: ModeName = "paged",
    ) -> None:
        if config is not None and not hasattr(config, "get_text_config"):
            kind = type(config).__name__
            raise TypeError(f"PagedCache({kind}): expected a configuration, such as model.config")
        if arguments.flag("offloading", offloading):
            raise ValueError(
                "offloading=True: blocks are not offloaded. Use DynamicCache for that."
            )
        warn_if_untested()
        budget = Budget(memory, block_size, kv_cache_dtype, host_memory=host_memory, mode=mode)
        budget.refuse_below(least_block_bytes(config, torch.bfloat16, budget))
        _DYNAMIC_CACHE_INIT(self, config=config)
        self._page(PagedMemory(budget), config)

    @classmethod
    def convert(cls, cache: DynamicCache, memory: PagedMemory, config: Any = None) -> None:
        """Turn an empty `DynamicCache` into a paged cache, in place. O(layers).

        A cache without attention layers stays unchanged, since it has no layers to page.
        """
        if cache.layer_class_to_replicate is None and not any(map(_is_attention, cache.layers)):
            _note_others(cache.layers, memory)
            return
        cache.__class__ = cls
        cache._page(memory, config)  # type: ignore[attr-defined]
        memory.calls.note_cache(cache)

    def _page(self, memory: PagedMemory, config: Any) -> None:
        self.memory = memory
        self.groups: list[LayerGroup] = []
        self._before: dict[int, int] = {}  # columns of layers and groups before the pass, by `id`
        self._last_written = sys.maxsize  # index of a layer; writing a lower one begins a pass
        if self.layer_class_to_replicate is not None:
            self._page_lazily(LayerGroup(memory, None, None))
            return
        _note_others(self.layers, memory)
        text = None if config is None else config.get_text_config(decoder=True)
        # Layers that attend to an image, as in Llama 3.2 Vision.
        across = getattr(text, "cross_attention_layers", None) or ()
        members: dict[tuple[int | None, bool], list[int]] = {}
        for index, layer in enumerate(self.layers):
            if _is_attention(layer):
                window = getattr(layer, "sliding_window", None)
                members.setdefault((window, index in across), []).append(index)
        for (window, is_across), indices in members.items():
            group = LayerGroup(memory, len(indices), window)
            group.holds_text = not is_across
            self.groups.append(group)
            for index in indices:
                if window is None:
                    self.layers[index] = PagedLayer(group)
                else:
                    sliding = PagedSlidingWindowLayer(group, window)
                    sliding.record_past = getattr(self.layers[index], "record_past", False)
                    self.layers[index] = sliding

    def _page_lazily(self, group: LayerGroup) -> None:
        """Make layers when they are first written, all in one group."""
        self.groups = [group]
        make: Any = functools.partial(PagedLayer, group)
        self.layer_class_to_replicate = custom_ops.on_the_host(make)

    # ---------------------------------------------------------------- operations on the batch

    def _plain_layers(self) -> Iterable[Any]:
        return (layer for layer in self.layers if not isinstance(layer, PagedLayer))

    def paged_layers(self) -> list[PagedLayer]:
        """Return the layers that are kept in blocks. O(layers)."""
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    def stats(self) -> CacheStats:
        """Return the figures of this cache. O(blocks)."""
        holdings = [each for group in self.groups for each in group.holdings()]
        device, host = (
            [each for each in holdings if each.on_host == on_host] for on_host in (False, True)
        )
        return CacheStats(
            num_rows=self._num_rows(),
            num_tokens=self.get_seq_length() if self.layers else 0,
            num_layers=len(self.layers),
            num_paged_layers=len(self.paged_layers()),
            num_blocks=sum(each.num_blocks for each in device),
            num_shared_blocks=sum(each.num_shared_blocks for each in device),
            held_bytes=sum(each.held_bytes for each in device),
            dense_bytes=sum(group.dense_bytes for group in self.groups),
            num_host_blocks=sum(each.num_blocks for each in host),
            host_held_bytes=sum(each.held_bytes for each in host),
        )

    def __repr__(self) -> str:
        # No call of the block manager: a debugger may ask while another thread has its lock.
        tokens = max((group.num_columns for group in self.groups), default=0)
        return (
            f"<PagedCache: {counted(self._num_rows(), 'row')} of {counted(tokens, 'token')}, "
            f"{len(self.paged_layers())} of {counted(len(self.layers), 'layer')} paged, "
            f"{self.memory.options()}>"
        )

    @property
    def is_fully_paged(self) -> bool:
        """Return True if every layer with content is kept in blocks."""
        return all(isinstance(layer, PagedLayer) for layer in _holding(self.layers))

    @property
    def is_begun(self) -> bool:
        """Return True if a layer holds columns. The first layer may not, if an image is missing."""
        if any(group.num_columns for group in self.groups):
            return True
        others = _holding(self._plain_layers())
        return any(getattr(layer, "is_initialized", False) for layer in others)

    @property
    def is_compileable(self) -> bool:
        """False: transformers' compiled steps need a static cache."""
        return False

    @custom_ops.on_the_host
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row `beam_idx[i]` was. O(rows + blocks); no bytes move."""
        self._select(beam_idx.tolist())
        for layer in self._plain_layers():
            layer.reorder_cache(beam_idx)

    @custom_ops.on_the_host
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times. O(rows + blocks); no bytes move."""
        self._select([row for row in range(self._num_rows()) for _ in range(repeats)])
        for layer in self._plain_layers():
            layer.batch_repeat_interleave(repeats)

    @custom_ops.on_the_host
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows in `indices`, which are integers or booleans. O(rows + blocks)."""
        if self._num_rows():
            self._select(torch.arange(self._num_rows())[indices.cpu()].tolist())
        for layer in self._plain_layers():
            layer.batch_select_indices(indices)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values; return all of them. See `DynamicCache.update`.

        Raises: `OutOfBlocks`. All paged layers are then as before the forward pass.
        """
        states = key_states, value_states, layer_idx
        if torch.compiler.is_compiling():
            return super().update(*states, *args, **kwargs)
        if layer_idx <= self._last_written:
            self._note_lengths()
        self._last_written = layer_idx
        try:
            try:
                return super().update(*states, *args, **kwargs)
            except ColumnMismatch:
                layer = self.layers[layer_idx]
                assert isinstance(layer, PagedLayer)
                self._set_apart(layer, key_states.shape[0], key_states.shape[2])
                return super().update(*states, *args, **kwargs)
        except OutOfBlocks:
            self._take_back()
            raise

    def _note_lengths(self) -> None:
        layers = self.paged_layers()
        self._before = {id(layer): layer.num_columns for layer in layers}
        self._before |= {id(group): group.num_columns for group in self.groups}
        for layer in layers:
            # A layer that was skipped still needs blocks that its group is about to free.
            if layer.is_sliding and 0 < layer.num_columns < layer.group.num_columns:
                self._set_apart(layer, layer.group.num_rows, 0)

    def _take_back(self) -> None:
        """Restore the lengths from before the forward pass. O(rows + blocks)."""
        for layer in self.paged_layers():
            layer.num_columns = self._before.get(id(layer), 0)
        for group in self.groups:
            num_columns = self._before.get(id(group), 0)
            if num_columns:
                group.truncate(num_columns)
            else:
                group.reset()

    def _set_apart(self, layer: PagedLayer, num_rows: int, num_new: int) -> None:
        """Move a layer to another group, which takes its columns. O(rows + blocks)."""
        start = layer.num_columns
        taking = (g for g in self.groups if g.takes_over(layer.group, num_rows, start, num_new))
        group = next(taking, None)
        if group is None:
            group = layer.group.fork_apart(start) if start else layer.group.new_apart()
            self.groups.append(group)
            self._before[id(group)] = start
        layer.move(group)

    def _select(self, rows: list[int]) -> None:
        for group in self.groups:
            group.select(rows)

    def _num_rows(self) -> int:
        return max((group.num_rows for group in self.groups), default=0)

    @custom_ops.on_the_host
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` columns of every row. O(rows + blocks)."""
        tokens_to_remove = int(tokens_to_remove)  # some callers pass a tensor
        if tokens_to_remove > 0 and _CROPS_TO_A_LENGTH:
            tokens_to_remove = min(tokens_to_remove - self.get_seq_length(), 0)
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: expected a negative number. "
                f"Pass {-tokens_to_remove} to remove that many tokens."
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
                f"crop: the blocks behind the window of {layer.sliding_window} tokens were freed. "
                "Call activate_past_recording() before the tokens that crop is to remove."
            )

    def join(self, parts: list[PagedCache], order: Int64, padding: Int64) -> None:
        """Take over the rows of `parts` in `order`. O(rows). For fully paged caches.

        `parts` are copies of this empty cache and are empty afterwards. Rows get `padding` [rows],
        which may be more than they had.
        """
        for number, group in enumerate(self.groups):
            group.join([part.groups[number] for part in parts], order, padding)
        for layer, other in zip(self.paged_layers(), parts[0].paged_layers(), strict=True):
            assert other.kind is not None
            layer.bind(other.kind)
            layer.num_columns = layer.group.num_columns

    @custom_ops.on_the_host
    def reset(self) -> None:
        """Remove all tokens and free the blocks. O(rows + blocks)."""
        for group in self.groups:
            group.reset()
        for layer in self.layers:
            layer.reset()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Serialise as a plain `DynamicCache`, since blocks belong to this process."""
        state = {name: self.__dict__.get(name) for name in ("layers", "offloading")}
        state["layers"] = [
            layer.plain() if isinstance(layer, PagedLayer) else layer for layer in self.layers
        ]
        lazily = self.layer_class_to_replicate is not None
        state["layer_class_to_replicate"] = DynamicLayer if lazily else None
        return copyreg._reconstructor, (DynamicCache, object, None), state  # type: ignore[attr-defined]

    def __copy__(self) -> PagedCache:
        """Return a shallow copy: the same layers in the same blocks."""
        fork: PagedCache = object.__new__(type(self))
        fork.__dict__.update(self.__dict__)
        return fork

    @custom_ops.on_the_host
    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        """Return a fork that shares every block, copy-on-write. O(rows + blocks)."""
        fork: PagedCache = object.__new__(type(self))
        memo[id(self)] = fork
        forks = {id(group): group.fork() for group in self.groups}
        for name, value in self.__dict__.items():
            if name not in _NOT_COPIED:
                fork.__dict__[name] = copy.deepcopy(value, memo)
        fork.memory, fork._before, fork._last_written = self.memory, {}, sys.maxsize
        fork.groups = list(forks.values())
        fork.layers = [
            layer.fork(forks[id(layer.group)]) if isinstance(layer, PagedLayer)
            else copy.deepcopy(layer, memo)
            for layer in self.layers
        ]  # fmt: skip
        fork.layer_class_to_replicate = None
        if self.layer_class_to_replicate is not None:
            fork._page_lazily(fork.groups[0])
        return fork


def least_block_bytes(config: Any, dtype: torch.dtype, budget: Budget) -> int:
    """Return a lower bound on the bytes of a block in all paged layers. O(layers).

    Returns 0 if the configuration does not show it.
    """
    if config is None:
        return 0
    values = config.get_text_config(decoder=True).to_dict()
    dims = [values.get(name) for name in ("head_dim", "global_head_dim")]
    if dims[0] is None and values.get("num_attention_heads"):
        dims = [values.get("hidden_size", 0) // values["num_attention_heads"]]
    heads = values.get("num_key_value_heads") or 1
    known = [dim for dim in dims if dim is not None]
    if not all(arguments.is_int(each) for each in [heads, *known]) or not known:
        return 0
    cache = object.__new__(DynamicCache)
    _DYNAMIC_CACHE_INIT(cache, config=config)
    num_layers = sum(map(_is_attention, cache.layers))
    # Latent attention stores less than its heads suggest, and layers may differ.
    if not num_layers or values.get("kv_lora_rank") or values.get("per_layer_config"):
        return 0
    shape = LayerShape(int(heads), int(min(known)), int(min(known)))
    return budget.block_bytes([shape] * num_layers, dtype)


def can_be_paged(cache: Any) -> bool:
    """Return True if `cache` is a plain, empty `DynamicCache`. O(layers)."""
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and not any(getattr(layer, "is_initialized", False) for layer in _holding(cache.layers))
    )


def _is_attention(layer: Any) -> bool:
    """Return True if blocks can hold the layer's content."""
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def _note_others(layers: list[Any], memory: PagedMemory) -> None:
    others = Counter(type(layer).__name__ for layer in layers if not _is_attention(layer))
    for layer_class, count in others.items():
        memory.note_unpaged(layer_class, count)


def _holding(layers: Iterable[Any]) -> Iterable[Any]:
    """Yield layers that can have content. A `DummyLayer` cannot, but says it is initialized."""
    return (layer for layer in layers if type(layer).__name__ != "DummyLayer")
