"""Continuous batching gives every request the tokens it would have had alone."""

import asyncio
import copy
import gc
import random
import re
import weakref
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import kvpager
from kvpager.blocks.policies import LRU
from kvpager.engine.config import EngineConfig
from kvpager.errors import (
    EngineClosed,
    KVPagerError,
    RequestCancelled,
    RequestExpired,
    RequestFailed,
)
from kvpager.integrations.huggingface import engine as engine_module
from kvpager.integrations.huggingface.engine import Engine
from kvpager.integrations.huggingface.runner.sampling import SamplingSettings
from kvpager.scheduling.preemption import PreemptionCosts
from tests.support import tiny_models
from tests.support.gates import Gate

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
NEW = 16


def some_prompts(model, count=7, longest=40, seed=1):
    source = random.Random(seed)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return [
        [source.randrange(3, vocabulary) for _ in range(source.randint(1, longest))]
        for _ in range(count)
    ]


def alone(model, prompt, **settings):
    """Return the new tokens of `generate` for one prompt."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | settings
    tokens = model.generate(torch.tensor([prompt]), **settings)[0].tolist()
    return tokens[1 if model.config.is_encoder_decoder else len(prompt) :]


def batched(model, prompts, settings=None, **options):
    settings = {"max_new_tokens": NEW, "do_sample": False} | (settings or {})
    with Engine(model, **{"memory": "8MiB", "max_batch_tokens": 24} | options) as engine:
        outputs = engine.generate(prompts, **settings)
        assert_nothing_is_held(engine)
    return [output.token_ids for output in outputs]


def assert_nothing_is_held(engine):
    engine.submit([5], max_new_tokens=1).result()  # its plan tells of the ends before
    while engine.stats().scheduler.num_running:
        pass
    assert engine.stats().pool.num_held == 0
    assert engine.stats().pool.num_sequences == 0
    engine._core.scheduler.check()


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


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_rows_computed_per_sequence_equal_packed_rows(name):
    model = tiny_models.tiny_model(name)
    prompts = some_prompts(model)
    assert batched(model, prompts, forward="per_sequence") == batched(
        model, prompts, forward="packed"
    )


@pytest.mark.mostly_slow(quick=3)
@pytest.mark.parametrize("budget", [16, 17, 64, 1024])
@pytest.mark.parametrize("block_size", [4, 16])
def test_chunks_of_any_size_make_no_difference(llama, budget, block_size):
    prompts = some_prompts(llama, longest=90)
    found = batched(llama, prompts, max_batch_tokens=budget, block_size=block_size)
    assert found == [alone(llama, prompt) for prompt in prompts]


@pytest.mark.mostly_slow(quick=3)
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
@pytest.mark.parametrize("name", ["llama", "qwen3_next", "t5"])
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 3}, "num_beams=3: beam search cannot be batched"),
        ({"prompt_lookup_num_tokens": 2}, "prompt lookup"),
        ({"num_return_sequences": 2, "do_sample": False}, "num_return_sequences"),
        ({"no_such_setting": 2}, "no_such_setting"),
        ({"max_length": 2, "max_new_tokens": None}, "the prompt has 3 tokens"),
        ({"max_new_tokens": 10**6}, "max_model_len"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(llama, settings, message):
    with (
        Engine(llama, memory="8MiB") as engine,
        pytest.raises((ValueError, TypeError), match=message),
    ):
        engine.submit([5, 6, 7], **settings)


@pytest.mark.parametrize("prompt", ["text", [], [[1, 2], [3, 4]], [1.5], [-1], None])
def test_what_is_no_prompt_is_refused(llama, prompt):
    with Engine(llama, memory="8MiB") as engine, pytest.raises((ValueError, TypeError)):
        engine.submit(prompt)


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


# -------------------------------------------------------------------- ends


def test_a_request_ends_at_its_deadline(llama):
    with Engine(llama, memory="8MiB") as engine:
        with pytest.raises(RequestExpired, match="deadline"):
            engine.submit([5, 6], max_new_tokens=900, timeout=1e-9).result(timeout=60)
        assert_nothing_is_held(engine)


@pytest.mark.parametrize("kind", [ZeroDivisionError, SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("where", ["logits_processor", "stopping_criteria"])
def test_a_processor_that_raises_ends_its_own_request(llama, where, kind):
    def broken(ids, scores, **kwargs):
        if ids.shape[1] > 6:
            raise kind("of the processor")
        return scores if where == "logits_processor" else torch.tensor([False])

    with Engine(llama, memory="8MiB") as engine:
        bad = engine.submit([5, 6, 7], max_new_tokens=30, **{where: [broken]})
        good = engine.submit([5, 6, 7], max_new_tokens=NEW, do_sample=False)
        with pytest.raises(RequestFailed, match=kind.__name__) as caught:
            bad.result(timeout=60)
        assert isinstance(caught.value.__cause__, kind)
        assert good.result().token_ids == alone(llama, [5, 6, 7])
        assert_nothing_is_held(engine)


def test_closing_ends_what_is_left_and_restores_the_model(monkeypatch):
    model = tiny_models.tiny_model("llama", attention="eager").train()
    engine = Engine(model, memory="8MiB")
    assert model.config._attn_implementation == "kvpager"
    gate = Gate(model)
    gate.open_after(monkeypatch, engine._core, "stop")
    stream = engine.submit([5], max_new_tokens=1000)
    gate.let(1)
    gate.entered.acquire()
    engine.close()
    engine.close()
    with pytest.raises(RequestCancelled):
        stream.result(timeout=60)
    with pytest.raises(EngineClosed, match="Make a new one"):
        engine.submit([5])
    assert model.config._attn_implementation == "eager"
    assert model.training


def test_generate_works_beside_an_open_engine(llama):
    expected = alone(llama, [5, 6, 7])
    with Engine(llama, memory="8MiB") as engine:
        stream = engine.submit([5, 6, 7], max_new_tokens=NEW, do_sample=False)
        assert alone(llama, [5, 6, 7]) == expected
        assert stream.result().token_ids == expected


def test_a_pause_lets_weights_change():
    model = tiny_models.tiny_model("llama")
    prompt = list(range(3, 53))
    with Engine(model, memory="8MiB") as engine:
        before = engine.submit(prompt, max_new_tokens=NEW, do_sample=False).result().token_ids
        with engine.pause():
            waiting = engine.submit(prompt, max_new_tokens=NEW, do_sample=False)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(-0.7)
        after = waiting.result().token_ids
    assert before != after == alone(model, prompt)


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


def test_a_pause_separates_the_prompts_before_and_after():
    model = tiny_models.tiny_model("llama")
    prompt = list(range(3, 67))
    with Engine(model, memory="8MiB") as engine:
        running = engine.submit(prompt, max_new_tokens=200)
        for _ in zip(running, range(3), strict=False):
            pass
        with engine.pause():
            waiting = engine.submit(prompt, max_new_tokens=NEW, do_sample=False)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(-0.7)
        later = engine.submit(prompt, max_new_tokens=NEW, do_sample=False)
        expected = alone(model, prompt)
        assert waiting.result().token_ids == later.result().token_ids == expected
        running.cancel()


def test_engines_of_one_model_do_not_disturb_each_other():
    model = tiny_models.tiny_model("llama").train()
    attention = model.config._attn_implementation
    first, second = Engine(model, memory="4MiB"), Engine(model, memory="4MiB")
    first.close()
    found = second.submit([5, 6, 7], max_new_tokens=NEW, do_sample=False).result().token_ids
    assert not model.training
    second.close()
    assert model.training
    assert model.config._attn_implementation == attention
    assert found == alone(model.eval(), [5, 6, 7])


def test_a_dropped_engine_leaves_no_thread_and_restores_the_model():
    model = tiny_models.tiny_model("llama")
    attention = model.config._attn_implementation
    engine = Engine(model, memory="4MiB")
    engine.submit([5], max_new_tokens=2).result()
    threads = [engine._core._thread, engine._core._dispatcher._thread]
    del engine
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert model.config._attn_implementation == attention


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


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize(
    "settings", [{"encoder_repetition_penalty": 3.0}, {"encoder_no_repeat_ngram_size": 2}]
)
def test_processors_that_look_at_the_prompt_see_it(name, settings):
    model = tiny_models.tiny_model(name)
    prompts = [[5, 6, 7], [9, 8, 7], [5, 6, 7]]
    assert batched(model, prompts, settings) == [alone(model, p, **settings) for p in prompts]


@pytest.mark.parametrize(("name", "block_size"), [("t5", 16), ("gpt2", 256), ("qwen3_next", 16)])
def test_costs_are_measured_for_every_kind_of_model(name, block_size):
    model = tiny_models.tiny_model(name)
    options = {"memory": "8MiB", "host_memory": "8MiB", "block_size": block_size}
    assert batched(model, [[5, 6, 7]], **options) == [alone(model, [5, 6, 7])]


def test_the_engine_follows_changes_of_the_models_settings():
    model = tiny_models.tiny_model("llama")
    with Engine(model, memory="8MiB") as engine:
        before = engine.submit([5, 6], max_new_tokens=NEW).result().token_ids
        model.generation_config.suppress_tokens = before
        after = engine.submit([5, 6], max_new_tokens=NEW).result().token_ids
    assert not set(before) & set(after)


@pytest.mark.parametrize("options", [{"logits_processor": [3]}, {"stopping_criteria": [None]}])
def test_what_is_no_processor_is_refused(llama, options):
    with Engine(llama, memory="8MiB") as engine, pytest.raises(TypeError, match="functions"):
        engine.sampling_settings(**options)


def test_lengths_of_many_kinds_leave_nothing_behind(llama):
    """Neither of requests that may generate more, nor of longer prompts."""
    kept = weakref.WeakSet()

    class Kept(SamplingSettings):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            kept.add(self)

    with pytest.MonkeyPatch.context() as patched, Engine(llama, memory="8MiB") as engine:
        patched.setattr(engine_module, "SamplingSettings", Kept)
        for number in range(200):
            stream = engine.submit([5] * (number + 1), max_new_tokens=number + 1)
            stream.cancel()
        settings = engine.sampling_settings(max_new_tokens=1)
        for number in range(600):
            settings.resolve(number + 1, [5])
        gc.collect()
        assert len(kept) <= 70
        assert len(settings._by_length) <= 256


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "gpt2"}, TypeError),
        ({"model": torch.nn.Linear(2, 2)}, TypeError),
        ({"forward": "yes"}, ValueError),
        ({"forward": 1}, TypeError),
        ({"prefix_cache": "no"}, TypeError),
        ({"costs": 3.0}, TypeError),
        ({"on_step": 3}, TypeError),
        ({"max_num_seqs": True}, TypeError),
        ({"max_num_seqs": 0}, ValueError),
        ({"max_batch_tokens": "24"}, TypeError),
        ({"memory": True}, TypeError),
        ({"max_model_len": True}, TypeError),
        ({"compile": "yes"}, TypeError),
        ({"compile": {"mode": "reduce-overhead"}}, ValueError),
        ({"compile": {"mode": "max-autotune"}}, ValueError),
        ({"compile": {"options": {"triton.cudagraphs": True}}}, ValueError),
        ({"compile": {"backend": "cudagraphs"}}, ValueError),
        ({"max_model_len": 10**9}, ValueError),
        ({"max_queue_size": 0}, ValueError),
        ({"policy": "none"}, ValueError),
        ({"kv_cache_dtype": ["int8"]}, ValueError),
    ],
)
def test_options_that_make_no_sense_are_refused(llama, options, error):
    attention = llama.config._attn_implementation
    with pytest.raises(error):
        Engine(**{"model": llama, "memory": "8MiB"} | options)
    assert llama.config._attn_implementation == attention


def test_generate_refuses_one_id_for_several_requests(llama) -> None:
    refused = pytest.raises(TypeError, match="request_id: requests cannot share an id")
    with Engine(llama, memory="8MiB") as engine, refused:
        engine.generate([[5], [6]], request_id="mine", max_new_tokens=2)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": "7"},
        {"seed": 2**70},
        {"seed": True},
        {"timeout": 0},
        {"timeout": -1.0},
        {"timeout": float("nan")},
        {"timeout": True},
        {"timeout": "9"},
        {"logprobs": 5},
        {"logprobs": None},
        {"num_return_sequences": 0},
        {"num_return_sequences": -1},
        {"num_return_sequences": True},
        {"generation_config": GenerationConfig(num_return_sequences=0)},
        {"do_sample": "no"},
        {"max_new_tokens": True},
        {"output_logits": True},
        {"return_dict_in_generate": True},
        {"sampling_settings": GenerationConfig()},
        {"priority": 0.5},
        {"tenant": 3},
        {"namespace": ""},
        {"request_id": ["a", "list"]},
        {"timeout": float("inf")},
        {"max_new_tokens": "9"},
        {"generation_config": {"max_new_tokens": 3}},
        {"prompt": {"ids": [5]}},
        {"logits_processor": [3]},
        {"request_id": 3},
        {"request_id": True},
        {"request_id": ""},
        {"use_cache": "no"},
        {"temperature": float("nan"), "do_sample": True},
        {"temperature": True, "do_sample": True},
        {"top_k": True, "do_sample": True},
        {"top_p": float("nan"), "do_sample": True},
        {"top_p": 1.5, "do_sample": True},
        {"typical_p": float("nan"), "do_sample": True},
        {"epsilon_cutoff": -1.0, "do_sample": True},
        {"repetition_penalty": float("inf")},
        {"min_new_tokens": -3},
        {"min_new_tokens": True},
        {"no_repeat_ngram_size": -1},
        {"eos_token_id": -7},
        {"eos_token_id": 2.5},
        {"eos_token_id": [2, -7]},
        {"pad_token_id": 2.5},
        {"num_beams": 1.0},
        {"suppress_tokens": 3},
        {"max_time": -1.0},
        {"max_time": float("nan")},
        {"renormalize_logits": "yes"},
        {"token_healing": True},
        {"num_beam_groups": 2},
        {"tokenizer": 3},
        {"is_complete": "yes"},
        {"generation_config": GenerationConfig(top_k=True)},
        {"streamer": print},
    ],
)
def test_wrong_settings_of_a_request_are_refused(llama, options):
    with Engine(llama, memory="8MiB") as engine, pytest.raises((ValueError, TypeError)):
        engine.submit(**{"prompt": [5]} | options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_cache": False}, "use_cache=False: an engine keeps .* Leave use_cache out"),
        ({"cache_implementation": "static"}, "cache_implementation='static': an engine keeps"),
        ({"prefill_chunk_size": 4}, r"prefill_chunk_size=4: .* Engine\(max_batch_tokens=\)"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True: an engine gives"),
    ],
)
def test_settings_without_effect_are_refused_wherever_they_stand(llama, settings, message):
    with Engine(llama, memory="8MiB") as engine:
        for given in (settings, {"generation_config": GenerationConfig(**settings)}):
            with pytest.raises(ValueError, match=message):
                engine.submit([5], **given)


def test_settings_without_effect_may_stay_where_the_model_has_them():
    model = tiny_models.tiny_model("llama")
    model.generation_config.use_cache = False
    with Engine(model, memory="8MiB") as engine:
        for given in ({}, {"generation_config": copy.deepcopy(model.generation_config)}):
            assert len(engine.submit([5], max_new_tokens=2, **given).result(60).token_ids) == 2


def test_a_setting_off_or_for_no_token_is_no_error(llama):
    off = {
        "top_k": 0,
        "eos_token_id": -1,
        "use_cache": True,
        "output_scores": False,
        "num_beams": 1,
    }
    with Engine(llama, memory="8MiB") as engine:
        assert len(engine.submit([5], max_new_tokens=2, **off).result(60).token_ids) == 2


def test_cancel_takes_a_name(llama):
    with Engine(llama, memory="8MiB") as engine:
        stream = engine.submit([5], max_new_tokens=2)
        with pytest.raises(TypeError, match=r"Pass stream\.request_id"):
            engine.cancel(stream)
        stream.result(60)
        engine.cancel(stream.request_id)  # it has ended


# -------------------------------------------------------------------- what it says of itself


def test_the_log_tells_of_starts_preemptions_and_failed_steps(llama, caplog):
    caplog.set_level("INFO", "kvpager")
    with Engine(llama, memory="8MiB", prefix_cache=False) as engine:
        block_bytes = engine.block_bytes
    assert "engine started: <Engine of LlamaForCausalLM: open, packed, " in caplog.text
    caplog.clear()
    with Engine(llama, memory=8 * block_bytes) as engine:
        engine.generate(some_prompts(llama, count=6), max_new_tokens=40)
        assert engine.stats().scheduler.total_preempted_by_recompute > 1
    told = [record for record in caplog.records if "KV cache is full" in record.message]
    assert len(told) == 1  # in a while
    caplog.clear()
    with Engine(llama, memory="8MiB") as engine:
        hook = llama.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(RequestFailed):
            engine.submit([5], request_id="mine").result(timeout=60)
        hook.remove()
    (failed,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "step failed for requests 'mine'" in failed.message
    assert failed.exc_info[0] is ZeroDivisionError


def test_an_engine_and_its_streams_show_what_they_are(llama):
    with Engine(llama, memory="8MiB", host_memory="1MiB") as engine:
        with engine.pause():
            stream = engine.submit([5, 6, 7], request_id="mine", max_new_tokens=4)
            assert "0 running, 1 waiting>" in repr(engine)
            assert repr(stream) == "<Stream of 'mine': waiting, 3 -> 0 tokens>"
        stream.result()
        assert repr(stream) == "<Stream of 'mine': done, 3 -> 4 tokens>"
        pool = engine.stats().pool
        assert f"open, packed, {pool.num_blocks} blocks of 16 tokens (8.0 MiB) and " in repr(engine)
        with engine.pause():
            stream = engine.submit([5], do_sample=True, num_return_sequences=2, max_new_tokens=900)
        next(iter(stream))
        assert "running, 1 -> " in repr(stream)
        stream.cancel()
        with pytest.raises(RequestCancelled):
            stream.result()
        assert ": RequestCancelled, 1 -> " in repr(stream)
    assert "<Engine of LlamaForCausalLM: closed, " in repr(engine)


def test_a_request_too_large_for_memory_says_what_to_raise() -> None:
    model, prompt = tiny_models.tiny_model("llama"), list(range(1, 100))
    with Engine(model, memory="64KiB") as engine:
        with pytest.raises(
            ValueError,
            match=r"a prompt of 99 and 50 new tokens may need 10 blocks of KV cache \(80.0 KiB\), "
            r"memory='64KiB' allows 8\. Raise memory to 80.0 KiB or lower max_new_tokens",
        ):
            engine.submit(prompt, max_new_tokens=50)
        assert len(engine.generate([prompt], max_new_tokens=9)[0].token_ids) == 9
    with Engine(model, memory="80KiB") as engine:
        assert len(engine.generate([prompt], max_new_tokens=50)[0].token_ids) == 50


@pytest.mark.parametrize(
    "options",
    [{"memory": "1KiB"}, {"memory": 1024}, {"memory": "1MiB", "host_memory": "1KiB"}],
)
def test_an_engine_refuses_bounds_below_one_block(options) -> None:
    model = tiny_models.tiny_model("llama")
    with pytest.raises(ValueError, match=r"takes 8.0 KiB in all layers. Raise .* 8.0 KiB") as told:
        Engine(model, **options)
    with pytest.raises(ValueError, match=re.escape(str(told.value))):
        kvpager.patch(model, **options)
    with pytest.raises(ValueError, match=r"^memory='1KiB'"):  # rows compute on the device alone
        Engine(model, memory="1KiB", host_memory="1MiB")


def test_settings_come_as_an_object_or_as_keywords() -> None:
    model = tiny_models.tiny_model("llama")
    config = EngineConfig(memory="1MiB", max_num_seqs=4, policy="fair")
    with Engine(model, config, max_num_seqs=2) as engine:
        assert (engine.config.max_num_seqs, engine.config.policy) == (2, "fair")
        assert config.max_num_seqs == 4
        assert len(engine.generate([[5, 6, 7]], max_new_tokens=3)) == 1


def test_a_setting_that_does_not_exist_is_refused_by_name() -> None:
    model = tiny_models.tiny_model("llama")
    with pytest.raises(
        TypeError, match=r"max_num: unknown engine setting\. Known settings: memory"
    ):
        Engine(model, max_num=3)
    with pytest.raises(TypeError, match=r"expected an EngineConfig\. Pass single settings"):
        Engine(model, {"memory": "1MiB"})


def test_an_engine_evicts_by_the_policy_it_was_given() -> None:
    model = tiny_models.tiny_model("llama")
    made: list[int] = []
    evicted: list[int] = []

    class Noting(LRU):
        def __init__(self, num_blocks: int) -> None:
            super().__init__(num_blocks)
            made.append(num_blocks)

        def forget(self, blocks: Any) -> None:
            evicted.extend(blocks)
            super().forget(blocks)

    with Engine(model, memory="48KiB", eviction=Noting) as engine:
        assert made == [engine.stats().pool.num_blocks]
        for first in range(8):
            engine.generate([[first, *range(10, 50)]], max_new_tokens=2)
        assert evicted
    for name in ("lifetime", "priority"):
        with Engine(model, memory="64KiB", eviction=name) as engine:
            assert len(engine.generate([[5, 6, 7]], max_new_tokens=3)) == 1


def test_an_unknown_eviction_is_refused() -> None:
    model = tiny_models.tiny_model("llama")
    with pytest.raises(ValueError, match="eviction='newest': expected one of"):
        Engine(model, eviction="newest")
    with pytest.raises(TypeError, match="eviction=3: expected a policy's name, or a function"):
        Engine(model, eviction=3)
