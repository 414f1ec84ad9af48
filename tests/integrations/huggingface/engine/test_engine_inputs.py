"""Padding is no part of a prompt, however the prompt arrives."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import BatchEncoding, GenerationConfig, PreTrainedModel  # noqa: E402

import kvpager  # noqa: E402
from kvpager import Engine  # noqa: E402
from tests.support import tiny_models  # noqa: E402

LENGTHS = [9, 4, 6]
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 2}


def padded(side: str, lengths: list[int] = LENGTHS) -> dict[str, torch.Tensor]:
    batch = tiny_models.prompts(lengths)
    if side == "left":
        return batch
    turned = {}
    for name, rows in batch.items():
        turned[name] = torch.stack(
            [row.roll(n - row.shape[0]) for row, n in zip(rows, lengths, strict=True)]
        )
    return turned


def without_padding(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


@pytest.fixture(scope="module", params=["llama", "t5"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_models.tiny_model(request.param)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_models.tiny_model("llama")


def lists(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: rows.tolist() for name, rows in batch.items()}


FORMS: dict[str, Any] = {
    "what a tokenizer returns": lambda batch: (BatchEncoding(batch), None),
    "its lists": lambda batch: (BatchEncoding(lists(batch)), None),
    "a dict": lambda batch: (dict(batch), None),
    "tensors": lambda batch: (batch["input_ids"], batch["attention_mask"]),
    "arrays": lambda batch: (batch["input_ids"].numpy(), batch["attention_mask"].numpy()),
    "bools": lambda batch: (batch["input_ids"], batch["attention_mask"].bool()),
    "rows": lambda batch: (list(batch["input_ids"]), list(batch["attention_mask"])),
    "a tensor that tells": lambda batch: (batch["input_ids"], None),
    "an array that tells": lambda batch: (batch["input_ids"].numpy(), None),
}


@pytest.mark.mostly_slow(quick=4)
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_computed(model: PreTrainedModel, side: str, form: str) -> None:
    batch = padded(side)
    expected = without_padding(batch)
    prompts, mask = FORMS[form](batch)
    with Engine(model, memory="4MiB") as engine:
        outputs = engine.generate(prompts, attention_mask=mask, **GREEDY)
        alone = [output.token_ids for output in engine.generate(expected, **GREEDY)]
    assert [output.prompt_token_ids for output in outputs] == expected
    assert [output.token_ids for output in outputs] == alone


def test_one_padded_prompt_is_submitted_without_its_padding(llama: PreTrainedModel) -> None:
    batch = {name: rows[1:2] for name, rows in padded("left").items()}
    prompt = without_padding(batch)[0]
    with Engine(llama, memory="4MiB") as engine:
        for form in (
            {"prompt": BatchEncoding(batch)},
            {"prompt": BatchEncoding({name: rows[0].tolist() for name, rows in batch.items()})},
            {"prompt": batch["input_ids"], "attention_mask": batch["attention_mask"]},
            {"prompt": batch["input_ids"][0], "attention_mask": batch["attention_mask"][0]},
            {"prompt": batch["input_ids"]},
        ):
            assert engine.submit(**form, max_new_tokens=1).result().prompt_token_ids == prompt


@pytest.mark.parametrize("form", [dict, lists], ids=["tensors", "lists"])
def test_what_a_tokenizer_returns_may_be_unpacked(model: PreTrainedModel, form: Any) -> None:
    batch = padded("left")
    expected = without_padding(batch)
    with Engine(model, memory="4MiB") as engine:
        outputs = engine.generate(**BatchEncoding(form(batch)), max_new_tokens=1)
        assert [output.prompt_token_ids for output in outputs] == expected
        outputs = asyncio.run(engine.agenerate(**BatchEncoding(form(batch)), max_new_tokens=1))
        assert [output.prompt_token_ids for output in outputs] == expected
        one = {name: rows[1] for name, rows in form(batch).items()}
        assert engine.submit(**one, max_new_tokens=1).result().prompt_token_ids == expected[1]


@pytest.mark.parametrize(
    "name",
    ["token_type_ids", "position_ids", "inputs_embeds", "inputs", "special_tokens_mask", "labels"],
)
def test_inputs_beside_ids_and_mask_are_refused_by_name(llama: PreTrainedModel, name: str) -> None:
    more = {name: torch.tensor([[1]])}
    with Engine(llama, memory="4MiB") as engine:
        with pytest.raises(ValueError, match=f"Leave {name} out"):
            engine.generate(input_ids=[[5]], max_new_tokens=1, **more)
        with pytest.raises(ValueError, match=f"Leave {name} out"):
            engine.submit([5], max_new_tokens=1, **more)


def test_prompts_are_given_once(llama: PreTrainedModel) -> None:
    with Engine(llama, memory="4MiB") as engine:
        with pytest.raises(TypeError, match="prompts: missing"):
            engine.generate(max_new_tokens=1)
        with pytest.raises(TypeError, match="prompt: given twice"):
            engine.submit([5], input_ids=[5], max_new_tokens=1)


@pytest.mark.parametrize("mask", [1, [1], torch.tensor(1)])
def test_a_mask_has_a_row_for_each_prompt(llama: PreTrainedModel, mask: Any) -> None:
    with Engine(llama, memory="4MiB") as engine, pytest.raises(TypeError):
        engine.generate([[5]], attention_mask=mask, max_new_tokens=1)


def test_pad_tokens_of_a_single_text_are_tokens(llama: PreTrainedModel) -> None:
    prompts = [[0, 0, 5, 0, 6, 0], [7, 8, 9]]
    with Engine(llama, memory="4MiB") as engine:
        assert engine.submit(prompts[0], max_new_tokens=1).result().prompt_token_ids == prompts[0]
        outputs = engine.generate(prompts, max_new_tokens=1)
        assert [output.prompt_token_ids for output in outputs] == prompts
        shown = engine.generate(
            torch.tensor([prompts[0]]), attention_mask=torch.ones(1, 6), max_new_tokens=1
        )
        assert shown[0].prompt_token_ids == prompts[0]


def test_prompts_of_unlike_lengths_come_in_any_collection(llama: PreTrainedModel) -> None:
    prompts = [[5, 6, 7], [8]]
    ragged = np.empty(2, object)
    ragged[:] = prompts
    with Engine(llama, memory="4MiB") as engine:
        for form in (prompts, tuple(prompts), iter(prompts), ragged, map(np.array, prompts)):
            outputs = engine.generate(form, max_new_tokens=1)
            assert [output.prompt_token_ids for output in outputs] == prompts


@pytest.mark.parametrize("config", [None, GenerationConfig(pad_token_id=5, eos_token_id=2)])
def test_the_pad_token_is_that_of_the_settings(
    llama: PreTrainedModel, config: GenerationConfig | None
) -> None:
    prompts = torch.tensor([[5, 5, 6], [7, 8, 9]])
    options: dict[str, Any] = {"pad_token_id": 5} if config is None else {}
    with Engine(llama, memory="4MiB") as engine:
        outputs = engine.generate(prompts, config, max_new_tokens=1, **options)
    assert [output.prompt_token_ids for output in outputs] == [[6], [7, 8, 9]]


@pytest.mark.parametrize(
    "form",
    [
        lambda batch: {"prompts": lists(batch)["input_ids"]},  # lists are no batch of generate's
        lambda batch: {"prompts": batch["input_ids"], "pad_token_id": 2},  # which ends texts, too
        lambda batch: {"prompts": list(batch["input_ids"])},
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_may_be_padding_or_not_is_refused(
    llama: PreTrainedModel, form: Any, side: str
) -> None:
    batch = padded(side)
    options = form(batch)
    if "pad_token_id" in options:
        batch["input_ids"][batch["attention_mask"] == 0] = 2
    with (
        Engine(llama, memory="4MiB") as engine,
        pytest.raises(ValueError, match="Pass attention_mask"),
    ):
        engine.generate(**options, max_new_tokens=1)


def test_texts_that_begin_with_eos_are_not_padded(
    llama: PreTrainedModel,
) -> None:
    prompts = torch.tensor([[2, 5, 6], [2, 8, 9]])
    with Engine(llama, memory="4MiB") as engine:
        outputs = engine.generate(prompts, pad_token_id=2, max_new_tokens=1)
    assert [output.prompt_token_ids for output in outputs] == prompts.tolist()


@pytest.mark.parametrize(
    ("prompts", "mask", "message"),
    [
        (
            torch.tensor([[5, 6, 7]]),
            torch.tensor([[1, 0, 1]]),
            "padding between tokens of a prompt",
        ),
        (torch.tensor([[5, 0, 7], [5, 6, 7]]), None, "padding between tokens of a prompt"),
        (torch.tensor([[5, 6, 7]]), torch.tensor([[0, 0, 0]]), "empty"),
        (torch.tensor([[5, 6, 7]]), torch.tensor([[0, 2, 1]]), "ones for tokens"),
        (torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1]]), "expected shape"),
        (torch.tensor([[5, 6, 7]]), torch.ones(1, 1, 3, 3), "expected shape"),
        (torch.tensor([[5, 6, 7]]), torch.ones(2, 3), "got 2 rows"),
        (BatchEncoding({"input_ids": [[5]], "attention_mask": [[1]]}), [[1]], "Leave out"),
        (BatchEncoding({"input_ids": [[5]], "pixel_values": [[1.0]]}), None, "pixel_values"),
        (BatchEncoding({"input_ids": [[5]], "position_ids": [[1]]}), None, "position_ids"),
    ],
)
def test_masks_and_inputs_that_cannot_be_followed_are_refused(
    llama: PreTrainedModel, prompts: Any, mask: Any, message: str
) -> None:
    with Engine(llama, memory="4MiB") as engine, pytest.raises(ValueError, match=message):
        engine.generate(prompts, attention_mask=mask, max_new_tokens=1)


@pytest.mark.parametrize(
    "prompts",
    [
        "text",
        3,
        ["text"],
        [5, 6],
        torch.tensor([5, 6]),
        {"ids": [[5]]},
        {"input_ids": [5]},
        [[5.5]],
    ],
)
def test_what_are_no_prompts_is_refused(llama: PreTrainedModel, prompts: Any) -> None:
    with Engine(llama, memory="4MiB") as engine, pytest.raises(TypeError):
        engine.generate(prompts, max_new_tokens=1)


def test_a_misspelt_setting_is_answered_with_the_closest_name(llama: PreTrainedModel) -> None:
    with Engine(llama, memory="4MiB") as engine:
        with pytest.raises(ValueError, match=r"max_tokens: .*Did you mean max_new_tokens\?"):
            engine.submit([1, 2], max_tokens=3)
        with pytest.raises(ValueError, match=r"stop: .*Did you mean stop_strings\?$"):
            engine.submit([1, 2], stop=["e"])
        with pytest.raises(ValueError, match=r"n: .*Did you mean num_return_sequences\?$"):
            engine.submit([1, 2], n=2)
        for name in ("presence_penalty", "frequency_penalty"):
            with pytest.raises(ValueError, match=name + r": not among the settings of a \w+\.$"):
                engine.submit([1, 2], **{name: 0.5})


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("max_new_token", "max_new_tokens"),
        ("priorty", "priority"),
        ("namspace", "namespace"),
        ("atention_mask", "attention_mask"),
        ("time_out", "timeout"),
    ],
)
def test_a_misspelt_argument_of_submit_is_answered_with_its_name(
    llama: PreTrainedModel, wrong: str, meant: str
) -> None:
    expected = pytest.raises(ValueError, match=rf"^{wrong}: .*Did you mean {meant}\?$")
    with Engine(llama, memory="4MiB") as engine, expected:
        engine.submit([1, 2], **{wrong: 1})


def test_an_argument_of_submit_is_no_sampling_setting(llama: PreTrainedModel) -> None:
    expected = pytest.raises(ValueError, match=r"^seed: .* Pass seed to submit or generate\.$")
    with Engine(llama, memory="4MiB") as engine, expected:
        engine.sampling_settings(seed=1)


@pytest.mark.parametrize("prompt", ["The with", ["The with"], ("The", "with")])
def test_a_prompt_of_text_is_to_be_tokenized_first(llama: PreTrainedModel, prompt: Any) -> None:
    refused = pytest.raises(TypeError, match=r"expected token ids, got .*\. Tokenize it first\.$")
    with Engine(llama, memory="4MiB") as engine, refused:
        engine.submit(prompt)


def test_submit_takes_one_prompt(llama: PreTrainedModel) -> None:
    with Engine(llama, memory="4MiB") as engine, pytest.raises(ValueError, match=r"Use generate"):
        engine.submit(np.array([[5, 6], [7, 8]]))


def test_generate_on_a_paged_cache_takes_the_padding_off(llama: PreTrainedModel) -> None:
    batch = padded("left")
    expected = [
        llama.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        for prompt in without_padding(batch)
    ]
    with kvpager.patch(llama, memory="4MiB"):
        found = llama.generate(
            **batch, max_new_tokens=8, do_sample=False, cache_implementation="paged"
        )[0]
    assert found[:, : batch["input_ids"].shape[1]].tolist() == batch["input_ids"].tolist()
    assert found[:, batch["input_ids"].shape[1] :].tolist() == [row.tolist() for row in expected]
