"""Whatever transformers can do with a cache, the tokens are the same with paging as without."""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any

import pytest
import torch

from tests.support.cache_name import cache_of

transformers = pytest.importorskip("transformers")

from transformers import PreTrainedModel, TextIteratorStreamer  # noqa: E402

import kvpager  # noqa: E402
from kvpager.testing import tiny_llama_path  # noqa: E402
from tests.support import tiny_models  # noqa: E402

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "two beams, both returned": {"num_beams": 2, "num_return_sequences": 2, "do_sample": False},
    "four beams, three returned": {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
    "sampling": {"do_sample": True},
    "three samples each": {"do_sample": True, "num_return_sequences": 3},
    "beam sampling": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
}
BATCHES = {"equal lengths": [13, 13], "left padding": [21, 6, 17]}
READS_IN_PLACE = ["llama", "qwen3", "mistral", "gemma3", "gpt2", "t5"]


@functools.cache
def model_named(name: str) -> PreTrainedModel:
    return tiny_models.tiny_model(name)


def generate(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(7)
    defaults = {"max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, **{**defaults, **options})


@functools.cache
def unpatched(name: str, batch: str, mode: str) -> Any:
    return generate(model_named(name), tiny_models.prompts(BATCHES[batch]), **MODES[mode])


def assert_same(paged: Any, plain: Any, own_error: float = 0.0) -> None:
    """Equal tokens; logits equal to 1e-5, or to a tenth of what float32 itself gets wrong."""
    assert torch.equal(paged.sequences, plain.sequences)
    for logits, expected in zip(paged.logits, plain.logits, strict=True):
        largest = max(1.0, float(expected.abs().max()))
        atol = max(1e-5 * largest, own_error / 10)
        torch.testing.assert_close(logits, expected, atol=atol, rtol=0)


@functools.cache
def own_error(name: str, batch: str, mode: str) -> float:
    """Return the difference between logits of transformers in float32 and in float64.

    T5 does not scale its scores, so that float32 is off by 4e-3 there, hundreds of times the
    difference between two orders of the same sums.
    """
    exact = generate(
        copy.deepcopy(model_named(name)).double(),
        tiny_models.prompts(BATCHES[batch]),
        **MODES[mode],
    )
    plain = unpatched(name, batch, mode)
    if not torch.equal(exact.sequences, plain.sequences):
        return 0.0
    pairs = zip(exact.logits, plain.logits, strict=True)
    return max(float((one.double() - other.double()).abs().max()) for one, other in pairs)


def tokens(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    options = {"do_sample": False, "max_new_tokens": 12, **options}
    result: torch.Tensor = model.generate(**inputs, **options)
    return result


# ---------------------------------------------------------------- every model, every mode


@pytest.mark.mostly_slow(quick=4)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", tiny_models.DECODERS)
def test_tokens_and_logits_are_those_of_unpatched_transformers(
    name: str, batch: str, mode: str
) -> None:
    plain = unpatched(name, batch, mode)
    with kvpager.patch(model_named(name)):
        paged = generate(model_named(name), tiny_models.prompts(BATCHES[batch]), **MODES[mode])
    assert isinstance(cache_of(paged), kvpager.PagedCache)
    assert_same(paged, plain)


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", tiny_models.ENCODER_DECODERS)
def test_encoder_decoder_tokens_and_logits_are_those_of_unpatched_transformers(
    name: str, mode: str
) -> None:
    plain = unpatched(name, "equal lengths", mode)
    inputs = tiny_models.prompts(BATCHES["equal lengths"])
    with kvpager.patch(model_named(name)):
        paged = generate(model_named(name), inputs, **MODES[mode])
    assert isinstance(cache_of(paged).self_attention_cache, kvpager.PagedCache)
    assert_same(paged, plain, own_error(name, "equal lengths", mode))


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("mode", ["greedy", "four beams, three returned", "sampling"])
@pytest.mark.parametrize("name", tiny_models.DECODERS + tiny_models.ENCODER_DECODERS)
def test_gather_mode_reads_nothing_in_place_with_equal_tokens(name: str, mode: str) -> None:
    batch = "left padding" if name in tiny_models.DECODERS else "equal lengths"
    plain = unpatched(name, batch, mode)
    with kvpager.patch(model_named(name), in_place=False) as patch:
        paged = generate(model_named(name), tiny_models.prompts(BATCHES[batch]), **MODES[mode])
        assert patch.stats().in_place_reads == 0
    assert_same(paged, plain)


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("block_size", [1, 2, 64])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_block_size_does_not_matter(name: str, block_size: int) -> None:
    mode = "four beams, three returned"
    with kvpager.patch(model_named(name), block_size=block_size):
        inputs = tiny_models.prompts(BATCHES["left padding"])
        paged = generate(model_named(name), inputs, **MODES[mode])
    assert_same(paged, unpatched(name, "left padding", mode))


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_oss"])
def test_text_far_beyond_the_window_is_the_same(name: str) -> None:
    inputs = tiny_models.prompts([40, 75])
    options = {"max_new_tokens": 60, "eos_token_id": None}
    plain = tokens(model_named(name), inputs, **options)
    with kvpager.patch(model_named(name)):
        assert torch.equal(tokens(model_named(name), inputs, **options), plain)


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "gathering"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_bundled_llama_writes_the_same_text(
    dtype: torch.dtype, in_place: bool, mode: str
) -> None:
    if dtype == torch.bfloat16 and in_place and mode != "greedy":
        pytest.skip("beams and samples choose by sums of rounded numbers, where no margin is real")
    model = _bundled(dtype)
    inputs = _bytes("def fibonacci(n):", "The `list` type is")
    options = {**MODES[mode], "max_new_tokens": 24}
    plain = generate(model, inputs, **options)
    with kvpager.patch(model, in_place=in_place):
        paged = generate(model, inputs, **options)
    if dtype == torch.float32 or not in_place:
        assert torch.equal(paged.sequences, plain.sequences)
    else:
        tiny_models.assert_equal_but_for_near_ties(paged, plain, inputs["input_ids"].shape[1])


@functools.cache
def _bundled(dtype: torch.dtype) -> PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_path(), dtype=dtype).eval()


def _bytes(*texts: str) -> dict[str, torch.Tensor]:
    rows = [[byte + 3 for byte in text.encode()] for text in texts]  # ByT5: 3 special tokens
    columns = max(map(len, rows))
    ids = torch.tensor([[0] * (columns - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (columns - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def test_sdpa_caps_no_scores_because_transformers_sdpa_does_not() -> None:
    try:
        model = tiny_models.tiny_model("gemma2", attention="sdpa")
    except ValueError:
        pytest.skip("this transformers does not let gemma2 use sdpa")
    inputs = tiny_models.prompts([21, 6])
    plain = generate(model, inputs, do_sample=False)
    with kvpager.patch(model):
        assert_same(generate(model, inputs, do_sample=False), plain)


# ---------------------------------------------------------------- reading in place


@pytest.mark.parametrize("name", READS_IN_PLACE)
def test_sdpa_models_never_gather(name: str) -> None:
    batch = "left padding" if name in tiny_models.DECODERS else "equal lengths"
    with kvpager.patch(model_named(name)) as patch:
        generate(model_named(name), tiny_models.prompts(BATCHES[batch]), do_sample=False)
        assert patch.stats().gathers == 0
        assert patch.stats().in_place_reads > 0


def test_beams_never_gather() -> None:
    model = model_named("llama")
    with kvpager.patch(model) as patch:
        generate(model, tiny_models.prompts([13, 13]), num_beams=4, do_sample=False)
        assert patch.stats().gathers == 0


# ---------------------------------------------------------------- ways of decoding


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_prompt_lookup_accepts_and_rejects_the_same_drafts(name: str) -> None:
    model = model_named(name)
    inputs = _repetitive_prompt()
    options = {"prompt_lookup_num_tokens": 4, "max_new_tokens": 24}
    plain = tokens(model, inputs, **options)
    with kvpager.patch(model):
        assert torch.equal(tokens(model, inputs, **options), plain)


def _repetitive_prompt() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 9, 33, 71, 12, 40] * 4])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("assistant_seed", [0, 1], ids=["always right", "mostly wrong"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_assisted_decoding_gives_the_same_tokens(name: str, assistant_seed: int) -> None:
    model = model_named(name)
    assistant = tiny_models.tiny_model(name, seed=assistant_seed)
    options = {"assistant_model": assistant, "max_new_tokens": 24}
    inputs = tiny_models.prompts([13])
    try:
        plain = tokens(model, inputs, **options)
    except RuntimeError as error:
        pytest.skip(f"this transformers cannot do it itself: {error}")
    for target in (model, None):
        with kvpager.patch(target):
            assert torch.equal(tokens(model, inputs, **options), plain)


def test_an_assistant_may_share_the_configuration_object() -> None:
    model = model_named("llama")
    assistant = type(model)(model.config).eval()
    options = {"assistant_model": assistant, "max_new_tokens": 24}
    inputs = tiny_models.prompts([13])
    plain = tokens(model, inputs, **options)
    with kvpager.patch(model):
        assert torch.equal(tokens(model, inputs, **options), plain)


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("mode", ["greedy", "four beams, three returned", "three samples each"])
@pytest.mark.parametrize("chunk", [1, 5, 16])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_chunked_prefill_gives_the_same_tokens(name: str, chunk: int, mode: str) -> None:
    model = model_named(name)
    inputs = tiny_models.prompts(BATCHES["left padding"])
    options = {**MODES[mode], "prefill_chunk_size": chunk}
    plain = generate(model, inputs, **options)
    for prefix_cache in (False, True):
        with kvpager.patch(model, prefix_cache=prefix_cache):
            assert_same(generate(model, inputs, **options), plain)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_chunked_prefill_without_a_mask_gives_the_same_tokens(name: str) -> None:
    model = model_named(name)
    inputs = {"input_ids": tiny_models.prompts([21])["input_ids"]}
    plain = tokens(model, inputs, prefill_chunk_size=5, pad_token_id=0)
    with kvpager.patch(model):
        assert torch.equal(tokens(model, inputs, prefill_chunk_size=5, pad_token_id=0), plain)


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_input_embeddings_instead_of_ids(name: str) -> None:
    model = model_named(name)
    inputs = tiny_models.prompts(BATCHES["left padding"])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    by_embeds = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    for options in ({}, {"num_beams": 3}):
        plain = tokens(model, by_embeds, **options)
        with kvpager.patch(model, prefix_cache=True):
            assert torch.equal(tokens(model, by_embeds, **options), plain)
            assert torch.equal(tokens(model, by_embeds, **options), plain)


class _Numbers:
    """A tokenizer that a streamer can use: text is token numbers."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(f"{int(token)} " for token in ids)


@pytest.mark.filterwarnings("default")
def test_a_streamer_reads_the_same_text_from_a_thread() -> None:
    model = model_named("llama")
    inputs = tiny_models.prompts([13])

    def streamed() -> str:
        streamer = TextIteratorStreamer(_Numbers(), skip_prompt=True, timeout=120)
        options = {**inputs, "streamer": streamer, "max_new_tokens": 12, "do_sample": False}
        thread = threading.Thread(target=model.generate, kwargs=options)
        thread.start()
        text = "".join(streamer)
        thread.join()
        return text

    plain = streamed()
    assert plain
    with kvpager.patch(model) as patch:
        assert streamed() == plain
        assert patch.stats().in_place_reads > 0


@pytest.mark.slow
@pytest.mark.parametrize("prefix_cache", [False, True], ids=["no prefixes", "prefix cache"])
def test_threads_may_generate_at_once_on_one_patch(prefix_cache: bool) -> None:
    model = model_named("llama")
    jobs = [
        (tiny_models.prompts([20 + 7 * number, 9], seed=number), {"num_beams": 1 + number % 3})
        for number in range(6)
    ]
    plain = [tokens(model, inputs, **options) for inputs, options in jobs]
    results: dict[int, Any] = {}

    def work(number: int) -> None:
        inputs, options = jobs[number]
        try:
            results[number] = [tokens(model, inputs, **options) for _ in range(3)]
        except Exception as error:
            results[number] = error

    with kvpager.patch(model, prefix_cache=prefix_cache) as patch:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for pool in patch.memory.pools():
            pool.manager.check()
    for number, expected in enumerate(plain):
        assert not isinstance(results[number], Exception), results[number]
        assert all(torch.equal(found, expected) for found in results[number])


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
def test_attentions_and_hidden_states_are_the_same(name: str) -> None:
    model = tiny_models.tiny_model(name, attention="eager")
    inputs = tiny_models.prompts(BATCHES["left padding"])
    options = {
        "output_attentions": True,
        "output_hidden_states": True,
        "num_beams": 2,
        "do_sample": False,
    }
    plain = generate(model, inputs, **options)
    with kvpager.patch(model):
        paged = generate(model, inputs, **options)
    assert_same(paged, plain)
    # Padding is not stored, so its attentions are not compared.
    tokens_only = inputs["attention_mask"].repeat_interleave(2, dim=0).bool()
    for kind in ("attentions", "hidden_states"):
        for step, (found_step, expected_step) in enumerate(
            zip(paged[kind], plain[kind], strict=True)
        ):
            for found, expected in zip(found_step, expected_step, strict=True):
                if step == 0:
                    pairs = (found, expected)
                    if kind == "attentions":
                        pairs = (found.transpose(1, 2), expected.transpose(1, 2))
                    found, expected = (tensor[tokens_only] for tensor in pairs)
                largest = max(1.0, float(expected.abs().max()))
                torch.testing.assert_close(found, expected, atol=1e-5 * largest, rtol=0)


@pytest.mark.parametrize("mode", ["three samples each", "four beams, three returned"])
@pytest.mark.parametrize("kind", ["attentions", "hidden_states"])
def test_extra_outputs_keep_a_row_for_each_repeat(kind: str, mode: str) -> None:
    model = tiny_models.tiny_model("llama", attention="eager")
    options = {**MODES[mode], f"output_{kind}": True}
    plain = generate(model, tiny_models.prompts([13, 13]), **options)
    with kvpager.patch(model):
        paged = generate(model, tiny_models.prompts([13, 13]), **options)
    assert_same(paged, plain)
    shapes = [[tensor.shape for tensor in step] for step in paged[kind]]
    assert shapes == [[tensor.shape for tensor in step] for step in plain[kind]]


def test_custom_position_ids_give_the_same_tokens() -> None:
    model = model_named("llama")
    inputs = tiny_models.prompts([13, 13])
    inputs["position_ids"] = torch.arange(13).expand(2, 13) * 2
    plain = tokens(model, inputs)
    with kvpager.patch(model):
        assert torch.equal(tokens(model, inputs), plain)


def test_a_mask_with_a_hole_gives_the_same_tokens() -> None:
    model = model_named("llama")
    inputs = tiny_models.prompts([13, 9])
    inputs["attention_mask"][:, 6] = 0
    for options in ({}, {"num_beams": 3}):
        plain = tokens(model, inputs, **options)
        with kvpager.patch(model, prefix_cache=True):
            assert torch.equal(tokens(model, inputs, **options), plain)


def test_right_padding_gives_the_same_tokens() -> None:
    model = model_named("llama")
    inputs = tiny_models.prompts([13, 9])
    inputs = {name: tensor.flip(1) for name, tensor in inputs.items()}
    plain = tokens(model, inputs)
    with kvpager.patch(model, prefix_cache=True):
        assert torch.equal(tokens(model, inputs), plain)


def test_a_repetition_penalty_and_bad_words_are_heeded() -> None:
    model = model_named("llama")
    options = {"repetition_penalty": 1.3, "bad_words_ids": [[34]], "no_repeat_ngram_size": 2}
    inputs = tiny_models.prompts([13, 9])
    plain = tokens(model, inputs, **options)
    with kvpager.patch(model):
        assert torch.equal(tokens(model, inputs, **options), plain)


def test_classifier_free_guidance_gives_the_same_tokens() -> None:
    model = model_named("llama")
    inputs = tiny_models.prompts([13])
    negative = tiny_models.prompts([13], seed=3)["input_ids"]
    options = {"guidance_scale": 1.5, "negative_prompt_ids": negative}
    plain = tokens(model, inputs, **options)
    with kvpager.patch(model):
        assert torch.equal(tokens(model, inputs, **options), plain)


def test_no_cache_means_no_cache() -> None:
    model = model_named("llama")
    inputs = tiny_models.prompts([13, 9])
    plain = tokens(model, inputs, use_cache=False)
    with kvpager.patch(model) as patch:
        assert torch.equal(tokens(model, inputs, use_cache=False), plain)
        assert patch.stats().num_blocks == 0
