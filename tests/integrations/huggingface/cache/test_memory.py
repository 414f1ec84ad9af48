"""What paging saves: little waste, shared prompts, blocks freed with their cache."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import kvpager
from tests.support import tiny_models
from tests.support.cache_name import cache_of, passing
from tests.support.llama_calls import generate, llama, long_prompt, tokens

BLOCK = 16


def test_only_the_open_tail_blocks_are_wasted() -> None:
    lengths = [5, 100, 33, 64, 250]
    with kvpager.patch(llama()) as patch:
        output = generate(llama(), tiny_models.prompts(lengths))
        stats = patch.stats()
        block_bytes = stats.held_bytes // stats.num_held_blocks
        assert stats.held_bytes - stats.used_bytes < len(lengths) * block_bytes
        per_row = [-(-(length + 7) // BLOCK) for length in lengths]
        assert stats.num_held_blocks == sum(per_row)
        del output


def test_windowed_layers_free_blocks_behind_the_window() -> None:
    model = tiny_models.tiny_model("mistral")
    with kvpager.patch(model, block_size=4) as patch:
        output = generate(model, tiny_models.prompts([50]), max_new_tokens=40)
        assert patch.stats().num_held_blocks <= 4
        del output


def test_four_beams_share_their_prompt() -> None:
    def peak_and_held(**options: Any) -> tuple[int, int]:
        with kvpager.patch(llama()) as patch:
            output = generate(llama(), long_prompt(), **options)
            stats = patch.stats()
            del output
            return stats.peak_held_bytes, stats.num_held_blocks

    one_peak, one_held = peak_and_held()
    peak, held = peak_and_held(num_beams=4)
    assert held < 1.2 * one_held
    assert peak < 1.2 * one_peak


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("chunk", [None, 100])
@pytest.mark.parametrize("mode", [{"num_beams": 4}, {"do_sample": True, "num_return_sequences": 4}])
def test_repeated_prompts_are_computed_once(mode: dict[str, Any], chunk: int | None) -> None:
    options = {**mode, "prefill_chunk_size": chunk}
    torch.manual_seed(3)
    plain = tokens(llama(), long_prompt(), **options)
    rows = []
    hook = (
        llama()
        .model.layers[0]
        .register_forward_pre_hook(lambda _module, inputs: rows.append(inputs[0].shape[:2]))
    )
    torch.manual_seed(3)
    with kvpager.patch(llama()):
        paged = tokens(llama(), long_prompt(), **options)
    hook.remove()
    assert torch.equal(paged, plain)
    assert {shape[0] for shape in rows if shape[1] > 1} == {1}


def test_dropping_the_cache_frees_its_blocks_and_the_pools() -> None:
    with kvpager.patch(llama()) as patch:
        output = generate(llama(), long_prompt())
        assert patch.stats().reserved_bytes > 0
        del output
        gc.collect()
        stats = patch.stats()
        assert (stats.num_held_blocks, stats.num_sequences) == (0, 0)
        assert stats.reserved_bytes == 0


def test_no_garbage_collection_is_needed_to_free_a_cache() -> None:
    gc.collect()
    gc.disable()
    try:
        with kvpager.patch(llama()) as patch:
            cache = cache_of(generate(llama(), tiny_models.prompts([20])))
            del cache
            assert patch.stats().reserved_bytes == 0
            cache = kvpager.PagedCache()
            memory = cache.memory
            cache.update(*torch.zeros(2, 1, 2, 9, 4), 0)
            del cache
            assert memory.reserved_bytes == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_prompt_beyond_the_window_takes_blocks_for_its_end(name: str) -> None:
    model = tiny_models.tiny_model(name)
    inputs = tiny_models.prompts([400, 90])
    plain = tokens(model, inputs, max_new_tokens=24)
    with kvpager.patch(model, block_size=4) as patch:
        assert torch.equal(tokens(model, inputs, max_new_tokens=24), plain)
        peak, pools = patch.stats().peak_held_bytes, patch.memory.pools()
        del pools
    layers = list(getattr(model.config, "layer_types", None) or ["sliding_attention"] * 2)
    layer_bytes = 2 * 2 * 16 * 4
    # A window of 8, its half and a block for what begins and ends within one.
    windowed = layers.count("sliding_attention") * layer_bytes * 2 * (8 + 4 + 2 * 4)
    full = layers.count("full_attention") * layer_bytes * (424 + 114 + 8)
    assert peak <= windowed + full


def test_a_prompt_beyond_the_window_without_room_leaves_nothing() -> None:
    model = tiny_models.tiny_model("mistral")
    ids = tiny_models.prompts([100, 100])["input_ids"]
    cache = kvpager.PagedCache(model.config, block_size=4, memory=12 * 2 * 2 * 2 * 16 * 4)
    with torch.no_grad():
        with pytest.raises(kvpager.OutOfBlocks):
            model(ids, **passing(cache))
        assert cache.get_seq_length() == 0
        assert cache.layers[0].keys is None
        found = model(ids[:1, :4], **passing(cache)).logits
        torch.testing.assert_close(found, model(ids[:1, :4]).logits, atol=1e-5, rtol=1e-5)
