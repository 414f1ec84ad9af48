"""Ranks with shards of each block: a block is used only if all of them have it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvpager import BlockStorage, KVPagerError
from kvpager.blocks.groups.manager import GroupedManager
from kvpager.plans import DropBlocks, FetchBlocks, LoadBlocks, SaveBlocks, Transfer
from kvpager.storage.keys import KeyContext
from kvpager.storage.staging import Staging
from kvpager.storage.tiers.follower import TierFollower
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.loading import Fetch
from kvpager.storage.tiers.prompt_saving import PromptSave
from kvpager.storage.tiers.tiering import Tiering
from tests.support.dict_store import DictStore
from tests.support.threads import wait_for_stores
from tests.support.tier_node import SHAPE, SIZE, Node, finished, prompt

LAYOUT = BlockLayout("shard", 64)


class Shard:
    """A follower of a node: its blocks hold what the node's blocks hold, plus its rank."""

    def __init__(
        self,
        node: Node | None,
        rank: int = 1,
        stores: list[DictStore] | None = None,
        slots: int = 32,
    ) -> None:
        self.node, self.rank = node, rank
        self.storage = BlockStorage(16, SIZE, [SHAPE], dtype=torch.float32)
        self.staging = Staging(self.storage, slots)
        self.stores = [DictStore(self.storage.block_bytes)] if stores is None else stores
        self.reports: list[tuple[int, ...]] = []
        report = self._note if node is None else node.tiering.followers.report
        self.follower = TierFollower(rank, self.staging, self.stores, LAYOUT, report, max_wait_s=60)

    def _note(self, *numbers: int) -> None:
        self.reports.append(numbers)

    def computed(self) -> torch.Tensor:
        """Return what the shard has after a model computed it."""
        assert self.node is not None
        return self.node.storage.tier() + self.rank

    def apply(self, transfers: tuple[Transfer, ...]) -> None:
        self.follower.apply(transfers)
        wait_for_stores(self.follower)

    def end(self) -> None:
        self.follower.close()
        self.follower.close()
        assert self.staging.num_free == self.staging.num_slots
        assert all(store.is_closed for store in self.stores)


def saved_by(node: Node, *shards: Shard, seed: int = 1) -> None:
    """Let a node compute a prompt, and all ranks save it."""
    node.compute(prompt(seed))
    for shard in shards:
        shard.storage.tier().copy_(shard.computed())
    assert node.clean() == 5
    transfers = node.tiering.followers.take()
    for shard in shards:
        shard.apply(transfers)


def again(node: Node, *shards: Shard) -> tuple[Node, list[Shard]]:
    """Return other ranks over the same stores."""
    other = Node(node.stores, num_followers=len(shards))
    return other, [Shard(other, shard.rank, shard.stores) for shard in shards]


def begun(node: Node, *shards: Shard, seed: int = 1) -> Fetch:
    """Begin to fetch a prompt on all ranks, and wait for them."""
    fetch = node.tiering.begin(prompt(seed))
    assert fetch is not None
    transfers = node.tiering.followers.take()
    finished(fetch)
    for shard in shards:
        assert not fetch.is_done
        shard.apply(transfers)
    assert fetch.is_done
    return fetch


def check_the_last_three_are_attached(node: Node, shard: Shard, fetch: Fetch) -> None:
    """Attach three of the prompt's blocks; compare all five on the follower. End both ranks."""
    assert node.tiering.attach(fetch) == {"dict": 12}
    shard.apply(node.tiering.followers.take())
    blocks = node.manager.match_prefix(prompt(1), blocks=True).blocks[:5].tolist()
    assert torch.equal(shard.storage.tier()[blocks], shard.computed()[blocks])
    shard.end()
    node.end()


def test_each_rank_saves_and_loads_its_shard() -> None:
    node = Node(num_followers=2)
    shards = [Shard(node, 1), Shard(node, 2)]
    saved_by(node, *shards)
    other, others = again(node, *shards)
    fetch = begun(other, *others)
    assert other.tiering.attach(fetch, 2) == {"dict": 8}
    assert other.tiering.attach(fetch) == {"dict": 12}
    transfers = other.tiering.followers.take()
    assert other.compute(prompt(1)) == 20
    blocks = other.manager.match_prefix(prompt(1), blocks=True).blocks[:5].tolist()
    for shard in others:
        shard.apply(transfers)
        assert torch.equal(shard.storage.tier()[blocks], shard.computed()[blocks])
        shard.end()
    other.end()


