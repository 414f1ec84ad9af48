"""A paged cache holds what transformers' own cache would, whatever is done to it."""

from __future__ import annotations

import copy
import functools
import gc
import random
from typing import Any

import pytest
import torch

from tests.support.cache_name import cache_of, passing

transformers = pytest.importorskip("transformers")
hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402
from transformers.cache_utils import DynamicCache, DynamicLayer  # noqa: E402

import kvpager  # noqa: E402
from tests.support import tiny_models  # noqa: E402


@functools.cache
def model_named(name: str) -> PreTrainedModel:
    return tiny_models.tiny_model(name)


def generate(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, **options}
    return model.generate(**inputs, return_dict_in_generate=True, **options)


def tokens(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    result: torch.Tensor = generate(model, inputs, **options).sequences
    return result


def longer(output: Any, mask: torch.Tensor, more: torch.Tensor | None = None) -> dict[str, Any]:
    """The next call's inputs: everything so far, then `more`, with its mask."""
    ids = output.sequences if more is None else torch.cat([output.sequences, more], dim=1)
    new = ids.shape[1] - mask.shape[1]
    return {"input_ids": ids, "attention_mask": torch.nn.functional.pad(mask, (0, new), value=1)}


def more_ids(rows: int, seed: int, count: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randint(3, tiny_models.VOCAB, (rows, count), generator=generator)


BATCHES = {"equal lengths": [13, 13], "left padding": [21, 6, 17]}
NAMES = ["llama", "mistral", "gemma3", "gpt2", "deepseek_v3", "qwen3_next"]


# ---------------------------------------------------------------- from one call to the next


@pytest.mark.mostly_slow(quick=5)
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


@pytest.mark.mostly_slow(quick=6)
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


@pytest.mark.mostly_slow(quick=16)
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


# ---------------------------------------------------------------- contents


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


# ---------------------------------------------------------------- random histories


WINDOW = 6
LAYERS = [None, WINDOW, None, WINDOW]
TOKEN_BYTES = len(LAYERS) * 2 * (4 + 4) * 4  # 2 heads of 4, keys and values in float32
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["append"] * 4
            + ["reorder", "select", "mask", "repeat", "crop", "reset", "copy", "hold", "record"]
        ),
        st.integers(0, 2**16),
    ),
    min_size=1,
    max_size=25,
)


def _config() -> Any:
    kinds = ["full_attention" if window is None else "sliding_attention" for window in LAYERS]
    return transformers.Gemma3TextConfig(
        num_hidden_layers=len(LAYERS), layer_types=kinds, sliding_window=WINDOW
    )


def _contents(layer: Any) -> tuple[Any, Any]:
    if layer.keys is None or layer.get_seq_length() == 0:
        return None, None
    keys, values = torch.clone(layer.keys), torch.clone(layer.values)
    # While the past is recorded, `keys` may show any part of it.
    if layer.is_sliding:
        keys, values = keys[:, :, -WINDOW + 1 :], values[:, :, -WINDOW + 1 :]
    return keys, values


def _assert_equal_caches(paged: Any, plain: Any) -> None:
    for index, (mine, theirs) in enumerate(zip(paged.layers, plain.layers, strict=True)):
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert paged.get_mask_sizes(3, index) == plain.get_mask_sizes(3, index)
        for found, expected in zip(_contents(mine), _contents(theirs), strict=True):
            assert (found is None) == (expected is None)
            assert found is None or torch.equal(found, expected)


