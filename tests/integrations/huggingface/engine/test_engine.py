"""Continuous batching gives every request the tokens it would have had alone."""

import asyncio

import pytest
import torch
from transformers import GenerationConfig

from kvpager.errors import (
    KVPagerError,
    RequestFailed,
)
from kvpager.integrations.huggingface.engine import Engine
from kvpager.scheduling.preemption import PreemptionCosts
from tests.support import tiny_models
from tests.support.engines import NEW, alone, assert_nothing_is_held, batched, some_prompts

# What has no attention layers of its own, keeps its state elsewhere, or reads no text.
REFUSED = {
    "deepseek_v32", "falcon_h1", "mamba", "mamba2", "minimax", "recurrent_gemma", "rwkv",
    "whisper", "zamba2",
}  # fmt: skip

SERVED = [
    name
    for name in tiny_models.ARCHITECTURES
    if tiny_models.is_known(name) and name not in REFUSED and "image" not in name
]


@pytest.fixture(scope="module")
def llama():
    return tiny_models.tiny_model("llama")


# -------------------------------------------------------------------- the same tokens


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("name", SERVED)
def test_tokens_are_those_of_generate_for_each_prompt_alone(name):
    model = tiny_models.tiny_model(name)
    prompts = some_prompts(model)
    assert batched(model, prompts) == [alone(model, prompt) for prompt in prompts]


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_rows_computed_per_sequence_equal_packed_rows(name):
    model = tiny_models.tiny_model(name)
    prompts = some_prompts(model)
    assert batched(model, prompts, forward="per_sequence") == batched(
        model, prompts, forward="packed"
    )


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("budget", [16, 17, 64, 1024])
@pytest.mark.parametrize("block_size", [4, 16])
def test_chunks_of_any_size_make_no_difference(llama, budget, block_size):
    prompts = some_prompts(llama, longest=90)
    found = batched(llama, prompts, max_batch_tokens=budget, block_size=block_size)
    assert found == [alone(llama, prompt) for prompt in prompts]


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 9, "eos_token_id": list(range(40))},
        {"eos_token_id": list(range(40))},
        {"bad_words_ids": [[7], [9, 11]], "suppress_tokens": [3, 4, 5]},
        {"max_length": 45, "max_new_tokens": None},
        {"forced_eos_token_id": 3},
    ],
)
def test_generation_settings_mean_what_they_mean_to_generate(llama, settings):
    prompts = some_prompts(llama)
    assert batched(llama, prompts, settings) == [alone(llama, p, **settings) for p in prompts]


def test_the_models_own_generation_config_holds(llama):
    model = tiny_models.tiny_model("llama")
    model.generation_config = GenerationConfig(
        max_new_tokens=5, eos_token_id=list(range(20)), repetition_penalty=1.5, pad_token_id=0
    )
    prompts = some_prompts(model)
    with Engine(model, memory="8MiB") as engine:
        found = [output.token_ids for output in engine.generate(prompts)]
    assert found == [model.generate(torch.tensor([p]))[0].tolist()[len(p) :] for p in prompts]


