"""A store of kvpager as a secondary tier of vLLM: jobs that end, and bytes that are the same."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvpager.storage.tiers.protocol import Saved
from tests.support.dict_store import DictStore
from tests.support.vllm_parts import (
    LookupResult,
    LowerTiers,
    context_of,
    interface,
    key_of,
    model_config,
    offloading_config,
    secondary,
)

HIT, MISS, RETRY = LookupResult.HIT, LookupResult.MISS, LookupResult.RETRY
KEYS = [key_of(number) for number in range(64)]
ROW_BYTES = 64


class Tier:
    """A tier over rows of random bytes, with the calls of vLLM's tiering manager."""

    def __init__(self, num_slots: int = 16, **settings: Any) -> None:
        random = np.random.default_rng(0)
        self.rows = random.integers(-128, 128, (num_slots, ROW_BYTES), dtype=np.int8)
        self.view = memoryview(self.rows)
        spec = SimpleNamespace(config=offloading_config(), replicated_layout=False)
        told = SimpleNamespace(model_config=model_config())
        with interface.set_current_vllm_config(told):
            self.tier = secondary.KvpagerSecondaryTier(spec, self.view, "Tier", **settings)
        self.num_jobs = 0

    def request(self) -> Any:
        context = context_of(KEYS)
        self.tier.on_new_request(context)
        return context

    def job(self, keys: list[Any], slots: list[int], context: Any, *, is_load: bool) -> Any:
        self.num_jobs += 1
        chunks = np.array(slots, np.int32)
        return interface.TransferJob(self.num_jobs, keys, chunks, is_load, context)

    def save(self, keys: list[Any], slots: list[int], context: Any = None) -> None:
        job = self.job(keys, slots, context or self.request(), is_load=False)
        self.tier.submit_store(job)

    def load(self, keys: list[Any], slots: list[int], context: Any = None) -> None:
        job = self.job(keys, slots, context or self.request(), is_load=True)
        self.tier.submit_load(job)

    def ended(self) -> list[tuple[bool, Any]]:
        """Wait for all jobs. Returns for each if all went well, and the keys that came."""
        self.tier.drain_jobs()
        return [(job.success, job.successful_keys) for job in self.tier.get_finished_jobs()]

    def look_up(self, keys: list[Any], context: Any) -> list[Any]:
        """Look all keys up, end the step, and wait for the store."""
        found = [self.tier.lookup(key, context) for key in keys]
        self.tier.on_schedule_end(SimpleNamespace())
        self.tier.drain_jobs()
        return found


@pytest.fixture
def store() -> DictStore:
    return DictStore(ROW_BYTES)


@pytest.fixture
def tier(store: DictStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tier]:
    def opened(urls: Any, rows: Any, *args: Any, **settings: Any) -> Any:
        return LowerTiers([store], rows, lambda key: key[:32])

    monkeypatch.setattr(secondary, "open_lower_tiers", opened)
    made = Tier(store="disk:/kv?capacity=1MiB")
    yield made
    made.tier.shutdown()


def test_a_chunk_comes_back_into_another_row(tier: Tier) -> None:
    want = tier.rows[[3, 5]].copy()
    tier.save(KEYS[:2], [3, 5])
    assert tier.ended() == [(True, None)]
    tier.rows[:] = 0
    tier.load(KEYS[:2], [7, 1])
    assert tier.ended() == [(True, KEYS[:2])]
    assert (tier.rows[[7, 1]] == want).all()
    assert not tier.rows[[0, 2, 3, 5]].any()


def test_a_look_up_is_answered_in_the_next_step(tier: Tier) -> None:
    tier.save(KEYS[:2], [0, 1])
    context = tier.request()
    assert tier.look_up(KEYS[:3], context) == [RETRY] * 3
    assert tier.look_up(KEYS[:3], context) == [HIT, HIT, MISS]


def test_no_call_waits_for_the_store(tier: Tier, store: DictStore) -> None:
    tier.save(KEYS[:1], [0])
    tier.ended()
    store.gate.clear()
    context = tier.request()
    tier.save(KEYS[1:2], [1], context)
    tier.load(KEYS[:1], [2], context)
    assert list(tier.tier.get_finished_jobs()) == []
    store.gate.set()
    assert sorted(map(str, tier.ended())) == sorted(map(str, [(True, None), (True, KEYS[:1])]))


def test_a_load_names_the_chunks_that_came(tier: Tier, store: DictStore) -> None:
    tier.save(KEYS[:3], [0, 1, 2])
    tier.ended()
    store.lost.add(KEYS[1][:32])
    context = tier.request()
    tier.look_up(KEYS[:3], context)
    assert tier.look_up(KEYS[:3], context) == [HIT] * 3
    tier.load(KEYS[:3], [4, 5, 6], context)
    assert tier.ended() == [(False, [KEYS[0], KEYS[2]])]
    # Else vLLM would look up and load for ever.
    assert tier.look_up(KEYS[:3], context) == [MISS] * 3


@pytest.mark.parametrize("answer", [Saved.REFUSED, Saved.LATE])
def test_a_save_that_the_store_refused_has_failed(
    tier: Tier, store: DictStore, answer: Saved
) -> None:
    store.answer = answer
    tier.save(KEYS[:2], [0, 1])
    assert tier.ended() == [(False, None)]


