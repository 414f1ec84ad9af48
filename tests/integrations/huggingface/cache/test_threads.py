"""Calls of `generate` in several threads share a bound on memory: they wait for each other's."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import LogitsProcessor, PreTrainedModel  # noqa: E402

import kvpager  # noqa: E402
from kvpager.integrations.huggingface.cache import generate_calls  # noqa: E402
from tests.support import tiny_models  # noqa: E402

BLOCK = 4
BLOCK_BYTES = 2 * 2 * BLOCK * 2 * 16 * 4  # llama: 2 layers, keys and values, 2 heads of 16


def prompts(length: int, seed: int) -> dict[str, Any]:
    inputs: dict[str, Any] = tiny_models.prompts([length, 20], seed=seed)
    return inputs


def generate(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, **options}
    found: torch.Tensor = model.generate(**inputs, **options)
    return found


class Pause(LogitsProcessor):
    """Does something once, when a call's prompt has been computed."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action: Callable[[], object] | None = action

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        action, self.action = self.action, None
        if action is not None:
            action()
        return scores


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize(
    ("name", "options", "prefix_cache"),
    [
        ("llama", {}, False),
        ("llama", {}, True),
        ("llama", {"num_beams": 3}, False),
        ("gemma3", {}, False),  # two pools
        ("t5", {}, False),  # two caches
    ],
)
def test_calls_wait_for_the_memory_of_other_threads(
    name: str, options: dict[str, Any], prefix_cache: bool
) -> None:
    model = tiny_models.tiny_model(name)
    batches = [prompts(60 + 3 * seed, seed) for seed in range(4)]
    plain = [generate(model, batch, **options) for batch in batches]
    with kvpager.patch(model, block_size=BLOCK) as patch:
        generate(model, batches[-1], **options)
        memory = patch.stats().peak_held_bytes * 3 // 2  # of one call, and not of two
    with (
        kvpager.patch(model, block_size=BLOCK, memory=memory, prefix_cache=prefix_cache) as patch,
        ThreadPoolExecutor(4) as threads,
    ):
        found = threads.map(lambda batch: generate(model, batch, **options), batches)
        for tokens, expected in zip(found, plain, strict=True):
            assert torch.equal(tokens, expected)
        assert patch.stats().num_held_blocks == 0


def test_no_call_waits_for_memory_that_no_other_call_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(*_: object) -> bool:
        raise AssertionError("nothing can be waited for")

    model = tiny_models.tiny_model("llama")
    with kvpager.patch(model, block_size=BLOCK, memory=40 * BLOCK_BYTES) as patch:
        held = generate(model, prompts(60, 0), return_dict_in_generate=True)
        monkeypatch.setattr(threading.Condition, "wait", wait)
        with pytest.raises(kvpager.OutOfBlocks):
            generate(model, prompts(60, 1))
        del held
        generate(model, prompts(60, 1))
        assert patch.stats().num_held_blocks == 0


def test_one_of_two_deadlocked_calls_fails_the_other_continues(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As if nothing was known of their lengths: then both begin.
    monkeypatch.setattr(generate_calls.GenerateCalls, "note_size", lambda *_: None)
    model = tiny_models.tiny_model("llama")
    plain = [generate(model, prompts(60, seed)) for seed in range(2)]
    both_hold = threading.Barrier(2, timeout=60)

    def run(seed: int) -> torch.Tensor:
        return generate(model, prompts(60, seed), logits_processor=[Pause(both_hold.wait)])

    # A prompt takes 20 blocks and its tokens 12 more: room for both prompts, and for one reply.
    with (
        kvpager.patch(model, block_size=BLOCK, memory=44 * BLOCK_BYTES) as patch,
        ThreadPoolExecutor(2) as threads,
    ):
        futures = [threads.submit(run, seed) for seed in range(2)]
        errors = [future.exception() for future in futures]
        assert sorted(type(error) for error in errors if error) == [kvpager.OutOfBlocks]
        for future, error, expected in zip(futures, errors, plain, strict=True):
            assert error or torch.equal(future.result(), expected)
        # The futures keep the error, its traceback and so the cache; but not its blocks.
        assert patch.stats().num_held_blocks == 0


def test_a_wait_ends_when_no_other_call_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_calls, "WAIT_SECONDS_MAX", 0.05)
    model = tiny_models.tiny_model("llama")
    expected = generate(model, prompts(60, 0))
    holds, goes_on = threading.Event(), threading.Event()

    def stop() -> None:
        holds.set()
        assert goes_on.wait(60)

    with (
        kvpager.patch(model, block_size=BLOCK, memory=40 * BLOCK_BYTES),
        ThreadPoolExecutor(1) as threads,
    ):
        future: Future[torch.Tensor] = threads.submit(
            generate, model, prompts(60, 0), logits_processor=[Pause(stop)]
        )
        assert holds.wait(60)
        try:
            with pytest.raises(kvpager.OutOfBlocks):
                generate(model, prompts(60, 1))
        finally:
            goes_on.set()
        assert torch.equal(future.result(), expected)


