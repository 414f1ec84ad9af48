"""A patch's rows and cached prompts in one host memory."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("xxhash")

import kvpager  # noqa: E402
from kvpager import BlockStorage  # noqa: E402
from kvpager.integrations.huggingface.cache.host_share import HostShare  # noqa: E402
from kvpager.storage.tiers.host import HostStore  # noqa: E402
from kvpager.storage.tiers.layout import BlockLayout  # noqa: E402
from tests.support import tiny_models  # noqa: E402
from tests.support.llama_calls import generate  # noqa: E402
from tests.support.threads import wait_for_stores  # noqa: E402
from tests.support.tiered_engines import DEAR, patient_tiering  # noqa: E402


@contextlib.contextmanager
def patched(model: Any, tiers: Any, **options: Any) -> Iterator[kvpager.Patch]:
    """A patch that leaves no slot in use."""
    with patient_tiering():
        patch = kvpager.patch(model, tiers=tiers, prefix_cache=True, costs=DEAR, **options)
    assert patch.prompt_tiers is not None
    staging = patch.prompt_tiers._tiering._staging
    with patch:
        yield patch
    assert staging.store is not None
    staging.store._tier.check()
    assert staging.store.capacity == staging._num_usable


def ids(model: Any, inputs: Any, **options: Any) -> list[list[int]]:
    found: list[list[int]] = generate(model, inputs, **options).sequences.tolist()
    return found


def one(seed: int) -> dict[str, torch.Tensor]:
    return tiny_models.prompts([100], seed=seed)


@pytest.mark.parametrize("below", [False, True])
def test_host_memory_is_the_first_tier(model: Any, disk: str, below: bool) -> None:
    expected = ids(model, one(0))
    tiers = [disk] if below else "host"
    with patched(model, tiers, memory="80KiB", host_memory="1MiB") as patch:
        for seed in range(3):  # the device has room for 10 blocks
            generate(model, one(seed))
        assert ids(model, one(0)) == expected
        assert " from host)" in patch.report()  # none from disk


def test_rows_take_host_memory_from_cached_prompts(model: Any) -> None:
    batch = tiny_models.prompts([90, 80, 70, 60], seed=9)
    expected = [ids(model, one(0)), ids(model, batch, max_new_tokens=30)]
    with patched(model, "host", memory="160KiB", host_memory="320KiB") as patch:
        tiering, memory = patch.prompt_tiers._tiering, patch.prompt_tiers._pool.memory
        used: list[tuple[int, int]] = []  # bytes of rows, and of cached blocks

        def look(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            used.append((memory.host.reserved_bytes, tiering._staging._num_usable * 8192))
            return torch.zeros(len(tokens), dtype=torch.bool)

        for seed in range(4):
            generate(model, one(seed))
        assert ids(model, one(0)) == expected[0]
        wait_for_stores(tiering)
        assert ids(model, batch, max_new_tokens=30, stopping_criteria=[look]) == expected[1]
        assert all(0 < rows + cached <= 320 << 10 for rows, cached in used)
        assert min(cached for _, cached in used) < 320 << 10  # blocks left for rows
        gc.collect()  # the caches of the rows
        assert ids(model, one(0)) == expected[0]
        assert tiering._staging._num_usable == 39  # a pool keeps a block
        assert "from host" in patch.report()


# ------------------------------------------------------------------------------------- a share


@pytest.fixture
def share() -> HostShare:
    storage = BlockStorage(4, 16, [(1, 32, 32)], dtype=torch.float32)  # blocks of two pages
    return HostShare(storage, BlockLayout("x", storage.block_bytes), 8 * storage.block_bytes + 5)


def filled(share: HostShare, *numbers: int) -> HostStore:
    store = share.staging.store
    assert store is not None
    for number in numbers:
        block = memoryview(bytes([number]) * store.block_bytes)
        store.save([bytes([number]) * 32], [block], float("inf"))
    return store


def test_a_share_has_as_many_blocks_as_fit(share: HostShare) -> None:
    store = filled(share, 1)
    assert store.stats().num_blocks == 0
    for num_blocks in (3, 8, 20, 0, 1):
        share.fit(num_blocks * store.block_bytes + 7)
        assert store.capacity == min(num_blocks, 8)


def test_the_oldest_blocks_of_a_share_leave_and_their_memory_is_free(share: HostShare) -> None:
    store = filled(share)
    share.fit(3 * store.block_bytes)
    filled(share, 1, 2, 3)
    slots = {key[0]: slot for key, slot in store._tier.pairs()}
    share.fit(2 * store.block_bytes)
    assert sorted(key[0] for key, _ in store._tier.pairs()) == [2, 3]
    assert not store.memory[slots[1]].any()  # the system gives pages of zeros
    assert (store.memory[slots[2]] == 2).all()


def test_a_block_that_is_copied_leaves_later(share: HostShare) -> None:
    store = filled(share)
    share.fit(2 * store.block_bytes)
    filled(share, 1, 2)
    pinned = store.pin([bytes([1]) * 32])
    share.fit(0)
    assert store.capacity == 1
    assert (store.memory[pinned[0]] == 1).all()
    store.give(pinned)
    share.fit(0)
    assert store.capacity == 0
