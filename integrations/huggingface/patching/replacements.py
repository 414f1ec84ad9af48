"""Replacements for the functions of transformers that `patch` replaces."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin, masking_utils
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import configuration_utils
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.continuous_batching import ContinuousMixin
from transformers.modeling_utils import AttentionInterface

from kvpager.integrations.huggingface.attention.flash import flash_names, reading_flash_in_place
from kvpager.integrations.huggingface.attention.functions import reading_in_place, register
from kvpager.integrations.huggingface.cache.paged_cache import PagedCache, can_be_paged
from kvpager.integrations.huggingface.continuous_batching.entry_points import entry_points
from kvpager.integrations.huggingface.patching.handle import Patch, active, patch_for
from kvpager.integrations.huggingface.patching.undo import around, replace, replace_attention
from kvpager.integrations.huggingface.prefix.prefill import prefill
from kvpager.integrations.huggingface.prefix.prefill_inputs import PrefillInputs, returned_rows
from kvpager.integrations.huggingface.prefix.prompt_cache import reply
from kvpager.integrations.huggingface.releases import cache_in

register()

_scope = threading.local()  # .patch: the patch that serves the cache being made, on this thread
_NO_PATCH: Any = object()


def install() -> None:
    """Replace functions of transformers. `restore_all` undoes it. O(replacements)."""
    replace(DynamicCache, "__init__", around(_page_new))
    replace(GenerationMixin, "generate", around(_generate))
    replace(GenerationMixin, "_prepare_cache_for_generation", around(_prepare))
    replace(GenerationMixin, "_prefill", around(_prefill))
    replace(GenerationMixin, "_sample", around(_sample))
    replace(masking_utils, "_preprocess_mask_arguments", around(_watch_mask))
    for name, function in entry_points(patch_for).items():
        replace(ContinuousMixin, name, around(function))
    names = "ALL_CACHE_IMPLEMENTATIONS"
    replace(configuration_utils, names, lambda original: (*original, "kvpager"))
    registered: Any = AttentionInterface._global_mapping
    replace_attention("sdpa", reading_in_place(registered["sdpa"]))
    for name in list(flash_names(registered)):
        replace_attention(name, reading_flash_in_place(registered[name]))


def _page_new(original: Callable[..., Any], self: DynamicCache, *args: Any, **kwargs: Any) -> None:
    """Page every new cache."""
    original(self, *args, **kwargs)
    if type(self) is DynamicCache and not torch.compiler.is_compiling():
        config = kwargs.get("config", args[1] if len(args) > 1 else None)
        _note_made_outside(_patch_in_scope(config), config)
        _page(self, _patch_in_scope(config), config)


def _generate(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Let calls of other threads wait for this call's memory."""
    serving = patch_for(self)
    if serving is None or torch.compiler.is_compiling():
        return original(self, *args, **kwargs)
    with serving.memory.calls.running():
        result = original(self, *args, **kwargs)
    if serving.prompt_tiers is not None:
        serving.prompt_tiers.save()
    return result


