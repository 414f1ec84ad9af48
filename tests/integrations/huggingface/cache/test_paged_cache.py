"""A paged cache holds what transformers' own cache would, whatever is done to it."""

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
from tests.support.cache_calls import (  # noqa: E402
    BATCHES,
    NAMES,
    generate,
    longer,
    model_named,
    more_ids,
    tokens,
)

# ---------------------------------------------------------------- from one call to the next


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("prefix_cache", [False, True], ids=["no prefixes", "prefix cache"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_a_returned_cache_continues(name: str, batch: str, prefix_cache: bool) -> None:
    model = model_named(name)
    inputs = tiny_models.prompts(BATCHES[batch])
    more = more_ids(len(BATCHES[batch]), seed=1)

    def turns() -> list[torch.Tensor]:
        first = generate(model, inputs)
        second_inputs = longer(first, inputs["attention_mask"], more)
        second = generate(model, second_inputs, **passing(cache_of(first)))
        third_inputs = longer(second, second_inputs["attention_mask"])
        third = generate(model, third_inputs, **passing(cache_of(second)))
        return [first.sequences, second.sequences, third.sequences]

    plain = turns()
    with kvpager.patch(model, prefix_cache=prefix_cache):
        for _ in range(2):
            assert all(map(torch.equal, turns(), plain))


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_copies_of_one_prompt_continue_apart(name: str, batch: str) -> None:
    model = model_named(name)
    inputs = tiny_models.prompts(BATCHES[batch])

    def continuations() -> list[torch.Tensor]:
        first = generate(model, inputs, max_new_tokens=2)
        results = []
        for seed in (1, 2, 1):
            step = longer(first, inputs["attention_mask"], more_ids(len(BATCHES[batch]), seed))
            copied = copy.deepcopy(cache_of(first))
            results.append(tokens(model, step, **passing(copied)))
        step = longer(first, inputs["attention_mask"], more_ids(len(BATCHES[batch]), 3))
        results.append(tokens(model, step, **passing(cache_of(first))))
        return results

    plain = continuations()
    with kvpager.patch(model):
        assert all(map(torch.equal, continuations(), plain))


def test_a_copy_shares_every_block() -> None:
    model = model_named("llama")
    with kvpager.patch(model) as patch:
        first = generate(model, tiny_models.prompts([40]))
        before = patch.stats()
        copies = [copy.deepcopy(cache_of(first)) for _ in range(5)]
        after = patch.stats()
        assert after.num_held_blocks == before.num_held_blocks == after.num_shared_blocks
        step = longer(first, torch.ones(1, 40, dtype=torch.long))
        generate(model, step, **passing(copies[0]), max_new_tokens=1)
        assert patch.stats().num_held_blocks == before.num_held_blocks + 1
        assert patch.stats().copied_blocks == 1


def test_copies_of_copies_and_the_death_of_the_original() -> None:
    model = model_named("llama")
    inputs = tiny_models.prompts([21, 6])
    first = generate(model, inputs)
    step = longer(first, inputs["attention_mask"], more_ids(2, seed=1))
    plain = tokens(model, step, **passing(cache_of(first)))
    with kvpager.patch(model) as patch:
        first = generate(model, inputs)
        copied = copy.deepcopy(copy.deepcopy(cache_of(first)))
        del first
        gc.collect()
        generate(model, inputs)  # would overwrite blocks that were freed too early
        assert torch.equal(tokens(model, step, **passing(copied)), plain)
        del copied
        gc.collect()
        assert patch.stats().num_held_blocks == 0


def test_beams_continue_from_a_returned_cache() -> None:
    model = model_named("llama")
    inputs = tiny_models.prompts([21])

    def run() -> torch.Tensor:
        first = generate(model, inputs)
        step = longer(first, inputs["attention_mask"], more_ids(1, seed=1))
        cache = cache_of(first)
        cache.batch_repeat_interleave(3)
        return tokens(model, step, **passing(cache), num_beams=3, num_return_sequences=3)

    plain = run()
    with kvpager.patch(model):
        assert torch.equal(run(), plain)


def test_continuing_past_left_padding_without_its_mask_is_an_error() -> None:
    model = model_named("llama")
    with kvpager.patch(model):
        first = generate(model, tiny_models.prompts([21, 6]))
        inputs = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
        with pytest.raises(ValueError, match="attention_mask"):
            generate(model, inputs, **passing(cache_of(first)))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_left_padded_cache_continues_by_hand(name: str) -> None:
    model = model_named(name)
    inputs = tiny_models.prompts([21, 6])

    def run() -> list[torch.Tensor]:
        first = generate(model, inputs)
        step = longer(first, inputs["attention_mask"])
        positions = (step["attention_mask"].cumsum(1) - 1)[:, -1:]
        with torch.no_grad():
            output = model(
                first.sequences[:, -1:],
                attention_mask=step["attention_mask"],
                position_ids=positions,
                **passing(cache_of(first)),
            )
        return [first.sequences, output.logits]

    plain = run()
    with kvpager.patch(model):
        sequences, logits = run()
    assert torch.equal(sequences, plain[0])
    torch.testing.assert_close(logits, plain[1], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- ways to ask for it


@pytest.mark.parametrize("name", ["llama", "mistral", "t5"])
def test_kvpager_can_be_asked_for_by_name(name: str) -> None:
    model = model_named(name)
    inputs = tiny_models.prompts([13, 13])
    plain = tokens(model, inputs)
    # The options of a patch of another model are not this one's.
    with kvpager.patch(model_named("qwen2"), kv_cache_dtype="int8", memory="4KiB") as patch:
        result = generate(model, inputs, cache_implementation="kvpager")
        assert torch.equal(result.sequences, plain)
        assert patch.stats().peak_held_bytes == 0
    cache = cache_of(result)
    cache = getattr(cache, "self_attention_cache", cache)
    assert isinstance(cache, kvpager.PagedCache)
    assert cache.memory.counters.peak_held_bytes > 0


@pytest.mark.mostly_slow(quick=4)
@pytest.mark.parametrize("patched", [False, True], ids=["no patch", "patched"])
@pytest.mark.parametrize("with_config", [False, True], ids=["no config", "config"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "bloom", "qwen3_next"])
def test_a_paged_cache_can_be_passed(
    name: str, batch: str, mode: dict[str, Any], with_config: bool, patched: bool
) -> None:
    if name == "qwen3_next" and not with_config:
        pytest.skip("linear attention layers are known from the configuration only")
    model = model_named(name)
    inputs = tiny_models.prompts(BATCHES[batch])
    plain_cache = DynamicCache(config=model.config) if with_config else DynamicCache()
    plain = tokens(model, inputs, **passing(plain_cache), **mode)
    cache = kvpager.PagedCache(model.config if with_config else None)
    patch = kvpager.patch(model) if patched else None
    try:
        assert torch.equal(tokens(model, inputs, **passing(cache), **mode), plain)
    finally:
        if patch is not None:
            patch.undo()
    assert isinstance(cache, kvpager.PagedCache)
    assert cache.get_seq_length() == max(BATCHES[batch]) + 7


def test_an_explicit_dynamic_cache_is_paged_while_patched() -> None:
    model = model_named("llama")
    inputs = tiny_models.prompts([13, 9])
    plain = tokens(model, inputs)
    with kvpager.patch(model) as patch:
        for cache in (DynamicCache(), DynamicCache(config=model.config)):
            assert torch.equal(tokens(model, inputs, **passing(cache)), plain)
            assert type(cache) is kvpager.PagedCache
        assert patch.stats().num_held_blocks > 0


def test_a_dynamic_cache_filled_before_the_patch_stays_unchanged() -> None:
    model = model_named("llama")
    inputs = tiny_models.prompts([13, 9])
    first = generate(model, inputs)
    step = longer(first, inputs["attention_mask"], more_ids(2, 1))
    plain = tokens(model, step, **passing(copy.deepcopy(cache_of(first))))
    with kvpager.patch(model):
        assert torch.equal(tokens(model, step, **passing(cache_of(first))), plain)
        assert type(cache_of(first)) is DynamicCache


@pytest.mark.parametrize("implementation", ["static", "quantized"])
@pytest.mark.filterwarnings("default")
def test_other_kinds_of_cache_are_left_alone(implementation: str) -> None:
    model = model_named("llama")
    options: dict[str, Any] = {"cache_implementation": implementation, "max_new_tokens": 4}
    if implementation == "static":
        options["disable_compile"] = True
    else:
        fp8 = hasattr(transformers.cache_utils, "Fp8QuantizedLayer")
        options["cache_config"] = {"backend": "fp8"} if fp8 else None
        if not fp8:
            pytest.skip("this transformers has no quantised cache without further packages")
    plain = generate(model, tiny_models.prompts([13, 9]), **options)
    with kvpager.patch(model) as patch:
        found = generate(model, tiny_models.prompts([13, 9]), **options)
        assert patch.stats().num_blocks == 0
    assert torch.equal(found.sequences, plain.sequences)
    assert type(cache_of(found)) is type(cache_of(plain))
