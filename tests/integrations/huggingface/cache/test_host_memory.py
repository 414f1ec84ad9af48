"""A batch that the device's memory has no room for goes on in host memory, with the same tokens."""

from __future__ import annotations

import copy
import gc
import re
import threading
from typing import Any

import pytest
import torch

from tests.support.cache_name import cache_of, passing

transformers = pytest.importorskip("transformers")

from transformers.cache_utils import DynamicCache  # noqa: E402

import kvpager  # noqa: E402
from kvpager.integrations.huggingface.cache.out_of_memory import out_of_memory  # noqa: E402
from kvpager.integrations.huggingface.cache.pools import PagedPool, pool_for  # noqa: E402
from kvpager.integrations.huggingface.patching.handle import Patch  # noqa: E402
from tests.support import tiny_models  # noqa: E402

BLOCK = 4
LENGTHS = [40, 7, 23, 31, 12, 40]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True},
    "beams": {"do_sample": False, "num_beams": 3},
    "returns": {"do_sample": True, "num_return_sequences": 2},
    "chunked": {"do_sample": False, "prefill_chunk_size": 16},
}
MODELS = ["llama", "mistral", "gemma3", "bloom", "deepseek_v3", "qwen3_next", "t5", "bart"]


def generate(model: Any, lengths: list[int], **options: Any) -> torch.Tensor:
    torch.manual_seed(1)
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, **options}
    found: torch.Tensor = model.generate(**tiny_models.prompts(lengths), **options)
    return found


def needed(model: Any, lengths: list[int], **options: Any) -> int:
    """The bytes that the blocks of such a call take at the most."""
    with kvpager.patch(model, block_size=BLOCK) as patch:
        generate(model, lengths, **options)
        return patch.stats().peak_held_bytes


def all_pools(patch: Patch) -> list[Any]:
    assert patch.memory.host is not None
    return [*patch.memory.pools(), *patch.memory.host.pools()]


def assert_everything_is_given_back(patch: Patch) -> None:
    gc.collect()
    for pool in all_pools(patch):
        pool.settle()
        pool.manager.check()
        assert pool.manager.num_held_blocks == 0


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "gathered"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_a_third_of_the_memory_gives_the_same_tokens(name: str, mode: str, in_place: bool) -> None:
    model, options = tiny_models.tiny_model(name), MODES[mode]
    if mode == "chunked" and model.config.is_encoder_decoder:
        pytest.skip("transformers prefills no encoder-decoder in chunks")
    plain, bound = generate(model, LENGTHS, **options), needed(model, LENGTHS, **options) // 3
    with kvpager.patch(
        model, block_size=BLOCK, memory=bound, host_memory="1GiB", in_place=in_place
    ) as patch:
        assert torch.equal(generate(model, LENGTHS, **options), plain)
        stats = patch.stats()
        assert 0 < stats.peak_held_bytes <= bound
        assert stats.peak_host_held_bytes > bound
        assert (stats.in_place_reads > 0) == (in_place and name not in ("bloom", "deepseek_v3"))
        assert_everything_is_given_back(patch)


def test_without_host_memory_the_error_names_what_to_set() -> None:
    model = tiny_models.tiny_model("llama")
    bound = needed(model, LENGTHS) // 3
    with (
        kvpager.patch(model, block_size=BLOCK, memory=bound),
        pytest.raises(
            kvpager.OutOfBlocks,
            match=r"^KV cache out of memory: \d+ more blocks? \(.*\) needed, .* allows \d+.*\. "
            r"Raise memory to .*iB or set host_memory= to offload\.$",
        ),
    ):
        generate(model, LENGTHS)


def test_too_little_host_memory_names_itself_and_leaves_nothing_behind() -> None:
    model = tiny_models.tiny_model("llama")
    bound = needed(model, LENGTHS) // 3
    with kvpager.patch(model, block_size=BLOCK, memory=bound, host_memory=bound) as patch:
        with pytest.raises(
            kvpager.OutOfBlocks, match=r"KV cache out of host memory.*Raise host_"
        ) as raised:
            generate(model, LENGTHS)
        assert raised.value.tier == "host"
        del raised
        assert_everything_is_given_back(patch)


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize(
    ("lengths", "options", "way"),
    [
        ([30, 12, 40], {}, r", raise memory, or use a smaller batch\.$"),
        ([12], {"num_beams": 3}, r", raise memory, or use a smaller batch\.$"),
        ([40], {}, r" or raise memory\.$"),
    ],
)
def test_the_host_memory_named_in_an_error_suffices(
    lengths: list[int], options: dict[str, Any], way: str
) -> None:
    model = tiny_models.tiny_model("llama")
    bound = needed(model, lengths, **options) // 4
    with (
        kvpager.patch(model, block_size=BLOCK, memory=bound, host_memory=bound),
        pytest.raises(kvpager.OutOfBlocks, match=way) as raised,
    ):
        generate(model, lengths, **options)
    asked = re.search(r"Raise host_memory to (.*?iB)", str(raised.value))
    assert asked is not None
    with kvpager.patch(model, block_size=BLOCK, memory=bound, host_memory=asked[1]):
        generate(model, lengths, **options)


