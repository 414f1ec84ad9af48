"""Errors of a pool without room: the memory that they name is the memory that a call takes."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

pytest.importorskip("transformers")

import kvpager
from kvpager._validate import parse_memory
from kvpager.storage.block_storage import BlockStorage
from tests.support import tiny_models
from tests.support.llama_calls import block_bytes, generate, llama, long_prompt, tokens


def test_a_global_bound_below_one_block_fails_at_first_use() -> None:
    with (
        kvpager.patch(memory=8),
        pytest.raises(kvpager.OutOfBlocks, match=r"memory=8 B allows 0. Raise memory to 8.0 KiB"),
    ):
        tokens(llama(), tiny_models.prompts([5]))


def test_the_memory_that_an_error_asks_for_is_enough() -> None:
    ids = long_prompt()[:, :300]
    with kvpager.patch(llama(), memory="64KiB"), pytest.raises(kvpager.OutOfBlocks) as raised:
        generate(llama(), ids, max_new_tokens=1)
    assert raised.value.__suppress_context__  # the pool's own words say nothing to a user
    assert str(copy.copy(raised.value)) == str(raised.value)
    asked = re.search(r"Raise memory to (.*iB) or set", str(raised.value))
    assert asked is not None
    with kvpager.patch(llama(), memory=asked[1]):
        generate(llama(), ids, max_new_tokens=1)


def test_the_memory_named_in_an_error_suffices() -> None:
    ids = long_prompt()[:, :19]
    with (
        kvpager.patch(llama(), memory=2 * block_bytes()),
        pytest.raises(kvpager.OutOfBlocks) as raised,
    ):
        generate(llama(), ids, max_new_tokens=64, min_new_tokens=64)
    asked = re.search(r"Raise memory to (.*iB) or set", str(raised.value))
    assert asked is not None
    with kvpager.patch(llama(), memory=asked[1]):
        generate(llama(), ids, max_new_tokens=64, min_new_tokens=64)


# The blocks of each call: rows of one prompt share its 9 full blocks, and padding takes none.
BLOCKS_OF_CALLS: dict[str, tuple[list[int], dict[str, Any], int]] = {
    "one row": ([150], {}, 10),
    "beams": ([150], {"num_beams": 4}, 9 + 4),
    "samples": ([150], {"do_sample": True, "num_return_sequences": 4}, 9 + 4),
    "beams of a padded batch": ([150, 20], {"num_beams": 4}, 9 + 4 + 1 + 4),
    "beams that are not merged": ([150], {"num_beams": 4, "output_hidden_states": True}, 4 * 10),
}  # fmt: skip


@pytest.mark.parametrize("call", BLOCKS_OF_CALLS)
def test_the_memory_named_in_an_error_is_what_a_call_takes(call: str) -> None:
    lengths, options, blocks = BLOCKS_OF_CALLS[call]
    inputs, size = tiny_models.prompts(lengths, seed=4), block_bytes()
    for bound in (2, blocks // 2, blocks - 1):
        with (
            kvpager.patch(llama(), memory=bound * size),
            pytest.raises(kvpager.OutOfBlocks) as raised,
        ):
            generate(llama(), inputs, **options)
        asked = re.search(r"Raise memory to (.*iB) or set", str(raised.value))
        assert asked is not None
        assert parse_memory(asked[1]) // size == blocks
        in_use = re.search(
            r"(\d+) more blocks? .*allows (\d+)(?:, (\d+) in use)?", str(raised.value)
        )
        assert in_use is not None
        needed, allowed, held = (int(each or 0) for each in in_use.groups())
        assert held <= allowed < held + needed
    with kvpager.patch(llama(), memory=asked[1]):
        generate(llama(), inputs, **options)


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("name", ["mistral", "gemma3", "t5", "bloom", "qwen3_next"])
def test_the_memory_named_in_an_error_suffices_for_other_layers(name: str) -> None:
    model, inputs = tiny_models.tiny_model(name), tiny_models.prompts([90, 60])
    with kvpager.patch(model, block_size=4) as patch:
        generate(model, inputs, num_beams=2)
        bound = patch.stats().peak_held_bytes // 2
    with (
        kvpager.patch(model, block_size=4, memory=bound),
        pytest.raises(kvpager.OutOfBlocks) as raised,
    ):
        generate(model, inputs, num_beams=2)
    asked = re.search(r"Raise memory to (.*iB) or set", str(raised.value))
    assert asked is not None
    with kvpager.patch(model, block_size=4, memory=asked[1]):
        generate(model, inputs, num_beams=2)


def test_a_full_device_is_not_mistaken_for_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(BlockStorage, "grow", fail)
    with (
        kvpager.patch(llama(), memory="1GiB"),
        pytest.raises(kvpager.OutOfBlocks, match="but the device is full"),
    ):
        generate(llama(), long_prompt())
