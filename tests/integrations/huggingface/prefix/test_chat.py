"""Turns of a chat: with a prefix cache, a reply is known when the history comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.cache_name import cache_of, passing

transformers = pytest.importorskip("transformers")

import kvpager  # noqa: E402
from tests.support import tiny_models  # noqa: E402

BLOCK = 16
QUESTION = 5  # tokens of a question


def random_ids(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny_models.VOCAB, shape, generator=generator)


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    torch.manual_seed(0)
    options = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None, **options}
    mask = torch.ones_like(ids) if mask is None else mask
    tokens: Tensor = model.generate(ids, attention_mask=mask, **options)
    return tokens


def hits(patch: Any, call: Any) -> tuple[Tensor, int]:
    """Return the result of the call, and the number of cached prompt tokens."""
    before = patch.stats().prefix_hit_tokens
    return call(), patch.stats().prefix_hit_tokens - before


def turns(model: Any, first: Tensor, count: int, **options: Any) -> list[Tensor]:
    """Every turn sends all that was said, and a question."""
    said, outputs = first, []
    for turn in range(count):
        said = generate(model, said, **options)
        outputs.append(said)
        question = random_ids(len(said), QUESTION, seed=10 + turn)
        said = torch.cat([said, question], dim=1)
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sample"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_a_turn_computes_the_question_and_gives_the_same_tokens(
    name: str, rows: int, options: dict[str, Any]
) -> None:
    model, first = tiny_models.tiny_model(name), random_ids(rows, 21, seed=1)
    plain = turns(model, first, 3, **options)
    with kvpager.patch(model, prefix_cache=True, memory="64MiB") as patch:
        said = first
        for turn, expected in enumerate(plain):
            said, cached = hits(patch, lambda said=said: generate(model, said, **options))
            assert torch.equal(said, expected)
            if turn:
                # All full blocks of what was computed: the last token of a reply never was.
                computed = plain[turn - 1].shape[1] - 1
                assert cached == rows * (computed // BLOCK * BLOCK)
            question = random_ids(rows, QUESTION, seed=10 + turn)
            said = torch.cat([said, question], dim=1)


def test_rows_that_ended_early_and_padded_rows_are_known_too() -> None:
    model, inputs = tiny_models.tiny_model("llama"), tiny_models.prompts([21, 9, 34])
    free = generate(model, inputs["input_ids"], inputs["attention_mask"])
    ends = int(free[1, 40])  # where the second row ends from now on, and perhaps others
    options = {"eos_token_id": ends, "max_new_tokens": 40}

    def second_turn() -> tuple[Tensor, Tensor]:
        first = generate(model, inputs["input_ids"], inputs["attention_mask"], **options)
        reply = first.shape[1] - inputs["input_ids"].shape[1]
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, reply + QUESTION).long()], dim=1)
        question = random_ids(3, QUESTION, seed=2)
        return first, generate(model, torch.cat([first, question], dim=1), mask, **options)

    expected = second_turn()
    with kvpager.patch(model, prefix_cache=True, memory="64MiB") as patch:
        found, cached = hits(patch, second_turn)
    assert all(map(torch.equal, found, expected))
    assert cached > 0


def test_each_of_several_samples_may_be_gone_on_with() -> None:
    model, prompt = tiny_models.tiny_model("llama"), random_ids(1, 30, seed=3)
    options = {"do_sample": True, "num_return_sequences": 3}
    with kvpager.patch(model, prefix_cache=True, memory="64MiB") as patch:
        samples = generate(model, prompt, **options)
        assert len(samples.unique(dim=0)) == 3
        for sample in samples:
            _, cached = hits(patch, lambda sample=sample: generate(model, sample[None]))
            assert cached == 64  # of 30 + 39 tokens that were computed


def edited(model: Any, said: Tensor, cache: Any) -> Tensor:
    """Another last token than the one that was chosen."""
    other = said.clone()
    other[0, -1] = 50
    return go_on(model, other, cache)


def with_a_gap(model: Any, said: Tensor, cache: Any) -> Tensor:
    mask = torch.ones_like(said)
    mask[0, 3:18] = 0
    return go_on(model, said, cache, attention_mask=mask)


def elsewhere(model: Any, said: Tensor, cache: Any) -> Tensor:
    return go_on(model, said, cache, position_ids=torch.arange(said.shape[1])[None] + 50)


def embedded(model: Any, said: Tensor, cache: Any) -> Tensor:
    embeddings = torch.randn(1, said.shape[1], 64, generator=torch.Generator().manual_seed(5)) * 3
    go_on(model, said, cache, inputs_embeds=embeddings)
    return said


def by_another_model(model: Any, said: Tensor, cache: Any) -> Tensor:
    other = tiny_models.tiny_model("llama", seed=5)
    with kvpager.patch(other, prefix_cache=True):
        return go_on(other, said, cache)


def by_hand(model: Any, said: Tensor, cache: Any) -> Tensor:
    extra = random_ids(1, 40, seed=6)
    with torch.no_grad():
        model(extra, **passing(cache), position_ids=torch.arange(500, 540)[None])
    return go_on(model, torch.cat([said[:, :-1], extra, extra[:, :1]], dim=1), cache)


def go_on(model: Any, said: Tensor, cache: Any, **options: Any) -> Tensor:
    tokens: Tensor = model.generate(
        said, **passing(cache), max_new_tokens=24, do_sample=False, eos_token_id=None,
        **options,
    )  # fmt: skip
    return tokens


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize(
    "continued", [edited, with_a_gap, elsewhere, embedded, by_another_model, by_hand]
)
def test_a_cache_that_is_gone_on_with_teaches_nothing(continued: Any) -> None:
    model, prompt = tiny_models.tiny_model("llama"), random_ids(1, 21, seed=4)
    with kvpager.patch(model, prefix_cache=True, memory="64MiB") as patch:
        result = model.generate(
            prompt, max_new_tokens=9, do_sample=False, eos_token_id=None,
            return_dict_in_generate=True,
        )  # fmt: skip
        said = result.sequences
        later = continued(model, said.clone(), cache_of(result))
        # As it was edited, and as the true reply would have gone on.
        asked = [later, torch.cat([said[:, -1:], later[:, said.shape[1] :]], dim=1)]
        asked[1] = torch.cat([said[:, :-1], asked[1]], dim=1)
        found = [hits(patch, lambda ids=ids: generate(model, ids)) for ids in asked]
    assert found[0][1] <= 16  # of the 29 tokens that the first call computed
    for ids, (tokens, _) in zip(asked, found, strict=True):
        assert torch.equal(tokens, generate(model, ids))


def test_a_reply_whose_model_changed_meanwhile_is_not_kept() -> None:
    model, prompt = tiny_models.tiny_model("llama"), random_ids(1, 21, seed=4)
    attention = model.model.layers[0].self_attn

    def meddle(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == 24:
            attention.scaling *= 5
        return scores

    with kvpager.patch(model, prefix_cache=True, memory="64MiB") as patch:
        said = generate(model, prompt, logits_processor=[meddle])
        attention.scaling /= 5
        tokens, cached = hits(patch, lambda: generate(model, said))
    assert cached <= 16
    assert torch.equal(tokens, generate(model, said))


def test_a_reply_in_one_namespace_is_unknown_in_another() -> None:
    model, prompt = tiny_models.tiny_model("llama"), random_ids(1, 21, seed=4)
    with kvpager.patch(model, prefix_cache=True, memory="64MiB") as patch:
        with patch.namespace("a"):
            first = model.generate(
                prompt, max_new_tokens=9, do_sample=False, eos_token_id=None,
                return_dict_in_generate=True,
            )  # fmt: skip
        with patch.namespace("b"):
            said = go_on(model, first.sequences, cache_of(first))
        with patch.namespace("a"):
            _, cached = hits(patch, lambda: generate(model, said))
    assert cached <= 16


def test_a_temporarily_shortened_model_reuses_nothing() -> None:
    model, prompt = tiny_models.tiny_model("llama"), random_ids(1, 50, seed=4)
    expected = generate(model, prompt)
    with kvpager.patch(model, prefix_cache=True, memory="64MiB"):
        model.config.num_hidden_layers = 1
        generate(model, prompt)
        model.config.num_hidden_layers = 2
        assert torch.equal(generate(model, prompt), expected)


def test_weights_that_change_between_turns_reuse_no_reply() -> None:
    model, first = tiny_models.tiny_model("llama"), random_ids(1, 30, seed=7)
    with kvpager.patch(model, prefix_cache=True, memory="64MiB") as patch:
        said = generate(model, first)
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(0.5)
        after, cached = hits(patch, lambda: generate(model, said))
    assert cached == 0
    assert torch.equal(after, generate(model, said))


def test_a_streamer_hears_every_token() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.heard: list[Tensor] = []
            self.ended = False

        def put(self, tokens: Tensor) -> None:
            self.heard.append(tokens.reshape(-1))

        def end(self) -> None:
            self.ended = True

    model, prompt = tiny_models.tiny_model("llama"), random_ids(1, 30, seed=8)
    streamer = Streamer()
    with kvpager.patch(model, prefix_cache=True):
        tokens = generate(model, prompt, streamer=streamer)
    assert torch.equal(torch.cat(streamer.heard), tokens[0])
    assert streamer.ended


def test_without_a_prefix_cache_nobody_listens() -> None:
    model, prompt = tiny_models.tiny_model("llama"), random_ids(1, 30, seed=9)
    with kvpager.patch(model):
        result = model.generate(prompt, max_new_tokens=4, return_dict_in_generate=True)
        assert cache_of(result).groups[0].prompt is None
