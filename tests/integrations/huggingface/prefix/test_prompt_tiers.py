"""A patch saves prompts in tiers, and another patch finds them there, or computes them."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("xxhash")

import kvpager  # noqa: E402
from kvpager.integrations.huggingface.prefix import prompt_tiers  # noqa: E402
from kvpager.scheduling.preemption import PreemptionCosts  # noqa: E402
from kvpager.storage.tiers import loading  # noqa: E402
from tests.support import tiny_models  # noqa: E402
from tests.support.llama_calls import generate  # noqa: E402
from tests.support.tiered_engines import (  # noqa: E402
    NUM_CACHED,
    adapted,
    ask,
    edited,
    engine_over,
    flip_bits,
    llama,
)
from tests.support.tiered_engines import prompt as prompt_of_the_engine  # noqa: E402
from tests.support.tiered_patches import ids, one, patched, saved_by  # noqa: E402

pytestmark = pytest.mark.filterwarnings(  # of PEFT's
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)


# -------------------------------------------------------------------------------------- hits


def test_a_new_patch_finds_a_prompt_on_disk(model: Any, disk: str) -> None:
    expected = ids(model, one())
    saved_by(model, disk, one())
    again = llama()
    with patched(again, disk) as patch:
        assert ids(again, one()) == expected
        assert patch.stats().prefix_hit_tokens == NUM_CACHED
        assert (
            f"{NUM_CACHED} tokens fetched, not computed ({NUM_CACHED} from disk)" in patch.report()
        )
        assert ids(again, one()) == expected  # it is on the device now
    assert f"{NUM_CACHED} tokens fetched" in patch.report()


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"num_return_sequences": 2}], ids=str)
def test_a_padded_batch_is_found_again(model: Any, disk: str, mode: dict[str, Any]) -> None:
    if "num_return_sequences" in mode:
        mode = mode | {"num_beams": 2}
    inputs = tiny_models.prompts([100, 60])
    expected = ids(model, inputs, **mode)
    saved_by(model, disk, inputs)
    with patched(model, disk) as patch:
        assert ids(model, inputs, **mode) == expected
        assert patch.stats().prefix_hit_tokens == 136  # columns 0 to 96 and 40 to 80
        assert "144 from disk" in patch.report()


def test_an_undo_without_blocks_to_save_waits_for_none(
    model: Any, disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Never(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            raise AssertionError("there is nothing to wait for")

    monkeypatch.setattr(prompt_tiers, "threading", SimpleNamespace(Event=Never))
    with patched(model, disk) as patch:
        assert patch.prompt_tiers is not None
        assert not patch.prompt_tiers.save()


def test_a_chat_continues_after_a_restart(model: Any, disk: str) -> None:
    first = ids(model, one(), max_new_tokens=30)
    second = torch.tensor([[*first[0], 5, 6, 7]])
    expected = ids(model, second)
    with patched(model, disk):
        assert ids(model, one(), max_new_tokens=30) == first
    with patched(model, disk) as patch:
        assert ids(model, second) == expected
        assert patch.stats().prefix_hit_tokens == 128


def test_an_evicted_prompt_is_found_in_the_host_tier(model: Any) -> None:
    expected = ids(model, one())
    with patched(model, "host:16MiB", memory="80KiB") as patch:  # room for 10 blocks
        for seed in range(3):
            generate(model, one(seed))
        assert ids(model, one()) == expected
        assert "from host" in patch.report()


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8_e4m3"])
def test_blocks_are_stored_as_the_pool_holds_them(
    model: Any, disk: str, kv_cache_dtype: Any
) -> None:
    with kvpager.patch(model, prefix_cache=True, kv_cache_dtype=kv_cache_dtype):
        generate(model, one())
        expected = ids(model, one())
    saved_by(model, disk, one(), kv_cache_dtype=kv_cache_dtype)
    with patched(model, disk, kv_cache_dtype=kv_cache_dtype) as patch:
        assert ids(model, one()) == expected
        assert patch.stats().prefix_hit_tokens == NUM_CACHED


def test_patches_and_engines_share_stores(model: Any, disk: str) -> None:
    inputs = torch.tensor([prompt_of_the_engine()])
    expected = ids(model, inputs)
    with engine_over(llama(), disk) as engine:
        ask(engine)
    with patched(model, disk) as patch:
        assert ids(model, inputs) == expected
        assert patch.stats().prefix_hit_tokens == NUM_CACHED


def test_a_wrapped_model_is_served(disk: str) -> None:
    for hits in (0, NUM_CACHED):
        wrapped = adapted()
        expected = ids(wrapped, one())
        with patched(wrapped, disk) as patch:
            assert ids(wrapped, one()) == expected
            assert patch.stats().prefix_hit_tokens == hits


def test_threads_fetch_together(model: Any, disk: str) -> None:
    batches = [one(0), one(1), tiny_models.prompts([100, 60]), one(0)]
    expected = [ids(model, inputs) for inputs in batches]
    with patched(model, disk):
        for inputs in batches:
            generate(model, inputs)
    found: dict[int, Any] = {}

    def call(number: int) -> None:
        found[number] = ids(model, batches[number])

    with patched(model, disk) as patch:
        threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert "from disk" in patch.report()
    assert [found[number] for number in range(4)] == expected


# -------------------------------------------------------------------------------------- misses


def test_namespaces_find_their_own_prompts(model: Any, disk: str) -> None:
    expected = ids(model, one())
    saved_by(model, disk, one(), namespace="acme")
    with patched(model, disk) as patch:
        for namespace, hits in (("other", 0), ("acme", NUM_CACHED)):
            before = patch.stats().prefix_hit_tokens
            with patch.namespace(namespace):
                assert ids(model, one()) == expected
            assert patch.stats().prefix_hit_tokens - before == hits


@pytest.mark.parametrize("other", [edited, adapted], ids=["weights", "adapter"])
def test_another_model_finds_nothing(model: Any, disk: str, other: Any) -> None:
    saved_by(model, disk, one())
    changed = other()
    expected = ids(changed, one())
    with patched(changed, disk) as patch:
        assert ids(changed, one()) == expected
        assert patch.stats().prefix_hit_tokens == 0


@pytest.mark.parametrize("when", ["before the first call", "between calls"])
def test_a_change_of_the_model_turns_tiers_off(
    disk: str, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    changed, unlike = llama(), edited()
    expected = ids(unlike, one(1))
    with caplog.at_level(logging.WARNING, "kvpager"), patched(changed, disk) as patch:
        if when == "between calls":
            generate(changed, one(0))
        changed.load_state_dict(unlike.state_dict())
        assert ids(changed, one(1)) == expected
        assert "not used any more, because the model changed" in patch.report()
    assert "because the model changed" in caplog.text
    for model in (unlike, llama()):
        with patched(model, disk) as patch:
            generate(model, one(1))
            assert patch.stats().prefix_hit_tokens == 0


def test_a_change_after_a_call_keeps_its_blocks_unsaved(disk: str) -> None:
    changed = llama()

    class Change(transformers.StoppingCriteria):
        """Changes a weight unnoticed by torch, while the reply is generated."""

        def __call__(self, *_: Any, **__: Any) -> Any:
            changed.model.layers[0].self_attn.k_proj.weight.data.add_(0.5)
            return torch.tensor([False])

    with patched(changed, disk) as patch:
        generate(changed, one(), stopping_criteria=[Change()])
    assert "because the model changed" in patch.report()
    assert "0 blocks saved" in patch.report()
    model = llama()
    with patched(model, disk) as patch:
        generate(model, one())
        assert patch.stats().prefix_hit_tokens == 0


def test_a_flipped_bit_is_not_served(model: Any, tmp_path: Path, disk: str) -> None:
    expected = ids(model, one())
    saved_by(model, disk, one())
    flip_bits(tmp_path / "kv")
    with patched(model, disk) as patch:
        assert ids(model, one()) == expected
        assert patch.stats().prefix_hit_tokens == 0


def test_one_damaged_block_ends_the_prefix(model: Any, disk: str) -> None:
    expected = ids(model, one())
    saved_by(model, disk, one())
    with patched(model, disk) as patch:
        opened = patch.prompt_tiers
        assert opened is not None
        [store] = opened._tiering.stores
        find = store.find

        def find_and_lose(keys: Any) -> int:
            count = find(keys)
            store.drop(keys[2:3])
            return count

        store.find = find_and_lose  # type: ignore[method-assign]
        assert ids(model, one()) == expected
        assert patch.stats().prefix_hit_tokens == 32


def test_a_late_prompt_is_computed(model: Any, disk: str) -> None:
    expected = ids(model, one())
    saved_by(model, disk, one())
    late = PreemptionCosts(seconds_per_token=1e-6)
    with patched(model, disk, costs=late) as patch:
        opened, release = patch.prompt_tiers, threading.Event()
        assert opened is not None
        [store] = opened._tiering.stores
        find = store.find
        store.find = lambda keys: release.wait() and find(keys)  # type: ignore[method-assign]
        assert ids(model, one()) == expected
        assert patch.stats().prefix_hit_tokens == 0
        release.set()


def test_a_late_prompt_is_used_as_far_as_it_came(
    model: Any, disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ids(model, one())
    saved_by(model, disk, one())
    with patched(model, disk) as patch:
        opened, release, is_late = patch.prompt_tiers, threading.Event(), threading.Event()
        assert opened is not None
        [store] = opened._tiering.stores
        load = store.load

        def load_once(keys: Any, into: Any, deadline: float) -> Any:
            if store.stats().hits:
                is_late.set()
                assert release.wait(60)
            return load(keys, into, deadline)

        store.load = load_once  # type: ignore[method-assign]
        monkeypatch.setattr(loading, "_BATCH", 2)
        monkeypatch.setattr(prompt_tiers, "wait", lambda *_: is_late.wait(60))
        assert ids(model, one()) == expected
        assert patch.stats().prefix_hit_tokens == 32
        release.set()


def test_a_call_does_not_wait_for_the_deadline_of_a_warmed_prompt(model: Any, disk: str) -> None:
    expected = ids(model, one())
    saved_by(model, disk, one())
    late = PreemptionCosts(seconds_per_token=1e-6)
    with patched(model, disk, costs=late) as patch, ThreadPoolExecutor(1) as caller:
        opened, release = patch.prompt_tiers, threading.Event()
        assert opened is not None
        [store] = opened._tiering.stores
        find = store.find
        store.find = lambda keys: release.wait(60) and find(keys)  # type: ignore[method-assign]
        warmed = caller.submit(patch.tiers.warm, [one()["input_ids"][0]], wait_s=600.0)
        while not patch.tiers.stats().num_fetching:
            pass
        assert ids(model, one()) == expected
        assert patch.stats().prefix_hit_tokens == 0
        assert patch.tiers.stats().num_fetching == 1  # the call did not wait for its end
        release.set()
        warmed.result(60)


def test_a_store_that_fails_costs_no_call(model: Any, disk: str) -> None:
    expected = ids(model, one())
    with patched(model, disk) as patch:
        opened = patch.prompt_tiers
        assert opened is not None

        def fail(*_: Any, **__: Any) -> Any:
            raise OSError("planted")

        opened._tiering.begin = fail  # type: ignore[method-assign]
        assert ids(model, one()) == expected
        assert "not used any more, because they failed" in patch.report()


def test_clearing_the_prefix_cache_turns_tiers_off(model: Any, disk: str) -> None:
    expected = ids(model, one())
    saved_by(model, disk, one())
    with patched(model, disk) as patch:
        patch.clear_prefix_cache()
        for hits in (0, NUM_CACHED):
            assert ids(model, one()) == expected
            assert patch.stats().prefix_hit_tokens == hits
        assert "0 tokens fetched" in patch.report()
        assert "because the prefix cache was cleared" in patch.report()
