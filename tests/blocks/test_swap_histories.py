"""Random histories of swaps: every token reads back."""

from __future__ import annotations

import random

import pytest

from kvpager import BlockManager, OutOfBlocks
from kvpager.errors import SequenceSwapped
from tests.support.manager_state import same_state, state_of
from tests.support.swap_memory import BLOCK_SIZE, Memory

NUM_STEPS = 5_000


def act(memory: Memory, chance: random.Random) -> None:
    """One random operation; a refusal must leave everything as it was."""
    manager = memory.manager
    live = list(memory.contents)
    rows = manager._state.rows
    here = [one for one in live if not rows.swapped[one._row]]
    some = chance.sample(live, min(len(live), chance.randint(1, 4)))
    resident = chance.sample(here, min(len(here), chance.randint(1, 3)))
    at_most = chance.choice([None, None, 0, 1, 2, 5])
    operation = chance.choices(
        ["allocate", "fork", "append", "commit", "truncate", "out", "in", "free", "drop"],
        [4, 3, 8, 5, 2, 4, 5, 3, 0.3],
    )[0]
    before = state_of(manager)
    try:
        if operation == "allocate" and len(live) < 7:
            # Few different tokens, so that prompts agree often.
            ids = [chance.randint(0, 1) for _ in range(chance.randint(0, 18))]
            memory.allocate(ids, chance.choice([None, None, "a"]))
        elif operation == "fork" and here and len(live) < 7:
            memory.fork(resident[0])
        elif operation == "append" and here:
            ids = [[chance.randint(0, 1) for _ in range(chance.randint(0, 5))] for _ in resident]
            memory.append(resident, ids)
        elif operation == "commit" and here:
            manager.commit(resident)
        elif operation == "truncate" and here:
            length = chance.randint(0, len(resident[0]))
            manager.truncate(resident[0], length)
            del memory.contents[resident[0]][length:]
        elif operation == "out":
            memory.swap(some, "host", at_most)
        elif operation == "in":
            memory.swap(some, "device", at_most)
        elif operation == "free" and live:
            memory.free(some[0])
        elif operation == "drop":
            manager.clear_prefix_cache()
    except (OutOfBlocks, SequenceSwapped) as refusal:
        after = state_of(manager)
        if operation == "allocate":  # an idle row more is no change
            assert after["device.refs"].tolist() == before["device.refs"].tolist()
        else:
            assert same_state(after, before), refusal  # noqa: PT017


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lru", "priority", "lifetime"])
def test_a_long_random_history_keeps_every_token(policy: str) -> None:
    manager = BlockManager(20, BLOCK_SIZE, 14, eviction=policy)
    memory, chance = Memory(manager), random.Random(f"swap {policy}")
    for _ in range(NUM_STEPS // 3 + 1):
        act(memory, chance)
        memory.check()
    stats = manager.stats()
    assert min(stats.total_swapped_in, stats.total_swapped_out, stats.total_evicted) > 100


@pytest.mark.mostly_slow(quick=4)
@pytest.mark.parametrize("seed", range(20))
def test_short_random_histories_in_a_tiny_pool(seed: int) -> None:
    manager = BlockManager(6, BLOCK_SIZE, 4)
    memory, chance = Memory(manager), random.Random(seed)
    for _ in range(100):
        act(memory, chance)
        memory.check()
    for one in list(memory.contents):
        memory.free(one)
    manager.clear_prefix_cache()
    assert (manager.num_free_blocks, manager.stats().num_host_free) == (6, 4)
