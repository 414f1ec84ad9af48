"""What hostile use may do to the adapter: wrong reuse, failed calls, shared bounds, odd layers."""

from __future__ import annotations

import contextlib
import copy
import io
import threading
from typing import Any

import pytest
import torch

from tests.support.cache_name import cache_of, passing

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import kvpager
from kvpager.integrations.huggingface.cache.budget import Budget, LayerKind
from kvpager.integrations.huggingface.cache.memory import PagedMemory
from kvpager.integrations.huggingface.cache.pools import pool_for
from kvpager.storage.block_storage import LayerShape
from tests.support import tiny_models

IDS = torch.arange(3, 43)[None]


def model_named(name: str = "llama") -> PreTrainedModel:
    return tiny_models.tiny_model(name)


def logits(model: PreTrainedModel, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    defaults = {"max_new_tokens": 2, "do_sample": False}
    output = model.generate(
        ids, return_dict_in_generate=True, output_logits=True, **{**defaults, **options}
    )
    return torch.stack(output.logits)


# ---------------------------------------------------------------- what may be reused


def test_the_same_prompt_is_reused() -> None:
    model = model_named()
    with kvpager.patch(model, prefix_cache=True) as patch:
        first, second = logits(model), logits(model)
        assert patch.stats().prefix_query_tokens == 80
        assert patch.stats().prefix_hit_tokens == 32
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def hook(model: PreTrainedModel) -> None:
    model.model.layers[0].register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 1.5,))


def scale(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.scaling *= 3


def train_and_back(model: PreTrainedModel) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)


@pytest.mark.parametrize("change", [hook, scale, train_and_back], ids=lambda f: f.__name__)
def test_a_changed_model_reuses_nothing(change: Any) -> None:
    model = model_named()
    with kvpager.patch(model, prefix_cache=True) as patch:
        logits(model)
        change(model)
        paged = logits(model)
        assert patch.stats().prefix_hit_tokens == 0
    torch.testing.assert_close(paged, logits(model), atol=1e-5, rtol=1e-5)


def test_keys_computed_under_autocast_are_not_reused_without_it() -> None:
    model = model_named()
    with kvpager.patch(model, prefix_cache=True) as patch:
        with torch.autocast("cpu", torch.bfloat16):
            logits(model)
        paged = logits(model)
        with torch.autocast("cpu", torch.bfloat16):
            logits(model)
        assert patch.stats().prefix_hit_tokens == 0
    torch.testing.assert_close(paged, logits(model), atol=1e-5, rtol=1e-5)


def test_a_prompt_under_a_mask_with_holes_is_not_reused() -> None:
    model = model_named()
    holes = torch.ones_like(IDS)
    holes[0, 3:9] = 0
    positions = torch.arange(IDS.shape[1])[None]
    with kvpager.patch(model, prefix_cache=True) as patch:
        holed = logits(model, attention_mask=holes, position_ids=positions)
        whole = logits(model)
        logits(model, attention_mask=holes, position_ids=positions)
        assert patch.stats().prefix_hit_tokens == 0
    torch.testing.assert_close(whole, logits(model), atol=1e-5, rtol=1e-5)
    plain = logits(model, attention_mask=holes, position_ids=positions)
    torch.testing.assert_close(holed, plain, atol=1e-5, rtol=1e-5)


def test_inputs_beside_the_ids_end_reuse() -> None:
    model = model_named()

    original = type(model).forward

    class Steered(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, strengths: Any = None, **kwargs: Any) -> Any:
            embeds = self.get_input_embeddings()(input_ids) * strengths[0]
            return original(self, inputs_embeds=embeds, **kwargs)

    model.__class__ = Steered
    with kvpager.patch(model, prefix_cache=True) as patch:
        logits(model, strengths=[1.0])
        paged = logits(model, strengths=[2.0])
        assert patch.stats().prefix_hit_tokens == 0
    torch.testing.assert_close(paged, logits(model, strengths=[2.0]), atol=1e-5, rtol=1e-5)


def test_prompts_that_look_ahead_are_not_reused() -> None:
    model = model_named()
    model.config.use_bidirectional_attention = True  # as embedding models of this shape do
    with kvpager.patch(model, prefix_cache=True) as patch:
        logits(model)
        logits(model)
        assert patch.stats().prefix_hit_tokens == 0


