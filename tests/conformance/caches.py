"""Modes in which a cache lives on: continued, copied, made by the caller, looked into, changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from tests.conformance.case import EQUAL, Case, at_least, attempted, run, text
from tests.support import tiny_models
from tests.support.cache_name import NAME, passing

SUFFIXES = ([5, 9, 33], [71, 12, 40])

# ---------------------------------------------------------------- caches that live on


def continuation(case: Case) -> Any:
    return _continued_twice(case, lambda cache: cache, SUFFIXES[:1], max_new_tokens=7)


def continuation_with_beams(case: Case) -> Any:
    options = {"num_beams": 2, "num_return_sequences": 2}
    return _continued_twice(case, lambda cache: cache, SUFFIXES[:1], **options)


def copies(case: Case) -> Any:
    """Two replies from one prefilled cache, each from a copy of its own."""
    return _continued_twice(case, copy.deepcopy, SUFFIXES, max_new_tokens=1)


def _continued_twice(
    case: Case, taken: Callable[[Any], Any], suffixes: Any, **options: Any
) -> list[Any]:
    inputs = case.inputs()
    first = run(case, inputs, **options)
    rows = options.get("num_return_sequences", 1)
    inputs = {name: tensor.repeat_interleave(rows, dim=0) for name, tensor in inputs.items()}
    replies = []
    for suffix in suffixes:
        cache = taken(first.get(NAME))
        replies.append(_continued(case, inputs, first.sequences, cache, suffix))
        replies.append(cache_of(cache).get_seq_length() if cache is not None else None)
    return replies


def _continued(case: Case, inputs: Any, sequences: Any, cache: Any, suffix: list[int]) -> Any:
    ids = torch.cat([sequences, torch.tensor([suffix]).repeat(len(sequences), 1)], dim=1)
    if case.has_encoder:
        return text(case, {**inputs, "decoder_input_ids": ids}, **passing(cache))
    mask = torch.ones_like(ids)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    return text(case, {"input_ids": ids, "attention_mask": mask}, **passing(cache))


@torch.no_grad()
def own_cache(case: Case) -> Any:
    """A cache that the caller makes and passes to `forward`, a few tokens at a time."""
    cache, inputs = _empty_cache(case), case.inputs(EQUAL)
    name, always = "input_ids", {}
    inputs.pop("attention_mask", None)
    if case.has_encoder:
        name, always = "decoder_input_ids", {"encoder_outputs": case.model.get_encoder()(**inputs)}
        inputs = {name: tiny_models.prompts(list(EQUAL), seed=5)["input_ids"]}
    ids, logits, start = inputs.pop(name), [], 0
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, :8]
    for stop in (8, 9, 10, ids.shape[1]):
        piece = {name: ids[:, start:stop], **always, **inputs}
        logits.append(case.model(**piece, **passing(cache), use_cache=True).logits)
        start, inputs = stop, {}  # an image is seen in the first piece
    return {"logits": logits, "cache": format_of(cache)}


def _empty_cache(case: Case) -> Any:
    config = case.model.config
    if not case.has_encoder:
        return DynamicCache(config=config)
    decoder = config.get_text_config(decoder=True)
    return EncoderDecoderCache(DynamicCache(config=decoder), DynamicCache(config=decoder))


def given_cache(case: Case) -> Any:
    """An empty cache that the caller passes to `generate`, twice."""
    cache = _empty_cache(case)
    first = text(case, **passing(cache), max_new_tokens=5)
    return first, cache_of(cache).get_seq_length()


def cache_format(case: Case) -> Any:
    return [format_of(run(case, case.inputs(EQUAL), num_beams=beams).get(NAME)) for beams in (1, 2)]


def cache_operations(case: Case) -> Any:
    """Each on a copy of one cache; what the copy shows afterwards, or how it was refused."""
    found: dict[str, Any] = {}
    whole = run(case, case.inputs(EQUAL), max_new_tokens=5).get(NAME)
    for name, change in _OPERATIONS.items():
        if "crop" in name and not _crops(whole):
            continue
        cache = copy.deepcopy(whole)
        found[name] = attempted(lambda: (change(cache), format_of(cache))[1])  # noqa: B023
    found["afterwards"] = format_of(whole)
    return found


def _crops(cache: Any) -> bool:
    """Before 5.22, a layer that was never written fails to be cropped."""
    layers = getattr(cache_of(cache), "layers", [])
    if at_least("5.22"):
        return True
    return all(getattr(layer, "is_initialized", True) for layer in layers)


_OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "crop": lambda cache: cache.crop(-2),
    "crop to nothing": lambda cache: cache.crop(-cache.get_seq_length()),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "reorder to one": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
}
if at_least("5.18"):  # before, the length stayed
    _OPERATIONS["reset"] = lambda cache: cache.reset()


# ---------------------------------------------------------------- what a cache shows

_OF_A_LAYER = ("keys", "values", "conv_states", "recurrent_states", "ssm_states")


def cache_of(cache: Any) -> Any:
    """The cache of the decoder's own attention."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def format_of(cache: Any) -> Any:
    """Lengths, and every layer's tensors: as attributes and as iteration shows them."""
    if isinstance(cache, EncoderDecoderCache):
        parts = (cache.self_attention_cache, cache.cross_attention_cache)
        return {"updated": dict(cache.is_updated), "parts": [format_of(part) for part in parts]}
    if not hasattr(cache, "layers"):
        return _plain(cache)
    return {
        "length": cache.get_seq_length(),
        "lengths": [attempted(layer.get_seq_length) for layer in cache.layers if _has_keys(layer)],
        "number": len(cache),
        "mask sizes": attempted(lambda: cache.get_mask_sizes(1, 0)),
        "is sliding": attempted(lambda: list(cache.is_sliding)),
        "layers": [
            {name: _plain(getattr(layer, name, None)) for name in _OF_A_LAYER}
            for layer in cache.layers
        ],
        "iterated": attempted(lambda: [_plain(layer) for layer in cache]),
    }


def _has_keys(layer: Any) -> bool:
    return getattr(layer, "keys", None) is not None


def _plain(value: Any) -> Any:
    """Handles and tensors as ordinary tensors; other collections as lists."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
