"""What the settings of transformers' continuous batching mean on a patched model, and `serve`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import tokenizers  # noqa: E402
from transformers import GenerationConfig, PreTrainedModel  # noqa: E402
from transformers.generation.configuration_utils import (  # noqa: E402
    CompileConfig,
    ContinuousBatchingConfig,
)
from transformers.generation.continuous_batching.requests import RequestStatus  # noqa: E402

import kvpager  # noqa: E402
from kvpager.errors import KVPagerError  # noqa: E402
from kvpager.integrations.huggingface.continuous_batching import options  # noqa: E402
from kvpager.integrations.huggingface.continuous_batching.manager import PagedBatchingManager  # noqa: E402
from tests.support import tiny_models  # noqa: E402

NEW = 6
PROMPT = [5, 9, 23, 7, 41, 12, 30, 8, 19]
HAS_PAGES = hasattr(ContinuousBatchingConfig(), "page_size")


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_models.tiny_model("llama")


@pytest.fixture(autouse=True)
def _warnings_are_new() -> Iterator[None]:
    options.warn_once.cache_clear()
    yield
    options.warn_once.cache_clear()


def made(llama: PreTrainedModel, patched: dict[str, Any] | None = None, **batching: Any) -> Any:
    """A manager of this configuration."""
    generation = GenerationConfig(max_new_tokens=NEW, do_sample=batching.pop("do_sample", False))
    with kvpager.patch(llama, **{"memory": "1MiB", **(patched or {})}):
        return llama.init_continuous_batching(generation, ContinuousBatchingConfig(**batching))


def pool(manager: PagedBatchingManager) -> Any:
    """The pool's counts."""
    manager.warmup()
    try:
        return manager.batch_processor.stats().pool
    finally:
        manager.destroy()


# ---------------------------------------------------------------- the pool


def test_the_patch_says_how_large_blocks_and_pool_are(llama: PreTrainedModel) -> None:
    blocks = pool(made(llama, {"memory": "64KiB", "block_size": 8}))
    per_token = pool(made(llama, {"memory": "64KiB", "block_size": 1})).num_blocks
    assert (blocks.block_size, blocks.num_blocks) == (8, per_token // 8)


def test_the_config_goes_before_the_patch(llama: PreTrainedModel) -> None:
    name = "page_size" if HAS_PAGES else "block_size"
    blocks = pool(made(llama, {"block_size": 8}, num_blocks=3, **{name: 32}))
    assert (blocks.block_size, blocks.num_blocks) == (32, 3)


def test_blocks_are_as_many_tokens_as_those_of_transformers(llama: PreTrainedModel) -> None:
    assert pool(made(llama, num_blocks=2)).num_blocks == 2 * 256 // 16


def test_a_share_of_the_memory(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "free_bytes", lambda device: 2 << 20)
    per_mebibyte = pool(made(llama)).num_blocks
    assert pool(made(llama, max_memory_percent=0.5)).num_blocks == per_mebibyte
    with pytest.raises(ValueError, match="expected more than 0, at most 1"):
        made(llama, max_memory_percent=90)


def test_what_generate_batch_announces_bounds_the_pool(llama: PreTrainedModel) -> None:
    with kvpager.patch(llama):
        llama.generate_batch([PROMPT] * 3, persistent_manager=True, max_new_tokens=NEW)
        kept = llama._cached_continuous_batching_manager
        assert pool(kept).num_blocks == 4  # a block each, and one to spare


def test_host_memory(llama: PreTrainedModel) -> None:
    assert pool(made(llama)).num_host_blocks == 0
    of_patch = pool(made(llama, {"host_memory": "1MiB"})).num_host_blocks
    assert of_patch == pool(made(llama)).num_blocks
    assert pool(made(llama, cpu_offload_space=2 / 1024)).num_host_blocks == 2 * of_patch


def test_a_dtype_the_patch_was_not_made_for_is_refused(llama: PreTrainedModel) -> None:
    assert made(llama, {"dtype": torch.float32})._info.dtype == torch.float32
    with (
        kvpager.patch(dtype=torch.bfloat16),  # every model, of any dtype
        pytest.raises(KVPagerError, match="of the patch: "),
    ):
        llama.init_continuous_batching(GenerationConfig())


# ---------------------------------------------------------------- the other settings


def options_of(manager: PagedBatchingManager) -> dict[str, Any]:
    return manager._options


def test_settings_with_a_meaning_are_mapped(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    found = options_of(made(llama, max_batch_tokens=99, max_requests_per_batch=7))
    assert (found["max_batch_tokens"], found["max_num_seqs"]) == (99, 7)
    assert options_of(made(llama))["prefix_cache"] is True
    assert options_of(made(llama, allow_block_sharing=False))["prefix_cache"] is False
    assert options_of(made(llama, max_queue_size=5))["max_queue_size"] == 5
    assert options_of(made(llama, default_compile_level=1))["compile"] is True
    assert options_of(made(llama))["compile"] is False
    assert options_of(made(llama, {"kv_cache_dtype": "int8"}))["kv_cache_dtype"] == "int8"
    made(llama, use_async_batching=False, use_cuda_graph=False)  # just as it is done
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_async_batching", True),
        ("use_cuda_graph", True),
        ("use_cuda_graph", (False, True)),
        ("q_padding_interval_size", 64),
        ("kv_padding_interval_size", 64),
        ("max_blocks_per_request", 8),
        ("safety_margin", 0.3),
        ("auto_switch_to_flash", False),
        ("cpu_group_timeout", 1.0),
        ("scheduler_type", "prefill_first"),
        ("decode_compile_config", CompileConfig()),
    ],
)
def test_settings_without_a_meaning_are_named_once(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture, name: str, value: object
) -> None:
    if not hasattr(ContinuousBatchingConfig(), name):
        pytest.skip(f"this transformers has no {name}")
    for _ in range(2):
        made(llama, **{name: value})
    ours = [record.getMessage() for record in caplog.records if record.name == "kvpager"]
    assert len(ours) == 1
    assert name in ours[0]


