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


def test_gpu_models_with_attention_of_their_own_read_mapped_blocks() -> None:
    pytest.importorskip("cuda.bindings.driver", reason="kvpager[virtual] is not installed")
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    # 8 KiB per token in float32: 256 tokens are a page of a GPU.
    config = BloomConfig(vocab_size=99, hidden_size=256, n_layer=4, n_head=4)
    model = BloomForCausalLM(config).to("cuda").eval()
    ids = torch.randint(4, 99, (3, 300), device="cuda")
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with kvpager.patch(model, mode="virtual", block_size=256) as patch:
        mapped = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        stats = patch.stats()
    assert torch.equal(mapped, expected)
    assert (stats.gathers, stats.in_place_reads > 0) == (0, True)