@pytest.mark.parametrize("kept", [0, 3])
def test_blocks_that_one_rank_lacks_are_not_used(kept: int) -> None:
    node = Node(num_followers=2)
    shards = [Shard(node, 1), Shard(node, 2)]
    saved_by(node, *shards)
    other, others = again(node, *shards)
    store = others[1].stores[0]
    store.drop(list(store.blocks)[: 5 - kept])  # the last block of the prompt was saved first
    fetch = begun(other, *others)
    assert other.tiering.attach(fetch) == ({"dict": 4 * kept} if kept else {})
    assert other.compute(prompt(1)) == 4 * kept
    transfers = other.tiering.followers.take()
    for shard in others:
        shard.apply(transfers)
        shard.end()
    other.end()


def test_all_ranks_fetch_what_is_behind_the_cached_blocks() -> None:
    node = Node(num_followers=1)
    shard = Shard(node)
    saved_by(node, shard)
    other, [shard] = again(node, shard)
    other.compute(prompt(1)[:9])
    shard.storage.tier().copy_(shard.computed())
    fetch = begun(other, shard)
    check_the_last_three_are_attached(other, shard, fetch)


def test_blocks_that_are_cached_meanwhile_are_skipped_on_all_ranks() -> None:
    node = Node(num_followers=1)
    shard = Shard(node)
    saved_by(node, shard)
    other, [shard] = again(node, shard)
    fetch = begun(other, shard)
    other.compute(prompt(1)[:9])
    shard.storage.tier().copy_(shard.computed())
    check_the_last_three_are_attached(other, shard, fetch)


def test_a_fetch_that_was_cancelled_ignores_answers() -> None:
    node = Node(num_followers=1)
    shard = Shard(node)
    saved_by(node, shard)
    other, [shard] = again(node, shard)
    shard.stores[0].gate.clear()
    fetch = other.tiering.begin(prompt(1))
    assert fetch is not None
    shard.follower.apply(other.tiering.followers.take())
    other.tiering.cancel(fetch)
    shard.follower.apply(other.tiering.followers.take())
    shard.stores[0].gate.set()
    shard.end()  # after the load, and its answer
    other.end()


def test_a_fetch_that_ends_before_the_next_plan_is_not_in_it() -> None:
    node = Node(num_followers=1)
    fetch = node.tiering.begin(prompt(1))
    assert fetch is not None
    assert node.tiering.followers.has_transfers
    node.tiering.cancel(fetch)
    assert node.tiering.followers.take() == ()
    node.end()


def test_a_leader_without_followers_has_no_transfers() -> None:
    node = Node()
    node.compute(prompt(1))
    node.clean()
    other = Node(node.stores)
    assert other.fetch(prompt(1)) == 5
    for each in (node, other):
        assert each.tiering.followers.take() == ()
        each.end()


def test_the_blocks_of_a_prompt_are_saved_at_once_on_all_ranks() -> None:
    node = Node(num_followers=1)
    shard = Shard(node)
    node.compute(prompt(1))
    shard.storage.tier().copy_(shard.computed())
    save = PromptSave(
        np.array(prompt(1), np.int32), {"namespace": None, "lora": None, "mm_hashes": []}
    )
    node.tiering.prompts.save(save)
    shard.apply(node.tiering.followers.take())
    assert len(shard.stores[0].blocks) == 5
    shard.end()
    node.end()


def test_warming_with_followers_is_refused() -> None:
    node = Node(num_followers=1)
    with pytest.raises(ValueError, match="warm: followers"):
        node.tiering.warm([prompt(1)])
    node.end()


