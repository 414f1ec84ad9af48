"""What a paged cache shows: keys, values, counts, attributes."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

from tests.support.cache_name import cache_of, passing

transformers = pytest.importorskip("transformers")


hypothesis = pytest.importorskip("hypothesis")

from transformers.cache_utils import DynamicCache  # noqa: E402

import kvpager  # noqa: E402
from tests.support import tiny_models  # noqa: E402
from tests.support.cache_calls import generate, longer, model_named, more_ids, tokens  # noqa: E402


def test_iterating_gives_keys_values_and_windows() -> None:
    for name in ("llama", "gemma3"):
        model = model_named(name)
        plain = cache_of(generate(model, tiny_models.prompts([13, 13])))
        with kvpager.patch(model):
            paged = cache_of(generate(model, tiny_models.prompts([13, 13])))
        assert len(paged) == len(plain)
        for (key, value, window), (*expected, expected_window) in zip(paged, plain, strict=True):
            torch.testing.assert_close(torch.clone(key), expected[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(torch.clone(value), expected[1], atol=1e-5, rtol=1e-5)
            assert (window is None) == (expected_window is None)
            assert window is None or torch.equal(window, expected_window)


def test_a_cache_can_be_made_from_what_iteration_gave() -> None:
    model = model_named("llama")
    with kvpager.patch(model):
        paged = cache_of(generate(model, tiny_models.prompts([13, 13])))
        again = DynamicCache(ddp_cache_data=list(paged), config=model.config)
        assert again.get_seq_length() == paged.get_seq_length()
        for found, expected in zip(again, paged, strict=True):
            assert torch.equal(torch.clone(found[0]), torch.clone(expected[0]))
            assert torch.equal(torch.clone(found[1]), torch.clone(expected[1]))


def test_padding_reads_as_zeros() -> None:
    model = model_named("llama")
    with kvpager.patch(model):
        cache = cache_of(generate(model, tiny_models.prompts([13, 9])))
        assert not cache.layers[0].keys[1, :, :4].any()
        assert cache.layers[0].keys[1, :, 4:].any()


def test_a_cache_counts_what_it_holds() -> None:
    model = tiny_models.tiny_model("llama")
    cache = kvpager.PagedCache(model.config, memory="1MiB", block_size=4)
    assert repr(cache) == (
        "<PagedCache: 0 rows of 0 tokens, 2 of 2 layers paged, memory=1.0 MiB, block_size=4>"
    )
    assert cache.stats().held_bytes == 0
    with torch.no_grad():
        model(**tiny_models.prompts([10, 10]), **passing(cache))
    cache.batch_repeat_interleave(2)
    block_bytes = 2 * 2 * 4 * 2 * 16 * 4  # 2 layers, keys and values, 4 tokens, 2 heads of 16
    stats = cache.stats()
    assert (stats.num_rows, stats.num_tokens, stats.num_paged_layers) == (4, 10, 2)
    assert (stats.num_blocks, stats.num_shared_blocks) == (6, 6)
    assert (stats.held_bytes, stats.dense_bytes) == (6 * block_bytes, 10 * block_bytes)
    assert "4 rows of 10 tokens" in repr(cache)


def test_a_cache_counts_its_rows_in_host_memory_apart() -> None:
    model = tiny_models.tiny_model("llama")
    block_bytes = 2 * 2 * 4 * 2 * 16 * 4
    cache = kvpager.PagedCache(
        model.config, memory=4 * block_bytes, host_memory="1MiB", block_size=4
    )
    with torch.no_grad():
        model(**tiny_models.prompts([10, 10]), **passing(cache))
    stats = cache.stats()
    assert (stats.num_blocks, stats.num_host_blocks) == (3, 3)
    assert (stats.held_bytes, stats.host_held_bytes) == (3 * block_bytes, 3 * block_bytes)


def test_the_caches_attributes_are_those_of_a_dynamic_cache() -> None:
    for name in ("llama", "gemma3", "qwen3_next"):
        model = model_named(name)
        plain = cache_of(generate(model, tiny_models.prompts([13, 13])))
        with kvpager.patch(model):
            paged = cache_of(generate(model, tiny_models.prompts([13, 13])))
        for attribute in (
            "is_sliding",
            "is_initialized",
            "batch_size",
            "is_croppable",
            "is_linear",
        ):
            if hasattr(type(plain), attribute):
                assert getattr(paged, attribute) == getattr(plain, attribute), (name, attribute)
        for index in range(len(plain)):
            if hasattr(plain.layers[index], "get_mask_sizes"):
                assert paged.get_mask_sizes(3, index) == plain.get_mask_sizes(3, index)
            if hasattr(plain.layers[index], "keys"):
                assert paged.get_seq_length(index) == plain.get_seq_length(index)
        assert (
            paged.has_previous_state() == plain.has_previous_state()
            if any(getattr(plain, "is_linear", []))
            else True
        )
        assert isinstance(repr(paged), str)


def test_handles_behave_as_tensors() -> None:
    model = model_named("llama")
    with kvpager.patch(model):
        keys = cache_of(generate(model, tiny_models.prompts([13, 13]))).layers[1].keys
        dense = torch.clone(keys)
        assert isinstance(keys, torch.Tensor)
        assert (keys.shape, keys.dtype, keys.device) == (dense.shape, dense.dtype, dense.device)
        assert len(keys) == 2
        assert keys.stride() == dense.stride()
        assert keys.is_contiguous() == dense.is_contiguous()
        assert torch.equal(keys + 1, dense + 1)
        assert torch.equal(torch.cat([keys, keys], dim=2), torch.cat([dense, dense], dim=2))
        assert torch.equal(keys[1:, :, -1], dense[1:, :, -1])
        assert torch.equal(keys @ dense.mT, dense @ dense.mT)
        assert torch.equal(keys.to(torch.float64), dense.double())
        assert torch.equal(torch.from_numpy(keys.numpy()), dense)
        assert keys.tolist() == dense.tolist()
        assert repr(keys) == repr(dense)
        assert torch.equal(copy.deepcopy(keys), dense)
        assert keys.data_ptr()
        assert torch.equal(
            torch.nn.functional.pad(keys, (0, 2)), torch.nn.functional.pad(dense, (0, 2))
        )
        assert type(keys.contiguous()) is torch.Tensor


def test_a_serialised_handle_is_a_plain_tensor() -> None:
    model = model_named("llama")
    with kvpager.patch(model):
        keys = cache_of(generate(model, tiny_models.prompts([13, 13]))).layers[1].keys
        rebuild, arguments = keys.__reduce_ex__(2)[:2]
        loaded = rebuild(*arguments)
        assert type(loaded) is torch.Tensor
        assert torch.equal(loaded, torch.clone(keys))


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-5),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.reset(),
        lambda cache: [cache.update(*torch.full((2, 2, 2, 3, 16), 9.0), n) for n in range(2)],
        lambda cache: (
            cache.crop(-9),
            [cache.update(*torch.full((2, 2, 2, 9, 16), 9.0), n) for n in range(2)],
        ),
    ],
    ids=["crop", "reorder", "select", "repeat", "reset", "append", "crop and append"],
)
def test_held_keys_do_not_see_later_changes(change: Any) -> None:
    model = model_named("llama")
    with kvpager.patch(model), torch.no_grad():
        cache = cache_of(generate(model, tiny_models.prompts([13, 13])))
        expected = [torch.clone(layer.keys) for layer in cache.layers]
        held = [layer.keys for layer in cache.layers]
        change(cache)
        generate(model, tiny_models.prompts([30, 30], seed=9))
        assert all(map(torch.equal, held, expected))


def test_held_keys_outlive_the_cache_and_the_patch() -> None:
    model = model_named("llama")
    with kvpager.patch(model) as patch:
        cache = cache_of(generate(model, tiny_models.prompts([13, 13])))
        expected, held = torch.clone(cache.layers[0].keys), cache.layers[0].keys
        del cache
        gc.collect()
        generate(model, tiny_models.prompts([30, 30], seed=9))
        assert torch.equal(held, expected)
        held = cache_of(generate(model, tiny_models.prompts([13, 13]))).layers[0].keys
        del patch
    gc.collect()
    assert torch.equal(held, expected)


def test_keys_may_be_assigned() -> None:
    model = model_named("llama")
    inputs = tiny_models.prompts([13, 9])

    def run() -> torch.Tensor:
        first = generate(model, inputs)
        for layer in cache_of(first).layers:
            layer.keys = layer.keys * 1.0
            layer.values = layer.values * 1.0
        step = longer(first, inputs["attention_mask"], more_ids(2, 1))
        return tokens(model, step, **passing(cache_of(first)))

    plain = run()
    with kvpager.patch(model):
        assert torch.equal(run(), plain)