class Clock:
    """Goes on while a call waits, and at no other time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(generate_calls, "time", self)

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return True


def test_all_waits_of_a_call_share_one_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lock = Clock(monkeypatch), threading.RLock()
    shared = generate_calls.GenerateCalls(lock)
    holds, goes_on = threading.Event(), threading.Event()

    def hold() -> None:
        with shared.running():
            other = shared.current()
            assert other is not None
            other.claimed_bytes = 1
            holds.set()
            assert goes_on.wait(60)

    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(hold)
        assert holds.wait(60)
        monkeypatch.setattr(shared._changed, "wait", clock.wait)
        try:
            with shared.running(), lock:
                call = shared.current()
                assert call is not None
                shared.await_turn(call, 1, bound=1)
                waited = clock.now
                assert waited > generate_calls.WAIT_SECONDS_MAX
                assert shared.wait_for(lambda: None) is None
                assert clock.now == waited
                shared.note_step()  # others move: it may wait again
                assert shared.wait_for(lambda: None) is None
                assert clock.now > waited + generate_calls.WAIT_SECONDS_MAX
        finally:
            goes_on.set()
        future.result()


def test_a_failed_call_frees_blocks_while_its_traceback_lives() -> None:
    model = tiny_models.tiny_model("llama")

    def fail() -> None:
        raise ZeroDivisionError

    with kvpager.patch(model, block_size=BLOCK) as patch:
        with pytest.raises(ZeroDivisionError) as raised:
            generate(model, prompts(60, 0), logits_processor=[Pause(fail)])
        assert raised.traceback
        assert patch.stats().num_held_blocks == 0


def test_an_assistant_of_a_call_waits_for_nobody() -> None:
    model = tiny_models.tiny_model("llama")
    inputs = tiny_models.prompts([40])
    plain = generate(model, inputs)
    with kvpager.patch(memory=60 * BLOCK_BYTES, block_size=BLOCK):
        assert torch.equal(generate(model, inputs, assistant_model=model), plain)


def test_a_large_call_precedes_smaller_calls_that_come_later() -> None:
    asked = {num_bytes: threading.Event() for num_bytes in (6, 10, 2)}
    begun, order = threading.Event(), list[int]()

    class Observed(generate_calls.GenerateCalls):
        def _fits(self, call: generate_calls.GenerateCall, num_bytes: int, bound: int) -> bool:
            asked[num_bytes].set()
            return super()._fits(call, num_bytes, bound)

    all_calls = Observed(threading.RLock())

    def run(num_bytes: int, until: threading.Event | None = None) -> None:
        with all_calls.running():
            call = all_calls.current()
            assert call is not None
            all_calls.await_turn(call, num_bytes, 10)
            order.append(num_bytes)
            if until is not None:
                until.wait()

    threads = []
    for num_bytes in (6, 10, 2):
        until = begun if num_bytes == 6 else None
        threads.append(threading.Thread(target=run, args=(num_bytes, until)))
        threads[-1].start()
        asked[num_bytes].wait()
    begun.set()
    for thread in threads:
        thread.join()
    assert order == [6, 10, 2]


def test_an_interrupted_call_does_not_count_as_running() -> None:
    made = generate_calls.GenerateCalls(threading.RLock())

    def interrupted() -> None:
        running = made.running()
        running.__enter__()
        raise KeyboardInterrupt  # before the `with` statement has the context manager

    try:
        interrupted()
    except KeyboardInterrupt as error:
        kept = error  # as an interactive session keeps the last error
    with made.running():
        call = made.current()
        assert call is not None
        assert call.depth == 1
        made.note_size(2, 30)
        with made.running():
            assert made.current() is call
            assert call.depth == 2
        assert call.num_rows == 2
    assert made.current() is None
    assert kept is not None
    del kept
    gc.collect()
    assert made.current() is None


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_generates_although_a_parent_thread_held_memory() -> None:
    model = tiny_models.tiny_model("llama")
    inputs = prompts(9, seed=1)
    expected = generate(model, inputs)
    with kvpager.patch(model, memory="1MiB", prefix_cache=True) as patch:
        assert torch.equal(generate(model, inputs), expected)
        held, forked = threading.Event(), threading.Event()
        locks = [patch.memory.lock, *(pool.manager._state.lock for pool in patch.memory.pools())]

        def hold() -> None:
            with contextlib.ExitStack() as stack, patch.memory.calls.running():
                for lock in locks:
                    stack.enter_context(lock)
                held.set()
                forked.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(60)
        child = os.fork()
        if not child:
            signal.alarm(50)  # a call that hangs
            try:
                assert not patch.memory.calls._calls
                assert torch.equal(generate(model, inputs), expected)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        forked.set()
        thread.join()
        assert os.waitpid(child, 0)[1] == 0
