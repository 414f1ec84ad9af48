"""generate under a patch attends with the native CPU kernel, and writes the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvpager
from kvpager.integrations.huggingface.cache import paged_view
from kvpager.kernels import backends, reference
from kvpager.kernels.cpu.attention import PagedAttention
from kvpager.ops import AttentionArgs, attend
from kvpager.testing import tiny_llama_path
from tests.support import tiny_models
from tests.support.tiny_models import assert_equal_but_for_near_ties

PROMPTS = ["This method ", "When an instance of the class ", "An exception "]


@pytest.fixture
def kernel() -> PagedAttention:
    chosen = backends.select("paged_attention", torch.device("cpu"))
    if not isinstance(chosen, PagedAttention):
        pytest.skip(backends.active()["cpu"]["paged_attention"].reason)
    return chosen


def load(dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_path(), dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_path(), padding_side="left")
    inputs = tokenizer(PROMPTS, add_special_tokens=False, padding=True, return_tensors="pt")
    return model, inputs


def generate(model: Any, inputs: Any, **options: Any) -> Any:
    return model.generate(
        **inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_read_of_generate_is_the_native_kernels(
    kernel: PagedAttention, dtype: torch.dtype
) -> None:
    model, inputs = load(dtype)
    expected = generate(model, inputs)
    with kvpager.patch(model) as patch:
        before = kernel.num_calls
        paged = generate(model, inputs)
        stats = patch.stats()
    layers, steps = model.config.num_hidden_layers, 8
    assert kernel.num_calls - before == stats.in_place_reads == layers * steps
    assert stats.gathers == 0
    if dtype == torch.float32:
        assert torch.equal(paged.sequences, expected.sequences)
    else:
        assert_equal_but_for_near_ties(paged, expected, inputs.input_ids.shape[1])


@pytest.mark.parametrize(("name", "kinds"), [("llama", 1), ("gemma3", 2)])
def test_layers_of_one_kind_share_their_attention_arguments(
    name: str, kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[AttentionArgs] = []

    def recording(query: Tensor, caches: Any, args: Any, **options: Any) -> Any:
        read.append(args)
        return attend(query, caches, args, **options)

    monkeypatch.setattr(paged_view, "attend_in_place", recording)
    model = tiny_models.tiny_model(name)
    with kvpager.patch(model):
        # No longer than the window: the end of a longer prompt is stored, and read dense.
        generate(model, tiny_models.prompts([5, 7, 3]), min_new_tokens=8)
    layers, steps = model.config.num_hidden_layers, 8
    assert len(read) == layers * steps
    for step in range(steps):
        mine = read[step * layers : (step + 1) * layers]
        if step:  # masks of prompts are large, so their arguments are not kept
            assert len({id(args) for args in mine}) == kinds
        assert len({id(args.block_tables) for args in mine}) == kinds
        assert len({id(args.seq_lens) for args in mine}) == kinds
    # `read` keeps them all, so no two have one id by chance.
    assert len({id(args.seq_lens) for args in read}) == kinds * steps


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_tokens_do_not_depend_on_the_number_of_threads(
    kernel: PagedAttention, threads: int
) -> None:
    model, inputs = load(torch.float32)
    expected = generate(model, inputs, num_beams=3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with kvpager.patch(model):
            assert torch.equal(generate(model, inputs, num_beams=3).sequences, expected.sequences)
    finally:
        torch.set_num_threads(before)


def test_reference_kernels_serve_the_same_tokens(
    kernel: PagedAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = load(torch.float32)
    with kvpager.patch(model):
        native = generate(model, inputs)
    for operation in ("append_kv", "copy_blocks", "gather_kv", "paged_attention"):
        replacement = (getattr(reference, operation), "the reference")
        monkeypatch.setitem(backends._registered, (operation, "cpu"), replacement)
    before = kernel.num_calls
    with kvpager.patch(model):
        assert torch.equal(generate(model, inputs).sequences, native.sequences)
    assert kernel.num_calls == before
