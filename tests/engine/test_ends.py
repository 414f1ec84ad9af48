"""How requests end: cancelled, expired, refused, failed, closed."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kvpager.engine.request_state import RequestSettings
from kvpager.errors import (
    EngineClosed,
    QueueFull,
    RequestCancelled,
    RequestExpired,
    RequestFailed,
)
from tests.support.gates import Gate
from tests.support.toy_runner import BLOCK_SIZE, ToyEngine, expected

KINDS = pytest.mark.parametrize("kind", [ZeroDivisionError, SystemExit, KeyboardInterrupt])
NEW = 16


@pytest.mark.parametrize("steps", [1, 2, 5])  # prefilling, decoding
def test_cancelling_a_request_affects_no_other_request(steps: int) -> None:
    with ToyEngine(max_batch_tokens=16) as engine:
        gate = Gate(engine.runner)
        stream = engine.ask(list(range(3, 33)), 50)
        other = engine.ask([7, 8, 9], NEW)
        gate.let(steps)
        gate.entered.acquire()
        stream.cancel()
        gate.open()
        with pytest.raises(RequestCancelled, match="was cancelled"):
            stream.result(timeout=60)
        assert other.result().token_ids == expected([7, 8, 9], NEW)
        assert len(stream.partial().token_ids) < 50
        engine.check_idle()


def test_a_cancelled_stream_yields_what_arrived_and_then_raises() -> None:
    with ToyEngine(256) as engine:
        gate = Gate(engine.runner)
        stream = engine.ask([5, 6], 200)
        gate.let(3)
        gate.entered.acquire()
        stream.cancel()
        gate.open()
        arrived: list[int] = []
        with pytest.raises(RequestCancelled, match="was cancelled"):
            arrived.extend(token.id for token in stream)
        assert arrived == expected([5, 6], 200)[: len(arrived)]
        assert stream.partial().token_ids[: len(arrived)] == arrived
        assert 0 < len(arrived) < 200


def test_garbage_collecting_a_stream_cancels_its_request() -> None:
    with ToyEngine(256) as engine:
        gate = Gate(engine.runner)
        stream = engine.ask([5, 6], 500, request_id="dropped")
        gate.let(2)
        del stream
        gate.open()
        for _ in engine.ask([8], 10):
            pass
        assert engine.stats().scheduler.total_tokens < 200
        engine.check_idle()
        engine.ask([5], 1, request_id="dropped").result()


def test_a_request_ends_at_its_deadline() -> None:
    with ToyEngine(512) as engine:
        with pytest.raises(RequestExpired, match="deadline"):
            engine.ask([5, 6], 900, deadline=0.0).result(timeout=60)
        engine.check_idle()


def test_a_deadline_passes_while_no_request_can_run() -> None:
    with ToyEngine(4) as engine:
        foreign = engine.scheduler.manager.allocate(4 * BLOCK_SIZE)
        stream = engine.ask([5, 6], 3, deadline=time.monotonic() + 0.1)
        with pytest.raises(RequestExpired):
            stream.result(timeout=60)
        engine.scheduler.manager.free(foreign)


def test_a_full_queue_refuses() -> None:
    with ToyEngine(max_num_seqs=1, max_queue_size=2) as engine:
        gate = Gate(engine.runner)
        running = engine.ask([5], 4)
        gate.entered.acquire()
        waiting = [engine.ask([6], 4) for _ in range(2)]
        with pytest.raises(QueueFull, match="max_queue_size"):
            engine.ask([7], 4)
        gate.open()
        assert all(len(each.result().token_ids) == 4 for each in (running, *waiting))
        engine.check_idle()


def test_a_live_request_id_is_refused() -> None:
    with ToyEngine() as engine:
        gate = Gate(engine.runner)
        stream = engine.ask([5], 3, request_id="twice")
        with pytest.raises(ValueError, match="'twice'"):
            engine.ask([5], request_id="twice")
        gate.open()
        stream.result()
        engine.ask([5], 1, request_id="twice").result()


def test_cancelling_an_ended_request_does_nothing() -> None:
    with ToyEngine() as engine:
        gate = Gate(engine.runner)
        stream = engine.ask([5], 30, request_id="mine")
        gate.let(1)
        engine.cancel("mine")
        gate.open()
        with pytest.raises(RequestCancelled):
            stream.result(timeout=60)
        engine.cancel("mine")
        engine.cancel("of nobody")


@KINDS
@pytest.mark.parametrize("where", ["sampling", "find_stop"])
def test_a_setting_that_raises_ends_its_own_request(where: str, kind: type[BaseException]) -> None:
    def broken(ids: list[int]) -> None:
        if len(ids) > 6:
            raise kind("of the request")

    settings: dict[str, Any] = {where: broken}
    with ToyEngine() as engine:
        bad = engine.ask([5, 6, 7], 30, settings=RequestSettings(**settings))
        good = engine.ask([5, 6, 7], NEW)
        with pytest.raises(RequestFailed, match=kind.__name__) as caught:
            bad.result(timeout=60)
        assert isinstance(caught.value.__cause__, kind)
        assert good.result().token_ids == expected([5, 6, 7], NEW)
        engine.check_idle()


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["runner", "sampler"])
def test_a_step_that_raises_ends_the_requests_in_it(
    where: str, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fail(*_: object) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise kind("of the step")

    with ToyEngine() as engine:
        with engine.pause():
            if where == "runner":
                engine.runner.register_forward_pre_hook(fail)
            else:
                sampler = engine._loop._sampler
                genuine = sampler.choose
                choose = lambda *args: fail() or genuine(*args)  # noqa: E731
                monkeypatch.setattr(sampler, "choose", choose)
            streams = [engine.ask([5, 6, i], 20) for i in range(4)]
        for stream in streams:
            with pytest.raises(RequestFailed) as caught:
                stream.result(timeout=60)
            assert isinstance(caught.value.__cause__, kind)
        assert engine.ask([7, 8, 9], NEW).result().token_ids == expected([7, 8, 9], NEW)
        engine.check_idle()


def test_a_defect_ends_all_requests_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    with ToyEngine() as engine:
        with engine.pause():
            stream = engine.ask([5], 3)
            monkeypatch.setattr(engine.scheduler, "plan", fail)
        with pytest.raises(RequestFailed, match="a defect"):
            stream.result(timeout=60)
        engine.close()
        assert isinstance(engine.error, RuntimeError)
        with pytest.raises(EngineClosed, match="after RuntimeError"):
            engine.ask([5])


def test_closing_cancels_live_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[str] = []
    engine = ToyEngine(512, core={"on_end": lambda: ends.append("end")})
    gate = Gate(engine.runner)
    gate.open_after(monkeypatch, engine, "stop")
    stream = engine.ask([5], 1000)
    gate.let(1)
    gate.entered.acquire()
    engine.close()
    engine.close()
    with pytest.raises(RequestCancelled, match="closed"):
        stream.result(timeout=60)
    with pytest.raises(EngineClosed, match="Make a new one"):
        engine.ask([5])
    assert ends == ["end"]


def test_an_interrupt_of_submit_leaves_no_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ToyEngine() as engine:
        genuine = engine.scheduler.submit

        def interrupted(request: Any) -> None:
            genuine(request)
            raise KeyboardInterrupt

        monkeypatch.setattr(engine.scheduler, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.ask([5, 6], 3)
        monkeypatch.undo()
        assert engine.ask([5, 6, 7], NEW).result(60).token_ids == expected([5, 6, 7], NEW)
        engine.check_idle()
