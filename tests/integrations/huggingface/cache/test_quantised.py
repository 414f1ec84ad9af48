"""generate from keys and values in eight bits: what rounding them gives, and nothing else.

The specification is transformers' own cache with keys and values rounded as they enter it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.cache_name import passing

transformers = pytest.importorskip("transformers")

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer  # noqa: E402

import kvpager  # noqa: E402
from kvpager.kernels.quantisation import KV_CACHE_DTYPES, dequantise, quantise  # noqa: E402
from tests.support import tiny_models  # noqa: E402

KV = list(KV_CACHE_DTYPES)
# full, windows, gathered by the model's own code, Dk != Dv, cross attention
MODELS = ["llama", "gemma3", "gpt2", "bloom", "deepseek_v3", "t5", "bart"]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
}


@contextmanager
def rounded_entries(monkeypatch: pytest.MonkeyPatch, kv_cache_dtype: str) -> Iterator[None]:
    """transformers' own layers, as if they kept keys and values in eight bits."""

    def rounded(states: Tensor) -> Tensor:
        return dequantise(*quantise(states, KV_CACHE_DTYPES[kv_cache_dtype]), states.dtype)

    with monkeypatch.context() as patched:
        for layer in (DynamicLayer, DynamicSlidingWindowLayer):
            update = layer.update

            def rounding(
                self: Any, key: Tensor, value: Tensor, *args: Any, update: Any = update, **kw: Any
            ) -> Any:
                return update(self, rounded(key), rounded(value), *args, **kw)

            patched.setattr(layer, "update", rounding)
        yield


def generate(model: Any, inputs: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None, **options}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


def assert_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    for logits, exact in zip(found.logits, expected.logits, strict=True):
        # A number on the edge of two codes rounds either way, which is 1/254 of its vector. The
        # last bit of a float32 decides: noise of 3e-7 before it moves logits by up to 1.3e-3.
        torch.testing.assert_close(logits, exact, rtol=0, atol=2e-3 * float(exact.abs().max()))


@pytest.mark.mostly_slow(quick=4)
@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "gathered"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_generate_from_int8_is_generate_from_rounded_keys_and_values(
    name: str, mode: str, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.tiny_model(name)
    inputs = tiny_models.prompts([21, 9, 34])
    with rounded_entries(monkeypatch, "int8"):
        expected = generate(model, inputs, **MODES[mode])
    with kvpager.patch(model, kv_cache_dtype="int8", in_place=in_place) as patch:
        assert_same(generate(model, inputs, **MODES[mode]), expected)
        stats = patch.stats()
    assert (stats.in_place_reads > 0) == (in_place and name not in ("bloom", "deepseek_v3"))
    assert stats.num_held_blocks == 0


def test_generate_from_fp8_is_generate_from_rounded_keys_and_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = tiny_models.tiny_model("llama"), tiny_models.prompts([21, 9, 34])
    with rounded_entries(monkeypatch, "fp8_e4m3"):
        expected = generate(model, inputs)
    with kvpager.patch(model, kv_cache_dtype="fp8_e4m3"):
        assert_same(generate(model, inputs), expected)


@pytest.mark.parametrize("kv_cache_dtype", KV)
def test_eight_bit_elements_take_one_byte_plus_scales(kv_cache_dtype: Any) -> None:
    model, inputs = tiny_models.tiny_model("llama"), tiny_models.prompts([40])
    held = {}
    for kept in (None, kv_cache_dtype):
        with kvpager.patch(model, kv_cache_dtype=kept) as patch:
            result = generate(model, inputs, max_new_tokens=2)
            held[kept] = patch.stats().held_bytes
            del result
    # Heads of 16 numbers in float32: 64 bytes, or 16 and a scale of 4.
    assert held[None] * 20 == held[kv_cache_dtype] * 64


@pytest.mark.parametrize("kv_cache_dtype", KV)
def test_cached_prompts_are_reused_as_they_were_rounded(kv_cache_dtype: Any) -> None:
    model, inputs = tiny_models.tiny_model("llama"), tiny_models.prompts([70])
    with kvpager.patch(model, kv_cache_dtype=kv_cache_dtype, prefix_cache=True) as patch:
        first = generate(model, inputs)
        assert_same(generate(model, inputs), first)
        assert patch.stats().prefix_hit_tokens == 64


def test_caches_in_eight_bits_are_continued_copied_and_cropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = tiny_models.tiny_model("llama"), tiny_models.prompts([40])["input_ids"]

    def logits(cache: Any) -> list[Tensor]:
        with torch.no_grad():
            model(ids, **passing(cache))
            copied = copy.deepcopy(cache)
            cache.crop(-7)
            found = [model(ids[:, :5], **passing(cache)).logits]
            found.append(model(ids[:, :3], **passing(copied)).logits)
        return found

    with rounded_entries(monkeypatch, "int8"):
        expected = logits(transformers.DynamicCache(config=model.config))
    found = logits(kvpager.PagedCache(model.config, kv_cache_dtype="int8"))
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-4)


def test_a_layer_that_leaves_blocks_keeps_its_rounded_values() -> None:
    model, ids = tiny_models.tiny_model("llama"), tiny_models.prompts([20])["input_ids"]
    cache = kvpager.PagedCache(model.config, kv_cache_dtype="int8")
    with torch.no_grad():
        model(ids, **passing(cache))
    stored = cache.layers[0].keys.clone()
    assert stored.dtype == torch.float32
    cache.layers[0].values = cache.layers[0].values.clone()  # an assignment ends paging
    assert type(cache.layers[0]) is DynamicLayer
    assert torch.equal(cache.layers[0].keys, stored)


def test_an_unknown_kv_cache_dtype_leaves_the_model_unpatched() -> None:
    model, init = tiny_models.tiny_model("llama"), transformers.DynamicCache.__init__
    with pytest.raises(
        ValueError, match=r"kv_cache_dtype='int4': expected one of 'int8', 'fp8_e4m3' or None"
    ):
        kvpager.patch(model, kv_cache_dtype="int4")
    assert transformers.DynamicCache.__init__ is init
