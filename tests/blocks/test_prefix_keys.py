"""The parts of a prefix key: namespace, LoRA and mm_hashes."""

from __future__ import annotations

import json

import pytest

from kvpager import BlockManager
from tests.support.prefixes import A, B, C, cache, committed

DOG, CAT = b"sha256 of a dog", b"sha256 of a cat"


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=64, block_size=4)


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


@pytest.mark.parametrize("label", ["namespace", "lora"])
def test_a_label_with_a_lone_surrogate_is_refused(manager: BlockManager, label: str) -> None:
    value = json.loads(r'"\ud83d"')  # as half of an emoji in a JSON request
    for look in (manager.allocate, manager.match_prefix):
        with pytest.raises(ValueError, match=f"{label}='.ud83d': expected Unicode text"):
            look(A, **{label: value})  # type: ignore[operator]
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