def test_settings_of_later_versions_are_named(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    config = ContinuousBatchingConfig()
    config.number_of_elves = 3
    with kvpager.patch(llama, memory="1MiB"):
        llama.init_continuous_batching(GenerationConfig(), config)
    assert "number_of_elves=3" in caplog.text


def test_keywords_that_generate_batch_passes_over_are_named(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with kvpager.patch(llama, memory="1MiB"):
        llama.generate_batch([PROMPT], max_new_tokens=NEW, temperature=0.5)
    assert "temperature of generate_batch" in caplog.text


def test_a_seed_makes_samples_the_same(llama: PreTrainedModel) -> None:
    def sampled(seed: int) -> list[list[int]]:
        config = ContinuousBatchingConfig(seed=seed, allow_block_sharing=seed % 2 == 0)
        generation = GenerationConfig(max_new_tokens=12, do_sample=True)
        with kvpager.patch(llama, memory="1MiB"):
            outputs = llama.generate_batch([PROMPT, PROMPT], generation, config)
        return [output.generated_tokens for output in outputs.values()]

    first, second = sampled(4), sampled(4)
    assert first == second
    assert first[0] != first[1]
    assert sampled(6) != first


def test_requests_have_logits_processors_of_their_own_if_enabled(
    llama: PreTrainedModel,
) -> None:
    greedy = torch.tensor([PROMPT])
    expected = llama.generate(greedy, do_sample=False, max_new_tokens=NEW)[
        0, len(PROMPT) :
    ].tolist()
    for per_request in (True, False):
        manager = made(llama, do_sample=True, per_request_processors=per_request)
        manager.start()
        manager.add_request(PROMPT, top_k=1, min_tokens_to_keep=1)
        manager.add_request(PROMPT, number_of_elves=3)
        first, second = manager.get_result("req_0"), manager.get_result("req_1")
        assert second.status == RequestStatus.FAILED
        if per_request:
            assert first.generated_tokens == expected
            assert "number_of_elves" in second.error
        else:
            assert "per_request_processors=True" in first.error
        manager.destroy()


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_text_ends_at_the_last_position_of_the_model(is_asked: bool) -> None:
    model = tiny_models.tiny_model("llama", max_position_embeddings=32)
    config = GenerationConfig(max_new_tokens=100 if is_asked else None)
    with kvpager.patch(model, memory="1MiB"):
        (output,) = model.generate_batch([PROMPT], config).values()
    assert len(output.prompt_ids + output.generated_tokens) == 32
    assert output.status == RequestStatus.FINISHED


def test_without_any_limit_a_text_ends_where_the_pool_does() -> None:
    model = tiny_models.tiny_model("llama")
    config = GenerationConfig(max_new_tokens=None)
    small = ContinuousBatchingConfig(num_blocks=1)
    with kvpager.patch(model, block_size=64):
        (output,) = model.generate_batch([PROMPT], config, small).values()
    longest = min(256, model.config.max_position_embeddings)
    assert longest <= len(output.prompt_ids + output.generated_tokens) <= longest + 1


def test_namespaces_do_not_share_prompts(llama: PreTrainedModel) -> None:
    prompt = PROMPT * 5
    config = GenerationConfig(max_new_tokens=NEW)
    with (
        kvpager.patch(llama, memory="1MiB", prefix_cache=True, namespace="a") as paging,
        llama.continuous_batching_context_manager(config) as manager,
    ):

        def reused() -> int:
            manager.get_result(manager.add_request(prompt))
            total: int = manager.batch_processor.stats().scheduler.total_reused_tokens
            return total

        assert reused() == 0
        with paging.namespace("b"):
            assert reused() == 0
        assert reused() > 0


# ---------------------------------------------------------------- transformers serve


@pytest.fixture
def serving(llama: PreTrainedModel) -> Iterator[tuple[Any, Any, Any]]:
    """Yield the handler of `transformers serve`, its model and its tokenizer."""
    utils = pytest.importorskip("transformers.cli.serving.utils")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{n}": n for n in range(128)}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    with kvpager.patch(llama, memory="1MiB"):
        server = utils.CBGenerateManager(ContinuousBatchingConfig())
        yield server, llama, tokenizer
        server.stop()


def test_the_calls_of_transformers_serve_are_answered(serving: tuple[Any, Any, Any]) -> None:
    server, model, tokenizer = serving
    config = GenerationConfig(max_new_tokens=12, do_sample=False)
    prompts = [tokenizer(text)["input_ids"] for text in ("w5 w9 w23 w7", "w41 w12 w30")]
    expected = [
        model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0, len(ids) :]
        for ids in prompts
    ]

    async def whole(ids: list[int], name: str) -> list[int]:
        inputs = {"input_ids": ids}
        _, length, tokens = await server.generate_non_streaming(
            model, tokenizer, inputs, config, name
        )
        assert length == len(ids)
        return list(tokens)

    async def streamed(ids: list[int], name: str) -> str:
        inputs = {"input_ids": ids}
        queue, _ = server.generate_streaming(model, tokenizer, inputs, config, name)
        pieces = []
        while (piece := await asyncio.wait_for(queue.get(), 60)) is not None:
            pieces.append(piece)
        return "".join(pieces)

    async def both() -> list[Any]:
        return list(await asyncio.gather(whole(prompts[0], "a"), streamed(prompts[1], "b")))

    server.init_cb(model, config)
    tokens, text = asyncio.run(both())
    assert tokens == expected[0].tolist()
    assert text == tokenizer.decode(expected[1], skip_special_tokens=True)
    assert server.is_alive()


def test_an_invalid_request_to_serve_raises_instead_of_waiting(
    serving: tuple[Any, Any, Any],
) -> None:
    server, model, tokenizer = serving
    config = GenerationConfig(max_new_tokens=12, do_sample=False)
    server.init_cb(model, config)
    call = server.generate_non_streaming(model, tokenizer, {"input_ids": []}, config, "a")
    with pytest.raises(RuntimeError, match="prompt: empty"):
        asyncio.run(asyncio.wait_for(call, 60))
