"""Models that insert columns before the prompt: the same tokens as unpatched."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")


peft = pytest.importorskip("peft")

from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402

import kvpager  # noqa: E402
from kvpager.integrations.huggingface.prefix import prefill, prompt_cache  # noqa: E402
from kvpager.integrations.huggingface.releases import cache_in, with_cache  # noqa: E402
from kvpager.testing import tiny_llama_path  # noqa: E402
from tests.support import tiny_models  # noqa: E402
from tests.support.wrapped_models import MODES, PATCHES, PEFT_CONFIGS, check_pools, tokens, tuned  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("options", PATCHES.values(), ids=PATCHES)
@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_a_tuned_model_writes_its_own_tokens(kind: str, options: dict[str, Any]) -> None:
    model = tuned(kind)
    expected = {mode: tokens(model, **of_mode) for mode, of_mode in MODES.items()}
    with kvpager.patch(model, **options) as patch:
        for mode, of_mode in MODES.items():
            tokens(model.get_base_model(), **of_mode)  # the same weights, without virtual tokens
            for _ in range(2):
                assert tokens(model, **of_mode) == expected[mode], mode
        check_pools(patch)


def test_a_soft_prompt_before_padded_prompts_on_the_bundled_model() -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_path()).eval()
    model = peft.get_peft_model(model, PEFT_CONFIGS["prompt tuning"]()).eval()
    expected = tokens(model)
    with kvpager.patch(model):
        assert tokens(model) == expected


class SoftPrompt:
    """Virtual tokens that a class puts before every prompt, unseen from outside."""

    unaware = False  # of what a cache holds already

    def forward(self: Any, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("position_ids", None)
        cache = cache_in(kwargs)
        count = int(os.environ.get("VIRTUAL_TOKENS", "5"))
        embeds = self.get_input_embeddings()(input_ids)
        rows = len(input_ids)
        if cache.get_seq_length() == 0 or (self.unaware and input_ids.shape[1] > 1):
            generator = torch.Generator().manual_seed(7)
            soft = torch.randn(1, count, embeds.shape[2], generator=generator)
            embeds = torch.cat([soft.expand(rows, -1, -1), embeds], dim=1)
        if attention_mask is not None:
            soft = torch.ones(rows, count, dtype=attention_mask.dtype)
            attention_mask = torch.cat([soft, attention_mask], dim=1)
        kwargs |= {"inputs_embeds": embeds, "attention_mask": attention_mask}
        return super().forward(**kwargs)  # type: ignore[misc]


def softly_prompted(name: str) -> PreTrainedModel:
    model = tiny_models.tiny_model(name)
    model.__class__ = type("Soft", (SoftPrompt, type(model)), {})
    return model


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("options", PATCHES.values(), ids=PATCHES)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_class_with_virtual_tokens_writes_its_own_tokens(
    name: str, options: dict[str, Any]
) -> None:
    model = softly_prompted(name)
    expected = {mode: tokens(model, **of_mode) for mode, of_mode in MODES.items()}
    with kvpager.patch(model, **options) as patch:
        for mode, of_mode in MODES.items():
            for _ in range(2):
                assert tokens(model, **of_mode) == expected[mode], mode
        check_pools(patch)


def test_later_virtual_tokens_do_not_follow_a_cached_prefix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = softly_prompted("llama")
    kind: Any = type(model)
    prompt, other = (tiny_models.prompts([300], seed=seed)["input_ids"] for seed in (1, 2))
    turns = {"input_ids": torch.cat([prompt[:, :200], other[:, :100]], dim=1)}
    kind.unaware = True
    # As if a known library had put the virtual tokens there.
    monkeypatch.setattr(prefill, "row_dependence", lambda model: None)
    monkeypatch.setattr(prompt_cache, "row_dependence", lambda model: None)
    with kvpager.patch(model, prefix_cache=True) as patch:
        monkeypatch.setenv("VIRTUAL_TOKENS", "0")  # which leaves no trace in the model
        tokens(model, {"input_ids": prompt})
        monkeypatch.delenv("VIRTUAL_TOKENS")
        paged = tokens(model, turns)
        assert patch.stats().prefix_hit_tokens == 200
        check_pools(patch)
    assert paged == tokens(model, turns)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_wrapper_may_use_another_cache(beams: int) -> None:
    model = tiny_models.tiny_model("llama")
    plain_class = type(model)

    class Elsewhere(plain_class):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if cache_in(kwargs).get_seq_length() == 0:
                kwargs = with_cache(kwargs, DynamicCache(config=self.config))
            return super().forward(*args, **kwargs)

    model.__class__ = Elsewhere
    expected = tokens(model, num_beams=beams)
    with kvpager.patch(model, prefix_cache=True):
        for _ in range(2):
            assert tokens(model, num_beams=beams) == expected


MASKS: dict[str, Any] = {
    "none": lambda mask: None,
    "padding shown": torch.ones_like,
    "padding shown in part": lambda mask: mask.index_fill(1, torch.tensor([3, 4]), 1),
    "more hidden": lambda mask: mask.index_fill(1, torch.tensor([20]), 0),
    "another length": lambda mask: torch.cat([torch.ones(len(mask), 5).long(), mask], dim=1),
}


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("options", PATCHES.values(), ids=PATCHES)
@pytest.mark.parametrize("change", MASKS.values(), ids=MASKS)
def test_a_wrapper_may_hide_other_columns(change: Any, options: dict[str, Any]) -> None:
    model = tiny_models.tiny_model("llama")

    class Masked(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, attention_mask=change(attention_mask), **kwargs)

    model.__class__ = Masked
    for mode in ({}, {"num_beams": 3}):
        expected = tokens(model, **mode)
        with kvpager.patch(model, **options) as patch:
            for _ in range(2):
                assert tokens(model, **mode) == expected
            check_pools(patch)


def test_drafts_of_an_assistant_with_virtual_tokens_are_unchanged() -> None:
    model, assistant = softly_prompted("llama"), tiny_models.tiny_model("llama", seed=1)
    prompt = tiny_models.prompts([17])
    expected = tokens(model, prompt, assistant_model=assistant)
    with kvpager.patch():
        assert tokens(model, prompt, assistant_model=assistant) == expected
