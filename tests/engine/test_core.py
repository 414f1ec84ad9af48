"""The engine core, over a runner whose tokens depend on the contents of the blocks."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from typing import Any

import pytest

from kvpager.engine.metrics import StepRecord
from kvpager.engine.request_state import RequestSettings
from kvpager.engine.stream import Token
from kvpager.errors import (
    EngineClosed,
    KVPagerError,
    QueueFull,
    RequestCancelled,
    RequestExpired,
    RequestFailed,
)
from kvpager.scheduling.preemption import PreemptionCosts
from tests.support.gates import Gate
from tests.support.toy_runner import BLOCK_SIZE, ToyEngine, expected

KINDS = pytest.mark.parametrize("kind", [ZeroDivisionError, SystemExit, KeyboardInterrupt])
NEW = 16


def some_prompts(count: int = 12, longest: int = 30, seed: int = 1) -> list[list[int]]:
    source = random.Random(seed)
    return [
        [source.randrange(1000) for _ in range(source.randint(1, longest))] for _ in range(count)
    ]


# -------------------------------------------------------------------- tokens


@pytest.mark.parametrize("budget", [4, 7, 64, 2048])
def test_tokens_depend_on_all_earlier_tokens(budget: int) -> None:
    prompts = some_prompts()
    with ToyEngine(256, max_batch_tokens=budget) as engine:
        streams = [engine.ask(prompt, NEW) for prompt in prompts]
        assert [stream.result().token_ids for stream in streams] == [
            expected(prompt, NEW) for prompt in prompts
        ]
        engine.check_idle()


def test_a_stream_yields_tokens_and_then_the_result() -> None:
    with ToyEngine() as engine:
        stream = engine.ask([5, 6, 7], 9)
        tokens = [token.id for token in stream]
        assert tokens == stream.result().token_ids == expected([5, 6, 7], 9)
        assert stream.done
        output = stream.result()
    assert output.first_scheduled_time is not None
    assert output.first_token_time is not None
    assert output.finished_time is not None
    assert (
        output.arrival_time
        <= output.first_scheduled_time
        <= output.first_token_time
        <= output.finished_time
    )
    assert output.samples[0].finish_reason == "length"


def test_asyncio_reads_many_streams_at_once() -> None:
    prompts = some_prompts()

    async def read(engine: ToyEngine, prompt: list[int]) -> list[int]:
        stream = engine.ask(prompt, NEW)
        tokens = [token.id async for token in stream]
        assert (await stream).token_ids == tokens
        return tokens

    async def main() -> list[list[int]]:
        with ToyEngine(256) as engine:
            return await asyncio.gather(*(read(engine, prompt) for prompt in prompts))

    assert asyncio.run(main()) == [expected(prompt, NEW) for prompt in prompts]


def test_a_stop_token_and_a_criterion_end_a_sample() -> None:
    tokens = expected([5, 6, 7], NEW)
    with ToyEngine() as engine:
        stop = RequestSettings(stop_ids=frozenset({tokens[4], -1}))
        by_token = engine.ask([5, 6, 7], NEW, settings=stop).result()
        enough = RequestSettings(find_stop=lambda ids: "nine" if len(ids) == 9 else None)
        by_criterion = engine.ask([5, 6, 7], NEW, settings=enough).result()
    first, second = by_token.samples[0], by_criterion.samples[0]
    assert (first.token_ids, first.finish_reason, first.stop_reason) == (tokens[:5], "stop", None)
    assert (second.token_ids, second.finish_reason, second.stop_reason) == (
        tokens[:6],
        "stop",
        "nine",
    )


def test_log_probabilities_are_returned_on_request() -> None:
    settings = RequestSettings(with_logprobs=True)
    with ToyEngine() as engine:
        with engine.pause():
            asked = engine.ask([5, 6, 7], 4, settings=settings)
            other = engine.ask([5, 6, 8], 4)
        assert [token.logprob for token in asked] == [-float(id) for id in expected([5, 6, 7], 4)]
        assert asked.result().samples[0].logprobs == [-float(id) for id in expected([5, 6, 7], 4)]
        assert other.result().samples[0].logprobs is None


def test_samples_of_a_prompt_diverge() -> None:
    prompt = list(range(10))
    with ToyEngine() as engine:
        stream = engine.ask(prompt, NEW, n=3)
        tokens = list(stream)
        samples = stream.result().samples
        assert [sample.token_ids for sample in samples] == [
            expected(prompt, NEW, k) for k in range(3)
        ]
        for number, sample in enumerate(samples):
            assert [token.id for token in tokens if token.sample == number] == sample.token_ids
        assert len(engine.runner.forks) == 2  # the runner gets them
        assert engine.stats().pool.total_copied > 0  # they shared the last block
        engine.check_idle()


def test_a_sample_may_end_before_the_others() -> None:
    prompt = list(range(10))
    ends = frozenset({expected(prompt, 1, 1)[0], expected(prompt, 5, 2)[4]})
    with ToyEngine() as engine:
        output = engine.ask(prompt, NEW, n=3, settings=RequestSettings(stop_ids=ends)).result()
        assert [len(sample.token_ids) for sample in output.samples] == [NEW, 1, 5]
        engine.check_idle()


def test_the_runner_gets_prompts_and_ended_sequences() -> None:
    with ToyEngine() as engine:
        engine.ask([5, 6, 7], 2).result()
        assert engine.runner.prompts == {0: [5, 6, 7]}
        engine.check_idle()
        assert 0 in engine.runner.freed


@pytest.mark.parametrize("costs", [PreemptionCosts(), PreemptionCosts(seconds_per_block=1e9)])
def test_a_pool_for_few_requests_gives_the_same_tokens(costs: PreemptionCosts) -> None:
    prompts = some_prompts(count=12, longest=60)
    third = sum(-(-(len(prompt) + 40) // BLOCK_SIZE) for prompt in prompts) // 3
    with ToyEngine(third, 200, costs=costs) as engine:
        with engine.pause():  # the first step contains all requests
            streams = [engine.ask(prompt, 40, n=1 + (len(prompt) % 3)) for prompt in prompts]
        for prompt, stream in zip(prompts, streams, strict=True):
            for number, sample in enumerate(stream.result().samples):
                assert sample.token_ids == expected(prompt, 40, number)
        counts = engine.stats().scheduler
        engine.check_idle()
    if costs.seconds_per_block > 1:
        assert counts.total_preempted_by_recompute > 0
        assert counts.total_preempted_by_swap == 0
    else:
        assert counts.total_preempted_by_swap > 0


def test_a_shared_prefix_is_computed_once_per_namespace() -> None:
    prompts = [list(range(64)) + prompt for prompt in some_prompts(6)]
    with ToyEngine(512) as engine:
        streams = [engine.ask(prompt, NEW) for prompt in prompts]
        found = [stream.result().token_ids for stream in streams]
        assert found == [expected(prompt, NEW) for prompt in prompts]
        hits = engine.stats().pool.prefix_hit_tokens
        assert hits >= 64 * 5
        engine.ask(prompts[0], 2, namespace="another").result()
        assert engine.stats().pool.prefix_hit_tokens == hits


def test_fifty_threads_submit_and_cancel() -> None:
    prompts = some_prompts(count=20)
    ended: list[str] = []
    wrong: list[tuple[int, int]] = []

    def client(number: int) -> None:
        source = random.Random(number)
        for turn in range(20):
            prompt = source.choice(prompts)
            stream = engine.ask(prompt, 6, request_id=f"{number}-{turn}")
            if source.random() < 0.4:
                stream.cancel()
            try:
                if stream.result(timeout=120).token_ids != expected(prompt, 6):
                    wrong.append((number, turn))
                ended.append("done")
            except RequestCancelled:
                ended.append("cancelled")

    with ToyEngine(128, max_num_seqs=32, max_batch_tokens=256) as engine:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine.check_idle()
    assert len(ended) == 1000
    assert not wrong
    assert {"done", "cancelled"} == set(ended)


# -------------------------------------------------------------------- ends


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
        assert len(stream.partial().samples[0].token_ids if stream.partial().samples else []) < 50
        engine.check_idle()


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
    def fail() -> None:
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


# -------------------------------------------------------------------- listeners and on_step


def test_a_listener_that_raises_delays_no_other_request() -> None:
    def fail(tokens: list[Token], is_done: bool) -> None:
        raise ZeroDivisionError("of the listener")

    with ToyEngine() as engine:
        with engine.pause():
            stream = engine.ask([5, 6], 5)
            with pytest.raises(ZeroDivisionError):  # the first call happens at once, on this thread
                stream.listen(fail)
        assert len(stream.result(timeout=60).token_ids) == 5


@pytest.mark.parametrize("timeout", [True, "9", -1.0, float("nan")])
def test_a_timeout_is_a_number_of_seconds(timeout: Any) -> None:
    with ToyEngine() as engine:
        stream = engine.ask([5], 2)
        with pytest.raises((ValueError, TypeError), match="timeout"):
            stream.result(timeout=timeout)


@KINDS
def test_a_listener_that_raises_loses_no_tokens(kind: type[BaseException]) -> None:
    def fail(tokens: list[Token], is_done: bool) -> None:
        if tokens or is_done:
            raise kind("of the listener")

    with ToyEngine() as engine:
        with engine.pause():
            bad = engine.ask([5, 6], 5)
            good = engine.ask([5, 6, 7], NEW)
            bad.listen(fail)
        assert [token.id for token in good] == expected([5, 6, 7], NEW)
        assert len(bad.result(timeout=60).token_ids) == 5


def test_on_step_gets_every_step() -> None:
    records: list[StepRecord] = []
    with ToyEngine(core={"on_step": records.append}) as engine:
        engine.ask([5, 6, 7], 4).result()
        engine.check_idle()
    computed = [record for record in records if record.rows]
    assert [record.tokens for record in computed] == [3, 1, 1, 1, 1]
    assert computed[3].stats.scheduler.total_tokens == 6


@KINDS
def test_an_on_step_that_raises_ends_no_request(kind: type[BaseException]) -> None:
    def fail(record: StepRecord) -> None:
        raise kind("of on_step")

    with ToyEngine(core={"on_step": fail}) as engine:
        assert len(engine.ask([5, 6], 5).result(timeout=60).token_ids) == 5


# -------------------------------------------------------------------- pauses


def test_a_pause_holds_steps_and_then_drops_cached_prefixes() -> None:
    prompt = list(range(40))
    with ToyEngine() as engine:
        engine.ask(prompt, 2).result()
        with engine.pause(), engine.pause():  # a second pause of a thread does not wait
            assert engine.is_paused_here
            before = engine.stats().scheduler.total_steps
            stream = engine.ask(prompt, 2)
            with pytest.raises(TimeoutError):
                stream.result(timeout=0.01)
            assert engine.stats().scheduler.total_steps == before
        assert not engine.is_paused_here
        assert stream.result().token_ids == expected(prompt, 2)
        assert engine.stats().pool.prefix_hit_tokens == 0


def test_closing_in_a_pause_ends_requests() -> None:
    with ToyEngine() as engine, engine.pause():
        stream = engine.ask([5], 2)
        engine.close()
        with pytest.raises(RequestCancelled):
            stream.result(timeout=60)


def test_pausing_within_a_step_is_refused() -> None:
    raised: list[KVPagerError] = []

    def pausing(record: StepRecord) -> None:
        try:
            with engine.pause():
                pass
        except KVPagerError as error:
            raised.append(error)

    with ToyEngine(core={"on_step": pausing}) as engine:
        engine.ask([5], 2).result(timeout=60)
    assert raised


# -------------------------------------------------------------------- between steps


def test_callbacks_between_steps_keep_cached_prefixes() -> None:
    prompt, calls = list(range(40)), []

    def note() -> None:
        # Another thread can take the engine's lock meanwhile.
        thread = threading.Thread(target=lambda: calls.append(engine.stats().scheduler.total_steps))
        thread.start()
        thread.join()

    with ToyEngine() as engine:
        engine.between_steps.append(note)
        engine.ask(prompt, 3).result()
        engine.ask(prompt, 3).result()
        assert {0, 1, 2, 3, 4} <= set(calls)
        assert engine.stats().pool.prefix_hit_tokens >= 36


def test_a_callback_between_steps_that_raises_stops_the_engine() -> None:
    def fail() -> None:
        raise RuntimeError("a defect")

    with ToyEngine() as engine:
        with engine.pause():
            engine.between_steps.append(fail)
            stream = engine.ask([5], 3)
        with pytest.raises(RequestFailed, match="a defect"):
            stream.result(timeout=60)
