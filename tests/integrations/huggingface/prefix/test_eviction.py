"""Which cached blocks leave first: the policy that `patch` was given decides, in every pool."""

from __future__ import annotations

from typing import Any

import pytest

from kvpager.blocks.policies import LRU, POLICIES

transformers = pytest.importorskip("transformers")

import kvpager  # noqa: E402
from kvpager.integrations.huggingface.patching.handle import active  # noqa: E402
from tests.support import tiny_models  # noqa: E402

ROOM = "128KiB"  # 15 blocks of the tiny llama


class Noting(LRU):
    """LRU that notes what it was made for, and how many blocks it gave up."""

    made: list[int]
    num_evicted: int

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.made.append(num_blocks)

    def forget(self, blocks: Any) -> None:
        type(self).num_evicted += len(blocks)
        super().forget(blocks)


@pytest.fixture(autouse=True)
def _nothing_noted() -> None:
    Noting.made, Noting.num_evicted = [], 0


def generate(model: Any, seed: int) -> None:
    prompt = tiny_models.prompts([100], seed=seed)
    model.generate(**prompt, do_sample=False, max_new_tokens=3, eos_token_id=None)


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_pool_runs_the_policy_named(name: str) -> None:
    llama, gpt2 = tiny_models.tiny_model("llama"), tiny_models.tiny_model("gpt2")
    with kvpager.patch(prefix_cache=True, eviction=name) as patch:
        generate(llama, 1)
        generate(gpt2, 1)
        policies = [pool.manager._state.evictor.policy for pool in patch.memory.pools()]
        assert [type(policy) for policy in policies] == [POLICIES[name]] * 2
        assert (f"eviction={name}" in repr(patch)) == (name != "lru")


def test_a_policy_of_ones_own_gives_blocks_up() -> None:
    model = tiny_models.tiny_model("llama")
    with kvpager.patch(model, prefix_cache=True, memory=ROOM, eviction=Noting) as patch:
        for seed in range(9):
            generate(model, seed)
        assert Noting.num_evicted == patch.stats().evicted_blocks > 0
        assert len(Noting.made) == 1


def test_continuous_batching_runs_the_policy_of_the_patch() -> None:
    model = tiny_models.tiny_model("llama")
    with kvpager.patch(model, eviction=Noting):
        config = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1)
        model.generate_batch([[5, 6, 7]], generation_config=config)
        assert len(Noting.made) == 1


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="eviction='newest': expected one of 'lru', "):
        kvpager.patch(eviction="newest")
    with pytest.raises(TypeError, match="eviction=3: expected a policy's name, or a function"):
        kvpager.patch(eviction=3)  # type: ignore[arg-type]
    assert not active
