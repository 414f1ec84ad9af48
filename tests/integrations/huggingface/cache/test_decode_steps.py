"""Decoding steps between two blocks, which leave the block tables as they are."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

import kvpager
from kvpager.blocks.manager import BlockManager
from kvpager.integrations.huggingface.cache.paged_cache import PagedCache
from tests.support import tiny_models
from tests.support.cache_name import cache_of, passing

BLOCK, LAYERS, ROWS, HEADS, DIM = 8, 2, 3, 2, 16


def write(caches: list[Cache], generator: torch.Generator, columns: int = 1) -> None:
    """The same random keys and values to every layer of every cache."""
    rows = caches[0].layers[0].keys.shape[0] if caches[0].get_seq_length() else ROWS
    for layer in range(LAYERS):
        states = torch.randn(2, rows, HEADS, columns, DIM, generator=generator)
        for cache in caches:
            cache.update(states[0], states[1], layer)


def assert_equal(paged: Cache, plain: Cache) -> None:
    for ours, theirs in zip(paged.layers, plain.layers, strict=True):
        assert torch.equal(ours.keys + 0, theirs.keys)
        assert torch.equal(ours.values + 0, theirs.values)
    for pool in paged.memory.pools():
        pool.manager.check()


def started(columns: int) -> tuple[PagedCache, DynamicCache, torch.Generator]:
    generator = torch.Generator().manual_seed(columns)
    paged, plain = PagedCache(block_size=BLOCK), DynamicCache()
    write([paged, plain], generator, columns)
    return paged, plain, generator


def questions(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """A list that grows whenever a block manager is asked for block tables."""
    asked: list[None] = []
    block_tables = BlockManager.block_tables

    def counting(*args: Any, **kwargs: Any) -> Any:
        asked.append(None)
        return block_tables(*args, **kwargs)

    monkeypatch.setattr(BlockManager, "block_tables", counting)
    return asked


def test_tables_are_made_again_when_a_block_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    paged, plain, generator = started(BLOCK)
    asked = questions(monkeypatch)
    steps_that_ask = []
    for step in range(3 * BLOCK):
        before = len(asked)
        write([paged, plain], generator)
        if len(asked) > before:
            steps_that_ask.append(step)
    assert steps_that_ask == [0, BLOCK, 2 * BLOCK]
    assert_equal(paged, plain)


CHANGES: dict[str, Callable[[Cache], object]] = {
    "crop": lambda cache: cache.crop(-1),
    "crop to the block before": lambda cache: cache.crop(-BLOCK),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([-1, 0])),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("steps", [1, 2, BLOCK - 3, BLOCK - 2])
def test_a_batch_may_change_within_a_block(change: str, steps: int) -> None:
    paged, plain, generator = started(BLOCK + 2)
    for _ in range(3):
        for _ in range(steps):
            write([paged, plain], generator)
        for cache in (paged, plain):
            CHANGES[change](cache)
        assert_equal(paged, plain)
        write([paged, plain], generator)
        assert_equal(paged, plain)


@pytest.mark.parametrize("steps", range(BLOCK))
def test_a_copy_made_within_a_block_goes_its_own_way(steps: int) -> None:
    paged, plain, generator = started(BLOCK + 1)
    for _ in range(steps):
        write([paged, plain], generator)
    other_paged, other_plain = copy.deepcopy(paged), copy.deepcopy(plain)
    for _ in range(BLOCK):
        write([paged, plain], generator)
        write([other_paged, other_plain], generator)
        assert_equal(paged, plain)
        assert_equal(other_paged, other_plain)


def test_rows_begin_their_blocks_where_their_padding_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    paged = PagedCache(block_size=BLOCK)
    expected: list[Tensor] = []
    paged.groups[0].columns.padding = torch.tensor([0, 3, 9]).numpy()
    for columns in (10, *[1] * (3 * BLOCK)):
        states = torch.randn(2, ROWS, HEADS, columns, DIM, generator=generator)
        keys, _ = paged.update(states[0], states[1], 0)
        expected.append(states[0])
        whole = torch.cat(expected, dim=2)
        for row, padding in enumerate([0, 3, 9]):
            assert torch.equal((keys + 0)[row, :, padding:], whole[row, :, padding:])
    paged.memory.pools()[0].manager.check()


def test_keys_held_over_steps_show_what_they_showed() -> None:
    paged, plain, generator = started(BLOCK)
    held = []
    for _ in range(2 * BLOCK):
        write([paged, plain], generator)
        held.append((paged.layers[1].keys, plain.layers[1].keys.clone()))
    paged.crop(-BLOCK)
    for ours, theirs in held:
        assert torch.equal(ours + 0, theirs)


def test_statistics_count_every_token() -> None:
    model = tiny_models.tiny_model("llama")
    ids = torch.ones(ROWS, 1, dtype=torch.long)
    with kvpager.patch(model, block_size=BLOCK) as patch, torch.no_grad():
        cache = cache_of(model(ids.expand(-1, BLOCK), use_cache=True))
        of_a_token = patch.stats().used_bytes // (ROWS * BLOCK)
        for step in range(1, 2 * BLOCK):
            model(ids, **passing(cache), use_cache=True)
            assert patch.stats().used_bytes == ROWS * (BLOCK + step) * of_a_token
        for _ in range(BLOCK - 1):
            model(ids, **passing(cache), use_cache=True)
        assert patch.stats().used_bytes == ROWS * (4 * BLOCK - 2) * of_a_token


def test_another_thread_may_ask_at_any_time() -> None:
    paged, plain, generator = started(BLOCK)
    done, seen = threading.Event(), []

    def ask() -> None:
        while not done.is_set():
            paged.memory.settle()
            seen.append(paged.memory.pools()[0].manager.stats().num_tokens)

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(20 * BLOCK):
        write([paged, plain], generator)
    done.set()
    thread.join()
    assert seen == sorted(seen)
    assert_equal(paged, plain)


def test_a_cache_dropped_within_a_block_gives_its_blocks_back() -> None:
    paged, plain, generator = started(BLOCK)
    for _ in range(3):
        write([paged, plain], generator)
    (pool,) = paged.memory.pools()
    del paged
    pool.settle()
    assert pool.manager.num_held_blocks == 0
    pool.manager.check()


def test_a_window_frees_only_whole_blocks_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_models.tiny_model("mistral").config
    window = config.sliding_window
    paged, plain = PagedCache(config, block_size=BLOCK), DynamicCache(config=config)
    generator = torch.Generator().manual_seed(0)
    asked = questions(monkeypatch)
    steps_that_ask = 0
    for step in range(window + 4 * BLOCK):
        before = len(asked)
        write([paged, plain], generator)
        steps_that_ask += step >= window + BLOCK and len(asked) > before
        assert_equal(paged, plain)
        (pool,) = paged.memory.pools()
        assert pool.manager.num_held_blocks <= ROWS * (-(-window // BLOCK) + 1)
    # Of three blocks' steps: where a block is full, and where one is left behind.
    assert steps_that_ask <= 3 * 3
