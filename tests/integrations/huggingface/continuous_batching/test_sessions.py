"""Sessions of a continuous batching manager: started, stopped, paused, kept."""

from __future__ import annotations

import threading
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from transformers import PreTrainedModel  # noqa: E402

import kvpager  # noqa: E402
from kvpager.integrations.huggingface import Patch  # noqa: E402
from kvpager.integrations.huggingface.continuous_batching.manager import PagedBatchingManager  # noqa: E402
from tests.support.batching_calls import FAILED, FINISHED, PROMPTS, one_by_one, settings  # noqa: E402
from tests.support.gates import Gate  # noqa: E402


def test_requests_wait_for_the_start(manager: PagedBatchingManager, llama: Any) -> None:
    names = manager.add_requests(PROMPTS)
    assert (names, manager.is_running()) == (["req_0", "req_1", "req_2"], False)
    assert manager.get_result() is None
    manager.start()
    assert manager.is_running()
    found = {output.request_id: output for output in (manager.get_result() for _ in names)}
    assert [found[name].generated_tokens for name in names] == one_by_one(llama, PROMPTS)


def test_stop_waits_for_requests_whose_outputs_can_be_taken_afterwards(
    manager: PagedBatchingManager,
) -> None:
    manager.start()
    names = manager.add_requests(PROMPTS)
    manager.stop()
    assert not manager.is_running()
    outputs = list(manager)
    assert sorted(output.request_id for output in outputs) == names
    assert {output.status for output in outputs} == {FINISHED}
    assert manager.get_result() is None


def test_a_hard_stop_fails_unfinished_requests_and_loses_no_output(
    manager: PagedBatchingManager, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.start()
    with Gate(llama) as gate:
        gate.open_after(monkeypatch, manager.batch_processor._core, "stop")
        with manager.pause():
            names = manager.add_requests(PROMPTS, max_new_tokens=100, streaming=True)
        gate.let(1)
        first = manager.get_result(names[0])
        gate.entered.acquire()
        manager.stop(hard_stop=True)
    last = {output.request_id: output for output in manager}
    assert sorted(last) == names
    assert {output.status for output in last.values()} == {FAILED}
    assert all("closed" in output.error for output in last.values())
    tokens = last[names[0]].generated_tokens
    assert tokens[: len(first.generated_tokens)] == first.generated_tokens


def test_stop_need_not_wait(manager: PagedBatchingManager) -> None:
    manager.start()
    with manager.pause():
        manager.add_requests(PROMPTS)
        stopping = threading.Thread(target=manager.stop, kwargs={"block": False})
        stopping.start()
        stopping.join()
        assert manager.is_running()
        assert manager.add_request(PROMPTS[0]) is None
    manager.join(0.0)
    assert not manager.is_running()
    assert len(list(manager)) == 3


def test_a_manager_can_be_started_again(manager: PagedBatchingManager, llama: Any) -> None:
    for _ in range(2):
        manager.start()
        manager.add_request(PROMPTS[0], request_id="same name")
        manager.stop()
        assert [o.generated_tokens for o in manager] == one_by_one(llama, PROMPTS[:1])


def test_calls_out_of_turn_are_told_off_or_harmless(
    manager: PagedBatchingManager, caplog: pytest.LogCaptureFixture
) -> None:
    manager.stop()
    assert "was not started" in caplog.text
    manager.start()
    manager.start()
    assert "is running already" in caplog.text
    manager.stop()
    assert manager.add_request(PROMPTS[0]) is None
    assert "was refused" in caplog.text


def test_destroy_is_for_good(manager: PagedBatchingManager) -> None:
    manager.add_request(PROMPTS[0])
    manager.warmup()
    manager.destroy()
    manager.destroy()
    assert [(o.status, o.request_id) for o in manager] == [(FAILED, "req_0")]
    with pytest.raises(RuntimeError, match="was destroyed"):
        manager.start()


def test_nothing_is_computed_in_a_pause(manager: PagedBatchingManager) -> None:
    with pytest.raises(RuntimeError, match="no session is running"), manager.pause():
        pass
    manager.start()
    engine = manager.batch_processor
    with manager.pause():
        with manager.pause():
            pass
        before = engine.stats().scheduler.total_steps
        name = manager.add_request(PROMPTS[0])
        assert manager.get_result(name, timeout=0.05) is None
        assert engine.stats().scheduler.total_steps == before
        with pytest.raises(RuntimeError, match="inside pause"):
            manager.stop()
    assert manager.get_result(name).status == FINISHED


def test_a_persistent_manager_is_kept_on_the_model(llama: PreTrainedModel, patch: Patch) -> None:
    llama.generate_batch(PROMPTS[:1], settings(), persistent_manager=True)
    kept = llama._cached_continuous_batching_manager
    outputs = llama.generate_batch(PROMPTS, persistent_manager=True)
    assert [o.generated_tokens for o in outputs.values()] == one_by_one(llama, PROMPTS)
    assert llama.init_continuous_batching() is kept
    llama.destroy_cached_continuous_batching_manager()
    assert not hasattr(llama, "_cached_continuous_batching_manager")
    with pytest.raises(RuntimeError, match="was destroyed"):
        kept.start()


def test_undo_takes_a_kept_manager_from_the_model(llama: PreTrainedModel) -> None:
    with kvpager.patch(llama, memory="1MiB"):
        llama.generate_batch(PROMPTS[:1], settings(), persistent_manager=True)
        assert isinstance(llama._cached_continuous_batching_manager, PagedBatchingManager)
    assert not hasattr(llama, "_cached_continuous_batching_manager")


def test_a_session_survives_undo_and_is_not_kept_after_it(llama: PreTrainedModel) -> None:
    with kvpager.patch(llama, memory="1MiB"):
        manager = llama.init_continuous_batching(settings())
        manager.start()
    manager.add_request(PROMPTS[0])
    assert manager.get_result().generated_tokens == one_by_one(llama, PROMPTS[:1])[0]
    manager.stop(keep_for_next_session=True)
    assert not hasattr(llama, "_cached_continuous_batching_manager")