def test_custom_processors_and_criteria_are_asked(llama):
    def only_even(ids, scores):
        assert ids.shape[0] == 1
        scores = scores.clone()
        scores[:, 1::2] = -float("inf")
        return scores

    def after_six(ids, scores, **kwargs):
        return torch.tensor([ids.shape[1] >= 10])

    with Engine(llama, memory="8MiB") as engine:
        settings = engine.sampling_settings(
            max_new_tokens=20,
            min_new_tokens=20,
            logits_processor=[only_even],
            stopping_criteria=[after_six],
        )
        output = engine.submit([5, 6, 7, 8], sampling_settings=settings).result()
    assert len(output.token_ids) == 6
    assert all(token % 2 == 0 for token in output.token_ids)
    sample = output.samples[0]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", "after_six")


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("costs", [PreemptionCosts(), PreemptionCosts(seconds_per_block=1e9)])
@pytest.mark.parametrize("name", ["qwen3_next", "llama", "t5"])
def test_a_pool_for_few_requests_gives_the_same_tokens(name, costs):
    model = tiny_models.tiny_model(name)
    prompts = some_prompts(model, count=12, longest=60)
    lengths = [len(p) + 40 if name != "t5" else 41 for p in prompts]
    with Engine(model, memory="8MiB", prefix_cache=False) as engine:
        block_bytes = engine.block_bytes
    third = sum(-(-length // 16) for length in lengths) // 3 * block_bytes
    with Engine(model, memory=third, host_memory="8MiB", costs=costs) as engine:
        with engine.pause():  # all of them are there in the first step
            streams = [
                engine.submit(prompt, max_new_tokens=40, do_sample=False) for prompt in prompts
            ]
        outputs = [stream.result() for stream in streams]
        counts = engine.stats().scheduler
        assert_nothing_is_held(engine)
    expected = [alone(model, prompt, max_new_tokens=40) for prompt in prompts]
    assert [output.token_ids for output in outputs] == expected
    if costs.seconds_per_block > 1:
        assert counts.total_preempted_by_recompute > 0
        assert counts.total_preempted_by_swap == 0
    else:
        assert counts.total_preempted_by_swap > 0


def test_a_shared_prefix_is_computed_once(llama):
    beginning = some_prompts(llama, count=1, longest=1)[0] * 64
    prompts = [beginning + prompt for prompt in some_prompts(llama, count=6)]
    with Engine(llama, memory="8MiB") as engine:
        outputs = engine.generate(prompts, max_new_tokens=NEW, do_sample=False)
        assert engine.stats().pool.prefix_hit_tokens >= 64 * 5
    assert [output.token_ids for output in outputs] == [alone(llama, prompt) for prompt in prompts]


def test_namespaces_share_nothing(llama):
    prompt = list(range(3, 67))
    with Engine(llama, memory="8MiB") as engine:
        for namespace in ("a", "b"):
            engine.submit(prompt, namespace=namespace, max_new_tokens=2).result()
        assert engine.stats().pool.prefix_hit_tokens == 0
        engine.submit(prompt, namespace="a", max_new_tokens=2).result()
        assert engine.stats().pool.prefix_hit_tokens >= 48


def test_a_quota_bounds_the_memory_of_a_namespace(llama):
    prompt = list(range(3, 35))
    with Engine(llama, memory="8MiB") as engine:
        assert engine.block_bytes == 8 * 1024
        engine.quotas["acme"] = "32KiB"
        assert dict(engine.quotas) == {"acme": "32KiB"}
        with pytest.raises(
            ValueError, match="may need 5 blocks, but the quota of its namespace is 4"
        ):
            engine.submit(prompt, namespace="acme", max_new_tokens=40)
        with engine.pause():
            streams = [
                engine.submit(prompt, namespace=name, max_new_tokens=NEW, do_sample=False)
                for name in ("acme", "acme", None)
            ]
        expected = alone(llama, prompt)
        assert [stream.result().token_ids for stream in streams] == [expected] * 3
        del engine.quotas["acme"]
        assert (
            len(engine.submit(prompt, namespace="acme", max_new_tokens=40).result().token_ids) == 40
        )


# -------------------------------------------------------------------- sampling


def test_samples_of_a_prompt_see_their_own_tokens(llama):
    """The log probabilities reported are those of the unbatched model for the same tokens."""
    prompt = some_prompts(llama)[0]
    settings = {"do_sample": True, "top_k": 0, "num_return_sequences": 5, "max_new_tokens": 20}
    with Engine(llama, memory="8MiB") as engine:
        output = engine.submit(prompt, logprobs=True, seed=3, **settings).result()
        assert engine.stats().pool.total_copied > 0  # they began in one block
    assert len({tuple(sample.token_ids) for sample in output.samples}) == 5
    for sample in output.samples:
        ids = torch.tensor([prompt + sample.token_ids])
        with torch.no_grad():
            scores = llama(ids).logits[0].log_softmax(-1)
        expected = scores[len(prompt) - 1 : -1].gather(1, torch.tensor(sample.token_ids)[:, None])
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected[:, 0])


def test_a_seed_decides_the_tokens(llama):
    settings = {"do_sample": True, "temperature": 1.3, "top_k": 30, "max_new_tokens": 12}
    with Engine(llama, memory="8MiB") as engine:
        noise = [engine.submit([i + 3], **settings) for i in range(5)]
        found = [
            engine.submit([5, 6], seed=seed, **settings).result().token_ids for seed in (1, 1, 2)
        ]
        assert all(stream.result() for stream in noise)
    assert found[0] == found[1] != found[2]


def test_sampling_obeys_its_settings(llama):
    with Engine(llama, memory="8MiB") as engine:
        greedy = engine.submit([5, 6], max_new_tokens=10, do_sample=False)
        cold = engine.submit([5, 6], max_new_tokens=10, do_sample=True, top_k=1)
        narrow = engine.submit([5, 6], max_new_tokens=10, do_sample=True, top_p=1e-6)
        assert greedy.result().token_ids == cold.result().token_ids == narrow.result().token_ids


# -------------------------------------------------------------------- streams


def test_asyncio_reads_many_streams_at_once(llama):
    prompts = some_prompts(llama)

    async def read(engine, prompt):
        stream = engine.submit(prompt, max_new_tokens=NEW, do_sample=False)
        tokens = [token.id async for token in stream]
        assert (await stream).token_ids == tokens
        return tokens

    async def main():
        with Engine(llama, memory="8MiB") as engine:
            found = await asyncio.gather(*(read(engine, prompt) for prompt in prompts))
            outputs = await engine.agenerate(prompts, max_new_tokens=NEW, do_sample=False)
        assert [output.token_ids for output in outputs] == found
        return found

    assert asyncio.run(main()) == [alone(llama, prompt) for prompt in prompts]


# -------------------------------------------------------------------- models


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_model_that_cannot_be_batched_is_refused(name):
    if not tiny_models.is_known(name):
        pytest.skip(f"this transformers has no {name}")
    model = tiny_models.tiny_model(name)
    attention = model.config._attn_implementation
    with pytest.raises(KVPagerError, match="cannot be batched continuously"):
        Engine(model, memory="8MiB")
    assert model.config._attn_implementation == attention


def test_a_model_with_attention_of_its_own_is_not_packed():
    model = tiny_models.tiny_model("bloom")
    with Engine(model, memory="8MiB") as engine:
        assert not engine.is_packed
    with pytest.raises(KVPagerError, match="other logits for packed rows"):
        Engine(model, memory="8MiB", forward="packed")


def test_a_recurrent_state_is_not_shared_between_samples():
    model = tiny_models.tiny_model("qwen3_next")
    with Engine(model, memory="8MiB") as engine, pytest.raises(ValueError, match="several times"):
        engine.submit([5, 6], do_sample=True, num_return_sequences=2)


def test_eight_bits_hold_twice_the_tokens(llama):
    with (
        Engine(llama, memory="1MiB") as whole,
        Engine(llama, memory="1MiB", kv_cache_dtype="int8") as half,
    ):
        assert half.stats().pool.num_blocks > 1.8 * whole.stats().pool.num_blocks
        tokens = half.submit([5, 6, 7], max_new_tokens=4, do_sample=False).result().token_ids
    assert len(tokens) == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_pass_has_the_tokens_of_an_eager_one(llama):
    prompts = some_prompts(llama, count=4)
    assert batched(llama, prompts, compile={"backend": "aot_eager"}) == [
        alone(llama, prompt) for prompt in prompts
    ]


# -------------------------------------------------------------------- several at once, and changes


def test_rows_of_unlike_settings_are_drawn_apart(llama):
    """In one step; whichever settings were taken for all, one of the two would show it."""
    with Engine(llama, memory="8MiB") as engine:
        with engine.pause():
            streams = [
                engine.submit([5, 6], max_new_tokens=12, do_sample=True, **settings)
                for settings in ({"top_k": 1}, {"top_k": 0, "temperature": 50.0}, {"top_k": 1})
            ]
        found = [stream.result().token_ids for stream in streams]
    expected = alone(llama, [5, 6], max_new_tokens=12)
    assert found[0] == found[2] == expected != found[1]


def test_scores_that_cannot_be_drawn_from_end_their_own_request():
    model = tiny_models.tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    with Engine(model, memory="8MiB") as engine:
        with engine.pause():
            streams = [
                engine.submit([5, token], max_new_tokens=1, do_sample=True, top_k=5)
                for token in (6, 7, 8)
            ]
        with pytest.raises(RequestFailed):
            streams[1].result(timeout=60)
        assert all(len(streams[i].result().token_ids) == 1 for i in (0, 2))


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize(
    "settings", [{"encoder_repetition_penalty": 3.0}, {"encoder_no_repeat_ngram_size": 2}]
)
def test_processors_that_look_at_the_prompt_see_it(name, settings):
    model = tiny_models.tiny_model(name)
    prompts = [[5, 6, 7], [9, 8, 7], [5, 6, 7]]
    assert batched(model, prompts, settings) == [alone(model, p, **settings) for p in prompts]


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize(("name", "block_size"), [("t5", 16), ("gpt2", 256), ("qwen3_next", 16)])
def test_costs_are_measured_for_every_kind_of_model(name, block_size):
    model = tiny_models.tiny_model(name)
    options = {"memory": "8MiB", "host_memory": "8MiB", "block_size": block_size}
    assert batched(model, [[5, 6, 7]], **options) == [alone(model, [5, 6, 7])]
