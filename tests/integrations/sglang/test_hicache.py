"""Pages of SGLang's host memory go to kvpager's stores and come back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvpager.storage.tiers.protocol import Saved
from tests.support.dict_store import DictStore
from tests.support.sglang_parts import (
    LAYOUTS,
    HostPool,
    config_of,
    hicache_of,
    pages,
    tokens_of,
)

KEYS = ["a0", "b1", "c2"]


class Buffers(DictStore):
    """A store that keeps the buffers it was given."""

    def __init__(self, block_bytes: int) -> None:
        super().__init__(block_bytes)
        self.seen = list[Any]()

    def save(self, keys: Any, blocks: Any, deadline: float) -> Any:
        self.seen += blocks
        return super().save(keys, blocks, deadline)

    def load(self, keys: Any, into: Any, deadline: float) -> Any:
        self.seen += into
        return super().load(keys, into, deadline)


@pytest.fixture
def pool() -> HostPool:
    return HostPool("page_first")


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch, pool: HostPool) -> Iterator[Any]:
    """Return a storage over two stores in dicts."""
    made = hicache_of(monkeypatch, pool)
    made.close()
    size = made._pages.part_bytes
    made._stores = [Buffers(size), Buffers(size)]
    yield made
    made.close()


def is_of(pool: HostPool, buffer: memoryview) -> bool:
    memory = pool.kv_buffer.view(torch.uint8).numpy()
    return np.shares_memory(np.frombuffer(buffer, np.uint8), memory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("layout", [*LAYOUTS, "latent"])
def test_pages_come_back_at_other_places(
    layout: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = HostPool(layout, dtype=dtype)
    made = hicache_of(monkeypatch, pool)
    saved = [pool.page(number) for number in (5, 0, 2)]
    assert made.batch_set_v1(KEYS, tokens_of(pool, 5, 0, 2)) == [True] * 3
    pool.kv_buffer.zero_()
    others = [pool.page(number) for number in (0, 2, 4, 6, 7)]
    assert made.batch_exists(KEYS) == 3
    assert made.batch_get_v1(KEYS, tokens_of(pool, 1, 3, 5)) == [True] * 3
    for number, page in zip((1, 3, 5), saved, strict=True):
        assert torch.equal(pool.page(number), page)
    for number, page in zip((0, 2, 4, 6, 7), others, strict=True):
        assert torch.equal(pool.page(number), page)
    made.close()


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct", "page_head", "latent"])
def test_a_page_that_lies_together_moves_without_a_copy(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = HostPool(layout)
    made = hicache_of(monkeypatch, pool)
    made.close()
    made._stores = [store := Buffers(made._pages.part_bytes)]
    made.batch_set_v1(KEYS, tokens_of(pool, 1, 2, 3))
    made.batch_get_v1(KEYS, tokens_of(pool, 4, 5, 6))
    assert len(store.seen) == 6 * made._pages.num_parts
    assert all(is_of(pool, buffer) for buffer in store.seen)


def test_pages_in_pieces_are_copied_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = HostPool("layer_first")
    page_bytes = pool.page(0).nbytes
    monkeypatch.setattr(pages, "_STAGED_BYTES", 2 * page_bytes)
    made = hicache_of(monkeypatch, pool)
    made.close()
    made._stores = [store := Buffers(page_bytes)]
    calls = list[int]()
    monkeypatch.setattr(
        store,
        "save",
        lambda keys, *rest: calls.append(len(keys)) or Buffers.save(store, keys, *rest),
    )
    saved = [pool.page(number) for number in (1, 2, 3)]
    assert made.batch_set_v1(KEYS, tokens_of(pool, 1, 2, 3)) == [True] * 3
    assert calls == [2, 1]
    assert made.batch_get_v1(KEYS, tokens_of(pool, 4, 5, 6)) == [True] * 3
    assert all(torch.equal(pool.page(4 + n), page) for n, page in enumerate(saved))


def test_a_run_of_hits_ends_at_a_page_without_its_keys_or_values(
    stored: Any, pool: HostPool
) -> None:
    stored.batch_set_v1(KEYS, tokens_of(pool, 1, 2, 3))
    names = stored._keys(KEYS)
    assert len(names) == len(set(names)) == 6
    for store in stored._stores:
        del store.blocks[names[3]]  # the values of the second page
    assert stored.batch_exists(KEYS) == 1
    assert [stored.exists(key) for key in KEYS] == [True, False, True]
    assert stored.batch_get_v1(KEYS, tokens_of(pool, 1, 2, 3)) == [True, False, True]


def test_stores_are_asked_in_order_for_what_those_before_lack(stored: Any, pool: HostPool) -> None:
    saved = [pool.page(number) for number in (1, 2, 3)]
    stored.batch_set_v1(KEYS, tokens_of(pool, 1, 2, 3))
    first, second = stored._stores
    for name in stored._keys(KEYS[1:]):
        del first.blocks[name]
    for name in stored._keys(KEYS[:1]):
        del second.blocks[name]
    assert stored.batch_exists(KEYS) == 3
    assert stored.batch_get_v1(KEYS, tokens_of(pool, 4, 5, 6)) == [True] * 3
    assert all(torch.equal(pool.page(4 + n), page) for n, page in enumerate(saved))
    assert (first.num_loads, second.num_loads) == (6, 4)


def test_a_page_is_saved_if_a_store_has_it_afterwards(stored: Any, pool: HostPool) -> None:
    first, second = stored._stores
    first.answer = Saved.REFUSED
    assert stored.batch_set_v1(KEYS, tokens_of(pool, 1, 2, 3)) == [True] * 3
    second.answer = Saved.KNOWN
    assert stored.batch_set_v1(["d"], tokens_of(pool, 4)) == [True]
    second.answer = Saved.LATE
    assert stored.batch_set_v1(["e"], tokens_of(pool, 4)) == [False]


@pytest.mark.parametrize("fault", ["raises", "booleans"])
def test_a_store_that_breaks_its_contract_is_passed_over(
    stored: Any, pool: HostPool, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = [pool.page(number).clone() for number in (1, 2, 3)]
    first, second = stored._stores
    first.fails = fault == "raises"
    if fault == "booleans":  # False equals `Loaded.HIT`
        for name in ("load", "save"):
            real = getattr(first, name)
            monkeypatch.setattr(first, name, lambda *call, real=real: real(*call) == 0)
    assert stored.batch_set_v1(KEYS, tokens_of(pool, 1, 2, 3)) == [True] * 3
    first.blocks.clear()
    assert stored.batch_exists(KEYS) == 3
    assert stored.batch_get_v1(KEYS, tokens_of(pool, 4, 5, 6)) == [True] * 3
    assert all(torch.equal(pool.page(4 + n), page) for n, page in enumerate(saved))
    second.blocks.clear()
    assert stored.batch_get_v1(KEYS, tokens_of(pool, 4, 5, 6)) == [False] * 3


def test_a_store_that_is_bypassed_is_offered_nothing(stored: Any, pool: HostPool) -> None:
    stored._stores[0].bypassed = True
    assert stored.batch_set_v1(KEYS, tokens_of(pool, 1, 2, 3)) == [True] * 3
    assert [store.num_saves for store in stored._stores] == [0, 6]


def test_pages_survive_a_restart_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: HostPool
) -> None:
    config = config_of(f"disk:{tmp_path / 'kv'}?capacity=1MiB", extra={"model_id": "b@1"})
    made = hicache_of(monkeypatch, pool, config)
    page = pool.page(1)
    assert made.batch_set_v1(["a"], tokens_of(pool, 1)) == [True]
    made.close()
    made = hicache_of(monkeypatch, pool, config)
    assert made.batch_get_v1(["a"], tokens_of(pool, 6)) == [True]
    assert torch.equal(pool.page(6), page)
    made.close()
    assert made.batch_exists(["a"]) == 0


def test_to_clear_keeps_blocks_and_says_so(
    stored: Any, pool: HostPool, caplog: pytest.LogCaptureFixture
) -> None:
    stored.batch_set_v1(KEYS, tokens_of(pool, 1, 2, 3))
    stored.clear()
    assert stored.batch_exists(KEYS) == 3
    assert "the stores keep their blocks" in caplog.text


@pytest.mark.parametrize("name", ["get", "set", "batch_get", "batch_set"])
def test_calls_with_tensors_are_refused(name: str, stored: Any) -> None:
    with pytest.raises(NotImplementedError, match="interface_v1"):
        getattr(stored, name)("a")
