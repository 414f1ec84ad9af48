"""A patch keeps retained prompts on the device, within its memory."""

from __future__ import annotations

from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("xxhash")

import kvpager  # noqa: E402
from kvpager.errors import KVPagerError, OutOfBlocks  # noqa: E402
from tests.support import tiny_models  # noqa: E402
from tests.support.llama_calls import generate  # noqa: E402

NUM_BLOCKS = 14  # of memory; a prompt of 100 tokens and its reply take 7
NUM_WHOLE = 96  # tokens of its full blocks


def inputs(seed: int = 0, length: int = 100) -> Any:
    return tiny_models.prompts([length], seed=seed)


def tokens(seed: int = 0) -> list[int]:
    found: list[int] = inputs(seed)["input_ids"][0].tolist()
    return found


def patched(model: Any, **options: Any) -> kvpager.Patch:
    return kvpager.patch(model, prefix_cache=True, tiers=["host:1MiB"], **options)


@pytest.fixture
def memory(model: Any) -> int:
    """The bytes of a pool of `NUM_BLOCKS` blocks."""
    with patched(model) as patch:
        generate(model, inputs())
        opened = patch.prompt_tiers
        assert opened is not None
        return NUM_BLOCKS * opened._pool.block_bytes


def hits(model: Any, patch: kvpager.Patch, seed: int = 0) -> int:
    """Return how many tokens of a prompt a call finds."""
    before = patch.stats().prefix_hit_tokens
    generate(model, inputs(seed))
    return patch.stats().prefix_hit_tokens - before


def test_a_retained_prompt_stays_while_others_leave(model: Any, memory: int) -> None:
    with patched(model, memory=memory) as patch:
        patch.tiers.limit("acme", capacity="1MiB")
        generate(model, inputs())
        with patch.tiers.retain(tokens()) as retained:
            assert retained.num_tokens >= NUM_WHOLE
            for seed in (1, 2, 3):
                hits(model, patch, seed)
            assert patch.prompt_tiers is not None
            num_fetched = patch.prompt_tiers._fetched.total()
            assert hits(model, patch) >= NUM_WHOLE
            assert patch.prompt_tiers._fetched.total() == num_fetched
        assert retained.num_tokens == 0


def test_a_call_without_room_beside_it_says_so(model: Any, memory: int) -> None:
    with patched(model, memory=memory) as patch:
        generate(model, inputs())
        with patch.tiers.retain(tokens()), pytest.raises(OutOfBlocks, match="retained"):
            generate(model, inputs(1, 200))
        assert len(generate(model, inputs(1, 200)).sequences)


def test_the_end_of_tiers_releases_retained_prompts(model: Any) -> None:
    with patched(model) as patch:
        generate(model, inputs())
        first = patch.tiers.retain(tokens())
        patch.clear_prefix_cache()
        assert first.num_tokens == 0
        assert patch.tiers.retain(tokens()).num_tokens == 0
    with patched(model) as patch:
        generate(model, inputs())
        second = patch.tiers.retain(tokens())
        tiers = patch.tiers
    assert second.num_tokens == 0
    second.release()
    with pytest.raises(KVPagerError):
        tiers.retain(tokens())


def test_each_namespace_retains_its_own_prompts(model: Any) -> None:
    with patched(model) as patch:
        with patch.namespace("acme"):
            generate(model, inputs())
            assert patch.tiers.retain(tokens()).num_tokens >= NUM_WHOLE
        assert patch.tiers.retain(tokens()).num_tokens == 0
        acme = patch.tiers.retain(tokens(), namespace="acme")
        assert acme.num_tokens >= NUM_WHOLE
        patch.tiers.forget("acme")
        assert acme.num_tokens == 0
