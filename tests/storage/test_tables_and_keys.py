"""Block tables in the formats of other kernels, and content keys of blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpager import BlockManager
from kvpager.errors import SequenceSwapped, StaleSequence
from kvpager.storage.keys import KEY_BYTES, KeyContext, content_keys, shard_key
from kvpager.storage.table_formats import flash_attention, flashinfer
from tests.support.programs import outputs_by_hash_seed


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=16, block_size=4, num_host_blocks=8)


# -------------------------------------------------------------------- FlashInfer


def test_flashinfer_gets_all_tables_end_to_end(manager: BlockManager) -> None:
    sequences = [manager.allocate(n) for n in (9, 4, 1)]
    ragged = flashinfer(manager, sequences)
    assert ragged.indptr.tolist() == [0, 3, 4, 5]
    for i, sequence in enumerate(sequences):
        part = ragged.indices[ragged.indptr[i] : ragged.indptr[i + 1]]
        assert part.tolist() == manager.block_tables(sequence)[0].tolist()
    assert all(array.dtype == np.int32 for array in ragged)


def test_flashinfer_counts_the_last_page_from_one_to_block_size(manager: BlockManager) -> None:
    sequences = [manager.allocate(n) for n in (1, 3, 4, 5, 8)]
    assert flashinfer(manager, sequences).last_page_len.tolist() == [1, 3, 4, 1, 4]


def test_flashinfer_gets_no_page_and_length_zero_for_empty_sequences(
    manager: BlockManager,
) -> None:
    ragged = flashinfer(manager, [manager.allocate(5), manager.allocate([]), manager.allocate(1)])
    assert ragged.indptr.tolist() == [0, 2, 2, 3]
    assert ragged.last_page_len.tolist() == [1, 0, 1]


def test_no_sequences_make_empty_flashinfer_tables(manager: BlockManager) -> None:
    ragged = flashinfer(manager, [])
    assert ragged.indptr.tolist() == [0]
    assert len(ragged.indices) == len(ragged.last_page_len) == 0


def test_flashinfer_tables_take_a_handle_a_batch_or_a_generator(manager: BlockManager) -> None:
    sequence = manager.allocate(6)
    expected = manager.block_tables(sequence)[0].tolist()
    for target in (sequence, manager.batch([sequence]), (s for s in [sequence])):
        assert flashinfer(manager, target).indices.tolist() == expected


def test_flashinfer_tables_refuse_dropped_blocks(manager: BlockManager) -> None:
    swapped, dropped, whole = (manager.allocate(9) for _ in range(3))
    manager.swap(swapped, "host")
    manager.drop_before(dropped, 5)
    with pytest.raises(ValueError, match="the first blocks of one are gone"):
        flashinfer(manager, [whole, dropped])
    for make in (flashinfer, flash_attention):
        with pytest.raises(SequenceSwapped):
            make(manager, [whole, swapped])


def test_tables_of_a_freed_sequence_are_refused(manager: BlockManager) -> None:
    sequence = manager.allocate(3)
    manager.free(sequence)
    for make in (flashinfer, flash_attention):
        with pytest.raises(StaleSequence):
            make(manager, [sequence])


# -------------------------------------------------------------------- flash-attn


def test_flash_attention_tables_are_rectangular_and_padded_with_block_0(
    manager: BlockManager,
) -> None:
    sequences = [manager.allocate(9), manager.allocate(2)]
    padded = flash_attention(manager, sequences)
    assert padded.block_table.shape == (2, 3)
    assert padded.block_table[0].tolist() == manager.block_tables(sequences[0])[0].tolist()
    assert padded.block_table[1, 0] == manager.block_tables(sequences[1])[0][0]
    assert padded.block_table[1, 1:].tolist() == [0, 0]
    assert padded.seq_lens.tolist() == [9, 2]
    assert len(padded.slot_mapping) == 0


def test_a_steps_slots_become_the_slot_mapping(manager: BlockManager) -> None:
    sequences = [manager.allocate(4), manager.allocate(2)]
    step = manager.append(sequences, 1)
    padded = flash_attention(manager, sequences, step)
    assert padded.slot_mapping.tolist() == step.slots.tolist()
    assert padded.slot_mapping.dtype == np.int64


def test_padding_adds_unused_rows_columns_and_slots(manager: BlockManager) -> None:
    sequences = [manager.allocate(4), manager.allocate(2)]
    step = manager.append(sequences, 1)
    plain = flash_attention(manager, sequences, step)
    padded = flash_attention(manager, sequences, step, num_rows=4, width=8, num_tokens=5)
    assert padded.block_table.shape == (4, 8)
    assert padded.block_table[:2, :2].tolist() == plain.block_table.tolist()
    assert not padded.block_table[2:].any()
    assert not padded.block_table[:, 2:].any()
    assert padded.seq_lens.tolist() == [5, 3, 0, 0]
    assert padded.slot_mapping.tolist() == [*step.slots.tolist(), -1, -1, -1]


@pytest.mark.parametrize("too_small", ["num_rows", "width", "num_tokens"])
def test_tables_that_do_not_fit_their_padding_are_refused(
    manager: BlockManager, too_small: str
) -> None:
    sequences = [manager.allocate(8), manager.allocate(2)]
    step = manager.append(sequences, 1)
    room = {"num_rows": 2, "width": 3, "num_tokens": 2}
    flash_attention(manager, sequences, step, **room)
    with pytest.raises(ValueError, match=too_small):
        flash_attention(manager, sequences, step, **{**room, too_small: room[too_small] - 1})


def test_a_sequence_with_dropped_blocks_keeps_its_length(manager: BlockManager) -> None:
    sequence = manager.allocate(9)
    manager.drop_before(sequence, 5)
    padded = flash_attention(manager, sequence)
    assert padded.seq_lens.tolist() == [9]
    assert padded.block_table[0, 1:].tolist() == manager.block_tables(sequence)[0][1:].tolist()


# -------------------------------------------------------------------- keys

CONTEXT = KeyContext("fp16/HND/8x128/4", "llama@1", b"s" * 16, "adapter")
IDS = list(range(16))
SHOWN = [(5, 10, b"image")]


def test_full_blocks_get_keys_and_the_open_one_none() -> None:
    assert [len(content_keys(range(n), 4, CONTEXT)) for n in (0, 3, 4, 9)] == [0, 0, 1, 2]


def test_a_key_is_32_bytes() -> None:
    assert KEY_BYTES == 32
    assert {len(key) for key in content_keys(IDS, 4, CONTEXT, SHOWN)} == {32}


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("layout", "fp16/NHD/8x128/4"),
        ("model", "llama@2"),
        ("secret", b"t" * 16),
        ("secret", b"s" * 17),
        ("secret", b"s" * 16 + b"\0"),
        ("secret", b""),
        ("lora", None),
        ("lora", " "),
        ("lora", "other"),
    ],
)
def test_another_context_gives_other_keys_throughout(field: str, other: object) -> None:
    keys = content_keys(IDS, 4, CONTEXT)
    others = content_keys(IDS, 4, replace(CONTEXT, **{field: other}))
    assert not set(keys) & set(others)


@pytest.mark.parametrize("field", ["layout", "model"])
def test_a_key_without_a_model_or_a_layout_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f'{field}="": blocks of any {field} would be the same'):
        replace(CONTEXT, **{field: ""})


def test_an_empty_lora_is_refused() -> None:
    with pytest.raises(ValueError, match='lora="": expected at least one character'):
        replace(CONTEXT, lora="")


def test_fields_of_a_key_are_encoded_separately() -> None:
    contexts = [
        KeyContext("ab", "c"),
        KeyContext("a", "bc"),
        KeyContext("abc", "d"),
        KeyContext("a", "bcd"),
        KeyContext("a", "b", lora="c"),
        KeyContext("a", "b", lora="cd"),
    ]
    assert len({content_keys(IDS, 4, context)[0] for context in contexts}) == len(contexts)


def test_another_block_size_gives_other_keys() -> None:
    assert not set(content_keys(IDS, 4, CONTEXT)) & set(content_keys(IDS, 8, CONTEXT))


@pytest.mark.parametrize("position", range(16))
def test_a_changed_token_changes_the_keys_from_its_block_on(position: int) -> None:
    keys = content_keys(IDS, 4, CONTEXT)
    changed = content_keys([*IDS[:position], 99, *IDS[position + 1 :]], 4, CONTEXT)
    same = [a == b for a, b in zip(keys, changed, strict=True)]
    assert same == [block < position // 4 for block in range(4)]


def test_equal_blocks_at_different_depths_have_different_keys() -> None:
    assert len(set(content_keys([7] * 16, 4, CONTEXT))) == 4


@pytest.mark.parametrize(
    "shown",
    [
        [],
        [(5, 10, b"other")],
        [(6, 10, b"image")],
        [(5, 7, b"image")],
        [(5, 10, b"image"), (7, 8, b"image")],
    ],
)
def test_other_mm_hashes_change_keys_from_their_first_block_on(
    shown: list[tuple[int, int, bytes]],
) -> None:
    keys = content_keys(IDS, 4, CONTEXT, SHOWN)
    others = content_keys(IDS, 4, CONTEXT, shown)
    assert [a == b for a, b in zip(keys, others, strict=True)] == [True, False, False, False]


def test_the_order_of_mm_hashes_does_not_matter() -> None:
    shown = [(1, 3, b"a"), (5, 7, b"b")]
    assert content_keys(IDS, 4, CONTEXT, shown) == content_keys(IDS, 4, CONTEXT, shown[::-1])


PIECES = st.lists(st.tuples(st.integers(0, 7), st.binary(min_size=1, max_size=9)), max_size=3)


@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=8, max_size=8),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=8, max_size=8),
    PIECES,
    PIECES,
)
def test_two_different_blocks_never_have_one_key(
    ids: list[int],
    others: list[int],
    one: list[tuple[int, bytes]],
    two: list[tuple[int, bytes]],
) -> None:
    first = sorted((start, 8, digest) for start, digest in one)
    second = sorted((start, 8, digest) for start, digest in two)
    same = (ids, first) == (others, second)
    keys = content_keys(ids, 8, CONTEXT, first), content_keys(others, 8, CONTEXT, second)
    assert (keys[0] == keys[1]) == same


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, ">i4"])
def test_keys_depend_on_the_numbers_and_not_on_their_dtype(dtype: object) -> None:
    assert content_keys(np.array(IDS, dtype), 4, CONTEXT) == content_keys(IDS, 4, CONTEXT)


def test_keys_are_equal_in_every_process() -> None:
    code = (
        "from kvpager.storage.keys import *;"
        f"print(b''.join(content_keys({IDS}, 4, {CONTEXT!r}, {SHOWN})).hex())"
    )
    assert outputs_by_hash_seed(code) == {b"".join(content_keys(IDS, 4, CONTEXT, SHOWN)).hex()}


def test_a_key_stays_the_same_from_release_to_release() -> None:
    # Keys name blocks in external stores: a change here loses them.
    key = content_keys(IDS, 4, CONTEXT)[-1]
    assert key.hex() == "93086a17801342a770ce1741371ea4d68ac07a279d2d06dc54aff2a4941dcb68"


def test_the_key_of_a_shard_covers_rank_and_layout_and_stays_the_same() -> None:
    key = bytes(range(32))
    keys = [shard_key(key, *of) for of in ((1, b"a"), (2, b"a"), (1, b"b"))]
    keys.append(shard_key(bytes(32), 1, b"a"))
    assert len({key, *keys}) == 5
    assert keys[0].hex() == "b8f1e3d7467c8cda65ad517b1cc61b2bca3bf7b5b398ffc25edf48292e7096bd"


@pytest.mark.parametrize("secret", [b"short", b"s" * 15, b"s" * 65, "s" * 16, None, bytearray(16)])
def test_a_secret_of_the_wrong_length_or_kind_is_refused(secret: object) -> None:
    with pytest.raises(ValueError, match="secret: expected 16 to 64 bytes"):
        content_keys(IDS, 4, replace(CONTEXT, secret=secret))  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [0, 16, 64])
def test_secrets_of_16_to_64_bytes_and_none_are_taken(length: int) -> None:
    assert len(content_keys(IDS, 4, replace(CONTEXT, secret=b"s" * length))) == 4


def test_mm_hashes_beyond_the_prompt_or_without_hash_are_refused() -> None:
    with pytest.raises(ValueError, match="mm_hashes stop=17: expected at most 16"):
        content_keys(IDS, 4, CONTEXT, [(3, 17, b"image")])
    with pytest.raises(ValueError, match="mm_hashes stop=3: expected at least 4"):
        content_keys(IDS, 4, CONTEXT, [(3, 3, b"image")])
    for digest in (b"", "image"):
        with pytest.raises(TypeError, match="has no hash"):
            content_keys(IDS, 4, CONTEXT, [(3, 4, digest)])  # type: ignore[list-item]


def test_a_block_size_must_be_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two"):
        content_keys(IDS, 3, CONTEXT)
