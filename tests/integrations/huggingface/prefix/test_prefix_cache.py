"""Prompts kept between calls: computed once, and never reused by a changed model."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import PreTrainedModel

import kvpager
from tests.support import tiny_models
from tests.support.cache_name import cache_of, passing
from tests.support.llama_calls import COMPUTED, generate, llama, long_prompt, tokens

BLOCK = 16


def test_a_second_call_computes_only_what_is_new() -> None:
    first = torch.cat([long_prompt(), torch.tensor([[5, 6, 7]])], dim=1)
    second = torch.cat([long_prompt(), torch.tensor([[8, 9, 10, 11]])], dim=1)
    plain = [tokens(llama(), ids) for ids in (first, second)]
    with kvpager.patch(llama(), prefix_cache=True) as patch:
        assert torch.equal(tokens(llama(), first), plain[0])
        before = patch.stats()
        with COMPUTED[llama()] as computed:
            output = generate(llama(), second)
        assert torch.equal(output.sequences, plain[1])
        assert max(computed.columns) <= BLOCK + 4
        after = patch.stats()
        # 1,003 of 1,004 prompt tokens and 7 new ones; 62 full blocks were there.
        assert after.num_held_blocks - after.num_shared_blocks <= 64
        assert after.num_held_blocks + after.num_cached_blocks <= before.num_cached_blocks + 2
        assert after.prefix_hit_tokens - before.prefix_hit_tokens >= 992
        assert torch.equal(tokens(llama(), second, num_beams=3), _beams(second))


def _beams(ids: torch.Tensor) -> torch.Tensor:
    # Undone patches leave no trace, so this may be asked for while one is active elsewhere.
    plain = copy.deepcopy(llama())
    return tokens(plain, ids, num_beams=3)


def test_the_same_prompt_again_computes_one_token() -> None:
    plain = tokens(llama(), long_prompt())
    with kvpager.patch(llama(), prefix_cache=True):
        for wanted in (1000, BLOCK):
            with COMPUTED[llama()] as computed:
                assert torch.equal(tokens(llama(), long_prompt()), plain)
            assert max(computed.columns) <= wanted


def test_a_shorter_prompt_may_use_part_of_a_longer_one() -> None:
    plain = tokens(llama(), long_prompt()[:, :500])
    with kvpager.patch(llama(), prefix_cache=True):
        generate(llama(), long_prompt())
        with COMPUTED[llama()] as computed:
            assert torch.equal(tokens(llama(), long_prompt()[:, :500]), plain)
        assert max(computed.columns) <= BLOCK


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("lengths", [[60, 60], [60, 40], [33, 60], [80, 33, 50]], ids=str)
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_reuse_is_right_whatever_the_left_padding(lengths: list[int], mode: dict[str, Any]) -> None:
    shared = tiny_models.prompts([30], seed=8)["input_ids"][0]
    inputs = tiny_models.prompts(lengths)
    for row, length in enumerate(lengths):
        start = max(lengths) - length
        inputs["input_ids"][row, start : start + 30] = shared
    single = {"input_ids": inputs["input_ids"][:1, max(lengths) - lengths[0] :]}
    single["attention_mask"] = torch.ones_like(single["input_ids"])
    plain = [tokens(llama(), batch, **mode) for batch in (single, inputs)]
    with kvpager.patch(llama(), prefix_cache=True) as patch:
        for _ in range(2):
            assert torch.equal(tokens(llama(), single, **mode), plain[0])
            assert torch.equal(tokens(llama(), inputs, **mode), plain[1])
        assert patch.stats().prefix_hit_tokens > 0
        for pool in patch.memory.pools():
            pool.manager.check()


def test_random_calls_with_shared_prefixes_give_the_same_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    reference = copy.deepcopy(llama())
    with kvpager.patch(llama(), prefix_cache=True, block_size=4) as patch:
        for _ in range(12):
            lengths = torch.randint(5, 60, (3,), generator=generator).tolist()
            inputs = tiny_models.prompts(lengths)
            for row, length in enumerate(lengths):
                ids = long_prompt()[0, :length].clone()
                change = int(torch.randint(0, length, (1,), generator=generator))
                ids[change:] = torch.randint(3, 6, (length - change,), generator=generator)
                inputs["input_ids"][row, max(lengths) - length :] = ids
            options: dict[str, Any] = {"num_beams": 1 + len(lengths) * (lengths[0] % 2)}
            assert torch.equal(
                tokens(llama(), inputs, **options), tokens(reference, inputs, **options)
            )
            for pool in patch.memory.pools():
                pool.manager.check()
        assert patch.stats().prefix_hit_tokens > 0


def test_text_that_was_generated_is_not_taken_for_a_prompt() -> None:
    plain = tokens(llama(), long_prompt()[:, :40])
    with kvpager.patch(llama(), prefix_cache=True):
        output = generate(llama(), long_prompt()[:, :40])
        assert torch.equal(output.sequences, plain)
        cache = cache_of(output)
        cache.crop(-20)
        cache.update(*torch.full((2, 1, 2, 20, 16), 9.0), 0)
        cache.update(*torch.full((2, 1, 2, 20, 16), 9.0), 1)
        assert torch.equal(tokens(llama(), long_prompt()[:, :40]), plain)


def test_models_of_one_shape_share_nothing() -> None:
    other = tiny_models.tiny_model("llama", seed=5)
    plain = tokens(other, long_prompt())
    with kvpager.patch(prefix_cache=True) as patch:
        generate(llama(), long_prompt())
        assert torch.equal(tokens(other, long_prompt()), plain)
        assert patch.stats().prefix_hit_tokens == 0


def _scale_in_place(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(0.5)


def _scale_data(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(0.5)


def _replace(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].self_attn.v_proj.weight
    model.model.layers[0].self_attn.v_proj.weight = torch.nn.Parameter(weight.detach() * 0.5)


def _load(model: PreTrainedModel) -> None:
    model.load_state_dict(tiny_models.tiny_model("llama", seed=5).state_dict())


def _load_assign(model: PreTrainedModel) -> None:
    model.load_state_dict(tiny_models.tiny_model("llama", seed=5).state_dict(), assign=True)


def _optimise(model: PreTrainedModel) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = long_prompt()[:, :20]
    model(ids, labels=ids).loss.backward()
    optimiser.step()


def _cast(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16)


def _there_and_back(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def _rope(model: PreTrainedModel) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize(
    "change",
    [
        _scale_in_place,
        _scale_data,
        _replace,
        _load,
        _load_assign,
        _optimise,
        _cast,
        _there_and_back,
        _rope,
    ],
)
def test_changed_weights_never_reuse_what_the_old_ones_wrote(change: Any) -> None:
    model = tiny_models.tiny_model("llama")
    ids = long_prompt()[:, :100]
    with kvpager.patch(model, prefix_cache=True) as patch:
        generate(model, ids)
        change(model)
        assert patch.stats().prefix_hit_tokens == 0
        paged = tokens(model, ids)
        assert patch.stats().prefix_hit_tokens == 0
    assert torch.equal(paged, tokens(model, ids))


def test_custom_position_ids_are_not_reused() -> None:
    ids = long_prompt()[:, :60]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    moved = {**inputs, "position_ids": torch.arange(60)[None] * 2}
    plain = [tokens(llama(), batch) for batch in (inputs, moved)]
    for order in ((0, 1, 0), (1, 0, 1)):
        with kvpager.patch(llama(), prefix_cache=True):
            for number in order:
                assert torch.equal(tokens(llama(), (inputs, moved)[number]), plain[number])


def test_models_with_windows_are_right_with_a_prefix_cache() -> None:
    for name in ("mistral", "gemma3", "qwen3_next", "gpt2"):
        model = tiny_models.tiny_model(name)
        inputs = tiny_models.prompts([60, 33])
        plain = tokens(model, inputs)
        with kvpager.patch(model, prefix_cache=True):
            for _ in range(2):
                assert torch.equal(tokens(model, inputs), plain)


def test_clear_gives_cached_prefixes_up() -> None:
    with kvpager.patch(llama(), prefix_cache=True) as patch:
        generate(llama(), long_prompt())
        assert patch.stats().cached_bytes > 0
        patch.clear_prefix_cache()
        gc.collect()
        assert (patch.stats().cached_bytes, patch.stats().reserved_bytes) == (0, 0)
        generate(llama(), long_prompt())


def test_a_live_cache_survives_clear() -> None:
    ids = long_prompt()[:, :60]
    plain = tokens(llama(), ids, max_new_tokens=16)
    with kvpager.patch(llama(), prefix_cache=True) as patch:
        first = generate(llama(), ids)
        patch.clear_prefix_cache()
        generate(llama(), tiny_models.prompts([70], seed=9))
        second = generate(llama(), first.sequences, **passing(cache_of(first)))
        assert torch.equal(second.sequences, plain)