def test_a_chunk_that_the_store_has_is_saved(tier: Tier, store: DictStore) -> None:
    store.answer = Saved.KNOWN
    tier.save(KEYS[:2], [0, 1])
    assert tier.ended() == [(True, None)]


def test_a_store_that_breaks_its_contract_fails_its_jobs(
    tier: Tier, store: DictStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.fails = True
    tier.save(KEYS[:1], [0])
    tier.load(KEYS[:1], [1])
    assert sorted(tier.ended(), key=str) == [(False, None), (False, [])]
    assert "failed to save blocks" in caplog.text
    assert "failed to load blocks" in caplog.text


def test_saves_hold_at_most_a_quarter_of_the_rows(tier: Tier, store: DictStore) -> None:
    store.gate.clear()
    tier.save(KEYS[5::-1], [5, 4, 3, 2, 1, 0])  # the front of the prompt is worth more
    tier.save(KEYS[6:8], [6, 7])
    assert [job.success for job in tier.tier.get_finished_jobs()] == [False]  # the second
    store.gate.set()
    assert tier.ended() == [(False, None)]
    assert set(store.blocks) == {key[:32] for key in KEYS[:4]}


def test_an_aborted_request_ends_its_jobs(tier: Tier) -> None:
    tier.save(KEYS[:1], [0])
    tier.ended()
    context = tier.request()
    tier.look_up(KEYS[:1], context)
    tier.tier.on_request_finished(context)
    tier.load(KEYS[:1], [3], context)  # vLLM submits what it promised the request
    assert tier.ended() == [(True, KEYS[:1])]
    assert context.req_id not in tier.tier._places


def test_requests_know_only_what_they_asked(tier: Tier) -> None:
    early, late = tier.request(), tier.request()
    assert tier.look_up(KEYS[:1], early) == [RETRY]
    tier.save(KEYS[:1], [0])
    tier.ended()
    assert tier.look_up(KEYS[:1], early) == [MISS]
    assert tier.look_up(KEYS[:1], late) == [RETRY]
    assert tier.look_up(KEYS[:1], late) == [HIT]


def test_the_memory_can_be_released_after_a_shutdown(tier: Tier, store: DictStore) -> None:
    tier.save(KEYS[:1], [0])
    rows = weakref.ref(tier.rows)
    tier.tier.shutdown()
    assert store.is_closed
    tier.view.release()  # as vLLM does
    del tier.rows
    assert rows() is None  # else vLLM's mapping stays


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "store"),
        ({"store": 3}, TypeError, "store=3: expected a URL"),
        ({"store": "floppy:/a"}, ValueError, "no store is called 'floppy'"),
        ({"store": "host:1MiB", "model_id": ""}, ValueError, "model_id"),
        ({"store": "host:1MiB", "locality": "FAR"}, ValueError, "FAR"),
        ({"store": "host:1MiB", "url": "x"}, ValueError, "url: Tier has no such setting"),
    ],
)
def test_a_bad_setting_is_named(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Tier(**settings)


def test_a_disk_says_that_it_is_one(tmp_path: Path) -> None:
    disk = Tier(store=f"disk:{tmp_path / 'kv'}?capacity=1MiB", model_id="b@1", locality="LOCAL")
    assert disk.tier.medium == interface.Medium.STORAGE
    assert disk.tier.cache_hit_source == interface.CacheHitSource.DISK
    assert disk.tier.locality == interface.Locality.LOCAL
    disk.tier.shutdown()
    other = Tier(store="host:1MiB")
    assert (other.tier.medium, other.tier.locality) == (None, None)
    other.tier.shutdown()


def test_two_tiers_after_each_other_share_a_disk(tmp_path: Path) -> None:
    for number in range(2):
        made = Tier(store=f"disk:{tmp_path / 'kv'}?capacity=1MiB", model_id="b@1")
        want = made.rows[[2, 3]].copy()  # the same in both: the generator has one seed
        if not number:
            made.save(KEYS[:2], [2, 3])
        else:
            made.rows[:] = 0
            made.load(KEYS[:2], [8, 9])
            assert made.ended() == [(True, KEYS[:2])]
            assert (made.rows[[8, 9]] == want).all()
        made.tier.shutdown()


def test_another_arrangement_of_rows_shares_nothing(tmp_path: Path) -> None:
    url = f"disk:{tmp_path / 'kv'}?capacity=1MiB"
    made = Tier(store=url, model_id="b@1")
    made.save(KEYS[:1], [2])
    made.tier.shutdown()
    config = offloading_config(canonical_layout=True)
    spec = SimpleNamespace(config=config, replicated_layout=False)
    with interface.set_current_vllm_config(SimpleNamespace(model_config=model_config())):
        tier = secondary.KvpagerSecondaryTier(spec, made.view, "Tier", store=url, model_id="b@1")
    context = context_of(KEYS)
    tier.on_new_request(context)
    tier.lookup(KEYS[0], context)
    tier.on_schedule_end(SimpleNamespace())
    tier.drain_jobs()
    assert tier.lookup(KEYS[0], context) == MISS
    tier.shutdown()


def test_the_tier_needs_the_connector_that_names_the_model() -> None:
    spec = SimpleNamespace(config=offloading_config(), replicated_layout=False)
    view = memoryview(np.zeros((4, ROW_BYTES), np.int8))
    with pytest.raises(ValueError, match='expected "KvpagerOffloadingConnector"'):
        secondary.KvpagerSecondaryTier(spec, view, "Tier", store="host:1MiB")
