"""The bound on a patch's memory holds, and a call beyond it changes nothing."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import kvpager
from kvpager.integrations.huggingface.cache import pools
from tests.support import tiny_models
from tests.support.cache_name import cache_of, passing
from tests.support.llama_calls import block_bytes, generate, llama, long_prompt, tokens


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("prefix_cache", [False, True], ids=["no prefixes", "prefix cache"])
def test_what_fits_the_bound_gives_the_same_tokens(
    prefix_cache: bool, mode: dict[str, Any]
) -> None:
    ids = long_prompt()[:, :100]
    plain = tokens(llama(), ids, **mode)
    memory = 16 * block_bytes()
    with kvpager.patch(llama(), memory=memory, prefix_cache=prefix_cache) as patch:
        for _ in range(3):
            assert torch.equal(tokens(llama(), ids, **mode), plain)
        assert patch.stats().reserved_bytes <= memory


def test_a_prompt_that_just_fits_is_served() -> None:
    ids = long_prompt()[:, :100]  # 100 + 7 tokens: 7 blocks
    with kvpager.patch(llama(), memory=7 * block_bytes()):
        tokens(llama(), ids)


def test_cached_prefixes_are_given_up_first() -> None:
    batches = [tiny_models.prompts([100], seed=seed) for seed in range(6)]
    plain = [tokens(llama(), batch) for batch in batches]
    memory = 16 * block_bytes()
    with kvpager.patch(llama(), memory=memory, prefix_cache=True) as patch:
        for _ in range(2):
            for batch, expected in zip(batches, plain, strict=True):
                assert torch.equal(tokens(llama(), batch), expected)
                assert patch.stats().reserved_bytes <= memory
        assert patch.stats().evicted_blocks > 0
        for pool in patch.memory.pools():
            pool.manager.check()


def test_another_models_cached_prefixes_are_given_up_too() -> None:
    other = tiny_models.tiny_model("gpt2")
    with kvpager.patch(memory=10 * block_bytes(), prefix_cache=True):
        for _ in range(2):
            tokens(llama(), long_prompt()[:, :100])
            tokens(other, long_prompt()[:, :30])


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"prefill_chunk_size": 16}], ids=str)
@pytest.mark.parametrize("prefix_cache", [False, True], ids=["no prefixes", "prefix cache"])
def test_a_batch_that_does_not_fit_leaves_the_pool_usable(
    prefix_cache: bool, mode: dict[str, Any]
) -> None:
    short = long_prompt()[:, :50]
    plain = tokens(llama(), short)
    with kvpager.patch(llama(), memory=8 * block_bytes(), prefix_cache=prefix_cache) as patch:
        for _ in range(2):
            with pytest.raises(
                kvpager.OutOfBlocks, match=r"\d+ more blocks? .* needed, memory=64.0 KiB allows 8"
            ):
                generate(llama(), long_prompt(), **mode)
            gc.collect()
            assert patch.stats().num_held_blocks == 0
            assert torch.equal(tokens(llama(), short), plain)
        for pool in patch.memory.pools():
            pool.manager.check()


def test_running_out_while_decoding_leaves_the_pool_usable() -> None:
    ids = long_prompt()[:, :100]
    plain = tokens(llama(), ids)
    with kvpager.patch(llama(), memory=8 * block_bytes()) as patch:
        with pytest.raises(kvpager.OutOfBlocks):
            generate(llama(), ids, max_new_tokens=40)
        gc.collect()
        assert patch.stats().num_held_blocks == 0
        assert torch.equal(tokens(llama(), ids), plain)


def test_a_cache_that_could_not_grow_keeps_what_it_held() -> None:
    cache = kvpager.PagedCache(llama().config, memory=8 * block_bytes())
    ids = long_prompt()[:, :200]
    with torch.no_grad():
        llama()(ids[:, :100], **passing(cache))
        before = [torch.clone(layer.keys) for layer in cache.layers]
        with pytest.raises(kvpager.OutOfBlocks):
            llama()(ids[:, 100:], **passing(cache))
        assert cache.get_seq_length() == 100
        assert all(
            torch.equal(torch.clone(a.keys), b) for a, b in zip(cache.layers, before, strict=True)
        )
        paged = llama()(ids[:, 100:120], **passing(cache)).logits
        plain = llama()(ids[:, :120]).logits[:, 100:]
    torch.testing.assert_close(paged, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 8}, "memory=8 B: one block of 16 tokens takes 8.0 KiB in all layers. Raise"),
        ({"memory": "7KiB"}, "memory='7KiB': .* Raise memory to at least 8.0 KiB"),
        ({"memory": "1GiB", "host_memory": 8}, "host_memory=8 B: .* Raise host_memory to at least"),
    ],
)
def test_a_bound_below_one_block_is_refused_for_a_model(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kvpager.patch(llama(), **options)
    assert type(cache_of(generate(llama(), long_prompt()[:, :5]))) is not kvpager.PagedCache


def test_a_cache_in_which_no_block_fits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"memory='1KiB': one block of 16 tokens takes 4.0 KiB"):
        kvpager.PagedCache(llama().config, memory="1KiB")  # 16 bits at least: it has no model


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3", "t5", "bloom", "qwen3_next"])
def test_no_bound_is_refused_in_which_a_block_fits(name: str) -> None:
    model = tiny_models.tiny_model(name)
    with kvpager.patch(model, block_size=4) as patch:
        output = generate(model, tiny_models.prompts([5]), max_new_tokens=2)
        least = sum(pool.block_bytes for pool in patch.memory.pools())
        del output
    with kvpager.patch(model, block_size=4, memory=least):
        pass


def test_a_pool_in_use_gives_free_blocks_to_another_pool() -> None:
    other, ids = tiny_models.tiny_model("gpt2"), long_prompt()[:, :20]
    batch = tiny_models.prompts([50])
    plain, plain_rest = tokens(other, batch), tokens(llama(), ids, max_new_tokens=16)
    with kvpager.patch(memory=16 * block_bytes()) as patch:
        held = generate(llama(), ids)
        tokens(llama(), long_prompt()[:, :150])  # the pool that `held` is in has 10 blocks and more
        assert patch.stats().reserved_bytes > 9 * block_bytes()
        assert torch.equal(tokens(other, batch), plain)  # 4 blocks of twice the size
        for pool in patch.memory.pools():
            pool.manager.check()
        rest = generate(llama(), held.sequences, **passing(cache_of(held)))
        assert torch.equal(rest.sequences, plain_rest)


def test_prefixes_are_kept_in_half_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches = [tiny_models.prompts([100], seed=seed) for seed in range(8)]
    plain = [tokens(llama(), batch) for batch in batches]
    free = 40 * block_bytes()
    with kvpager.patch(llama(), prefix_cache=True) as patch:
        # What the pool takes is free no longer.
        monkeypatch.setattr(pools, "free_bytes", lambda _: free - patch.stats().reserved_bytes)
        for batch, expected in zip(batches, plain, strict=True):
            old = patch.stats().reserved_bytes
            assert torch.equal(tokens(llama(), batch), expected)
            new = patch.stats().reserved_bytes
            assert new == old or not old or new <= (free - old) // 2
        assert patch.stats().evicted_blocks > 0


def test_a_call_may_take_more_than_cached_prefixes_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pools, "free_bytes", lambda _: 0)
    ids = long_prompt()[:, :400]
    plain = tokens(llama(), ids)
    with kvpager.patch(llama(), prefix_cache=True):
        for _ in range(2):
            assert torch.equal(tokens(llama(), ids), plain)
