"""Reasons for which a batch's prompts are neither merged nor kept, as the report shows them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpager.integrations.huggingface.cache.paged_cache import PagedCache
from kvpager.integrations.huggingface.prefix.prefill_inputs import PER_ROW, Padding, PrefillInputs
from kvpager.integrations.huggingface.releases import CACHE_NAMES

_HARMLESS = {
    *CACHE_NAMES,
    "use_cache",
    "logits_to_keep",
    "return_dict",
    "output_attentions",  # these two are checked separately
    "output_hidden_states",
}


def row_merge_obstacle(cache: PagedCache, inputs: PrefillInputs) -> str | None:
    """Return why a row's keys and values depend on more than its ids, mask and positions.

    Returns None if they do not. O(parameters).
    """
    model, input_ids, generation_config, model_kwargs = inputs
    if not cache.is_fully_paged:
        return "layers that are not paged"
    # State outside the cache is neither repeated nor reused with it.
    if getattr(model, "_is_stateful", False):
        return "a model that keeps state outside its cache"
    # Dropout makes equal rows differ; autocast computes in another dtype than the model's.
    if model.training:
        return "a model in training mode"
    places = {tensor.device.type for tensor in (input_ids, *model.parameters())}
    if any(map(_is_autocast, places)):
        return "autocast"
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name, False) or model_kwargs.get(name):
            return f"{name}=True, which needs all tokens of a prompt computed"
    given = {name for name, value in model_kwargs.items() if value is not None}
    if others := given - PER_ROW - _HARMLESS:
        return f"{', '.join(sorted(others))}, which the prompt's token ids do not include"
    for name in sorted(given & PER_ROW):
        if model_kwargs[name].shape != input_ids.shape:
            return f"{name} of another shape than input_ids"
    return None


def prefix_obstacle(cache: PagedCache, inputs: PrefillInputs, padding: Padding) -> str | None:
    """Return why a prompt's prefix may not be reused; None if it may be. O(tokens).

    Later tokens must not change the prefix's keys and values, and these must not depend on their
    position in the batch. Call it only if `row_merge_obstacle` returned None.
    """
    if (reason := model_obstacle(inputs.model)) is not None:
        return reason
    if len(cache.groups) != 1 or cache.groups[0].window is not None:
        return "a model with sliding windows"
    if cache.groups[0].members.expected is None:
        return "a cache without a configuration"
    if (chunk := inputs.generation_config.prefill_chunk_size) is not None:
        return f"prefill_chunk_size={chunk}"
    if not _count_from_zero(inputs.model_kwargs.get("position_ids"), inputs.ids, padding):
        return "position_ids that do not count a prompt's tokens from 0"
    return None


def model_obstacle(model: Any) -> str | None:
    """Return why no prefix of this model may be reused; None if some may be. O(1)."""
    if getattr(model.config, "use_bidirectional_attention", False):
        return "a model whose tokens attend to later ones"
    if model.config.get_text_config(decoder=True) is not model.config:
        return "a multimodal model"
    if _rotation_depends_on_length(model.config):
        return "a model whose positions depend on the length of the prompt"
    return None


def _is_autocast(device_type: str) -> bool:
    # For "meta", the device of offloaded weights, `is_autocast_enabled` raises.
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _rotation_depends_on_length(config: Any) -> bool:
    """Return True if a key's rotation depends on its sequence's length (dynamic NTK, LongRoPE)."""
    settings = [getattr(config, name, None) or {} for name in ("rope_parameters", "rope_scaling")]
    settings += [each for outer in settings for each in outer.values() if isinstance(each, dict)]
    kinds = [str(each.get("rope_type", each.get("type"))) for each in settings]
    return any("dynamic" in kind or "longrope" in kind for kind in kinds)


def _count_from_zero(positions: Tensor | None, input_ids: Tensor, padding: Padding) -> bool:
    if positions is None:
        return not padding.any()
    columns = np.arange(input_ids.shape[1])
    tokens = columns >= padding[:, None]
    usual = columns - padding[:, None]
    return bool((positions.cpu().numpy() == usual)[tokens].all())
