"""What a patch says of itself."""

from __future__ import annotations

import gc
import logging
import threading
from typing import Any

import pytest
import torch

from tests.support.cache_name import cache_of

transformers = pytest.importorskip("transformers")

import kvpager  # noqa: E402
from kvpager._text import change  # noqa: E402
from kvpager.integrations.huggingface.cache.budget import Budget  # noqa: E402
from kvpager.integrations.huggingface.cache.memory import PagedMemory  # noqa: E402
from kvpager.integrations.huggingface.releases import CACHE_NAMES  # noqa: E402
from tests.support import tiny_models  # noqa: E402


def generate(model: Any, lengths: list[int], **options: Any) -> Any:
    return model.generate(
        **tiny_models.prompts(lengths), max_new_tokens=4, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, **options,
    )  # fmt: skip


def held_by_transformers(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_dense_bytes_are_what_transformers_own_cache_holds(name: str) -> None:
    model = tiny_models.tiny_model(name)
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 1}
    own = cache_of(generate(model, [40, 9], **options))
    with kvpager.patch(model) as patch:
        generate(model, [40, 9], **options)
        assert patch.stats().peak_dense_bytes == held_by_transformers(own)


def test_the_peak_is_over_all_caches_alive_and_stays() -> None:
    model = tiny_models.tiny_model("llama")
    with kvpager.patch(model) as patch:
        first = generate(model, [40])
        alone = patch.stats().peak_dense_bytes
        second = generate(model, [40])
        assert patch.stats().peak_dense_bytes == 2 * alone
        del first, second
        generate(model, [40])
        assert patch.stats().peak_dense_bytes == 2 * alone


def test_a_cache_may_begin_while_another_thread_counts() -> None:
    memory = PagedMemory(Budget(None, 16))

    class Group:
        """Has another thread begin a cache while it is looked at."""

        @property
        def dense_bytes(self) -> int:
            beginning.start()
            beginning.join(0.5)  # it has to wait until all are counted
            return 7

    groups = [Group(), Group()]
    memory.note_group(groups[0])
    beginning = threading.Thread(target=lambda: memory.note_group(groups[1]))
    memory.note_dense()
    beginning.join()
    assert memory.counters.peak_dense_bytes == 7


def test_the_report_names_layers_blocks_reads_and_what_was_saved() -> None:
    model = tiny_models.tiny_model("gemma3")
    with kvpager.patch(model, kv_cache_dtype="int8") as patch:
        assert patch.report().startswith("nothing was paged yet")
        kept = generate(model, [40, 9], num_beams=3)
        report, stats = patch.report(), patch.stats()
        del kept
    assert "paged: 2 layers, a window of 8 tokens, 2 kv heads of 16, float32 kept as int8" in report
    assert "paged: 1 layer, full attention, 2 kv heads of 16" in report
    assert f"{stats.num_held_blocks} held ({stats.num_shared_blocks} shared)" in report
    assert f"{stats.copied_blocks} copied" in report
    saved = 1 - stats.peak_held_bytes / stats.peak_dense_bytes
    assert f"({saved:.0%} less)" in report
    assert "prompts:" not in report


def test_the_report_says_how_much_of_the_prompts_was_cached() -> None:
    model = tiny_models.tiny_model("llama")
    with kvpager.patch(model, prefix_cache=True) as patch:
        for _ in range(2):
            generate(model, [64])
        assert "prompts: 63 of 128 tokens were cached (49%)" in patch.report()


def test_layers_that_cannot_be_paged_are_named_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_models.tiny_model("qwen3_next")
    with caplog.at_level(logging.INFO, "kvpager"), kvpager.patch(model) as patch:
        for _ in range(2):
            generate(model, [9])
        assert "not paged, transformers' own: 1 layer, LinearAttentionLayer" in patch.report()
    said = [record.message for record in caplog.records if "LinearAttention" in record.message]
    assert said == ["kvpager: not paged, transformers' own: LinearAttentionLayer"]


def test_what_keeps_layers_out_of_blocks_is_said() -> None:
    model = tiny_models.tiny_model("llama")
    with kvpager.patch(model) as patch:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            generate(model, [9])
        inputs = tiny_models.prompts([9])
        model(**inputs, labels=inputs["input_ids"])
        report = patch.report()
    assert "transformers' own: 2 layers, keys and values of two dtypes, as under autocast" in report
    assert "transformers' own: 2 layers, keys and values that need gradients" in report


def test_taking_more_is_not_called_saving() -> None:
    model = tiny_models.tiny_model("llama")
    with kvpager.patch(model, block_size=64) as patch:
        generate(model, [9, 9])
        assert "% more)" in patch.report()
    with kvpager.patch(model, memory="1MiB", host_memory="1MiB") as patch:
        generate(model, [9, 9])
        assert "on the device)" in patch.report()


def test_calls_whose_prompts_are_not_kept_are_counted() -> None:
    model = tiny_models.tiny_model("llama")
    with kvpager.patch(model, prefix_cache=True) as patch:
        generate(model, [40])
        assert "not kept" not in patch.report()
        generate(model, [40], prefill_chunk_size=16)
        assert "prompts not kept: 1 call with prefill_chunk_size=16" in patch.report()
        assert patch.stats().prefix_unserved_calls == 1


@pytest.mark.parametrize("name", ["mistral", "t5"])
def test_pools_that_serve_no_prompts_go_with_their_caches(name: str) -> None:
    model = tiny_models.tiny_model(name)
    with kvpager.patch(model, prefix_cache=True) as patch:
        generate(model, [40])
        gc.collect()
        assert patch.stats().reserved_bytes == 0