def _prepare(
    original: Callable[..., Any],
    self: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Page the cache of a call, whose model is known here."""
    wanted = generation_config.cache_implementation == "kvpager"
    serving = patch_for(self, wanted=wanted)
    # T5Gemma's override then replaces the cross-attention cache by a new one of its class, with
    # the arguments of DynamicCache. So that cache stays plain here; `_prefill` pages it.
    ours: Any = GenerationMixin._prepare_cache_for_generation
    is_overridden = type(self)._prepare_cache_for_generation is not ours
    outer = getattr(_scope, "patch", None)
    _scope.patch = _NO_PATCH if serving is None or is_overridden else serving
    try:
        result = original(self, generation_config, model_kwargs, *args, **kwargs)
    finally:
        _scope.patch = outer
    cache: Any = cache_in(model_kwargs)
    if isinstance(cache, EncoderDecoderCache):
        _page(cache.self_attention_cache, serving)
        if not is_overridden:
            _page(cache.cross_attention_cache, serving)
    else:
        _page(cache, serving, self.config)
    if serving is not None:
        mode = args[0] if args else kwargs.get("generation_mode")
        _note_fallback(serving, generation_config, cache, mode)
    return result


def _note_fallback(serving: Patch, generation_config: Any, cache: Any, mode: Any) -> None:
    """Note for the report why a call of `generate` gets no paged cache, or keeps no prompt."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if generation_config.use_cache is False:
        serving.memory.note_fallback("not paged: use_cache=False")
    elif not isinstance(own, PagedCache):
        name, package = type(own).__name__, type(own).__module__.partition(".")[0]
        named = generation_config.cache_implementation
        if package == "transformers":
            what = name if named is None else f"cache_implementation={named!r}"
            serving.memory.note_fallback(f"not paged: {what}, a cache of transformers' own")
        elif package != "kvpager":  # an engine's probe compares with a plain cache
            serving.memory.note_fallback(f"not paged: {name}, a cache passed by the caller")
    elif serving.prompts is None:
        return
    elif isinstance(cache, EncoderDecoderCache):
        serving.memory.note_not_kept("an encoder-decoder model")
    elif mode == GenerationMode.ASSISTED_GENERATION:
        is_lookup = generation_config.prompt_lookup_num_tokens is not None
        what = "prompt lookup" if is_lookup else "assisted decoding"
        serving.memory.note_fallback(f"prompts not kept: {what} may reject draft tokens")


def _note_made_outside(serving: Patch | None, config: Any) -> None:
    """Note for the report a cache that is made outside of `generate`."""
    is_outside = getattr(_scope, "patch", None) is None and config is not None
    if serving is not None and serving.prompts is not None and is_outside:
        serving.memory.note_fallback(
            "prompts not kept: a cache made outside generate(), as by a bare forward pass"
        )


def _prefill(
    original: Callable[..., Any],
    self: Any,
    input_ids: torch.Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Compute a prompt, whose ids and padding are known here."""
    serving, cache = patch_for(self), cache_in(model_kwargs)
    if isinstance(cache, EncoderDecoderCache):
        _page(cache.cross_attention_cache, serving)
    inputs = PrefillInputs(self, input_ids, generation_config, model_kwargs)
    if serving is not None:
        serving.memory.calls.note_size(len(input_ids), _longest(generation_config, model_kwargs))
    if serving is None or not _is_paged(cache) or args:
        return original(*inputs, *args, **kwargs)
    if cache.is_begun:
        _check_padding_is_still_hidden(cache, model_kwargs.get("attention_mask"))
        return original(*inputs, **kwargs)
    if not kwargs.get("is_first_iteration", True) or self.config.is_encoder_decoder:
        return original(*inputs, **kwargs)
    if model_kwargs.get("inputs_embeds") is not None:
        if returned_rows(generation_config) > 1:
            serving.memory.note_fallback("equal rows not merged: inputs_embeds")
        if serving.prompts is not None:
            serving.memory.note_not_kept("inputs_embeds")
        return original(*inputs, **kwargs)
    return prefill(original, serving.prompts, inputs, **kwargs)


def _longest(generation_config: Any, model_kwargs: dict[str, Any]) -> int:
    """Return the most columns that a call stores, also in the encoder; 0 if unknown."""
    encoded = getattr(model_kwargs.get("encoder_outputs"), "last_hidden_state", None)
    columns = 0 if encoded is None else encoded.shape[1]
    # The last token is returned, but not computed further.
    return max((generation_config.max_length or 1) - 1, columns)


def _watch_mask(
    original: Callable[..., Any],
    config: Any,
    inputs_embeds: Any,
    mask: Any,
    cache: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Note the columns that a model hides."""
    if isinstance(cache, PagedCache) and not torch.compiler.is_compiling():
        for group in cache.groups:
            group.see_mask(mask)
    return original(config, inputs_embeds, mask, cache, *args, **kwargs)


def _sample(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Keep a reply, whose tokens are known here."""
    serving, cache = patch_for(self), cache_in(kwargs)
    if serving is None or serving.prompts is None or not _is_paged(cache):
        return original(self, *args, **kwargs)
    if cache.is_begun or "logits_processor" not in kwargs:  # the cache's tokens are unknown
        return original(self, *args, **kwargs)
    return reply(original, serving.prompts, self, *args, **kwargs)


def _patch_in_scope(config: Any) -> Patch | None:
    scoped = getattr(_scope, "patch", None)
    if scoped is not None:
        return None if scoped is _NO_PATCH else scoped
    return next((made for made in reversed(active) if made.covers_config(config)), None)


def _page(cache: Any, serving: Patch | None, config: Any = None) -> None:
    if serving is not None and can_be_paged(cache):
        PagedCache.convert(cache, serving.memory, config)


def _is_paged(cache: Any) -> bool:
    """Return True for a paged cache with layers in blocks; a cache without attention has none."""
    return isinstance(cache, PagedCache) and bool(cache.groups)


def _check_padding_is_still_hidden(cache: PagedCache, mask: torch.Tensor | None) -> None:
    """Refuse a mask that shows the cache's left padding, which was never stored."""
    paddings = [group.columns.padding for group in cache.groups if group.columns.padding.any()]
    if not paddings:
        return
    padding = max(paddings, key=lambda each: int(each.max()))
    columns = int(padding.max())
    hidden = torch.arange(columns) < torch.from_numpy(padding)[:, None]
    if mask is None or mask.dim() != 2 or bool((mask[:, :columns].cpu() != 0)[hidden].any()):
        raise ValueError(
            "attention_mask: the cache was begun with left padding, which it does not store. "
            "Pass the mask of the whole sequence, with zeros at the padding."
        )
