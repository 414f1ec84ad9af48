"""Batches whose prompts are known to unlike lengths compute what is new, and little more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cache_name import cache_of, passing

transformers = pytest.importorskip("transformers")

import kvpager  # noqa: E402
from kvpager.integrations.huggingface.prefix.prefill_batches import PASS_TOKENS, prefill_batches  # noqa: E402
from tests.support import tiny_models  # noqa: E402

PROMPTS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 3), st.integers(1, 400)),
    min_size=1,
    max_size=9,
)


def ids_of(stem: int, stem_length: int, leaf: int, leaf_length: int) -> Any:
    """A prompt of a stem, repeated 20 times, and a leaf."""
    return np.concatenate(
        [np.full(20 * stem_length, stem, np.int32), np.full(leaf_length, 10 + leaf, np.int32)]
    )


def cost(passes: list[Any], new: Any) -> int:
    return sum(len(rows) * int(new[rows].max()) + PASS_TOKENS for rows in passes)


@given(shapes=PROMPTS, seed=st.integers(0, 99))
def test_every_row_runs_once_at_most_at_single_pass_cost(shapes: list[Any], seed: int) -> None:
    prompts = [ids_of(*shape) for shape in shapes]
    lengths = np.array([len(prompt) for prompt in prompts])
    known = np.random.default_rng(seed).integers(0, lengths)
    passes = prefill_batches(prompts, known)
    assert sorted(np.concatenate(passes)) == list(range(len(prompts)))
    # What rows of earlier passes computed is known to later ones.
    new, done = lengths - known, []
    for rows in passes:
        for row in rows:
            common = [_common(prompts[row], prompts[other]) for other in done]
            new[row] = min(new[row], lengths[row] - min(max([0, *common]), lengths[row] - 1))
        done.extend(rows)
    assert cost(passes, new) <= cost([np.arange(len(prompts))], lengths - known)


def _common(one: Any, other: Any) -> int:
    length = min(len(one), len(other))
    return int(np.cumprod(one[:length] == other[:length]).sum())


def test_rows_with_similar_prefixes_share_passes_longest_first() -> None:
    prompts = [np.full(2000, row, np.int32) for row in range(4)]
    passes = prefill_batches(prompts, np.array([1990, 0, 1980, 10]))
    assert [rows.tolist() for rows in passes] == [[1, 3], [0, 2]]


def test_one_of_those_that_begin_alike_goes_ahead() -> None:
    stems = [np.full(2000, stem, np.int32) for stem in (0, 0, 1, 1, 0)]
    prompts = [np.append(stem, np.int32(10 + row)) for row, stem in enumerate(stems)]
    passes = prefill_batches(prompts, np.zeros(5, np.int64))
    assert [rows.tolist() for rows in passes] == [[0, 2], [1, 3, 4]]


def test_short_prompts_are_not_worth_a_second_pass() -> None:
    prompts = [np.arange(20, dtype=np.int32) for _ in range(4)]
    assert [rows.tolist() for rows in prefill_batches(prompts, np.zeros(4, np.int64))] == [
        [0, 1, 2, 3]
    ]


def batch(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    columns = max(map(len, rows))
    pad = [torch.full((columns - len(row),), tiny_models.PAD) for row in rows]
    mask = [torch.cat([torch.zeros(columns - len(row)), torch.ones(len(row))]) for row in rows]
    ids = [torch.cat(pair) for pair in zip(pad, rows, strict=True)]
    return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask).long()}


def random_ids(length: int, seed: int) -> torch.Tensor:
    return tiny_models.prompts([length], seed=seed)["input_ids"][0]


MODES: list[dict[str, Any]] = [
    {},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 2},
]


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3"])
@pytest.mark.parametrize("options", MODES, ids=["greedy", "beams", "sampled"])
def test_a_mixed_batch_computes_only_its_new_tokens(name: str, options: dict[str, Any]) -> None:
    model = tiny_models.tiny_model(name)
    stem, other = random_ids(600, seed=1), random_ids(500, seed=2)
    rows = [torch.cat([stem, random_ids(n, seed=n)]) for n in (5, 20)] + [other, other[:9]]
    inputs = batch(rows)

    def tokens() -> Any:
        torch.manual_seed(3)
        return model.generate(
            **inputs, **{"max_new_tokens": 12, "eos_token_id": None, "do_sample": False, **options}
        )

    expected, computed = tokens(), tiny_models.Computed(model)
    with kvpager.patch(model, prefix_cache=True) as patch:
        model.generate(stem[None], max_new_tokens=2, do_sample=False)
        with computed:
            assert torch.equal(tokens(), expected)
        # 500 of `other`, 9 of its beginning, and what follows the 592 tokens of the stem's blocks.
        assert computed.tokens <= 500 + 3 * 32
        with computed:
            assert torch.equal(tokens(), expected)
        assert computed.tokens <= 4 * 32
        for pool in patch.memory.pools():
            pool.settle()
            pool.manager.check()
            assert pool.manager.num_held_blocks == 0


def test_a_prompt_shared_by_rows_is_computed_once() -> None:
    model = tiny_models.tiny_model("llama")
    stem = random_ids(640, seed=1)
    inputs = batch([torch.cat([stem, random_ids(n, seed=n)]) for n in (5, 20, 9, 14)])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    computed = tiny_models.Computed(model)
    with kvpager.patch(model, prefix_cache=True):
        assert torch.equal(model.generate(**inputs, **options), expected)
    assert computed.tokens <= 660 + 3 * 32


def test_what_was_computed_in_passes_can_be_continued() -> None:
    model = tiny_models.tiny_model("llama")
    stem = random_ids(640, seed=1)
    inputs = batch([torch.cat([stem, random_ids(n, seed=n)]) for n in (5, 20, 9)])

    def turns() -> list[torch.Tensor]:
        options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
        first = model.generate(**inputs, return_dict_in_generate=True, **options)
        said = torch.cat([first.sequences, random_ids(6, seed=8).expand(3, -1)], dim=1)
        pad = said.shape[1] - inputs["attention_mask"].shape[1]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, pad), value=1)
        cache = cache_of(first)
        return [said, model.generate(said, attention_mask=mask, **passing(cache), **options)]

    expected = turns()
    with kvpager.patch(model, prefix_cache=True):
        found = turns()
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    model = tiny_models.tiny_model("llama")
    stem = random_ids(640, seed=1)
    inputs = batch([torch.cat([stem, random_ids(n, seed=n)]) for n in (5, 20, 9)])
    token_bytes = 2 * 2 * 2 * 16 * 4
    with kvpager.patch(model, prefix_cache=True, memory=700 * token_bytes) as patch:
        with pytest.raises(kvpager.OutOfBlocks):
            model.generate(**inputs, max_new_tokens=60, eos_token_id=None, do_sample=False)
        for pool in patch.memory.pools():
            pool.settle()
            pool.manager.check()
            assert pool.manager.num_held_blocks == 0


def test_replies_after_several_passes_are_kept_per_row() -> None:
    model = tiny_models.tiny_model("llama")
    stem = random_ids(640, seed=1)
    rows = [torch.cat([stem, random_ids(n, seed=n)]) for n in (40, 5, 20)]
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    replies = model.generate(**batch(rows), **options)
    turns = [
        torch.cat([reply[-(len(row) + 40) :], random_ids(3, seed=7)])
        for row, reply in zip(rows, replies, strict=True)
    ]
    expected = [model.generate(turn[None], **options) for turn in turns]
    with kvpager.patch(model, prefix_cache=True) as patch:
        assert torch.equal(model.generate(**batch(rows), **options), replies)
        for turn, plain in zip(turns, expected, strict=True):
            before = patch.stats().prefix_hit_tokens
            assert torch.equal(model.generate(turn[None], **options), plain)
            # All but the last block or two: the reply was found as well.
            assert patch.stats().prefix_hit_tokens - before >= len(turn) - 24
