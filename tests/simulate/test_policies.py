"""Baseline policies follow their papers, and survive any traffic."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest

from kvpager import BlockManager
from kvpager.simulate.policies import BASELINES
from kvpager.simulate.replay import number_prefixes
from tests.simulate.references import arc, s3_fifo, two_q

References = Callable[[Iterable[int], int, int], int]
REFERENCES: dict[str, References] = {"s3-fifo": s3_fifo, "arc": arc, "2q": two_q}


def skewed(seed: int, count: int = 3000) -> list[int]:
    """Return popular keys that change over time, single keys, and a scan."""
    random = np.random.default_rng(seed)
    popular = np.minimum(random.zipf(1.2, count), 400) + np.arange(count) // 500 * 60
    keys = np.where(random.random(count) < 0.3, 10_000 + np.arange(count), popular)
    keys[1000:1300] = np.arange(300) + 50_000
    keys[1500:1800] = np.arange(300) + 50_000
    return keys.tolist()


def hits_of(name: str, keys: list[int], size: int) -> int:
    policy, hits = BASELINES[name](size), 0
    manager = BlockManager(size, 1, eviction=policy)
    for (key,) in number_prefixes("", ([key] for key in keys)).prompts:
        sequence = manager.allocate(np.array([key, 2**31 - 1]))
        hits += sequence.num_cached_tokens
        manager.commit(sequence, 1)
        manager.free(sequence)
    assert manager._state.evictor.policy.in_charge is policy
    return hits


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("size", [2, 40, 200])
def test_baseline_hits_like_the_algorithm_of_its_paper(name: str, size: int) -> None:
    keys = skewed(seed=size)
    assert hits_of(name, keys, size) == REFERENCES[name](keys, size, size - 1)


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("name", BASELINES)
def test_baseline_survives_prompts_of_many_blocks(name: str) -> None:
    random = np.random.default_rng(3)
    policy = BASELINES[name](24)
    manager = BlockManager(24, 1, eviction=policy)
    for _ in range(400):
        prompt = np.minimum(random.zipf(1.5, random.integers(1, 20)), 5)
        sequence = manager.allocate(prompt)
        manager.commit(sequence)
        manager.free(sequence)
        manager.check()
    assert manager._state.evictor.policy.in_charge is policy
