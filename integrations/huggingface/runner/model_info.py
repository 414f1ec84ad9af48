"""Find out what a model keeps in its cache, by one short forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.model_state.offloaded import execution_device
from kvpager.integrations.huggingface.releases import forward_cache_names
from kvpager.integrations.huggingface.runner.layer_groups import group_layers
from kvpager.integrations.huggingface.runner.step_cache import LayerInfo
from kvpager.storage.block_storage import LayerShape


class ModelInfo(NamedTuple):
    """A model's layers as a cache sees them, and the arguments of its forward pass."""

    layers: tuple[LayerInfo, ...]  # kept in blocks
    others: tuple[int, ...]  # indices of all other layers
    has_state: bool  # True if other layers hold a state: recurrent layers
    is_plain: bool  # True if attention is limited by causality and windows only
    is_encoder_decoder: bool
    dtype: torch.dtype
    device: torch.device
    arguments: frozenset[str]  # of `forward`
    cache_name: str  # of the argument of `forward` that takes the cache
    max_length: int | None  # tokens of a sequence
    vocabulary: int
    windows: tuple[int | None, ...]  # of each group of layers
    shapes: tuple[LayerShape, ...]  # of the layers that a block has room for

    @property
    def may_be_packed(self) -> bool:
        """Return True if the model's arguments and layers allow packed rows; a probe decides."""
        takes_positions = {"position_ids", "attention_mask"} <= self.arguments
        needs_rows = self.has_state or self.is_encoder_decoder
        return takes_positions and self.is_plain and not needs_rows


class _RecordingCache(DynamicCache):
    """A cache that records the shape, dtype and device of each layer's keys."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.written: dict[int, tuple[LayerShape, torch.dtype, torch.device]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        shape = LayerShape(key_states.shape[1], key_states.shape[3], value_states.shape[3])
        self.written[layer_idx] = shape, key_states.dtype, key_states.device
        found: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return found


def plain_cache(model: Any) -> DynamicCache:
    """Return an empty cache of transformers' own layers, even under a patch. O(layers)."""
    return _RecordingCache(model.config)


def blank_layers(model: Any, indices: Sequence[int]) -> dict[int, Any]:
    """Return the layers with these indices from an empty cache. O(layers)."""
    layers = plain_cache(model).layers
    return {index: layers[index] for index in indices}


def inspect_model(model: Any, *, one_group: bool = False) -> ModelInfo:
    """Return what a cache needs to know of `model`. Runs one forward pass of two tokens.

    `one_group` keeps all layers in one group, which keeps every token regardless of windows.

    Raises: `KVPagerError` for a model whose cache cannot be kept in blocks.
    """
    try:
        cache, cache_name = _record_pass(model)
    except Exception as error:  # the model reads no text, or takes no DynamicCache
        raise _refusal(model, f"its forward pass of two tokens failed: {error!r}") from error
    layers, others, has_state = [], [], False
    for index, layer in enumerate(cache.layers):
        written = cache.written.get(index)
        if written is not None and type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            layers.append((index, written[0], getattr(layer, "sliding_window", None)))
        else:
            others.append(index)
            has_state |= type(layer).__name__ != "DummyLayer"
    kinds = {written[1:] for written in cache.written.values()}
    if not layers or len(kinds) != 1:
        what = "no attention layers" if not layers else "layers of several dtypes or devices"
        raise _refusal(model, f"its cache keeps {what}")
    ((dtype, device),) = kinds
    text = model.config.get_text_config(decoder=True)
    max_length = getattr(text, "max_position_embeddings", None)
    indices, shapes, windows = zip(*layers, strict=True)
    groups = group_layers(shapes, (None,) * len(shapes) if one_group else windows, max_length)
    embeddings = model.get_input_embeddings()
    if not hasattr(embeddings, "num_embeddings"):
        raise _refusal(model, f"its input embedding is a {type(embeddings).__name__}, not a table")
    return ModelInfo(
        tuple(map(LayerInfo, indices, shapes, windows, *zip(*groups.places, strict=True))),
        tuple(others),
        has_state,
        getattr(text, "attention_chunk_size", None) is None,
        bool(model.config.is_encoder_decoder),
        dtype,
        device,
        frozenset(inspect.signature(model.forward).parameters),
        cache_name,
        max_length,
        int(embeddings.num_embeddings),
        groups.windows,
        groups.shapes,
    )


@torch.inference_mode()
def _record_pass(model: Any) -> tuple[_RecordingCache, str]:
    """Compute two tokens. Return the written cache and the name of its argument."""
    device = execution_device(model)
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    first: Exception | None = None
    for name in forward_cache_names(model):
        cache = _RecordingCache(model.config)
        try:
            if model.config.is_encoder_decoder:
                pair = EncoderDecoderCache(cache, DynamicCache())
                model(input_ids=ids, decoder_input_ids=ids, use_cache=True, **{name: pair})
            else:
                model(input_ids=ids, use_cache=True, **{name: cache})
        except Exception as error:
            first = first or error
        else:
            first = None
            if cache.written:
                break
    if first is not None:
        raise first
    return cache, name


def _refusal(model: nn.Module, reason: str) -> KVPagerError:
    return KVPagerError(
        f"{type(model).__name__} cannot be batched continuously: {reason}. Use model.generate()."
    )