def test_the_report_counts_sessions_of_continuous_batching() -> None:
    model = tiny_models.tiny_model("llama")
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False)
    with kvpager.patch(model, memory="1MiB") as patch:
        model.generate_batch([[5, 6, 7], [8, 9]], config)
        assert patch.report().startswith(
            "continuous batching: 1 session with pools of their own, 2 requests, 8 tokens generated"
        )
        model.generate_batch([[5, 6, 7]], config)
        stats = patch.stats()
    assert (stats.num_sessions, stats.session_requests, stats.session_tokens) == (2, 3, 12)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"cache_implementation": "static"},
            "not paged: 1 call with cache_implementation='static'",
        ),
        ({"use_cache": False}, "not paged: 1 call with use_cache=False"),
        ({"prompt_lookup_num_tokens": 2}, "prompts not kept: 1 call with prompt lookup"),
    ],
)
def test_the_report_names_calls_that_were_not_served(options: dict[str, Any], line: str) -> None:
    model = tiny_models.tiny_model("llama")
    with kvpager.patch(model, prefix_cache=True) as patch:
        generate(model, [20])
        assert "not paged" not in patch.report()
        assert "not kept" not in patch.report()
        generate(model, [20], **options)
        assert line in patch.report()


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions", "inputs_embeds"])
def test_the_report_names_arguments_that_keep_rows_apart(name: str) -> None:
    model = tiny_models.tiny_model("llama")
    inputs = dict(tiny_models.prompts([20]))
    if name == "inputs_embeds":
        inputs[name] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    else:
        inputs |= {name: True, "return_dict_in_generate": True}
    with kvpager.patch(model, prefix_cache=True) as patch:
        model.generate(**inputs, max_new_tokens=2, num_beams=2)
        report = patch.report()
        assert patch.stats().prefix_unserved_calls == 1
    assert f"prompts not kept: 1 call with {name}" in report
    assert f"equal rows not merged: 1 call with {name}" in report


@pytest.mark.parametrize(
    ("architecture", "options", "why"),
    [
        ("mistral", {}, "a model with sliding windows"),
        ("t5", {}, "an encoder-decoder model"),
        ("llama", {"position_ids": torch.arange(3, 23)[None]}, "position_ids that do not count"),
        ("llama", {"attention_mask": torch.ones(1, 20).index_fill(1, torch.tensor(9), 0)},
         "an attention_mask that hides more"),
    ],
)  # fmt: skip
def test_the_report_says_why_prompts_are_not_kept(
    architecture: str, options: dict[str, Any], why: str
) -> None:
    model = tiny_models.tiny_model(architecture)
    inputs = dict(tiny_models.prompts([20])) | options
    with kvpager.patch(model, prefix_cache=True) as patch:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert f"prompts not kept: 1 call with {why}" in patch.report()
        assert "merged" not in patch.report()


def test_the_report_names_a_cache_that_the_caller_brought() -> None:
    model = tiny_models.tiny_model("llama")
    own = transformers.StaticCache(config=model.config, max_cache_len=64)
    with kvpager.patch(model) as patch:
        generate(model, [20], **{CACHE_NAMES[0]: own})
        assert "not paged: 1 call with StaticCache" in patch.report()


class OfTheCaller(transformers.StaticCache):
    pass


def test_the_report_ignores_the_cache_of_an_engine_probe() -> None:
    model = tiny_models.tiny_model("llama")
    own = OfTheCaller(config=model.config, max_cache_len=64)
    with kvpager.patch() as patch:
        with kvpager.Engine(model, memory="8MiB"):
            pass
        assert "not paged" not in patch.report()
        generate(model, [20], **{CACHE_NAMES[0]: own})
        report = patch.report()
    assert "not paged: 1 call with OfTheCaller, a cache passed by the caller" in report


def test_the_report_names_bare_forward_passes_where_prompts_are_kept() -> None:
    model = tiny_models.tiny_model("llama")
    with kvpager.patch(model, prefix_cache=True) as patch, torch.no_grad():
        for _ in range(2):
            model(torch.tensor([[5, 6, 7]]))
        assert "prompts not kept: 2 calls with a cache made outside generate()" in patch.report()


@pytest.mark.parametrize(
    ("now", "before", "words"),
    [
        (100, 200, "50% less"), (214, 200, "7% more"), (200, 200, "the same"),
        (200, 201, "the same"), (0, 0, "the same"), (0, 7, "100% less"), (7, 0, "700% more"),
    ],
)  # fmt: skip
def test_changes_have_no_sign_and_no_zero(now: int, before: int, words: str) -> None:
    assert change(now, before) == words


def test_one_of_a_kind_is_singular_in_every_repr() -> None:
    model = tiny_models.tiny_model("llama", num_hidden_layers=1)
    with kvpager.patch(model, block_size=1) as patch, torch.no_grad():
        cache = cache_of(model(torch.tensor([[5]]), use_cache=True))
        assert repr(cache).startswith("<PagedCache: 1 row of 1 token, 1 of 1 layer paged")
        assert "blocks of 1 token: " in patch.report()
    assert repr(kvpager.BlockManager(1)).endswith("free of 1 block of 16>")
    shape = kvpager.LayerShape(1, 16, 16)
    storage = kvpager.BlockStorage(1, 16, [shape], dtype=torch.float32)
    assert repr(storage).startswith("<BlockStorage: 1 block of 2048 bytes, 1 layer of ")
    with kvpager.Engine(model, memory="1MiB") as engine:
        stream = engine.submit([5], max_new_tokens=1)
        stream.result(60)
        assert repr(stream).endswith("1 -> 1 token>")
