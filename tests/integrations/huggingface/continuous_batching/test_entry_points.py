"""transformers' continuous batching, on a patched model: the same calls, the same outputs."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import GenerationConfig, PreTrainedModel  # noqa: E402
from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402
from transformers.generation.continuous_batching import (  # noqa: E402
    ContinuousBatchingManager,
    ContinuousMixin,
)
from transformers.generation.continuous_batching.requests import (  # noqa: E402
    GenerationOutput,
)

import kvpager  # noqa: E402
from kvpager.errors import KVPagerError  # noqa: E402
from kvpager.integrations.huggingface import Patch  # noqa: E402
from kvpager.integrations.huggingface.continuous_batching.manager import PagedBatchingManager  # noqa: E402
from tests.support import tiny_models  # noqa: E402
from tests.support.batching_calls import (  # noqa: E402
    FINISHED,
    NEW,
    PROMPTS,
    SMALL,
    eos_of,
    one_by_one,
    settings,
    some_prompts,
)

# ---------------------------------------------------------------- the same outputs


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "gpt2", "bloom", "deepseek_v3", "qwen3_next", "t5"]
)
def test_generate_batch_gives_what_generate_gives(name: str) -> None:
    model = tiny_models.tiny_model(name)
    expected = one_by_one(model, PROMPTS)
    with kvpager.patch(model, memory="1MiB"):
        outputs = model.generate_batch(PROMPTS, settings(eos_token_id=eos_of(model)))
    assert [output.generated_tokens for output in outputs.values()] == expected
    assert {output.status for output in outputs.values()} == {FINISHED}


def test_a_patch_of_all_models_batches_encoder_decoders_too() -> None:
    model = tiny_models.tiny_model("t5")
    expected = one_by_one(model, PROMPTS)
    with kvpager.patch(memory="1MiB"):
        outputs = model.generate_batch(PROMPTS, settings(eos_token_id=eos_of(model)))
    assert [output.generated_tokens for output in outputs.values()] == expected


def assert_alike(ours: GenerationOutput, theirs: GenerationOutput) -> None:
    """Equal but for rounding and the clock."""
    assert type(ours) is type(theirs)
    for name, value in vars(theirs).items():
        if name == "logprobs":
            assert ours.logprobs == pytest.approx(value, abs=1e-4)
        elif name not in ("created_time", "lifespan", "timestamps"):
            assert getattr(ours, name) == value, name
    for output in (ours, theirs):
        begun, ended = output.lifespan
        times = [output.created_time, begun, *(output.timestamps or []), ended]
        assert times == sorted(times)
    if theirs.timestamps is None:
        assert ours.timestamps is None
    else:
        assert len(ours.timestamps) == len(theirs.timestamps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "batching"),
    [
        ({}, {}),
        ({}, {"return_logprobs": True}),
        ({"eos_token_id": 51}, {}),  # the second token of the last text
        ({"eos_token_id": [200, 90, 57]}, {"return_logprobs": True}),
    ],
)
@pytest.mark.parametrize("record_timestamps", [False, True])
def test_outputs_are_those_of_transformers_field_by_field(
    llama: PreTrainedModel,
    options: dict[str, Any],
    batching: dict[str, Any],
    record_timestamps: bool,
) -> None:
    def outputs() -> dict[str, GenerationOutput]:
        found: dict[str, GenerationOutput] = llama.generate_batch(
            PROMPTS,
            settings(**options),
            ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64, **batching),
            record_timestamps=record_timestamps,
        )
        return found

    theirs = outputs()
    with kvpager.patch(llama, memory="1MiB"):
        ours = outputs()
    assert list(ours) == list(theirs)
    for name, output in theirs.items():
        assert_alike(ours[name], output)


def test_samples_have_their_own_tokens_and_names_of_transformers(
    llama: PreTrainedModel,
) -> None:
    def outputs() -> list[GenerationOutput]:
        config = settings(do_sample=True, num_return_sequences=3, max_new_tokens=12)
        with llama.continuous_batching_context_manager(
            config, continuous_batching_config=SMALL
        ) as manager:
            manager.add_request(PROMPTS[0], request_id="x")
            return [manager.get_result() for _ in range(3)]

    theirs = outputs()
    with kvpager.patch(llama, memory="1MiB"):
        ours = outputs()
    assert {output.request_id for output in ours} == {output.request_id for output in theirs}
    assert len({tuple(output.generated_tokens) for output in ours}) == 3


def test_settings_that_a_config_leaves_open_are_not_the_models(llama: PreTrainedModel) -> None:
    def outputs() -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=NEW)
        return [o.generated_tokens for o in llama.generate_batch(PROMPTS, config, SMALL).values()]

    theirs_of_model = llama.generation_config
    llama.generation_config = GenerationConfig(do_sample=True, suppress_tokens=list(range(3, 120)))
    try:
        theirs = outputs()
        with kvpager.patch(llama, memory="1MiB"):
            assert outputs() == theirs
    finally:
        llama.generation_config = theirs_of_model


def test_generate_with_the_paged_cache_of_transformers_is_batched(
    llama: PreTrainedModel, patch: Patch
) -> None:
    inputs = torch.tensor(some_prompts(9, 9))
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = llama.generate(inputs, **options)
    ids = llama.generate(inputs, cache_implementation="paged", **options)
    assert ids[0].tolist() == expected.tolist()
    assert len(patch.managers) == 1 or not list(patch.managers)  # one was made, and may be gone


def test_nothing_to_do_is_done_at_once(llama: PreTrainedModel, patch: Patch) -> None:
    assert llama.generate_batch([]) == {}


# ---------------------------------------------------------------- who is served


def test_methods_keep_their_signatures_and_undo_restores_them(llama: PreTrainedModel) -> None:
    before = dict(vars(ContinuousMixin))
    with kvpager.patch(llama):
        changed = {name for name, value in vars(ContinuousMixin).items() if before[name] != value}
        assert changed == {"init_continuous_batching", "generate_batch"}
        for name in changed:
            ours = vars(ContinuousMixin)[name]
            assert inspect.signature(ours) == inspect.signature(before[name])
    assert dict(vars(ContinuousMixin)) == before


def test_a_model_without_a_patch_is_left_to_transformers(llama: PreTrainedModel) -> None:
    other = tiny_models.tiny_model("qwen2")
    with kvpager.patch(llama):
        made = other.init_continuous_batching(settings())
    assert type(made) is ContinuousBatchingManager


def test_the_manager_has_every_public_method_of_transformers(
    manager: PagedBatchingManager,
) -> None:
    assert isinstance(manager, ContinuousBatchingManager)
    for name, theirs in inspect.getmembers(ContinuousBatchingManager, inspect.isfunction):
        if name.startswith("_") and name != "__iter__":
            continue
        ours = inspect.getattr_static(type(manager), name)
        assert ours is not theirs, name
        wanted = list(inspect.signature(theirs).parameters)
        assert list(inspect.signature(ours).parameters)[: len(wanted)] == wanted, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam search cannot be batched"),
        ({"prompt_lookup_num_tokens": 2}, "prompt lookup cannot be batched"),
    ],
)
def test_ways_to_generate_that_cannot_be_batched_are_refused(
    llama: PreTrainedModel, patch: Patch, options: dict[str, Any], message: str
) -> None:
    threads = _our_threads()
    with pytest.raises(ValueError, match=message):
        llama.init_continuous_batching(settings(**options))
    with pytest.raises(ValueError, match=message):
        llama.generate_batch(PROMPTS, settings(**options))
    assert _our_threads() == threads


def _our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvpager")]


@pytest.mark.parametrize("name", ["mamba", "rwkv"])
def test_models_that_cannot_be_batched_are_refused(name: str) -> None:
    if not tiny_models.is_known(name):
        pytest.skip(f"this transformers has no {name}")
    model, threads = tiny_models.tiny_model(name), threading.enumerate()
    with kvpager.patch(model), pytest.raises(KVPagerError, match="cannot be batched continuously"):
        model.generate_batch(PROMPTS, settings())
    assert threading.enumerate() == threads