def test_rows_that_dropout_makes_different_are_computed_each() -> None:
    model = model_named("gpt2")
    model.train()

    def sample() -> torch.Tensor:
        torch.manual_seed(5)
        return logits(model, do_sample=True, num_return_sequences=3)

    plain = sample()
    with kvpager.patch(model):
        torch.testing.assert_close(sample(), plain, atol=1e-5, rtol=1e-5)


def test_clear_forgets_prompts_of_caches_that_just_died() -> None:
    model = model_named()
    with kvpager.patch(model, prefix_cache=True) as patch:
        kept = model.generate(IDS + 50, max_new_tokens=2, return_dict_in_generate=True)
        logits(model)
        patch.clear_prefix_cache()
        hits = patch.stats().prefix_hit_tokens
        logits(model)
        assert patch.stats().prefix_hit_tokens == hits
        del kept


# ---------------------------------------------------------------- failed calls


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("prefix_cache", [False, True], ids=["plain", "prefix cache"])
@pytest.mark.parametrize("layer", [None, 0, 1], ids=["before all", "first layer", "second layer"])
def test_a_failed_prefill_leaves_an_empty_cache(layer: int | None, prefix_cache: bool) -> None:
    model = model_named()
    module = model.get_input_embeddings() if layer is None else model.model.layers[layer].mlp
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], dim=1)
    mask = (padded != 0).long()
    with kvpager.patch(model, prefix_cache=prefix_cache) as patch:
        logits(model)
        cache = DynamicCache(config=model.config)
        assert isinstance(cache, kvpager.PagedCache)
        forward = module.forward
        module.forward = interrupted
        with pytest.raises(KeyboardInterrupt):
            model.generate(
                padded,
                attention_mask=mask,
                **passing(cache),
                max_new_tokens=2,
                do_sample=False,
            )
        module.forward = forward
        assert cache.get_seq_length() == 0
        assert patch.stats().num_held_blocks == 0
        other = IDS.flip(1)
        paged = model.generate(other, **passing(cache), max_new_tokens=4, do_sample=False)
    assert torch.equal(paged, model.generate(other, max_new_tokens=4, do_sample=False))


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


# ---------------------------------------------------------------- pools under one bound