def test_followers_of_layers_with_a_window_are_refused() -> None:
    node, windowed = Node(), GroupedManager([None, 8], 8, SIZE)
    with pytest.raises(ValueError, match="num_followers=1: expected 0 for groups of layers"):
        Tiering(
            windowed, node.staging, [], lambda *_: KeyContext("layout", "model"), num_followers=1
        )
    node.end()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((0, 1, 5), "rank=0"), ((2, 1, 5), "rank=2"), ((1, 1, -1), "blocks=-1")],
)
def test_a_bad_answer_is_refused(numbers: tuple[int, int, int], message: str) -> None:
    node = Node(num_followers=1)
    with pytest.raises(ValueError, match=message):
        node.tiering.followers.report(*numbers)
    node.end()


def test_what_is_over_a_limit_leaves_the_stores_of_all_ranks() -> None:
    node = Node(num_followers=1)
    shard = Shard(node)
    node.tiering.limit("a", capacity=3 * node.storage.block_bytes)
    node.compute(prompt(1), namespace="a")
    assert node.clean() == 5
    shard.apply(node.tiering.followers.take())
    assert [len(each.stores[0].blocks) for each in (node, shard)] == [3, 3]
    shard.end()
    node.end()


# ------------------------------------------------------------------- a follower alone

KEYS = np.arange(5 * 32, dtype=np.uint8).reshape(5, 32)
BLOCKS = np.array([3, 1, 4, 5, 9], np.int32)


def all_to(mask: int) -> SaveBlocks:
    return SaveBlocks(KEYS, BLOCKS, np.full(5, mask, np.uint8))


def test_ranks_of_one_layout_share_a_store_but_no_blocks() -> None:
    shared = [DictStore(64)]
    one, two = Shard(None, 1, shared), Shard(None, 2, shared)
    one.apply((all_to(1),))
    two.apply((FetchBlocks(1, KEYS, 60.0),))
    assert two.reports == [(2, 1, 0)]
    one.apply((FetchBlocks(1, KEYS, 60.0),))
    assert one.reports == [(1, 1, 5)]
    one.end()
    two.end()


@pytest.mark.parametrize("ticket", [1, 2])
def test_a_load_of_blocks_that_were_not_fetched_is_refused(ticket: int) -> None:
    shard = Shard(None)
    shard.apply((all_to(1), FetchBlocks(1, KEYS[:2], 60.0)))
    with pytest.raises(KVPagerError, match="not here"):
        shard.apply((LoadBlocks(ticket, 0, BLOCKS),))
    shard.end()


def test_a_full_staging_saves_the_first_blocks() -> None:
    shard = Shard(None, slots=3)
    shard.apply((all_to(1),))
    shard.apply((FetchBlocks(1, KEYS, 60.0),))
    assert (len(shard.stores[0].blocks), shard.reports) == (3, [(1, 1, 3)])
    shard.end()


def test_a_block_goes_to_the_stores_of_its_mask() -> None:
    shard = Shard(None, stores=[DictStore(64), DictStore(64)])
    shard.apply((all_to(2),))
    assert [len(store.blocks) for store in shard.stores] == [0, 5]
    shard.apply((FetchBlocks(1, KEYS, 60.0),))
    shard.apply((LoadBlocks(1, 1, BLOCKS[:3]),))  # from the second store: also saved in the first
    assert [len(store.blocks) for store in shard.stores] == [3, 5]
    shard.end()


def test_blocks_are_dropped_after_the_saves_before_them() -> None:
    shard = Shard(None, stores=[DictStore(64), DictStore(64)])
    shard.apply((all_to(3), DropBlocks(KEYS[:2], 1), DropBlocks(KEYS, 2)))  # a store it lacks
    assert [len(store.blocks) for store in shard.stores] == [5, 3]
    shard.end()


def test_a_follower_loads_nothing_after_the_deadline() -> None:
    shard = Shard(None)
    shard.apply((all_to(1), FetchBlocks(1, KEYS, 0.0)))
    assert shard.reports == [(1, 1, 0)]
    shard.end()


def test_a_defect_of_the_copy_leaves_no_slot_behind() -> None:
    shard = Shard(None)

    def fail(*_: Any) -> None:
        raise RuntimeError("a defect")

    shard.staging.read = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="a defect"):
        shard.apply((all_to(1),))
    shard.end()
