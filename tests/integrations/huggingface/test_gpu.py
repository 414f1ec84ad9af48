"""Generation through paged blocks on a GPU, against transformers' own cache there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import kvpager
from kvpager.testing import tiny_llama_path
from tests.support.tiny_models import assert_equal_but_for_near_ties

pytestmark = pytest.mark.gpu

PROMPTS = ["This method ", "When an instance of the class ", "An exception "]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True},
    "chunked_prefill": {"do_sample": False, "prefill_chunk_size": 5},
}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest) -> Any:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tiny_llama_path(), dtype=request.param)
    return loaded.to("cuda").eval()


@pytest.fixture(scope="module")
def inputs() -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_path(), padding_side="left")
    return tokenizer(PROMPTS, add_special_tokens=False, padding=True, return_tensors="pt").to(
        "cuda"
    )


def generate(model: Any, inputs: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(
        **inputs, max_new_tokens=48, return_dict_in_generate=True, output_logits=True, **options
    )


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_transformers(model: Any, inputs: Any, mode: str) -> None:
    expected = generate(model, inputs, **MODES[mode])
    with kvpager.patch(model) as patch:
        paged = generate(model, inputs, **MODES[mode])
        assert patch.stats().gathers == 0
    if model.dtype == torch.float32:
        assert torch.equal(paged.sequences, expected.sequences)
    elif mode in ("greedy", "chunked_prefill"):
        assert_equal_but_for_near_ties(paged, expected, inputs.input_ids.shape[1])


def test_dropping_the_cache_gives_its_memory_back(model: Any, inputs: Any) -> None:
    with kvpager.patch(model) as patch:
        output = generate(model, inputs)
        assert patch.stats().num_held_blocks > 0
        del output
        assert patch.stats().reserved_bytes == 0
