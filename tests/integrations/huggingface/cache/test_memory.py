"""What paging is for: little waste, shared prompts, prefixes kept, a bound that holds."""

from __future__ import annotations

import copy
import functools
import gc
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.cache_name import cache_of, passing

transformers = pytest.importorskip("transformers")

from transformers import PreTrainedModel  # noqa: E402

import kvpager  # noqa: E402
from kvpager._validate import parse_memory  # noqa: E402
from kvpager.integrations.huggingface.cache import pools  # noqa: E402
from kvpager.storage import free_memory  # noqa: E402
from kvpager.storage.block_storage import BlockStorage  # noqa: E402
from tests.support import tiny_models  # noqa: E402

BLOCK = 16


@functools.cache
def llama() -> PreTrainedModel:
    model = tiny_models.tiny_model("llama")
    COMPUTED[model] = tiny_models.Computed(model)
    return model


# Made with the model: a hook that comes later makes it another one.
COMPUTED: dict[PreTrainedModel, tiny_models.Computed] = {}


@functools.cache
def long_prompt() -> torch.Tensor:
    return tiny_models.prompts([1000], seed=4)["input_ids"]


def generate(model: PreTrainedModel, inputs: Any, **options: Any) -> Any:
    if isinstance(inputs, torch.Tensor):
        inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, **options}
    return model.generate(**inputs, return_dict_in_generate=True, **options)


def tokens(model: PreTrainedModel, inputs: Any, **options: Any) -> torch.Tensor:
    result: torch.Tensor = generate(model, inputs, **options).sequences
    return result


# ---------------------------------------------------------------- waste and sharing


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


# ---------------------------------------------------------------- prefixes between calls


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


@pytest.mark.mostly_slow(quick=4)
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


def test_namespaces_share_nothing() -> None:
    with kvpager.patch(prefix_cache=True, namespace="acme") as outer:
        generate(llama(), long_prompt())
        with kvpager.patch(llama(), prefix_cache=True, namespace="umbrella") as inner:
            with COMPUTED[llama()] as computed:
                generate(llama(), long_prompt())
            assert max(computed.columns) == 1000
            assert inner.stats().prefix_hit_tokens == 0
        assert outer.stats().prefix_hit_tokens == 0


def test_a_call_may_be_of_another_namespace() -> None:
    def hits(patch: Any) -> int:
        before = patch.stats().prefix_hit_tokens
        generate(llama(), long_prompt())
        return int(patch.stats().prefix_hit_tokens - before)

    room: dict[str, Any] = {"memory": "64MiB"}  # for the prompts of both
    with kvpager.patch(llama(), prefix_cache=True, namespace="acme", **room) as patch:
        assert hits(patch) == 0
        with patch.namespace("umbrella"):
            assert hits(patch) == 0
            with patch.namespace("acme"):
                assert hits(patch) > 900
            assert hits(patch) > 900
        with pytest.raises(RuntimeError, match="not served"), patch.namespace("initech"):
            raise RuntimeError("not served")
        assert hits(patch) > 900  # of acme again
        with patch.namespace("initech"):
            assert hits(patch) == 0


def test_a_namespace_holds_for_its_own_thread_and_patch_alone() -> None:
    found: dict[str, list[int]] = {}

    def serve(patch: Any, name: str, prompt: torch.Tensor) -> None:
        with patch.namespace(name):
            for _ in range(2):
                with COMPUTED[llama()] as computed:
                    generate(llama(), prompt)
                found.setdefault(name, []).append(max(computed.columns))

    with kvpager.patch(llama(), prefix_cache=True) as patch:
        with patch.namespace("outer"):
            thread = threading.Thread(target=lambda: generate(llama(), long_prompt()))
            thread.start()
            thread.join()
            # The thread's call was of no namespace, so nothing is here yet.
            serve(patch, "inner", long_prompt())
        generate(llama(), long_prompt())
        assert found["inner"][0] == 1000
        assert found["inner"][1] < 100
        other = kvpager.patch(prefix_cache=True)
        with other, patch.namespace("inner"), COMPUTED[llama()] as computed:
            generate(llama(), long_prompt())  # the patch made last serves it
        assert max(computed.columns) == 1000


def test_a_namespace_needs_a_name_and_prompts_that_are_kept() -> None:
    with kvpager.patch(llama()) as patch, pytest.raises(kvpager.KVPagerError, match="prefix_cache"):
        patch.namespace("acme")
    with kvpager.patch(llama(), prefix_cache=True) as patch:
        with pytest.raises(TypeError, match="namespace=None: expected a str"):
            patch.namespace(None)
        with pytest.raises(TypeError, match="namespace=7: expected a str"):
            patch.namespace(7)


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


@pytest.mark.mostly_slow(quick=5)
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