def test_a_cache_that_outgrew_both_memories_keeps_what_it_held() -> None:
    model = tiny_models.tiny_model("llama")
    ids = tiny_models.prompts([60, 60, 60])["input_ids"]
    token_bytes = 2 * 2 * 2 * 16 * 4
    cache = kvpager.PagedCache(
        model.config, block_size=BLOCK, memory=60 * token_bytes, host_memory=100 * token_bytes
    )
    with torch.no_grad():
        model(ids[:, :40], **passing(cache))
        before = [torch.clone(layer.keys) for layer in cache.layers]
        with pytest.raises(kvpager.OutOfBlocks):
            model(ids[:, 40:], **passing(cache))
        assert cache.get_seq_length() == 40
        for layer, keys in zip(cache.layers, before, strict=True):
            assert torch.equal(torch.clone(layer.keys), keys)
        found = model(ids[:, 40:48], **passing(cache)).logits
        expected = model(ids[:, :48]).logits[:, 40:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8_e4m3"])
def test_eight_bits_move_with_their_scales(kv_cache_dtype: Any) -> None:
    model = tiny_models.tiny_model("llama")
    with kvpager.patch(model, block_size=BLOCK, kv_cache_dtype=kv_cache_dtype) as patch:
        expected = generate(model, LENGTHS)
        bound = patch.stats().peak_held_bytes // 3
    with kvpager.patch(
        model, block_size=BLOCK, kv_cache_dtype=kv_cache_dtype, memory=bound, host_memory="1GiB"
    ) as patch:
        assert torch.equal(generate(model, LENGTHS), expected)
        assert patch.stats().swapped_out_blocks


def test_what_was_shared_is_shared_in_host_memory() -> None:
    model = tiny_models.tiny_model("llama")
    options = {"num_return_sequences": 4, "do_sample": True}
    plain, bytes_needed = generate(model, [400], **options), needed(model, [400], **options)
    # The prompt fits alone; the four that share it have to move while they decode.
    with kvpager.patch(
        model, block_size=BLOCK, memory=bytes_needed * 9 // 10, host_memory="1GiB"
    ) as patch:
        assert torch.equal(generate(model, [400], **options), plain)
        stats = patch.stats()
    assert stats.swapped_out_blocks >= 100
    assert stats.peak_host_held_bytes <= bytes_needed


def test_rows_return_when_the_device_has_room_again() -> None:
    model = tiny_models.tiny_model("llama")
    ids = tiny_models.prompts([40, 40, 40], seed=3)["input_ids"]
    with (
        kvpager.patch(model, block_size=BLOCK, memory="64KiB", host_memory="1GiB") as patch,
        torch.no_grad(),
    ):
        held = cache_of(model(ids, use_cache=True))
        cache = DynamicCache(config=model.config)
        plain = model(torch.cat([ids, ids], dim=1)).logits
        model(ids, **passing(cache))
        assert patch.stats().host_held_bytes > 0
        held.reset()
        for column in range(ids.shape[1]):
            found = model(ids[:, column : column + 1], **passing(cache)).logits
            expected = plain[:, ids.shape[1] + column : ids.shape[1] + column + 1]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        stats = patch.stats()
        assert stats.swapped_in_blocks > 0
        del held, cache
        assert_everything_is_given_back(patch)


def test_rows_that_share_return_together_and_share_again() -> None:
    model = tiny_models.tiny_model("llama")
    ids = tiny_models.prompts([80], seed=3)["input_ids"]
    with (
        kvpager.patch(model, block_size=BLOCK, memory="64KiB", host_memory="1GiB") as patch,
        torch.no_grad(),
    ):
        held = cache_of(model(ids[:, :76], use_cache=True))
        cache = DynamicCache(config=model.config)
        model(ids, **passing(cache))
        cache.batch_repeat_interleave(4)
        held.reset()
        more = tiny_models.prompts([1] * 4, seed=5)["input_ids"]
        found = model(more, **passing(cache)).logits
        expected = model(torch.cat([ids.expand(4, -1), more], dim=1)).logits[:, -1:]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        stats = patch.stats()
        # 20 blocks of the prompt, moved once each way.
        assert (stats.swapped_in_blocks, stats.host_held_bytes) == (20, 0)
        assert stats.num_shared_blocks == 20


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("room", range(32, 68, 4))
def test_a_step_without_room_leaves_every_layer_unchanged(name: str, room: int) -> None:
    model = tiny_models.tiny_model(name)
    ids = tiny_models.prompts([64, 64, 64])["input_ids"]
    cache = kvpager.PagedCache(model.config, block_size=BLOCK, memory=f"{room}KiB")
    with torch.no_grad():
        try:
            model(ids[:, :18], **passing(cache))
            start = 18  # two more fit in the blocks that are there
        except kvpager.OutOfBlocks:
            start = 0
        with pytest.raises(kvpager.OutOfBlocks):
            model(ids[:, start:], **passing(cache))
        assert [layer.get_seq_length() for layer in cache.layers] == [start] * len(cache.layers)
        if not start:
            assert all(layer.keys is None for layer in cache.layers)
            return
        found = model(ids[:, start : start + 2], **passing(cache)).logits
        expected = model(ids[:, : start + 2]).logits[:, start:]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_patch", [False, True])
def test_layers_unknown_beforehand_find_room_on_the_host(with_patch: bool) -> None:
    model = tiny_models.tiny_model("llama")
    ids = tiny_models.prompts([40, 40, 40])["input_ids"]
    bounds: dict[str, Any] = {"block_size": BLOCK, "memory": "24KiB", "host_memory": "1GiB"}
    with torch.no_grad():
        expected = model(ids).logits
        if with_patch:
            with kvpager.patch(model, **bounds):
                found = [model(ids[:, :20], **passing(cache := DynamicCache())).logits]
        else:
            cache = kvpager.PagedCache(**bounds)
            found = [model(ids[:, :20], **passing(cache)).logits]
        found.append(model(ids[:, 20:], **passing(cache)).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("memory", [None, "80KiB", "120KiB", "1GiB"])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_device_smaller_than_the_bound_can_be_full(
    memory: str | None, prefix_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.tiny_model("llama")
    plain = [generate(model, LENGTHS), generate(model, [60])]
    resize = PagedPool._resize

    def on_a_small_device(pool: PagedPool, num_blocks: int, need: int) -> None:
        if pool.budget.tier == "device" and num_blocks > 40:
            raise out_of_memory(pool, need, pool._segments[0].kind)
        resize(pool, num_blocks, need)

    monkeypatch.setattr(PagedPool, "_resize", on_a_small_device)
    with kvpager.patch(
        model, block_size=BLOCK, memory=memory, host_memory="1GiB", prefix_cache=prefix_cache
    ) as patch:
        for _ in range(3):
            assert torch.equal(generate(model, LENGTHS), plain[0])
        assert patch.stats().peak_host_held_bytes > 0
    with kvpager.patch(model, block_size=BLOCK, memory=memory, prefix_cache=True) as patch:
        for _ in range(4):  # what is cached goes, where there is no room for more
            assert torch.equal(generate(model, [60]), plain[1])
            generate(model, [50])


def test_held_keys_stay_unchanged_while_rows_move() -> None:
    model = tiny_models.tiny_model("llama")
    ids = tiny_models.prompts([60, 60, 60], seed=2)["input_ids"]
    other = tiny_models.prompts([60, 60, 60], seed=3)["input_ids"]
    with (
        kvpager.patch(model, block_size=BLOCK, memory="64KiB", host_memory="1GiB") as patch,
        torch.no_grad(),
    ):
        cache, second = DynamicCache(config=model.config), DynamicCache(config=model.config)
        model(ids[:, :36], **passing(cache))
        held = cache.layers[1].keys
        before = torch.clone(cache.layers[1].keys)
        moved = patch.stats().swapped_out_blocks
        model(ids[:, 36:], **passing(cache))
        assert patch.stats().swapped_out_blocks > moved
        model(other, **passing(second))  # takes the blocks that were left
        assert torch.equal(torch.clone(held), before)


def test_rows_in_host_memory_teach_the_prompt_cache_nothing() -> None:
    model = tiny_models.tiny_model("llama")
    bound = needed(model, LENGTHS) // 3
    with kvpager.patch(
        model, block_size=BLOCK, memory=bound, host_memory="1GiB", prefix_cache=True
    ) as patch:
        generate(model, LENGTHS)
        gc.collect()
        assert patch.memory.host is not None
        for pool in patch.memory.host.pools():
            pool.settle()
            assert pool.manager.stats().num_cached == 0
        before = patch.stats().prefix_hit_tokens
        generate(model, [LENGTHS[-1]])
        assert patch.stats().prefix_hit_tokens == before


def test_many_rows_move_at_once() -> None:
    model = tiny_models.tiny_model("llama")
    ids = torch.randint(3, tiny_models.VOCAB, (300, 9))
    with (
        kvpager.patch(model, block_size=BLOCK, memory="64KiB", host_memory="1GiB") as patch,
        torch.no_grad(),
    ):
        held = DynamicCache(config=model.config)
        tried = 0
        (pool,) = [pool_for(patch.memory, "of nobody")]
        append = type(pool).append

        def counted(*arguments: Any) -> Any:
            nonlocal tried
            tried += 1
            return append(*arguments)

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(PagedPool, "append", counted)
            found = model(ids, **passing(held)).logits
    assert tried < 20
    torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_batch_in_both_tiers_supports_every_cache_operation() -> None:
    model = tiny_models.tiny_model("gemma2")
    inputs = tiny_models.prompts([30, 30, 30, 30])["input_ids"]
    more = tiny_models.prompts([5, 5], seed=9)["input_ids"]

    def history() -> list[torch.Tensor]:
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        said = [model(inputs, **passing(cache)).logits]
        cache.crop(-3)
        copied = copy.deepcopy(cache)
        for each, rows in ((cache, [3, 0]), (copied, [1, 1])):
            each.batch_select_indices(torch.tensor(rows))
            said.append(model(more, **passing(each)).logits)
            each.batch_repeat_interleave(2)
            said.append(model(more.repeat_interleave(2, 0), **passing(each)).logits)
        return said

    with torch.no_grad():
        try:
            expected = history()
        except RuntimeError:
            pytest.skip("this transformers makes masks that do not fit after a crop")
        with kvpager.patch(model, block_size=BLOCK, memory="40KiB", host_memory="1MiB") as patch:
            found = history()
            assert patch.stats().peak_host_held_bytes > 0
            assert_everything_is_given_back(patch)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_prompts_that_fit_are_kept_and_larger_batches_still_finish() -> None:
    model = tiny_models.tiny_model("llama")
    plain, large = generate(model, [40]), generate(model, LENGTHS)
    bound = needed(model, LENGTHS) // 3
    with kvpager.patch(
        model, block_size=BLOCK, memory=bound, host_memory="1GiB", prefix_cache=True
    ) as patch:
        for _ in range(2):
            assert torch.equal(generate(model, [40]), plain)
        assert patch.stats().prefix_hit_tokens > 0
        for _ in range(2):
            assert torch.equal(generate(model, LENGTHS), large)
        assert torch.equal(generate(model, [40]), plain)
        assert_everything_is_given_back(patch)


def test_threads_that_share_a_full_pool_get_their_own_tokens() -> None:
    model = tiny_models.tiny_model("llama")
    batches = [[40, 9, 17], [22, 31], [8, 8, 8, 8], [40]]
    plain = [generate(model, lengths) for lengths in batches]
    found: list[Any] = [None] * len(batches)

    def serve(number: int) -> None:
        found[number] = model.generate(
            **tiny_models.prompts(batches[number]),
            max_new_tokens=24,
            min_new_tokens=24,
            do_sample=False,
        )

    with kvpager.patch(model, block_size=BLOCK, memory="48KiB", host_memory="1GiB") as patch:
        threads = [threading.Thread(target=serve, args=(n,)) for n in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert patch.stats().peak_host_held_bytes > 0
        assert_everything_is_given_back(patch)
    for mine, theirs in zip(found, plain, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kv_cache_dtype", [None, "int8"])
def test_staged_blocks_are_read_like_blocks_in_place(kv_cache_dtype: Any) -> None:
    model = tiny_models.tiny_model("llama")
    cache = kvpager.PagedCache(model.config, block_size=BLOCK, kv_cache_dtype=kv_cache_dtype)
    with torch.no_grad():
        # Whole blocks, since slots that were never written have any content.
        model(tiny_models.prompts([12, 12])["input_ids"], **passing(cache))
    cache.batch_select_indices(torch.tensor([1, 0]))
    (part,) = cache.groups[0].parts(1, 12)
    caches, tables = part.staged(torch.device("cpu"))
    assert tables.seq_lens.tolist() == [12, 12]
    for mine, theirs in zip(caches.tensors, part.caches().tensors, strict=True):
        assert torch.equal(
            mine[tables.block_tables.long()], theirs[part.tables.block_tables.long()]
        )


@pytest.mark.parametrize("host_memory", [0, -1, "much", 1.5])
def test_host_memory_that_makes_no_sense_is_refused(host_memory: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="host_memory"):
        kvpager.patch(tiny_models.tiny_model("llama"), host_memory=host_memory)


def test_the_report_says_what_is_in_host_memory() -> None:
    model = tiny_models.tiny_model("llama")
    bound = needed(model, LENGTHS) // 3
    with kvpager.patch(model, block_size=BLOCK, memory=bound, host_memory="1GiB") as patch:
        generate(model, LENGTHS)
        stats = patch.stats()
        assert f"{stats.swapped_out_blocks} blocks swapped out, 0 in" in patch.report()
    with kvpager.patch(model) as patch:
        generate(model, LENGTHS)
        assert "host memory" not in patch.report()
