"""The engine core, over a runner whose tokens depend on the contents of the blocks."""

from __future__ import annotations

import asyncio
import inspect
import random
import threading

import pytest

from kvpager.engine.config import EngineConfig
from kvpager.engine.request_state import RequestSettings
from kvpager.errors import (
    RequestCancelled,
)
from kvpager.scheduling.preemption import PreemptionCosts
from kvpager.scheduling.scheduler import Scheduler
from tests.support.toy_runner import BLOCK_SIZE, ToyEngine, expected

KINDS = pytest.mark.parametrize("kind", [ZeroDivisionError, SystemExit, KeyboardInterrupt])

NEW = 16


def some_prompts(count: int = 12, longest: int = 30, seed: int = 1) -> list[list[int]]:
    source = random.Random(seed)
    return [
        [source.randrange(1000) for _ in range(source.randint(1, longest))] for _ in range(count)
    ]


def test_scheduler_and_engine_have_the_same_defaults() -> None:
    config = EngineConfig()
    for name, parameter in inspect.signature(Scheduler).parameters.items():
        if hasattr(config, name):
            assert getattr(config, name) == parameter.default, name


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


def test_a_waiting_request_has_an_empty_output() -> None:
    with ToyEngine() as engine, engine.pause():
        output = engine.ask([5, 6, 7], 9).partial()
        assert (output.token_ids, output.finish_reason) == ([], None)
        with pytest.raises(ValueError, match=r"has no text: .* at the end\."):
            output.text  # noqa: B018


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
    assert output.finish_reason == "length"


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
