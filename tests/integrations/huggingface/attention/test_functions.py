"""The attention implementation `kvpager`: what `eager` and `sdpa` compute, paged or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers.modeling_utils import AttentionInterface  # noqa: E402

from kvpager import patch  # noqa: E402 - from here on the name is known
from tests.support import tiny_models  # noqa: E402

# Those that choose their attention by name; bloom and falcon have their own.
NAMED = [
    name
    for name in [*tiny_models.DECODERS, *tiny_models.ENCODER_DECODERS]
    if name not in ("bloom", "falcon")
]
# What neither reads blocks through handles nor has a cache of them: MLA expands its keys itself.
GATHERED = {"deepseek_v3"}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "chunked_prefill": {"prefill_chunk_size": 5},
}


def model_with(name: str, attention: str | None) -> Any:
    model = tiny_models.tiny_model(name, attention="eager")
    if attention is not None:
        model.set_attn_implementation(attention)
        assert model.config._attn_implementation == attention
    return model


def is_everywhere(model: Any) -> bool:
    """Return True if every part has the name: transformers 5.17 leaves out T5's stacks."""
    parts = [module.config for module in model.modules() if hasattr(module, "config")]
    return all(part._attn_implementation == "kvpager" for part in parts)


def generate(model: Any, **options: Any) -> Any:
    inputs = tiny_models.prompts([21, 9, 34])
    return model.generate(
        **inputs, max_new_tokens=10, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


def assert_same(found: Any, expected: Any, spread: float = 0.0) -> None:
    """Equal tokens; logits equal to 1e-5 of the largest, or to twice a `spread`."""
    assert torch.equal(found.sequences, expected.sequences)
    for logits, exact in zip(found.logits, expected.logits, strict=True):
        size = float(exact.abs().max())
        torch.testing.assert_close(logits, exact, rtol=0, atol=max(1e-5 * size, 2 * spread))


def spread_of_transformers(name: str, mode: str, expected: Any) -> float:
    """Return the difference between transformers' sdpa and eager: 2e-5 of the largest logit."""
    if name not in ("bart", "t5"):
        return 0.0
    other = generate(model_with(name, "sdpa"), **MODES[mode])
    pairs = zip(other.logits, expected.logits, strict=True)
    return max(float((logits - exact).abs().max()) for logits, exact in pairs)


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMED)
def test_it_reads_blocks_in_place_and_gives_what_eager_gives(name: str, mode: str) -> None:
    if mode == "chunked_prefill" and name in tiny_models.ENCODER_DECODERS:
        pytest.skip("transformers prefills encoder-decoders in one piece")
    expected = generate(model_with(name, None), **MODES[mode])
    model = model_with(name, "kvpager")
    with patch(model) as patched:
        found = generate(model, **MODES[mode])
        stats = patched.stats()
    assert_same(found, expected, spread_of_transformers(name, mode, expected))
    in_place = name not in GATHERED and is_everywhere(model)
    assert (stats.in_place_reads > 0, stats.gathers > 0) == (in_place, not in_place)


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "t5", "deepseek_v32"])
def test_without_paging_it_gives_what_eager_gives(name: str) -> None:
    expected = generate(model_with(name, None))
    assert_same(generate(model_with(name, "kvpager")), expected)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_gathered_keys_and_values_give_the_same(name: str) -> None:
    expected = generate(model_with(name, None))
    model = model_with(name, "kvpager")
    with patch(model, in_place=False) as patched:
        assert_same(generate(model), expected)
        assert patched.stats().in_place_reads == 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_gradients_are_those_of_eager(name: str) -> None:
    inputs = tiny_models.prompts([20, 20])
    gradients = []
    for attention in (None, "kvpager"):
        model = model_with(name, attention)
        with patch(model):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, exact in gradients[0].items():
        size = float(exact.abs().max())
        torch.testing.assert_close(gradients[1][parameter], exact, rtol=0, atol=2e-5 * size + 1e-9)


def test_dropout_is_applied_in_training_only() -> None:
    outputs = []
    for training in (True, True, False, False):
        model = model_with("gpt_oss", "kvpager").train(training)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        torch.manual_seed(len(outputs))
        outputs.append(model(**tiny_models.prompts([12])).logits)
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], outputs[3])


def test_the_name_stays_when_a_patch_is_undone() -> None:
    model = model_with("gemma2", "kvpager")
    patch(model).undo()
    assert "kvpager" in AttentionInterface().valid_keys()
    assert_same(generate(model), generate(model_with("gemma2", None)))