# ---------------------------------------------------------------- the bound


@functools.cache
def _block_bytes() -> int:
    with kvpager.patch(llama()) as patch:
        output = generate(llama(), tiny_models.prompts([20]))
        stats = patch.stats()
        del output
    return stats.held_bytes // stats.num_held_blocks


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("prefix_cache", [False, True], ids=["no prefixes", "prefix cache"])
def test_what_fits_the_bound_gives_the_same_tokens(
    prefix_cache: bool, mode: dict[str, Any]
) -> None:
    ids = long_prompt()[:, :100]
    plain = tokens(llama(), ids, **mode)
    memory = 16 * _block_bytes()
    with kvpager.patch(llama(), memory=memory, prefix_cache=prefix_cache) as patch:
        for _ in range(3):
            assert torch.equal(tokens(llama(), ids, **mode), plain)
        assert patch.stats().reserved_bytes <= memory


def test_a_prompt_that_just_fits_is_served() -> None:
    ids = long_prompt()[:, :100]  # 100 + 7 tokens: 7 blocks
    with kvpager.patch(llama(), memory=7 * _block_bytes()):
        tokens(llama(), ids)


def test_cached_prefixes_are_given_up_first() -> None:
    batches = [tiny_models.prompts([100], seed=seed) for seed in range(6)]
    plain = [tokens(llama(), batch) for batch in batches]
    memory = 16 * _block_bytes()
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
    with kvpager.patch(memory=10 * _block_bytes(), prefix_cache=True):
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
    with kvpager.patch(llama(), memory=8 * _block_bytes(), prefix_cache=prefix_cache) as patch:
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
    with kvpager.patch(llama(), memory=8 * _block_bytes()) as patch:
        with pytest.raises(kvpager.OutOfBlocks):
            generate(llama(), ids, max_new_tokens=40)
        gc.collect()
        assert patch.stats().num_held_blocks == 0
        assert torch.equal(tokens(llama(), ids), plain)


def test_a_cache_that_could_not_grow_keeps_what_it_held() -> None:
    cache = kvpager.PagedCache(llama().config, memory=8 * _block_bytes())
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


def test_a_global_bound_below_one_block_fails_at_first_use() -> None:
    with (
        kvpager.patch(memory=8),
        pytest.raises(kvpager.OutOfBlocks, match=r"memory=8 B allows 0. Raise memory to 8.0 KiB"),
    ):
        tokens(llama(), tiny_models.prompts([5]))


def test_the_memory_that_an_error_asks_for_is_enough() -> None:
    ids = long_prompt()[:, :300]
    with kvpager.patch(llama(), memory="64KiB"), pytest.raises(kvpager.OutOfBlocks) as raised:
        generate(llama(), ids, max_new_tokens=1)
    assert raised.value.__suppress_context__  # the pool's own words say nothing to a user
    assert str(copy.copy(raised.value)) == str(raised.value)
    asked = re.search(r"Raise memory to (.*iB) or set", str(raised.value))
    assert asked is not None
    with kvpager.patch(llama(), memory=asked[1]):
        generate(llama(), ids, max_new_tokens=1)


def test_the_memory_named_in_an_error_suffices() -> None:
    ids = long_prompt()[:, :19]
    with (
        kvpager.patch(llama(), memory=2 * _block_bytes()),
        pytest.raises(kvpager.OutOfBlocks) as raised,
    ):
        generate(llama(), ids, max_new_tokens=64, min_new_tokens=64)
    asked = re.search(r"Raise memory to (.*iB) or set", str(raised.value))
    assert asked is not None
    with kvpager.patch(llama(), memory=asked[1]):
        generate(llama(), ids, max_new_tokens=64, min_new_tokens=64)


# The blocks of each call: rows of one prompt share its 9 full blocks, and padding takes none.
BLOCKS_OF_CALLS: dict[str, tuple[list[int], dict[str, Any], int]] = {
    "one row": ([150], {}, 10),
    "beams": ([150], {"num_beams": 4}, 9 + 4),
    "samples": ([150], {"do_sample": True, "num_return_sequences": 4}, 9 + 4),
    "beams of a padded batch": ([150, 20], {"num_beams": 4}, 9 + 4 + 1 + 4),
    "beams that are not merged": ([150], {"num_beams": 4, "output_hidden_states": True}, 4 * 10),
}  # fmt: skip