def test_two_models_under_one_bound_do_not_block_each_other() -> None:
    models = [model_named("llama"), model_named("qwen2")]
    failures: list[BaseException] = []

    def work(model: PreTrainedModel, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(8):
                ids = torch.randint(3, 120, (2, 70), generator=generator)
                model.generate(ids, max_new_tokens=3, do_sample=False)
        except kvpager.OutOfBlocks:
            pass
        except BaseException as error:
            failures.append(error)

    with kvpager.patch(prefix_cache=True, memory="400KB"):
        threads = [
            threading.Thread(target=work, args=(model, seed), daemon=True)
            for seed, model in enumerate(models)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=600)
        assert not any(thread.is_alive() for thread in threads)
    assert not failures


def test_a_bound_is_filled_before_cached_prefixes_go() -> None:
    model = model_named()
    with kvpager.patch(model, prefix_cache=True, memory="64MB") as patch:
        for shift in range(6):
            logits(model, IDS + shift)
        stats = patch.stats()
        assert stats.evicted_blocks == 0
        assert stats.num_cached_blocks == 12


def test_an_unbounded_pool_keeps_prompts_up_to_five_times() -> None:
    model = model_named()
    with kvpager.patch(model, prefix_cache=True) as patch:
        logits(model)
        in_use = patch.stats().peak_held_bytes // patch.memory.pools()[0].block_bytes
        for shift in range(4):  # prompts that take turns
            logits(model, IDS + shift % 2)
        assert patch.stats().evicted_blocks == 0
        assert patch.stats().prefix_hit_tokens == 3 * 32
        for shift in range(2, 30):
            logits(model, IDS + shift)
        stats = patch.stats()
        assert stats.evicted_blocks > 0
        assert 3 * in_use < stats.num_cached_blocks <= 5 * in_use
        assert stats.num_blocks <= 5 * in_use


def test_a_pool_grows_seldom() -> None:
    memory = PagedMemory(Budget("1MB", 16))
    kind = LayerKind(LayerShape(2, 16, 16), torch.float32, torch.device("cpu"))
    pool = pool_for(memory, "layout")
    storage, _ = pool.storage(kind, 0, 2)
    sizes = set()
    sequence = pool.allocate([], None)
    one = torch.ones(1, dtype=torch.int64).numpy()

    def fill() -> None:
        for _ in range(10_000):
            pool.append([sequence], one, [])
            sizes.add(storage.num_blocks)

    with pytest.raises(
        kvpager.OutOfBlocks, match=r"1 more block .8.0 KiB. needed, memory='1MB' allows 122"
    ):
        fill()
    # Also close to the bound, where a whole quarter more does not fit.
    assert len(sizes) < 25
    assert memory.reserved_bytes <= 1_000_000
    assert storage.num_blocks == 1_000_000 // storage.block_bytes


def test_a_bound_below_one_block_says_what_a_block_takes() -> None:
    model = model_named()
    with (
        kvpager.patch(memory=100),
        pytest.raises(kvpager.OutOfBlocks, match=r"memory=100 B allows 0. Raise memory to"),
    ):
        logits(model)


def test_a_pool_with_sequences_is_not_dropped_for_another() -> None:
    llama, qwen = model_named("llama"), model_named("qwen2")
    plain = llama.generate(IDS, max_new_tokens=24, do_sample=False)
    with kvpager.patch(prefix_cache=True, memory="130KB"):
        held = llama.generate(IDS, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        with contextlib.suppress(kvpager.OutOfBlocks):
            qwen.generate(IDS.repeat(4, 1), max_new_tokens=2, do_sample=False)
        rest = llama.generate(
            held.sequences, **passing(cache_of(held)), max_new_tokens=22, do_sample=False
        )
    assert torch.equal(rest, plain)


def test_layers_of_different_kinds_reserve_what_they_need() -> None:
    cache = kvpager.PagedCache(model_named("llama").config)
    memory, group = cache.memory, cache.groups[0]
    num_layers = len(cache.layers)
    key = {heads: torch.randn(1, heads, 20, 16) for heads in range(1, num_layers + 1)}
    for index in range(num_layers):
        cache.update(key[index + 1], key[index + 1], index)
    assert group.pool is not None
    blocks = group.pool.manager.num_blocks
    needed = sum(heads * 16 * 2 * 4 * 16 for heads in key) * blocks
    assert memory.reserved_bytes == needed
    for index in range(num_layers):
        assert torch.equal(cache.layers[index].keys + 0, key[index + 1])


# ---------------------------------------------------------------- layers and handles


def test_a_gathered_tensor_can_be_viewed_like_any_other() -> None:
    cache, plain = kvpager.PagedCache(), DynamicCache()
    key = torch.randn(2, 3, 9, 16)
    for one in (cache, plain):
        one.update(key, key, 0)
    assert torch.equal(cache.layers[0].keys.view(6, 9, 16), plain.layers[0].keys.view(6, 9, 16))


def test_a_cache_is_serialised_as_a_plain_dynamic_cache() -> None:
    model = model_named("mistral")
    with kvpager.patch(model):
        with torch.no_grad():
            cache = cache_of(model(IDS, use_cache=True))
        make, arguments, state = cache.__reduce_ex__(2)
        torch.save(cache, io.BytesIO())
        assert arguments[0] is DynamicCache
        plain = make(*arguments)
        plain.__dict__.update(state)
        assert type(plain) is DynamicCache
        assert isinstance(cache, kvpager.PagedCache)
        for mine, theirs in zip(cache.layers, plain.layers, strict=True):
            assert torch.equal(mine.keys + 0, theirs.keys)
            assert theirs.get_seq_length() == IDS.shape[1]


def test_layers_that_need_gradients_give_their_blocks_back() -> None:
    model = model_named()
    with kvpager.patch(model) as patch:
        with torch.no_grad():
            cache = cache_of(model(IDS, use_cache=True))
        assert patch.stats().num_held_blocks > 0
        model(IDS, **passing(cache), use_cache=True)
        assert patch.stats().num_held_blocks == 0
        assert cache.get_seq_length() == 2 * IDS.shape[1]
        cache.batch_select_indices(torch.tensor([0, 0]))
        assert cache.layers[0].keys.shape[0] == 2


def test_reading_keys_over_and_over_keeps_nothing() -> None:
    cache = kvpager.PagedCache()
    cache.update(*torch.randn(2, 1, 2, 9, 16), 0)
    for _ in range(500):
        assert cache.layers[0].keys.shape[2] == 9
    assert len(cache.groups[0].views) == 0


def test_a_namespace_without_prefix_cache_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="Pass prefix_cache=True"):
        kvpager.patch(namespace="acme")


def test_an_undone_patch_cannot_be_entered() -> None:
    patch = kvpager.patch()
    patch.undo()
    with pytest.raises(kvpager.KVPagerError, match="undone already"):
        patch.__enter__()


def test_cropping_more_than_there_is_leaves_nothing() -> None:
    paged, plain = kvpager.PagedCache(), DynamicCache()
    for cache in (paged, plain):
        cache.update(*torch.ones(2, 1, 2, 9, 16), 0)
        cache.crop(-50)
        assert cache.get_seq_length() == 0
        cache.update(*torch.ones(2, 1, 2, 3, 16), 0)
        assert cache.get_seq_length() == 3


def test_what_follows_a_crop_is_not_taken_for_the_prompt() -> None:
    model = model_named()
    with kvpager.patch(model, prefix_cache=True), torch.no_grad():
        # After beams the cache still knows its prompt.
        cache = cache_of(
            model.generate(
                IDS, max_new_tokens=2, num_beams=2, do_sample=False, return_dict_in_generate=True
            )
        )
        group = cache.groups[0]
        cache.crop(-(cache.get_seq_length() - 20))
        model(IDS.flip(1)[:, :20].expand(group.num_rows, -1), **passing(cache))
        group.commit()
        known = group.pool.allocate(IDS[0].tolist(), group.prompt.key)
        # The prompt's own two full blocks; what was written over its end is something else.
        assert known.num_cached_tokens == 32
        assert group.pool.manager._state.rows.known[group.rows._sequences[0]._row] == 20
        group.pool.manager.free(known)


def test_a_shallow_copy_of_a_cache_is_the_same_cache() -> None:
    cache = kvpager.PagedCache()
    cache.update(*torch.ones(2, 1, 2, 9, 16), 0)
    assert copy.copy(cache).layers is cache.layers
    assert type(copy.copy(cache)) is kvpager.PagedCache


@pytest.mark.parametrize("rope_type", ["dynamic", "yarn"])
def test_a_rotation_that_moves_with_the_length_ends_reuse(rope_type: str) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 16} if rope_type == "yarn" else {}
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters=rope,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    prompt = torch.randint(3, 120, (1, 120), generator=torch.Generator().manual_seed(0))
    lengths = (50, 100, 100, 120) if rope_type == "dynamic" else (30, 40, 40, 50)
    plain = [logits(model, prompt[:, :length]) for length in lengths]
    with kvpager.patch(model, prefix_cache=True) as patch:
        for length, expected in zip(lengths, plain, strict=True):
            paged = logits(model, prompt[:, :length])
            torch.testing.assert_close(paged, expected, atol=1e-4, rtol=1e-4)
        assert (patch.stats().prefix_hit_tokens > 0) == (rope_type == "yarn")


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("prefix_cache", [False, True], ids=["plain", "prefix cache"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_cache_cropped_to_nothing_begins_anew(num_beams: int, prefix_cache: bool) -> None:
    model = model_named()
    options = {"num_beams": num_beams, "max_new_tokens": 4, "do_sample": False}
    plain = model.generate(IDS, **options)
    with kvpager.patch(model, prefix_cache=prefix_cache):
        output = model.generate(IDS.repeat(2, 1), **options, return_dict_in_generate=True)
        cache = cache_of(output)
        cache.crop(-cache.get_seq_length())
        assert torch.equal(model.generate(IDS, **passing(cache), **options), plain)


def test_growing_ahead_costs_no_other_pool_its_prefixes() -> None:
    kind = LayerKind(LayerShape(1, 16, 16), torch.float32, torch.device("cpu"))
    block_bytes = 16 * 32 * 4
    memory = PagedMemory(Budget(200 * block_bytes, 16), keep_pools=True)
    idle, busy = pool_for(memory, "idle"), pool_for(memory, "busy")
    for pool in (idle, busy):
        pool.storage(kind, 0, 1)
        memory.keep(pool)
    prompt = list(range(50 * 16))
    sequence = idle.allocate(prompt, None)
    idle.manager.commit(sequence)
    idle.manager.free(sequence)
    busy.allocate(list(range(121 * 16)), None)
    busy.allocate(list(range(5000, 5016)), None)
    assert idle.manager.stats().num_cached == 50
    assert idle in memory._kept


def test_a_pool_in_use_survives_when_another_has_no_room() -> None:
    kind = LayerKind(LayerShape(1, 16, 16), torch.float32, torch.device("cpu"))
    memory = PagedMemory(Budget(100 * 16 * 32 * 4, 16), keep_pools=True)
    used, other = pool_for(memory, "used"), pool_for(memory, "other")
    for pool in (used, other):
        pool.storage(kind, 0, 1)
        memory.keep(pool)
    used.allocate(list(range(60 * 16)), None)
    with pytest.raises(kvpager.OutOfBlocks):
        other.allocate(list(range(60 * 16)), None)
    assert used in memory._kept


def test_a_layer_behind_a_copy_never_writes_shared_blocks() -> None:
    cache = kvpager.PagedCache()
    key = torch.randn(1, 2, 5, 16)
    cache.update(key, key, 0)
    copied = copy.deepcopy(cache)
    with pytest.raises(kvpager.KVPagerError, match="copied or reordered"):
        cache.groups[0].extend(1, 0, 5)
    assert torch.equal(copied.layers[0].keys + 0, key)


# ---------------------------------------------------------------- models with ways of their own


def test_t5gemma_may_make_its_cache_across_anew() -> None:
    model, inputs = model_named("t5gemma"), tiny_models.prompts([9, 14])
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **options).sequences
    with kvpager.patch(model) as patch:
        output = model.generate(**inputs, **options)
        cache = cache_of(output)
        assert torch.equal(output.sequences, plain)
        for part in (cache.self_attention_cache, cache.cross_attention_cache):
            assert isinstance(part, kvpager.PagedCache)
            assert part.memory is patch.memory
        config = model.config.get_text_config(decoder=True)
        made = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        output = model.generate(**inputs, **options, **passing(made))
        assert torch.equal(output.sequences, plain)


@pytest.mark.parametrize("mode", ["model", "all models"])
@pytest.mark.parametrize("name", ["gemma3n", "nemotron_h"])
def test_layers_that_hold_nothing_keep_no_cache_from_being_paged(name: str, mode: str) -> None:
    model = model_named(name)
    with kvpager.patch(model if mode == "model" else None) as patch:
        model.generate(IDS, max_new_tokens=3, do_sample=False)
        assert patch.stats().in_place_reads > 0


@pytest.mark.parametrize("stateful", [False, True], ids=["plain", "stateful"])
def test_rows_are_merged_only_if_all_state_is_cached(stateful: bool) -> None:
    model, seen = model_named(), []
    model._is_stateful = stateful  # as RecurrentGemma, with its state in its modules until 5.22
    model.get_input_embeddings().register_forward_hook(lambda *call: seen.append(len(call[1][0])))
    with kvpager.patch(model, prefix_cache=True) as patch:
        for _ in range(2):
            model.generate(IDS, num_beams=3, max_new_tokens=2, do_sample=False)
        assert (patch.stats().prefix_hit_tokens > 0) == (not stateful)
    assert seen[0] == (3 if stateful else 1)


def test_a_paged_cache_refuses_to_be_offloaded() -> None:
    with pytest.raises(ValueError, match="offloading"):
        kvpager.PagedCache(offloading=True)


@pytest.mark.parametrize("mode", ["model", "all models"])
def test_a_cache_that_records_its_past_does_so_when_paged(mode: str) -> None:
    model = model_named("gemma3")
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    with kvpager.patch(model if mode == "model" else None):
        model.generate(IDS, **passing(cache), max_new_tokens=6, do_sample=False)
        assert isinstance(cache, kvpager.PagedCache)
        length = cache.get_seq_length()
        cache.crop(-4)
        assert cache.get_seq_length() == length - 4
