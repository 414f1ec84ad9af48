"""The prefix index against a dictionary of prefixes, and the isolation of namespaces."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpager import BlockManager
from kvpager.blocks.policies import POLICIES
from kvpager.blocks.sequences import SequenceHandle

# Operations of the paired isolation test, over all policies; 1,000,000 is a good night's worth.
ISOLATION_OPERATIONS = 20_000


# -------------------------------------------------------------------- against a dictionary


def common(one: list[int], other: list[int]) -> int:
    agree = [a == b for a, b in zip(one, other, strict=False)]
    return agree.index(False) if False in agree else len(agree)


def expected(prefixes: Iterable[list[int]], prompt: list[int]) -> int:
    """The longest that a published prefix, and then part of one block, agree with `prompt`."""
    return max((common(prefix, prompt) for prefix in prefixes), default=0)


TREES = st.tuples(st.sampled_from([None, "a"]), st.sampled_from([None, "x"]))
HISTORY = st.lists(
    st.tuples(
        st.sampled_from(["publish", "grow", "free", "fork", "look"]),
        TREES,
        st.lists(st.integers(0, 1), max_size=14),
        st.integers(0, 99),
    ),
    max_size=30,
)


@settings(max_examples=150)
@given(HISTORY, st.sampled_from([1, 2, 4]), st.sampled_from(sorted(POLICIES)))
def test_what_is_found_is_what_a_dictionary_of_prefixes_says(
    history: list[tuple[str, tuple[str | None, str | None], list[int], int]],
    block_size: int,
    policy: str,
) -> None:
    manager = BlockManager(2000, block_size, eviction=policy)
    known: dict[tuple[str | None, str | None], list[list[int]]] = {}
    live: list[tuple[SequenceHandle, tuple[str | None, str | None], list[int]]] = []
    for what, tree, ids, number in history:
        named = {"namespace": tree[0], "lora": tree[1]}
        assert manager.match_prefix(ids, **named) == expected(known.get(tree, []), ids)
        if what == "publish":
            hit = expected(known.get(tree, []), ids[:-1])
            sequence = manager.allocate(ids, **named)
            assert sequence.num_cached_tokens == hit
            live.append((sequence, tree, list(ids)))
        elif live and what != "look":
            sequence, tree, tokens = live[number % len(live)]
            if what == "free":
                manager.free(sequence)
                live = [entry for entry in live if entry[0] is not sequence]
                continue
            if what == "fork":
                sequence, tokens = manager.fork(sequence), list(tokens)
                live.append((sequence, tree, tokens))
            manager.append(sequence, ids)
            tokens += ids
        if live and what != "look":
            sequence, tree, tokens = live[-1] if what != "grow" else live[number % len(live)]
            manager.commit(sequence)
            full = len(tokens) // block_size * block_size
            known.setdefault(tree, []).append(tokens[:full])
        manager.check()


# -------------------------------------------------------------------- isolation, by pairs


class Pairs:
    """Tenants of tiny alphabets side by side, and for each what its own history explains."""

    def __init__(self, policy: str, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.manager = BlockManager(48, 2, eviction=policy)
        self.trees = [(n, a) for n in (None, " ", "a", "ab") for a in (None, " ", "b", "ab")]
        self.published: dict[object, set[tuple[int, ...]]] = {tree: set() for tree in self.trees}
        self.live: list[SequenceHandle] = []
        self.numbers = count()

    def step(self) -> None:
        """A tenant's prompt comes: it hits no more than its own past explains, and then all."""
        manager, tree = self.manager, self.trees[self.random.integers(len(self.trees))]
        who = {"namespace": tree[0], "lora": tree[1]}
        ids = self.random.integers(0, 2, self.random.integers(1, 13)).tolist()
        if len(self.live) > 3:
            manager.free(self.live.pop(self.random.integers(len(self.live))))
        sequence = manager.allocate(ids, **who)
        hit = tuple(ids[: sequence.num_cached_tokens])
        assert not hit or hit in self.published[tree]
        evicted = manager.queries.num_evicted_blocks
        if self.random.integers(2):
            manager.commit(sequence)
            full = len(ids) // 2 * 2
            self.published[tree].update(tuple(ids[:end]) for end in range(1, full + 1))
            assert evicted == manager.queries.num_evicted_blocks
            assert manager.match_prefix(ids, **who) >= full
        self.probe(ids, tree)
        self.live.append(sequence)

    def probe(self, ids: list[int], tree: tuple[str | None, str | None]) -> None:
        """Check that a new namespace finds nothing, whatever its name."""
        fresh = f"{tree[0]}{next(self.numbers)}"
        for namespace, lora in ((fresh, tree[1]), (tree[0], fresh), (fresh, fresh)):
            found = self.manager.match_prefix(ids, namespace=namespace, lora=lora)
            assert found == 0


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("policy", POLICIES)
def test_no_tenant_ever_sees_what_another_did(policy: str) -> None:
    pairs = Pairs(policy, seed=1)
    for number in range(ISOLATION_OPERATIONS // len(POLICIES)):
        pairs.step()
        if number % 200 == 0:
            pairs.manager.check()
    assert pairs.manager.queries.num_evicted_blocks > 100
    assert pairs.manager.stats().total_prefix_hits > 100
