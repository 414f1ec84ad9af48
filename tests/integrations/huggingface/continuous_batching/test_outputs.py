"""Outputs of continuous batching as they come, and requests that fail."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from transformers import PreTrainedModel  # noqa: E402
from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402
from transformers.generation.continuous_batching.requests import (  # noqa: E402
    GenerationOutput,
)

from kvpager.integrations.huggingface import Patch  # noqa: E402
from kvpager.integrations.huggingface.continuous_batching import manager as manager_module  # noqa: E402
from kvpager.integrations.huggingface.continuous_batching.manager import PagedBatchingManager  # noqa: E402
from tests.support.batching_calls import (  # noqa: E402
    DECODING,
    FAILED,
    FINISHED,
    NEW,
    PROMPTS,
    one_by_one,
    settings,
    some_prompts,
)
from tests.support.gates import Gate  # noqa: E402

# ---------------------------------------------------------------- outputs as they come


def test_a_stream_has_an_output_for_every_token(
    manager: PagedBatchingManager, llama: PreTrainedModel
) -> None:
    manager.start()
    other = manager.add_request(PROMPTS[1])
    name = manager.add_request(PROMPTS[0], streaming=True, record_timestamps=True)
    outputs = list(manager.request_id_iter(name))
    (expected,) = one_by_one(llama, PROMPTS[:1])
    assert [o.generated_tokens for o in outputs] == [expected[: n + 1] for n in range(NEW)]
    assert [o.status for o in outputs] == [DECODING] * (NEW - 1) + [FINISHED]
    assert [len(o.timestamps) for o in outputs] == list(range(1, NEW + 1))
    assert manager.get_result(other).request_id == other


def test_iterating_over_a_request_that_is_not_there_ends(manager: PagedBatchingManager) -> None:
    manager.start()
    assert list(manager.request_id_iter("nobody")) == []
    assert manager.get_result("nobody") is None
    assert manager.get_result(timeout=0.01) is None


@pytest.mark.parametrize("is_started", [False, True])
def test_a_cancelled_request_ends_with_what_it_has(
    manager: PagedBatchingManager, llama: Any, is_started: bool
) -> None:
    if is_started:
        manager.start()
    with Gate(llama) as gate:
        name = manager.add_request(PROMPTS[0], max_new_tokens=100, streaming=True)
        if is_started:
            gate.let(1)
            next(manager.request_id_iter(name))
            gate.entered.acquire()
        manager.cancel_request(name)
    manager.cancel_request("nobody")
    if not is_started:
        manager.start()
    *_, last = manager.request_id_iter(name)
    assert (last.status, "was cancelled" in last.error) == (FAILED, True)
    assert (0 < len(last.generated_tokens) < 100) == is_started
    manager.cancel_request(name)
    assert manager.add_request(PROMPTS[0], request_id=name) == name
    assert manager.get_result(name).status == FINISHED


def test_handlers_are_called_on_their_loop_with_all_outputs(manager: PagedBatchingManager) -> None:
    async def listen(name: str) -> list[int]:
        loop, lengths, is_done = asyncio.get_running_loop(), [], asyncio.Event()

        def handle(output: GenerationOutput) -> None:
            assert asyncio.get_running_loop() is loop
            lengths.append(len(output.generated_tokens))
            if output.is_finished():
                is_done.set()

        manager.register_result_handler(name, handle)
        if name == "early":
            manager.add_request(PROMPTS[0], request_id=name, streaming=True)
        await asyncio.wait_for(is_done.wait(), 60)
        return lengths

    async def both() -> list[list[int]]:
        return list(await asyncio.gather(listen("early"), listen("late")))

    manager.start()
    manager.add_request(PROMPTS[1], request_id="late", streaming=True)
    manager.stop()  # all its outputs exist before a handler is registered
    manager.start()
    assert asyncio.run(both()) == [list(range(1, NEW + 1))] * 2
    assert manager.output_router.result_handlers == {}


def test_outputs_of_a_loop_that_is_gone_can_be_taken(manager: PagedBatchingManager) -> None:
    async def register() -> None:
        manager.register_result_handler("x", lambda output: None)

    asyncio.run(register())
    manager.start()
    manager.add_request(PROMPTS[0], request_id="x")
    assert manager.get_result("x").status == FINISHED


# ---------------------------------------------------------------- what goes wrong


def test_an_invalid_request_fails_and_the_others_continue(
    llama: PreTrainedModel, patch: Patch
) -> None:
    config = ContinuousBatchingConfig(num_blocks=1)
    prompts = [PROMPTS[0], [], some_prompts(300)[0], PROMPTS[1]]
    outputs = llama.generate_batch(prompts, settings(), config)
    expected = [FINISHED, FAILED, FAILED, FINISHED]
    assert [output.status for output in outputs.values()] == expected
    empty, long = list(outputs.values())[1:3]
    assert "empty" in empty.error
    assert "blocks" in long.error or "max_length" in long.error


def test_samples_of_a_request_that_fails_fail_all(llama: PreTrainedModel, patch: Patch) -> None:
    config = settings(num_return_sequences=2, do_sample=True)
    with llama.continuous_batching_context_manager(config) as manager:
        manager.add_request([], request_id="x")
        found = [manager.get_result() for _ in range(2)]
    assert [(o.request_id, o.status) for o in found] == [("x", FAILED), ("x__child#0", FAILED)]


def test_a_model_error_fails_the_requests_of_its_step(
    llama: PreTrainedModel, manager: PagedBatchingManager
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("a fault")

    manager.start()
    hook = llama.model.layers[1].register_forward_hook(fail)
    name = manager.add_request(PROMPTS[0])
    output = manager.get_result(name)
    assert (output.status, "a fault" in output.error) == (FAILED, True)
    hook.remove()
    assert manager.background_thread_status.fatal_error is None
    assert manager.get_result(manager.add_request(PROMPTS[0])).status == FINISHED


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_of_the_engine_leaves_nobody_waiting(
    llama: PreTrainedModel, manager: PagedBatchingManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    manager.start()
    with manager.pause():
        monkeypatch.setattr(manager.batch_processor._core.scheduler, "plan", fail)
        manager.add_request(PROMPTS[0])
    assert manager.get_result().status == FAILED
    assert "a defect" in str(manager.background_thread_status.fatal_error)
    assert manager.add_request(PROMPTS[0]) is None
    manager.join(0.0, timeout=60)
    assert not manager.is_running()
    assert llama.config._attn_implementation == "sdpa"
    manager.start()
    assert manager.get_result(manager.add_request(PROMPTS[0])).status == FINISHED


def test_a_name_in_use_is_refused(manager: PagedBatchingManager) -> None:
    manager.add_request(PROMPTS[0], request_id="req_0")
    with pytest.raises(ValueError, match="request_id='req_0': in use"):
        manager.add_request(PROMPTS[1], request_id="req_0")
    assert manager.add_request(PROMPTS[1]) == "req_1"


def test_a_full_queue_makes_callers_wait_then_refuses(
    llama: PreTrainedModel, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    import queue

    monkeypatch.setattr(manager_module, "_QUEUE_SECONDS_MAX", 0.01)
    config = ContinuousBatchingConfig(max_queue_size=1)
    with llama.continuous_batching_context_manager(
        settings(), continuous_batching_config=config
    ) as manager:
        with manager.pause():
            manager.add_request(PROMPTS[0])
            with pytest.raises(queue.Full, match="raise max_queue_size"):
                manager.add_request(PROMPTS[1])
        assert manager.get_result().status == FINISHED
        assert len(manager.add_requests(PROMPTS * 4)) == 12
    assert len(list(manager)) == 12


def test_of_several_threads_that_start_a_manager_one_does(
    llama: PreTrainedModel, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = llama.init_continuous_batching(settings())
    served = []
    monkeypatch.setattr(
        manager, "_serve", lambda engine, serve=manager._serve: served.append(serve(engine))
    )
    together = threading.Barrier(6)

    def start() -> None:
        together.wait()
        manager.start()

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    manager.add_request(PROMPTS[0], request_id="mine")
    output = manager.get_result("mine", timeout=60)
    assert output is not None
    assert [output.generated_tokens] == one_by_one(llama, PROMPTS[:1])
    manager.stop()
    assert len(served) == 1
    assert not [each for each in threading.enumerate() if each.name == "kvpager-batching"]


def test_no_return_sequences_at_all_are_refused(llama: PreTrainedModel, patch: Patch) -> None:
    with pytest.raises(ValueError, match="num_return_sequences"):
        llama.init_continuous_batching(settings(num_return_sequences=0))