def _apply(operation: str, chance: random.Random, caches: list[Any], held: list[Any]) -> None:
    plain = caches[-1]
    keys = plain.layers[0].keys if plain.layers else None
    rows = 0 if keys is None or keys.dim() != 4 else len(keys)
    if operation == "append":
        shape = (rows or chance.randint(1, 3), 2, chance.randint(1, 9), 4)
        generator = torch.Generator().manual_seed(chance.randrange(2**31))
        for index in range(len(LAYERS)):
            key, value = torch.randn(2, *shape, generator=generator)
            visible = plain.get_mask_sizes(shape[2], index)[0] if plain.layers else shape[2]
            results = [cache.update(key, value, index) for cache in caches]
            for found, expected in zip(*results, strict=True):
                # While the past is recorded, older ones return more than their mask shows.
                assert torch.equal(torch.clone(found), expected[:, :, -visible:])
    elif operation == "reset":
        for cache in caches:
            cache.reset()
        if plain.layers and plain.layers[0].keys is not None:
            # Older ones leave zeros where tokens were: compare with what newer ones do.
            window = hasattr(plain.layers[1], "sliding_window")
            caches[-1] = DynamicCache(config=_config()) if window else DynamicCache()
            if window and plain.layers[1].record_past:
                caches[-1].activate_past_recording()
            if not window:
                caches[-1].layers[:] = [DynamicLayer() for _ in plain.layers]
    elif operation == "record":
        for cache in caches:
            cache.activate_past_recording()
    elif not plain.get_seq_length():
        return
    elif operation == "reorder":
        indices = torch.tensor([chance.randrange(rows) for _ in range(rows)])
        for cache in caches:
            cache.reorder_cache(indices)
    elif operation == "select":
        indices = torch.tensor([chance.randrange(rows) for _ in range(chance.randint(1, rows))])
        for cache in caches:
            cache.batch_select_indices(indices)
    elif operation == "mask":
        mask = torch.tensor([chance.random() < 0.6 for _ in range(rows)])
        mask[chance.randrange(rows)] = True
        for cache in caches:
            cache.batch_select_indices(mask)
    elif operation == "repeat" and rows <= 4:
        repeats = chance.randint(1, 3)
        for cache in caches:
            cache.batch_repeat_interleave(repeats)
    elif operation == "crop":
        _crop(chance.randint(0, plain.get_seq_length()), caches)
    elif operation == "copy":
        held.append(tuple(caches))
        caches[:] = [copy.deepcopy(cache) for cache in caches]
    elif operation == "hold":
        layer = chance.randrange(len(LAYERS))
        held.append((caches[0].layers[layer].keys, torch.clone(caches[0].layers[layer].keys)))


def _crop(count: int, caches: list[Any]) -> None:
    plain = caches[-1]
    sliding = plain.layers[1]
    beyond = sliding.get_seq_length() >= WINDOW
    # transformers' own crop loses what it still needs where the recorded past is too short.
    short = sliding.keys.shape[2] - count < min(WINDOW - 1, plain.get_seq_length() - count)
    if beyond and not sliding.record_past:
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            caches[0].crop(-count)
    elif not (beyond and short):
        for cache in caches:
            cache.crop(-count)


def _assert_unharmed(held: list[Any]) -> None:
    for first, second in held:
        if isinstance(first, torch.Tensor):
            assert torch.equal(torch.clone(first), second)
        else:
            _assert_equal_caches(first, second)


@settings(max_examples=60)
@given(
    operations=OPERATIONS,
    block_size=st.sampled_from([1, 4, 16]),
    memory_of_tokens=st.sampled_from([None, 1, 16, 64]),
)
def test_any_history_leaves_what_a_dynamic_cache_holds(
    operations: list[tuple[str, int]], block_size: int, memory_of_tokens: int | None
) -> None:
    # Where there is too little memory, rows live in host memory.
    bound = memory_of_tokens and memory_of_tokens * TOKEN_BYTES
    paged = kvpager.PagedCache(
        _config(), block_size=block_size, memory=bound, host_memory=bound and "1GB"
    )
    memory = paged.memory
    caches: list[Any] = [paged, DynamicCache(config=_config())]
    del paged
    held: list[Any] = []
    for operation, seed in operations:
        _apply(operation, random.Random(seed), caches, held)
        _assert_equal_caches(*caches)
        for pool in [*memory.pools(), *(memory.host.pools() if memory.host else [])]:
            pool.settle()
            pool.manager.check()
            del pool
    _assert_unharmed(held)
    caches.clear()
    held.clear()
    assert memory.reserved_bytes == 0
    assert memory.host is None or memory.host.reserved_bytes == 0


