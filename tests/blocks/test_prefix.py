"""What the prefix index finds, for whom, and what leaves it first."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpager import BlockManager, OutOfBlocks
from kvpager.blocks.policies import POLICIES
from kvpager.blocks.sequences import SequenceHandle
from tests.support.manager_state import state_of

# Operations of the paired isolation test, over all policies; 1,000,000 is a good night's worth.
ISOLATION_OPERATIONS = 20_000
A, B, C, D, E = ([first + i for i in range(4)] for first in range(10, 60, 10))  # a block each
DOG, CAT = b"sha256 of a dog", b"sha256 of a cat"


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=64, block_size=4)


def committed(manager: BlockManager, ids: list[int], **who: object) -> SequenceHandle:
    sequence = manager.allocate(ids, **who)  # type: ignore[arg-type]
    manager.commit(sequence)
    return sequence


def cache(manager: BlockManager, ids: list[int], **who: object) -> None:
    """Cache a prompt that no sequence holds."""
    manager.free(committed(manager, ids, **who))


def evict(manager: BlockManager, num_blocks: int = 1) -> None:
    """Evict `num_blocks` cached blocks."""
    manager.free(manager.allocate((manager.num_free_blocks + num_blocks) * manager.block_size))
    manager.check()


# -------------------------------------------------------------------- the shape of the tree


def test_prompts_that_part_inside_a_run_share_what_comes_before(manager: BlockManager) -> None:
    cache(manager, A + B + C)
    cache(manager, A + B + D)
    manager.check()
    assert manager.match_prefix(A + B + C) == 12
    assert manager.match_prefix(A + B + D) == 12
    assert manager.stats().num_cached == 4


def test_a_run_can_be_split_again_and_again(manager: BlockManager) -> None:
    prompts = [A + B + C + D, A + B + C + E, A + B + E, A + E, E]
    for prompt in prompts:
        cache(manager, prompt)
        manager.check()
    assert [manager.match_prefix(prompt) for prompt in prompts] == [len(p) for p in prompts]
    assert manager.stats().num_cached == 8


def test_a_sequence_goes_on_although_its_run_was_split(manager: BlockManager) -> None:
    sequence = committed(manager, A + B + C)
    cache(manager, A + D)
    manager.append(sequence, E)
    manager.commit(sequence)
    manager.check()
    assert manager.match_prefix(A + B + C + E) == 16


def test_a_sequence_truncated_into_a_split_run_continues_there(
    manager: BlockManager,
) -> None:
    sequence = committed(manager, A + B + C)
    cache(manager, A + B + D)
    manager.truncate(sequence, 4)
    manager.append(sequence, E)
    manager.commit(sequence)
    manager.check()
    for prompt in (A + B + C, A + B + D, A + E):
        assert manager.match_prefix(prompt) == len(prompt)


def test_prompts_that_part_inside_a_block_share_its_first_tokens(manager: BlockManager) -> None:
    cache(manager, A + B)
    other = manager.allocate([*A, B[0], B[1], 99, 98])
    assert other.num_cached_tokens == 6
    manager.commit(other)
    manager.check()
    # Both continuations are offered now, and each is found by its own tokens.
    assert manager.match_prefix([*A, B[0], B[1], 99]) == 7
    assert manager.match_prefix(A + B[:3]) == 7


def test_of_several_continuations_the_one_that_agrees_longest_is_copied(
    manager: BlockManager,
) -> None:
    for block in ([1, 2, 3, 4], [1, 2, 9, 9], [1, 9, 9, 9]):
        cache(manager, A + block)
    assert manager.match_prefix([*A, 1, 2, 3, 0]) == 7
    assert manager.match_prefix([*A, 1, 2, 9, 0]) == 7
    assert manager.match_prefix([*A, 1, 9, 0, 0]) == 6
    assert manager.match_prefix([*A, 1, 0, 0, 0]) == 5
    assert manager.match_prefix([*A, 0, 0, 0, 0]) == 4


def test_a_partial_match_needs_no_open_block(manager: BlockManager) -> None:
    cache(manager, A + B[:3])  # the second block never became full
    assert manager.match_prefix(A + B) == 4


def test_a_chain_of_many_forks_is_walked_to_its_end() -> None:
    manager = BlockManager(2048, 1)
    prompt = list(range(500))
    for depth in range(1, 500, 2):
        cache(manager, [*prompt[:depth], -1])
    cache(manager, prompt)
    manager.check()
    assert manager.match_prefix(prompt) == 500
    assert manager.match_prefix([*prompt[:251], -1]) == 252
    manager.clear_prefix_cache()
    manager.check()
    assert manager.num_free_blocks == 2048


def test_a_prompt_grown_by_tokens_is_found(
    manager: BlockManager,
) -> None:
    sequence = manager.allocate([])
    for token in A + B + C:
        manager.append(sequence, [token])
        manager.commit(sequence)
    manager.check()
    assert manager.match_prefix(A + B + C) == 12


def test_a_run_without_its_tail_can_be_extended() -> None:
    manager = BlockManager(8, 4)
    cache(manager, A + B + C + D)
    evict(manager, 2)
    assert manager.match_prefix(A + B + C + D) == 8
    cache(manager, A + B + E)
    cache(manager, A + B + C)
    manager.check()
    for prompt in (A + B + E, A + B + C):
        assert manager.match_prefix(prompt) == 12


def test_a_place_beyond_a_lost_tail_is_gone() -> None:
    manager = BlockManager(16, 4)
    first, duplicate = manager.allocate(A + B), manager.allocate(A + B)
    manager.commit([first, duplicate])  # the duplicate's place is in the blocks of the first
    manager.free(first)
    held = manager.allocate(manager.num_free_blocks * 4)
    manager.append(held, 1)  # the tail of the run leaves
    manager.free(held)
    assert manager.match_prefix(A + B) == 4
    cache(manager, A + C + D)
    manager.append(duplicate, E)
    manager.commit(duplicate)
    manager.check()
    assert manager.match_prefix(A + B + E) == 12
    assert manager.match_prefix(A + C + E) == 8


# -------------------------------------------------------------------- duplicates and forks


def test_a_duplicate_continues_after_the_published_blocks(manager: BlockManager) -> None:
    first, duplicate = manager.allocate(A + B), manager.allocate(A + B)
    manager.commit([first, duplicate])
    manager.append([first, duplicate], [C, D])
    manager.commit([duplicate, first])
    manager.check()
    assert manager.stats().num_shared == 0
    assert manager.match_prefix(A + B + C) == manager.match_prefix(A + B + D) == 12


def test_a_duplicate_publishes_its_blocks_after_an_eviction() -> None:
    manager = BlockManager(8, 4)
    first, duplicate = manager.allocate(A + B), manager.allocate(A + B)
    manager.commit([first, duplicate])
    manager.free(first)
    evict(manager, 2)
    assert manager.match_prefix(A + B) == 0
    manager.append(duplicate, C)
    manager.commit(duplicate)
    manager.check()
    hit = manager.allocate(A + B + C + D)
    assert hit.num_cached_tokens == 12
    assert manager.block_tables(hit)[0][:3].tolist() == manager.block_tables(duplicate)[0].tolist()


def test_a_duplicate_whose_front_was_evicted_publishes_its_own_blocks() -> None:
    manager = BlockManager(8, 4)
    first, duplicate = manager.allocate(A + B), manager.allocate(A + B)
    manager.commit([first, duplicate])
    manager.append(duplicate, C)
    manager.commit(duplicate)  # C stands behind the blocks of the first
    manager.free(first)
    manager.clear_prefix_cache()  # takes them, and with them C, although it is held
    manager.check()
    assert manager.match_prefix(A + B + C) == 0
    manager.commit(duplicate)
    manager.check()
    assert manager.match_prefix(A + B + C) == 12


def test_forks_offer_their_different_continuations(manager: BlockManager) -> None:
    parent = committed(manager, A)
    children = manager.fork(parent, 3)
    manager.append(children, [B, C, D])
    manager.commit(children)
    manager.append(children, [E, E, E])
    manager.commit(children)
    manager.check()
    for block in (B, C, D):
        assert manager.match_prefix(A + block + E) == 12


def test_forks_that_write_the_same_are_duplicates(manager: BlockManager) -> None:
    family = [parent := manager.allocate(A), *manager.fork(parent, 2)]
    manager.append(family, [B, B, B])
    manager.commit(family)
    manager.check()
    manager.free(family)
    assert manager.stats().num_cached == 2
    assert manager.match_prefix(A + B) == 8


def test_a_fork_taken_before_the_commit_publishes_once(manager: BlockManager) -> None:
    parent = manager.allocate(A + B)
    child = manager.fork(parent)
    manager.commit(child)
    manager.commit(parent)
    manager.check()
    manager.free([parent, child])
    assert manager.stats().num_cached == 2


# -------------------------------------------------------------------- who may have what


WHO = [
    {},
    {"namespace": "a"},
    {"namespace": "b"},
    {"namespace": "ab"},
    {"lora": "a"},
    {"lora": "b"},
    {"lora": "ab"},
    {"namespace": "a", "lora": "b"},
    {"namespace": "b", "lora": "a"},
    {"namespace": "None"},
    {"lora": "None"},
]


@pytest.mark.parametrize("owner", WHO, ids=str)
def test_a_prefix_is_private_to_its_namespace_and_lora(
    manager: BlockManager, owner: dict[str, str]
) -> None:
    cache(manager, A + B, **owner)
    for other in WHO:
        assert manager.match_prefix(A + B, **other) == (8 if other == owner else 0)


@pytest.mark.parametrize("label", ["namespace", "lora"])
@pytest.mark.parametrize("value", [1, True, b"a", ("a",)])
def test_a_namespace_or_adapter_that_is_no_string_is_refused(
    manager: BlockManager, label: str, value: object
) -> None:
    for look in (manager.allocate, manager.match_prefix):
        with pytest.raises(TypeError, match=f"{label}=.*expected a str or None"):
            look(A, **{label: value})  # type: ignore[operator]
    assert manager.stats().num_sequences == 0


@pytest.mark.parametrize("label", ["namespace", "lora"])
def test_an_empty_namespace_or_lora_is_refused(manager: BlockManager, label: str) -> None:
    for look in (manager.allocate, manager.match_prefix):
        with pytest.raises(ValueError, match=f'{label}="": expected at least one character'):
            look(A, **{label: ""})  # type: ignore[operator]
    assert manager.stats().num_sequences == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda manager: manager.quotas.set("", ceiling=1),
        lambda manager: manager.quotas.get(""),
        lambda manager: manager.quotas.ceiling(""),
        lambda manager: manager.quotas.drop(""),
        lambda manager: manager.quotas.used(""),
    ],
)
def test_an_empty_namespace_has_no_quota(manager: BlockManager, call) -> None:
    with pytest.raises(ValueError, match='namespace="": expected at least one character'):
        call(manager)


def test_a_fork_stays_with_its_parents_adapter(manager: BlockManager) -> None:
    child = manager.fork(manager.allocate(A, lora="math"))
    manager.append(child, B)
    manager.commit(child)
    assert manager.match_prefix(A + B, lora="math") == 8
    assert manager.match_prefix(A + B) == 0


# -------------------------------------------------------------------- mm_hashes

PLACEHOLDERS = A + [7] * 8 + B


def test_equal_contents_are_reused(manager: BlockManager) -> None:
    cache(manager, PLACEHOLDERS, mm_hashes=[(4, 12, DOG)])
    assert manager.match_prefix(PLACEHOLDERS, mm_hashes=[(4, 12, DOG)]) == 16


@pytest.mark.parametrize(
    ("mm_hashes", "cached"),
    [
        ([], 4),  # plain tokens that look like placeholders
        ([(4, 12, CAT)], 4),
        ([(4, 8, DOG), (8, 12, DOG)], 8),  # the first block shows the same
        ([(4, 8, DOG), (8, 12, CAT)], 8),
        ([(5, 12, DOG)], 4),  # the same image, a token later
        ([(4, 11, DOG)], 4),  # the same image, cut off a token earlier
        ([(4, 12, DOG), (12, 13, CAT)], 12),
        ([(0, 1, CAT), (4, 12, DOG)], 0),
    ],
)
def test_other_contents_are_missed_from_the_first_block_they_overlap(
    manager: BlockManager, mm_hashes: list[tuple[int, int, bytes]], cached: int
) -> None:
    cache(manager, PLACEHOLDERS, mm_hashes=[(4, 12, DOG)])
    if mm_hashes[:1] == [(4, 8, DOG)]:
        cache(manager, PLACEHOLDERS[:8], mm_hashes=[(4, 8, DOG)])
    assert manager.match_prefix(PLACEHOLDERS, mm_hashes=mm_hashes) == cached
    manager.check()


@pytest.mark.parametrize("start", [3, 4, 5, 7, 8])
def test_the_block_where_an_mm_hash_begins_is_missed_whole(
    manager: BlockManager, start: int
) -> None:
    prompt = [7] * 16
    cache(manager, prompt, mm_hashes=[(start, 14, DOG)])
    assert manager.match_prefix(prompt, mm_hashes=[(start, 14, CAT)]) == start // 4 * 4


def test_a_digest_a_byte_longer_is_another_content(manager: BlockManager) -> None:
    cache(manager, PLACEHOLDERS, mm_hashes=[(4, 12, DOG)])
    assert manager.match_prefix(PLACEHOLDERS, mm_hashes=[(4, 12, DOG + b"\0")]) == 4


def test_partial_reuse_stops_at_the_border_of_an_mm_hash(manager: BlockManager) -> None:
    prompt = [1, 2, 7, 7, *B]
    cache(manager, prompt, mm_hashes=[(2, 4, DOG)])
    # Tokens 1, 2 come before the image, yet the block as a whole is another one.
    assert manager.match_prefix(prompt, mm_hashes=[(2, 4, CAT)]) == 0
    assert manager.match_prefix([1, 2, 3, 4]) == 0
    assert manager.match_prefix([1, 2, 7, 7], mm_hashes=[(2, 4, DOG)]) == 4


def test_part_of_a_block_with_equal_contents_is_reused(manager: BlockManager) -> None:
    cache(manager, [7, 7, 1, 2], mm_hashes=[(0, 2, DOG)])
    assert manager.match_prefix([7, 7, 1, 9], mm_hashes=[(0, 2, DOG)]) == 3
    assert manager.match_prefix([7, 7, 1, 9], mm_hashes=[(0, 2, CAT)]) == 0


def test_prompts_with_different_mm_hashes_are_cached_side_by_side(
    manager: BlockManager,
) -> None:
    for digest in (DOG, CAT):
        cache(manager, PLACEHOLDERS, mm_hashes=[(4, 12, digest)])
    cache(manager, PLACEHOLDERS)
    manager.check()
    assert manager.stats().num_cached == 1 + 3 * 3
    for mm_hashes in ([(4, 12, DOG)], [(4, 12, CAT)], []):
        assert manager.match_prefix(PLACEHOLDERS, mm_hashes=mm_hashes) == 16


def test_tokens_after_an_mm_hash_are_shared_too(manager: BlockManager) -> None:
    sequence = committed(manager, PLACEHOLDERS, mm_hashes=[(4, 12, DOG)])
    manager.append(sequence, C)
    manager.commit(sequence)
    assert manager.match_prefix(PLACEHOLDERS + C, mm_hashes=[(4, 12, DOG)]) == 20
    assert manager.match_prefix(PLACEHOLDERS + C) == 4


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ((0, 5, DOG), ValueError, "mm_hashes stop=5: expected at most 4"),
        ((2, 2, DOG), ValueError, "mm_hashes stop=2: expected at least 3"),
        ((-1, 2, DOG), ValueError, "mm_hashes start=-1: expected at least 0"),
        ((0, 2, b""), TypeError, "has no hash"),
        ((0, 2, "dog"), TypeError, "has no hash"),
        ((0, 2.0, DOG), TypeError, "expected an int"),
    ],
)
def test_invalid_mm_hashes_are_refused(
    manager: BlockManager, content: object, error: type[Exception], message: str
) -> None:
    for look in (manager.allocate, manager.match_prefix):
        with pytest.raises(error, match=message):
            look(A, mm_hashes=[content])  # type: ignore[operator, list-item]
    assert manager.stats().num_sequences == 0


# -------------------------------------------------------------------- looking changes nothing


def test_match_prefix_changes_nothing() -> None:
    manager = BlockManager(8, 4, num_events=10)
    cache(manager, A + B)
    cache(manager, C)
    manager.events.fetch()
    before = {name: array.copy() for name, array in state_of(manager).items()}
    for prompt in (A + B, A + B[:2], D, []):
        manager.match_prefix(prompt)
        manager.match_prefix(prompt, namespace="nobody yet", lora="x")
    after = state_of(manager)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert manager.events.fetch() == []


def test_match_prefix_counts_the_last_token_unlike_allocate(
    manager: BlockManager,
) -> None:
    cache(manager, A + B)
    assert manager.match_prefix(A + B) == 8
    assert manager.allocate(A + B).num_cached_tokens == 7


def test_match_prefix_returns_the_blocks_that_allocate_shares(manager: BlockManager) -> None:
    cache(manager, A + B)
    match = manager.match_prefix([*A, *B, 99], blocks=True)
    assert match.num_tokens == 8
    table = manager.block_tables(manager.allocate([*A, *B, 99]))[0]
    assert match.blocks.dtype == np.int32
    assert match.blocks.tolist() == table[:2].tolist()


def test_match_prefix_returns_a_block_that_agrees_in_part(manager: BlockManager) -> None:
    cache(manager, A + B)
    whole = manager.match_prefix(A + B, blocks=True).blocks
    match = manager.match_prefix([*A, *B[:2], 99], blocks=True)
    assert (match.num_tokens, match.blocks.tolist()) == (6, whole.tolist())


def test_match_prefix_of_an_unknown_prompt_has_no_blocks(manager: BlockManager) -> None:
    cache(manager, A)
    for key in ({}, {"namespace": "other"}, {"lora": "x"}):
        match = manager.match_prefix(A if key else D, blocks=True, **key)
        assert (match.num_tokens, match.blocks.tolist()) == (0, [])


def test_blocks_of_a_match_are_a_read_only_copy(manager: BlockManager) -> None:
    cache(manager, A + B)
    match = manager.match_prefix(A, blocks=True)
    with pytest.raises(ValueError, match="read-only"):
        match.blocks[0] = 0
    cache(manager, A + C)
    assert len(match.blocks) == 1


def test_blocks_of_a_match_are_not_held(manager: BlockManager) -> None:
    cache(manager, A + B)
    match = manager.match_prefix(A + B, blocks=True)
    assert len(match.blocks) == 2
    assert manager.clear_prefix_cache() == 2
    assert manager.match_prefix(A + B, blocks=True).num_tokens == 0


def test_blocks_of_match_prefix_is_a_bool(manager: BlockManager) -> None:
    with pytest.raises(TypeError, match="blocks"):
        manager.match_prefix(A, blocks=1)  # type: ignore[call-overload]


def test_looking_at_a_prompt_does_not_keep_it(manager: BlockManager) -> None:
    manager = BlockManager(2, 4)
    cache(manager, A)
    cache(manager, B)
    manager.match_prefix(A)
    evict(manager)
    assert (manager.match_prefix(A), manager.match_prefix(B)) == (0, 4)


# -------------------------------------------------------------------- what leaves first


def order_of_leaving(manager: BlockManager, prompts: list[list[int]]) -> list[list[int]]:
    """Return the order in which these prompts of one block are evicted."""
    held = manager.allocate(manager.num_free_blocks * manager.block_size)
    order = list[list[int]]()
    for _ in prompts:
        manager.append(held, manager.block_size)
        manager.check()
        gone = [p for p in prompts if p not in order and not manager.match_prefix(p)]
        assert len(gone) == 1
        order += gone
    return order


def used_again(manager: BlockManager, ids: list[int]) -> None:
    """Another sequence shares the whole of a cached prompt."""
    sequence = manager.allocate([*ids, 0])
    assert sequence.num_cached_tokens == len(ids)
    manager.free(sequence)


def test_lru_lets_go_first_what_was_used_longest_ago() -> None:
    manager = BlockManager(6, 4, eviction="lru")
    for prompt in (A, B, C):
        cache(manager, prompt)
    used_again(manager, A)
    assert order_of_leaving(manager, [A, B, C]) == [B, C, A]


def test_lru_counts_from_when_the_last_holder_left() -> None:
    manager = BlockManager(6, 4, eviction="lru")
    long = committed(manager, A)
    cache(manager, B)
    manager.free(long)
    assert order_of_leaving(manager, [A, B]) == [B, A]


def test_lifetime_keeps_reused_blocks_over_blocks_used_once() -> None:
    if "lifetime" not in POLICIES:
        pytest.skip("this kvpager has no such policy")
    manager = BlockManager(32, 4, eviction="lifetime")
    fresh = count(100)
    for _ in range(1000):
        cache(manager, [*A, next(fresh), 0, 0, 0])
    assert manager.match_prefix(A) == 4


@pytest.mark.parametrize("policy", POLICIES)
def test_the_tail_of_a_prompt_leaves_before_its_front(policy: str) -> None:
    manager = BlockManager(8, 4, eviction=policy)
    cache(manager, A + B + C)
    for kept in (8, 4, 0):
        evict(manager)
        assert manager.match_prefix(A + B + C) == kept


@pytest.mark.parametrize("policy", POLICIES)
def test_a_branch_leaves_before_the_trunk_it_stands_on(policy: str) -> None:
    manager = BlockManager(8, 4, eviction=policy)
    for prompt in (A + B, A + C, A + D):
        cache(manager, prompt)
    evict(manager, 3)
    assert manager.match_prefix(A) == 4
    assert manager.stats().num_cached == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_eviction_never_takes_a_held_block(policy: str) -> None:
    manager = BlockManager(8, 4, eviction=policy)
    cache(manager, A + B + C)
    held = manager.allocate(A + B + D)  # holds A and B
    table = manager.block_tables(held)[0].tolist()
    evict(manager)
    assert manager.match_prefix(A + B + C) == 8
    with pytest.raises(OutOfBlocks, match="5 free, 0 evictable"):
        manager.allocate(24)
    assert manager.block_tables(held)[0].tolist() == table
    manager.check()


@pytest.mark.parametrize("policy", POLICIES)
def test_idle_blocks_in_front_of_held_ones_can_be_reclaimed(policy: str) -> None:
    manager = BlockManager(4, 4, eviction=policy)
    sequence = committed(manager, A + B + C + D)
    manager.drop_before(sequence, 8)
    assert manager.stats().num_cached == 2
    table = manager.block_tables(sequence)[0].tolist()
    other = manager.allocate(8)
    assert not set(manager.block_tables(other)[0].tolist()) & set(table[2:])
    assert manager.block_tables(sequence)[0].tolist() == table
    manager.check()
    manager.free([sequence, other])
    manager.clear_prefix_cache()
    manager.check()
    assert manager.num_free_blocks == 4


def test_a_fully_evicted_prompt_can_be_cached_again() -> None:
    manager = BlockManager(4, 4)
    for _ in range(50):
        cache(manager, A + B + C + D)
        assert manager.match_prefix(A + B + C + D) == 16
        manager.clear_prefix_cache()
        manager.check()


def test_tenants_that_come_and_go_leave_nothing_behind(manager: BlockManager) -> None:
    for i in range(300):
        cache(manager, A + B, namespace=f"tenant {i}")
    assert len(manager._state.forest.roots) <= 33
    manager.clear_prefix_cache()
    assert not manager._state.forest.roots
    assert sum(node is not None for node in manager._state.forest.nodes) == 0
    manager.check()


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
