"""Layouts by name: whatever changes the meaning of a block's bytes changes the name."""

from __future__ import annotations

from typing import Any

import pytest

from kvpager.storage.tiers.layout import BlockLayout

LLAMA: dict[str, Any] = {
    "block_size": 16,
    "layers": [(8, 128, 128)] * 2,
    "dtype": "bfloat16",
    "block_bytes": 131072,
}


@pytest.mark.parametrize(
    "other",
    [
        {"block_size": 32},
        {"layers": [(8, 128, 128)]},
        {"layers": [(8, 128, 128), (8, 128, 64)]},
        {"layers": [(8, 128, 128), (4, 256, 128)]},
        {"layers": [(8, 12, 8128)] * 2},
        {"dtype": "float16"},
        {"kv_cache_dtype": "int8"},
        {"groups": [(None, [0]), (4096, [1])]},
        {"groups": [(None, [1]), (4096, [0])]},
        {"groups": [(4096, [0, 1])]},
        {"token_first": True},
        {"num_ranks": 2},
        {"num_ranks": 2, "rank": 1},
        {"block_bytes": 131073},
    ],
)
def test_each_field_gives_another_layout(other: dict[str, Any]) -> None:
    layout, changed = BlockLayout.of(**LLAMA), BlockLayout.of(**LLAMA | other)
    assert layout.fingerprint != changed.fingerprint
    assert layout.text != changed.text or "block_bytes" in other


def test_ranks_of_one_model_have_layouts_of_their_own() -> None:
    prints = {BlockLayout.of(**LLAMA, rank=rank, num_ranks=4).fingerprint for rank in range(4)}
    assert len(prints) == 4


def test_the_dtype_is_the_kv_cache_dtype_unless_given() -> None:
    assert BlockLayout.of(**LLAMA) == BlockLayout.of(**LLAMA, kv_cache_dtype="bfloat16")


def test_a_layout_stays_the_same_from_release_to_release() -> None:
    layout = BlockLayout.of(**LLAMA)
    assert layout.text == (
        "kvpager block-first 1; block_size 16; dtype bfloat16; kv_cache_dtype bfloat16; "
        "layers 8x128x128 8x128x128; rank 0 of 1"
    )
    assert layout.fingerprint.hex() == "b575aaa36f852e1e963b776e3471da62"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_size": 12}, "block_size=12: expected a power of two"),
        ({"num_ranks": 0}, "num_ranks=0: expected at least 1"),
        ({"num_ranks": 2, "rank": 2}, "rank=2: expected at most 1"),
        ({"rank": 1}, "rank=1: expected at most 0"),
        ({"block_bytes": 0}, "block_bytes=0: expected at least 1"),
    ],
)
def test_bad_arguments_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockLayout.of(**LLAMA | wrong)
