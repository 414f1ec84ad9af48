"""Settings of engines and requests: what they mean, and which are refused."""

import copy
import gc
import re
import weakref
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import kvpager
from kvpager.blocks.policies import LRU
from kvpager.engine.config import EngineConfig
from kvpager.integrations.huggingface import engine as engine_module
from kvpager.integrations.huggingface.engine import Engine
from kvpager.integrations.huggingface.runner.sampling import SamplingSettings
from tests.support import tiny_models


@pytest.fixture(scope="module")
def llama():
    return tiny_models.tiny_model("llama")


# -------------------------------------------------------------------- sampling


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


# -------------------------------------------------------------------- several at once, and changes


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
        ({"low_memory": True}, "low_memory=True: it is for contrastive search"),
        ({"length_penalty": 0.7}, r"length_penalty=0\.7: it is for beams, and an engine has none"),
        ({"early_stopping": True}, "early_stopping=True: it is for beams"),
        ({"diversity_penalty": 0.5}, r"diversity_penalty=0\.5: it is for beams"),
    ],
)
def test_settings_without_effect_are_refused_wherever_they_stand(llama, settings, message):
    with Engine(llama, memory="8MiB") as engine:
        for given in (settings, {"generation_config": GenerationConfig(**settings)}):
            with pytest.raises(ValueError, match=message):
                engine.submit([5], **given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_new_tokens": 9, "max_new_tokens": 5}, "^min_new_tokens=9: only 5 new tokens are"),
        ({"min_new_tokens": 90}, "^min_new_tokens=90: only 20 new tokens are allowed. Raise max_n"),
        ({"min_length": 9, "max_length": 5}, "^min_length=9: only 2 new tokens are allowed"),
    ],
)
def test_a_minimum_above_the_maximum_is_refused(llama, settings, message):
    with Engine(llama, memory="8MiB") as engine:
        for given in (settings, {"generation_config": GenerationConfig(**settings)}):
            with pytest.raises(ValueError, match=message):
                engine.submit([5, 6, 7], **given)
        assert len(engine.submit([5], min_new_tokens=5, max_new_tokens=5).result(60).token_ids) == 5


def test_a_request_without_a_length_gets_twenty_new_tokens(llama):
    with Engine(llama, memory="8MiB") as engine:
        (output,) = engine.generate([[5, 6, 7]], eos_token_id=-1)
    assert len(output.token_ids) == 20
    assert output.samples[0].finish_reason == "length"


def test_no_prompts_give_no_outputs(llama):
    with Engine(llama, memory="8MiB") as engine:
        assert engine.generate([]) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, r"^temperature=-1: expected more than 0, at most 1e\+09$"),
        (
            {"temperature": 0, "do_sample": True},
            "^temperature=0: expected more than 0 for sampling",
        ),
        (
            {"repetition_penalty": 0},
            r"^repetition_penalty=0: expected more than 0, at most 1e\+09$",
        ),
        ({"typical_p": 0.0}, r"^typical_p=0\.0: expected more than 0, at most 1$"),
        ({"top_p": -0.5}, r"^top_p=-0\.5: expected 0 to 1$"),
    ],
)
def test_messages_name_the_range_that_is_allowed(llama, settings, message):
    with Engine(llama, memory="8MiB") as engine, pytest.raises(ValueError, match=message):
        engine.sampling_settings(**settings)


def test_the_ends_of_the_ranges_are_allowed(llama):
    ends = {"top_p": 0.0, "min_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 1.0}
    with Engine(llama, memory="8MiB") as engine:
        for name, value in ends.items():
            engine.submit([5], max_new_tokens=1, do_sample=True, **{name: value}).result(60)
        engine.submit([5], max_new_tokens=1, do_sample=False, temperature=0).result(60)


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
    with pytest.raises(TypeError, match=r", tokenizer, on_step\. Did you mean tokenizer\?$"):
        Engine(model, tokeniser=None)
    with pytest.raises(TypeError, match=r", on_step\.$"):
        Engine(model, colour=3)
    with pytest.raises(TypeError, match=r"expected an EngineConfig\. Pass single settings"):
        Engine(model, {"memory": "1MiB"})


@pytest.mark.parametrize("name", ["max_new_tokens", "temperature", "seed", "stopping_criteria"])
def test_a_setting_of_requests_is_refused_with_where_it_belongs(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: .* Pass it to submit or generate\.$"):
        Engine(tiny_models.tiny_model("llama"), **{name: 3})


@pytest.mark.parametrize("timeout", [0, -1, 1e10, float("nan")])
def test_a_timeout_out_of_range_is_told_its_range(timeout: float) -> None:
    message = r"expected more than 0 seconds, at most 1,000,000,000, or None$"
    with (
        Engine(tiny_models.tiny_model("llama"), memory="4MiB") as engine,
        pytest.raises(ValueError, match=message),
    ):
        engine.submit([5], timeout=timeout)


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