@pytest.mark.parametrize("call", BLOCKS_OF_CALLS)
def test_the_memory_named_in_an_error_is_what_a_call_takes(call: str) -> None:
    lengths, options, blocks = BLOCKS_OF_CALLS[call]
    inputs, size = tiny_models.prompts(lengths, seed=4), _block_bytes()
    for bound in (2, blocks // 2, blocks - 1):
        with (
            kvpager.patch(llama(), memory=bound * size),
            pytest.raises(kvpager.OutOfBlocks) as raised,
        ):
            generate(llama(), inputs, **options)
        asked = re.search(r"Raise memory to (.*iB) or set", str(raised.value))
        assert asked is not None
        assert parse_memory(asked[1]) // size == blocks
        in_use = re.search(
            r"(\d+) more blocks? .*allows (\d+)(?:, (\d+) in use)?", str(raised.value)
        )
        assert in_use is not None
        needed, allowed, held = (int(each or 0) for each in in_use.groups())
        assert held <= allowed < held + needed
    with kvpager.patch(llama(), memory=asked[1]):
        generate(llama(), inputs, **options)


@pytest.mark.parametrize("name", ["mistral", "gemma3", "t5", "bloom", "qwen3_next"])
def test_the_memory_named_in_an_error_suffices_for_other_layers(name: str) -> None:
    model, inputs = tiny_models.tiny_model(name), tiny_models.prompts([90, 60])
    with kvpager.patch(model, block_size=4) as patch:
        generate(model, inputs, num_beams=2)
        bound = patch.stats().peak_held_bytes // 2
    with (
        kvpager.patch(model, block_size=4, memory=bound),
        pytest.raises(kvpager.OutOfBlocks) as raised,
    ):
        generate(model, inputs, num_beams=2)
    asked = re.search(r"Raise memory to (.*iB) or set", str(raised.value))
    assert asked is not None
    with kvpager.patch(model, block_size=4, memory=asked[1]):
        generate(model, inputs, num_beams=2)


def test_a_full_device_is_not_mistaken_for_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(BlockStorage, "grow", fail)
    with (
        kvpager.patch(llama(), memory="1GiB"),
        pytest.raises(kvpager.OutOfBlocks, match="but the device is full"),
    ):
        generate(llama(), long_prompt())


def test_a_pool_in_use_gives_free_blocks_to_another_pool() -> None:
    other, ids = tiny_models.tiny_model("gpt2"), long_prompt()[:, :20]
    batch = tiny_models.prompts([50])
    plain, plain_rest = tokens(other, batch), tokens(llama(), ids, max_new_tokens=16)
    with kvpager.patch(memory=16 * _block_bytes()) as patch:
        held = generate(llama(), ids)
        tokens(llama(), long_prompt()[:, :150])  # the pool that `held` is in has 10 blocks and more
        assert patch.stats().reserved_bytes > 9 * _block_bytes()
        assert torch.equal(tokens(other, batch), plain)  # 4 blocks of twice the size
        for pool in patch.memory.pools():
            pool.manager.check()
        rest = generate(llama(), held.sequences, **passing(cache_of(held)))
        assert torch.equal(rest.sequences, plain_rest)


# ---------------------------------------------------------------- without a bound


def test_prefixes_are_kept_in_half_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches = [tiny_models.prompts([100], seed=seed) for seed in range(8)]
    plain = [tokens(llama(), batch) for batch in batches]
    free = 40 * _block_bytes()
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


def control_groups(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        ("0::/", {"memory.max": "max", "memory.current": "5", "memory.stat": ""}, None),
        (
            "0::/a/b",
            {
                "memory.max": "1000",
                "memory.current": "400",
                "memory.stat": "anon 7\ninactive_file 100\n",
                "a/memory.max": "900",
                "a/memory.current": "300",
                "a/memory.stat": "anon 7\n",
                "a/b/memory.max": "max",
            },
            600,
        ),
        (
            "3:cpu:/x\n2:memory:/x",
            {
                "memory/x/memory.limit_in_bytes": "1000",
                "memory/x/memory.usage_in_bytes": "400",
                "memory/x/memory.stat": "total_inactive_file 50",
            },
            650,
        ),
        (
            "0::/elsewhere",
            {"memory.max": "10", "memory.current": "50", "memory.stat": ""},
            0,
        ),
    ],
    ids=["no limit", "version 2, nested", "version 1", "in a container, over its limit"],
)
def test_free_memory_respects_the_limit_of_a_container(
    own: str,
    files: dict[str, str],
    left: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    control_groups(tmp_path / "group", files)
    (tmp_path / "own").write_text(own + "\n")
    (tmp_path / "meminfo").write_text("MemTotal: 90 kB\nMemAvailable: 40 kB\n")
    monkeypatch.setattr(free_memory, "_GROUPS", tmp_path / "group")
    monkeypatch.setattr(free_memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(free_memory, "_MEMINFO", tmp_path / "meminfo")
    expected = 40 * 1024 if left is None else left
    assert free_memory.free_bytes(torch.device("cpu")) == expected


# ---------------------------------------------------------------- windows


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