@settings(max_examples=40)
@given(operations=OPERATIONS)
def test_any_history_of_a_cache_without_configuration(operations: list[tuple[str, int]]) -> None:
    caches: list[Any] = [kvpager.PagedCache(), DynamicCache()]
    held: list[Any] = []
    for operation, seed in operations:
        if operation in ("record", "hold"):
            continue
        if not caches[-1].layers and operation in ("reset", "copy"):
            continue
        chance = random.Random(seed)
        if operation == "crop":
            if caches[-1].layers:
                count = chance.randint(0, caches[-1].get_seq_length())
                for cache in caches:
                    cache.crop(-count)
        else:
            _apply(operation, chance, caches, held)
        _assert_equal_caches(*caches)
    _assert_unharmed(held)


def test_crop_takes_negative_numbers_only() -> None:
    plain = DynamicCache()
    plain.update(*torch.zeros(2, 1, 2, 9, 4), 0)
    try:
        plain.crop(3)
    except ValueError:
        pass
    else:
        pytest.skip("this transformers crops to a positive length")
    cache = kvpager.PagedCache()
    cache.update(*torch.zeros(2, 1, 2, 9, 4), 0)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_cache_cropped_to_nothing_shows_empty_keys_and_values(name: str) -> None:
    shown = []
    for paged in (False, True):
        model = model_named(name)
        cache = kvpager.PagedCache(model.config) if paged else DynamicCache(config=model.config)
        with torch.no_grad():
            model(**tiny_models.prompts([5, 5]), **passing(cache))
        cache.crop(-cache.get_seq_length())
        shown.append([(layer.keys + 0, layer.values + 0) for layer in cache.layers])
    torch.testing.assert_close(shown[1], shown[0])


def test_crop_to_a_length_works_where_transformers_knows_it() -> None:
    caches: list[Any] = [kvpager.PagedCache(), DynamicCache()]
    for cache in caches:
        cache.update(*torch.ones(2, 1, 2, 9, 4), 0)
    try:
        caches[1].crop(3)
    except ValueError:
        pytest.skip("this transformers takes negative numbers only")
    caches[0].crop(3)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 3


def test_a_failed_crop_changes_nothing() -> None:
    cache = kvpager.PagedCache(_config())
    for index in range(4):
        cache.update(*torch.randn(2, 1, 2, 9, 4), index)
    before = [_contents(layer) for layer in cache.layers]
    with pytest.raises(RuntimeError):
        cache.crop(-2)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(
            torch.clone(layer.keys)[:, :, -WINDOW + 1 :]
            if layer.is_sliding
            else torch.clone(layer.keys),
            keys,
        )
        assert torch.equal(_contents(layer)[1], values)


def test_another_number_of_rows_is_an_error_that_changes_nothing() -> None:
    cache = kvpager.PagedCache()
    cache.update(*torch.zeros(2, 2, 2, 9, 4), 0)
    with pytest.raises(ValueError, match="rows"):
        cache.update(*torch.zeros(2, 3, 2, 1, 4), 0)
    assert cache.get_seq_length() == 9


def test_an_index_beyond_the_batch_is_an_error() -> None:
    cache = kvpager.PagedCache()
    cache.update(*torch.zeros(2, 2, 2, 9, 4), 0)
    for indices in (torch.tensor([0, 2]), torch.tensor([5])):
        with pytest.raises(IndexError):
            cache.batch_select_indices(indices)
        with pytest.raises((IndexError, ValueError)):
            cache.reorder_cache(indices)
    assert cache.get_seq_length() == 9
    cache.memory.pools()[0].manager.check()


def test_a_model_is_no_configuration() -> None:
    with pytest.raises(TypeError, match=r"model\.config"):
        kvpager.PagedCache(model_named("llama"))
