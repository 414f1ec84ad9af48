"""Names and bytes of KV events are vLLM's: compared with what vLLM itself made, see the records."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from kvpager import BlockManager
from kvpager.kv_events.block_hashes import first_seed
from kvpager.kv_events.block_names import VLLMHashes
from kvpager.kv_events.settings import Encoding
from kvpager.kv_events.translator import Translator
from tests.support.prefixes import cache
from tests.support.vllm_events import (
    ALGORITHMS,
    BLOCK_SIZE,
    PROMPTS,
    RECORDS,
    TIME,
    Prompt,
)

pytest.importorskip("msgspec")
from kvpager.kv_events.wire import encode_batch

ENCODINGS = get_args(Encoding)
RECORDED = json.loads(RECORDS.read_text())


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)


def translator(algorithm: str, *, int_hashes: bool = True) -> Translator:
    names = VLLMHashes(algorithm, {"math": "adapters/math"})
    return Translator(names, int_hashes=int_hashes)


def messages(prompt: Prompt, algorithm: str, *, int_hashes: bool) -> list[dict[str, Any]]:
    manager = BlockManager(16, BLOCK_SIZE, num_events=100)
    cache(manager, prompt.tokens, **prompt.key)
    return translator(algorithm, int_hashes=int_hashes).translate(manager.events.fetch())


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_block_has_the_hash_that_vllm_gives_it(algorithm: str, name: str) -> None:
    (stored,) = messages(PROMPTS[name], algorithm, int_hashes=False)
    hashes = [each.hex() for each in stored["block_hashes"]]
    assert hashes == RECORDED["hashes"][algorithm][name]


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_stored_prompt_has_the_bytes_that_vllm_sends(
    encoding: Encoding, algorithm: str, name: str
) -> None:
    stored = messages(PROMPTS[name], algorithm, int_hashes=algorithm == "sha256")
    payload = encode_batch(stored, TIME, 0, encoding)
    assert payload.hex() == RECORDED[encoding][f"{name}, {algorithm}"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_removed_block_has_the_bytes_that_vllm_sends(encoding: Encoding) -> None:
    manager, names = BlockManager(3, BLOCK_SIZE, num_events=100), translator("sha256")
    cache(manager, PROMPTS["plain"].tokens[:12])
    names.translate(manager.events.fetch())
    manager.allocate(1)  # evicts the last block
    removed = names.translate(manager.events.fetch())
    assert encode_batch(removed, TIME, 0, encoding).hex() == RECORDED[encoding]["removed"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_restart_without_blocks_has_the_bytes_that_vllm_sends(encoding: Encoding) -> None:
    cleared = translator("sha256").restart([])
    assert encode_batch(cleared, TIME, 0, encoding).hex() == RECORDED[encoding]["cleared"]


def test_the_first_seed_is_fixed_unless_python_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = first_seed()
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert (fixed, first_seed()) == ("vllm-none-hash", "7")
