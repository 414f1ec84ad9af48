"""Cached blocks that others copy: which leave next, their keys, clean marks and holds."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from kvpager import BlockManager, OutOfBlocks
from kvpager.storage.keys import ContentKeying, KeyContext, content_keys

SIZE = 4


def cached(manager: BlockManager, tokens: list[int], **key: Any) -> None:
    """Compute a prompt and leave its blocks cached."""
    sequence = manager.allocate(tokens, **key)
    manager.commit(sequence)
    manager.free(sequence)


def tree(seed: int, eviction: str = "lru") -> tuple[BlockManager, list[list[int]]]:
    """A full pool of cached prompts that share beginnings."""
    chance = random.Random(seed)
    manager = BlockManager(24, SIZE, eviction=eviction, num_events=10_000)
    prompts: list[list[int]] = []
    while manager.stats().num_free > 5:
        front = chance.choice(prompts)[: SIZE * chance.randrange(4)] if prompts else []
        prompt = front + [chance.randrange(3) for _ in range(SIZE * chance.randrange(1, 5))]
        try:
            cached(manager, prompt)
        except OutOfBlocks:
            break
        prompts.append(prompt)
    return manager, prompts


def evicted(manager: BlockManager, count: int) -> list[int]:
    """Evict `count` blocks at once, and return them."""
    manager.events.fetch()
    manager.allocate(SIZE * (manager.stats().num_free + count))
    return [
        block
        for event in manager.events.fetch()
        if event.kind == "evicted"
        for block in event.blocks.tolist()
    ]


def keying(layout: str = "layout") -> ContentKeying:
    return ContentKeying(
        SIZE,
        lambda namespace, lora: KeyContext(
            layout, "model", b"" if namespace is None else namespace.encode().ljust(16), lora
        ),
    )


# ------------------------------------------------------------------- what leaves next


@pytest.mark.parametrize("eviction", ["lru", "priority", "lifetime"])
@pytest.mark.parametrize("seed", range(25))
def test_blocks_leave_as_foretold(seed: int, eviction: str) -> None:
    manager, _ = tree(seed, eviction)
    count = random.Random(seed).randrange(1, manager.stats().num_cached)
    foretold = manager.cached.leaving(count).tolist()
    manager.check()
    assert foretold == evicted(manager, count)


@pytest.mark.parametrize("seed", range(25))
def test_blocks_in_use_do_not_leave(seed: int) -> None:
    manager, prompts = tree(seed)
    held = manager.allocate([*random.Random(seed).choice(prompts), 9])
    leaving = manager.cached.leaving(100)
    assert not set(leaving.tolist()) & set(manager.block_tables([held])[0].tolist())
    assert len(set(leaving.tolist())) == len(leaving)
    everything = manager.stats().num_cached
    assert len(leaving) <= everything
    assert leaving.tolist() == evicted(manager, len(leaving))


def test_clean_blocks_are_left_out_per_store() -> None:
    manager, maker = BlockManager(8, SIZE), keying()
    cached(manager, [1] * 16)
    blocks = manager.cached.leaving(4)
    first, second, *rest = manager.cached.keys(blocks, maker)
    manager.cached.mark_clean([first], 0)
    manager.cached.mark_clean([second], 6)
    assert manager.cached.keys(manager.cached.leaving(4), maker) == rest
    manager.cached.mark_clean([second], 0)
    manager.cached.mark_dirty([first, second], 0)
    assert manager.cached.keys(manager.cached.leaving(4), maker) == [first, *rest]


def test_a_block_is_offered_once_until_it_is_used_again() -> None:
    manager = BlockManager(8, SIZE)
    cached(manager, [1] * 16)
    first = manager.cached.leaving(1)
    manager.cached.mark_offered(first)
    others = manager.cached.leaving(4)
    assert first[0] not in others
    assert len(others) == 3
    manager.cached.mark_offered(others)
    assert not len(manager.cached.leaving(4))
    cached(manager, [1] * 10)  # uses the first two blocks again
    assert len(manager.cached.leaving(4)) == 2


def test_a_block_with_new_content_is_dirty() -> None:
    manager, maker = BlockManager(2, SIZE), keying()
    cached(manager, [1] * 8)
    blocks = manager.cached.leaving(2)
    keys = manager.cached.keys(blocks, maker)
    manager.cached.mark_clean(keys, 0)
    cached(manager, [2] * 8)
    manager.cached.mark_clean(keys, 0)  # the answer comes late: these blocks have other keys
    assert sorted(manager.cached.leaving(2).tolist()) == sorted(blocks.tolist())
    manager.cached.keys(blocks, maker)
    manager.cached.mark_clean(keys, 0)
    assert len(manager.cached.leaving(2)) == 2
    manager.clear_prefix_cache()
    assert not len(manager.cached.leaving(2))


def test_clean_blocks_stay_clean_when_the_pool_shrinks() -> None:
    manager, maker = BlockManager(8, SIZE), keying()
    filler = manager.allocate(4 * SIZE)
    cached(manager, [1] * 12)
    offered = manager.cached.leaving(8)
    keys = manager.cached.keys(offered, maker)
    manager.cached.mark_offered(offered)
    manager.cached.mark_clean(keys[:2], 3)
    manager.free(filler)
    manager.shrink(4)
    manager.cached.mark_dirty(keys, 3)  # the blocks have other numbers: this reaches none
    assert manager.cached.keys(manager.cached.leaving(4), maker) == keys[2:]


def test_evicted_blocks_that_no_store_has_are_counted() -> None:
    manager, maker = BlockManager(4, SIZE), keying()
    cached(manager, [1] * 16)
    keys = manager.cached.keys(manager.cached.leaving(4), maker)
    manager.cached.mark_clean(keys[:1], 0)
    manager.cached.mark_clean(keys[1:2], 5)
    manager.allocate(3 * SIZE)
    assert manager.cached.num_dropped_dirty == 1


# ------------------------------------------------------------------- keys


@pytest.mark.parametrize("seed", range(10))
def test_keys_are_those_of_the_prompt(seed: int) -> None:
    manager, prompts = tree(seed)
    maker = keying()
    for prompt in random.Random(seed).sample(prompts, len(prompts)):
        found = manager.match_prefix(prompt, blocks=True)
        expected = content_keys(prompt, SIZE, KeyContext("layout", "model"))
        whole = found.blocks.tolist()[: found.num_tokens // SIZE]
        assert (
            manager.cached.keys(np.array(whole[::-1], np.int32), maker)
            == (expected[: len(whole)][::-1])
        )


def test_keys_tell_namespaces_adapters_and_images_apart() -> None:
    manager, keys = BlockManager(32, SIZE), set()
    image = [(0, 2, b"image of 16 byte")]
    kinds = [{}, {"namespace": "a"}, {"namespace": "b"}, {"lora": "a"}, {"mm_hashes": image}]
    for kind in kinds:
        sequence = manager.allocate([5] * 8, **kind)
        manager.commit(sequence)
        keys.update(manager.cached.keys(manager.block_tables([sequence])[0], keying()))
    assert len(keys) == 2 * len(kinds)
    shown = content_keys([5] * 8, SIZE, KeyContext("layout", "model"), image)
    assert set(shown) <= keys


def test_keys_follow_blocks_that_move_and_change() -> None:
    manager, maker = BlockManager(4, SIZE), keying()
    for tokens in ([1] * 16, [2] * 16):
        cached(manager, tokens)
        blocks = manager.match_prefix([*tokens, 0], blocks=True).blocks[:4]
        expected = content_keys(tokens, SIZE, KeyContext("layout", "model"))
        assert manager.cached.keys(blocks, maker) == expected
    other = content_keys([2] * 16, SIZE, KeyContext("other", "model"))
    assert manager.cached.keys(blocks, keying("other")) == other
    assert manager.cached.keys(blocks, maker) == expected
    manager.grow(9)
    assert manager.cached.keys(blocks, maker) == expected


def test_a_block_that_is_not_published_has_no_key() -> None:
    manager = BlockManager(4, SIZE)
    sequence = manager.allocate([1] * 8)
    with pytest.raises(ValueError, match="not published"):
        manager.cached.keys(manager.block_tables([sequence])[0], keying())


# ------------------------------------------------------------------- holds


def test_held_blocks_stay_until_they_are_released() -> None:
    manager = BlockManager(4, SIZE)
    cached(manager, [1] * 16)
    blocks = manager.cached.leaving(2)
    ticket = manager.cached.hold(blocks)
    assert not set(manager.cached.leaving(4).tolist()) & set(blocks.tolist())
    with pytest.raises(OutOfBlocks):
        manager.allocate(12)
    manager.check()
    manager.cached.release(ticket)
    manager.allocate(12)
    with pytest.raises(ValueError, match="ticket"):
        manager.cached.release(ticket)


def test_held_blocks_stay_when_the_prefix_cache_is_cleared() -> None:
    manager = BlockManager(4, SIZE)
    cached(manager, [1] * 16)
    blocks = manager.cached.leaving(4)
    ticket = manager.cached.hold(blocks)
    manager.clear_prefix_cache()
    assert manager.num_available_blocks == 0
    manager.cached.release(ticket)
    assert manager.match_prefix([1] * 17) == 16
    manager.clear_prefix_cache()
    manager.check()
    assert manager.stats().num_free == 4


@pytest.mark.parametrize("verb", ["keys", "hold", "mark_offered"])
@pytest.mark.parametrize("blocks", [[-1], [4], [0, 0], [0.5], [[0]], "ab"])
def test_bad_block_numbers_are_refused(verb: str, blocks: Any) -> None:
    manager = BlockManager(4, SIZE)
    cached(manager, [1] * 16)
    more = (keying(),) if verb == "keys" else ()
    with pytest.raises((ValueError, TypeError), match="blocks"):
        getattr(manager.cached, verb)(blocks, *more)
    manager.check()


@pytest.mark.parametrize("store", [-1, 7, "disk", True])
def test_bad_store_numbers_are_refused(store: Any) -> None:
    manager = BlockManager(4, SIZE)
    with pytest.raises((ValueError, TypeError), match="store"):
        manager.cached.mark_clean([], store)


@pytest.mark.parametrize("seed", range(50))
def test_holds_at_random_leave_the_manager_consistent(seed: int) -> None:
    chance = random.Random(seed)
    manager, prompts = tree(seed)
    tickets: list[int] = []
    for _ in range(30):
        published = manager.cached.leaving(chance.randrange(1, 20))
        if len(published) and chance.random() < 0.6:
            some = chance.sample(published.tolist(), chance.randrange(1, len(published) + 1))
            tickets.append(manager.cached.hold(np.array(some)))
        elif tickets:
            manager.cached.release(tickets.pop(chance.randrange(len(tickets))))
        manager.check()
        if chance.random() < 0.5 and manager.num_available_blocks > 8:
            cached(manager, [*chance.choice(prompts), *[chance.randrange(3) for _ in range(5)]])
            manager.check()
    for ticket in tickets:
        manager.cached.release(ticket)
    manager.check()
    stats = manager.stats()
    assert stats.num_free + stats.num_cached == stats.num_blocks


@pytest.mark.parametrize("seed", range(20))
def test_keys_are_right_after_any_resize(seed: int) -> None:
    chance, maker = random.Random(seed), keying()
    manager = BlockManager(24, SIZE)
    for _ in range(40):
        prompt = [chance.randrange(3) for _ in range(SIZE * chance.randrange(1, 5))]
        cached(manager, prompt)
        action = chance.random()
        if action < 0.2:
            manager.shrink(chance.randrange(8, manager.num_blocks + 1))
        elif action < 0.4:
            manager.grow(24)
        for event in manager.events.published():
            if event.parent >= 0:
                continue
            tokens = event.tokens.ravel().tolist()
            context = KeyContext("layout", "model")
            assert manager.cached.keys(event.blocks, maker) == content_keys(tokens, SIZE, context)


@pytest.mark.parametrize("seed", range(20))
def test_a_copy_does_not_change_what_leaves_next(seed: int) -> None:
    manager, _ = tree(seed)
    foretold = manager.cached.leaving(100).tolist()
    ticket = manager.cached.hold(np.array(foretold[:: 1 + seed % 3]))
    manager.cached.release(ticket, keep_rank=True)
    manager.check()
    assert manager.cached.leaving(100).tolist() == foretold


# ------------------------------------------------------------------- eviction of a namespace


@pytest.mark.parametrize("seed", range(40))
def test_evicting_a_namespace_leaves_the_others(seed: int) -> None:
    chance = random.Random(seed)
    names = [None, "a", "b", "c"]
    manager = BlockManager(64, SIZE, eviction=chance.choice(["lru", "priority", "lifetime"]))
    if chance.random() < 0.5:
        manager.quotas.set("a", ceiling=40)
        manager.quotas.set("b", floor=2)
    held, tickets = list[Any](), list[int]()
    for _ in range(30):
        name = chance.choice(names)
        tokens = [chance.randrange(3) for _ in range(SIZE * chance.randrange(1, 4))]
        if chance.random() < 0.3 and len(held) < 4:
            held.append(manager.allocate([*tokens, 9], namespace=name))
            manager.commit(held[-1])
        else:
            cached(manager, tokens, namespace=name)
        if chance.random() < 0.2 and len(found := manager.cached.leaving(3)):
            tickets.append(manager.cached.hold(found))
        if chance.random() < 0.3:
            name = chance.choice(names)
            before = {other: _published(manager, other) for other in names if other != name}
            manager.cached.evict(name)
            manager.check()
            assert before == {other: _published(manager, other) for other in before}
            assert not set(manager.cached.leaving(64).tolist()) & _published(manager, name)
    for sequence in held:
        manager.free(sequence)
    for ticket in tickets:
        manager.cached.release(ticket)
    for name in names:
        manager.cached.evict(name)
        assert not _published(manager, name)
    manager.check()
    assert manager.stats().num_free == 64


def _published(manager: BlockManager, namespace: str | None) -> set[int]:
    return {
        block
        for event in manager.events.published()
        if event.namespace == namespace
        for block in event.blocks.tolist()
    }


# ------------------------------------------------------------------- the next to leave


@pytest.mark.parametrize("seed", range(10))
def test_blocks_ahead_are_those_that_leave_soon(seed: int) -> None:
    manager, _ = tree(seed)
    stats = manager.stats()
    ahead = random.Random(seed).randrange(stats.num_free, manager.num_blocks)
    near = set(manager.cached.leaving(100, ahead).tolist())
    if not (count := max(ahead - stats.num_free, 0)):
        assert not near
    else:
        assert near >= set(evicted(manager, count))
    assert manager.cached.leaving(100, 0).tolist() == []


def test_no_block_is_ahead_while_blocks_are_free() -> None:
    manager = BlockManager(8, SIZE)
    cached(manager, [1] * 12)
    assert not len(manager.cached.leaving(8, 5))
    assert len(manager.cached.leaving(8, 6)) == 3  # of one use, so of one rank
    assert len(manager.cached.leaving(2, 6)) == 2


@pytest.mark.parametrize("eviction", ["lru", "lifetime"])
@pytest.mark.parametrize("seed", range(5))
def test_no_block_leaves_before_it_was_ahead(seed: int, eviction: str) -> None:
    chance, maker = random.Random(seed), keying()
    manager = BlockManager(64, SIZE, eviction=eviction)
    fronts = [[chance.randrange(9) for _ in range(16)] for _ in range(24)]
    held = []
    for _ in range(300):
        front = chance.choice(fronts)
        held.append(manager.allocate([*front[: chance.randrange(1, 17)], chance.randrange(99)]))
        manager.commit(held[-1])
        while len(held) > chance.randrange(6):
            manager.free(held.pop(chance.randrange(len(held))))
        if chance.random() < 0.2:  # a store lost blocks
            blocks = np.flatnonzero(manager._state.pool.cached)
            some = np.array(chance.sample(blocks.tolist(), len(blocks) // 4), np.int32)
            manager.cached.mark_dirty(manager.cached.keys(some, maker), 0)
        while len(blocks := manager.cached.leaving(5, 16)):
            manager.cached.mark_clean(manager.cached.keys(blocks, maker), 0)
    manager.check()
    assert manager.stats().total_evicted > 100
    assert manager.cached.num_dropped_dirty == 0


def test_a_step_does_not_rank_the_whole_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, maker, ranked = BlockManager(4096, SIZE), keying(), list[int]()
    for seed in range(1024):
        cached(manager, [seed] * 4 * SIZE)
    policy = manager._state.evictor.policy
    rank = policy.rank
    monkeypatch.setattr(policy, "rank", lambda blocks: ranked.append(len(blocks)) or rank(blocks))
    for seed in range(200):
        cached(manager, [seed] * 2 * SIZE + [1])
        while len(blocks := manager.cached.leaving(64, 512)):
            manager.cached.mark_clean(manager.cached.keys(blocks, maker), 0)
    assert manager.cached.num_dropped_dirty == 0
    assert sum(ranked) < 12 * 4096  # not 200 times


def test_blocks_that_become_idle_may_be_ahead() -> None:
    manager = BlockManager(8, SIZE)
    cached(manager, [1] * 16)
    manager.cached.mark_offered(manager.cached.leaving(8, 8))
    held = manager.allocate([2] * 16)
    manager.commit(held)
    assert not len(manager.cached.leaving(8, 8))
    manager.free(held)
    assert len(manager.cached.leaving(8, 8)) == 4


def test_blocks_that_are_used_again_leave_others_ahead() -> None:
    manager, maker = BlockManager(64, SIZE), keying()
    for seed in range(16):
        cached(manager, [seed] * 16)
    for seed in range(4):
        blocks = manager.cached.leaving(64, 16)
        manager.cached.mark_clean(manager.cached.keys(blocks, maker), 0)
        cached(manager, [seed] * 16)
    blocks = manager.cached.leaving(64, 16)
    manager.cached.mark_clean(manager.cached.keys(blocks, maker), 0)
    manager.allocate(16 * SIZE)
    assert manager.cached.num_dropped_dirty == 0
