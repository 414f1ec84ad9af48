"""The connector that copies within the step: what is a hit, what is loaded, what is held."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.dict_store import DictStore
from tests.support.vllm_parts import interface
from tests.support.vllm_steps import Engine, Group

Make = Callable[..., Engine]
FULL, WINDOW = Group(4), Group(4, 7)
PROMPT = list(range(1, 38))  # 9 blocks and a token


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make engines that are closed, and hold nothing in the end."""
    with ExitStack() as stack:

        def made(*args: Any, **settings: Any) -> Engine:
            engine = Engine(tmp_path, *args, **settings)
            stack.callback(engine.close)
            return engine

        yield made


def store_of() -> DictStore:
    return DictStore(4096)


# ---------------------------------------------------------------- hits


def test_a_prompt_is_a_hit_right_after_the_step_that_computed_it(make: Make) -> None:
    engine = make()
    first, second = engine.arrive(PROMPT), engine.arrive([*PROMPT, 90])
    assert engine.match(first) == 0
    engine.admit(first, 0)
    engine.step((first, len(PROMPT)))
    found = engine.match(second)
    assert found == 36
    engine.admit(second, found)
    engine.step((second, 2))
    assert engine.num_compared == 9


def test_vllm_computes_at_least_the_last_token(make: Make) -> None:
    engine = make()
    engine.serve(PROMPT[:36])
    assert engine.serve(PROMPT[:36]) == 32
    assert engine.serve(PROMPT) == 36


def test_what_the_device_has_is_not_loaded(make: Make) -> None:
    engine = make()
    engine.serve(PROMPT)
    request = engine.arrive(PROMPT)
    assert engine.match(request, 20) == 16
    engine.admit(request, 16, 20)
    planned = engine.plan({request.request_id: 1})
    assert planned.loads[0][1].group_sizes == [4]
    engine.end(engine.execute(planned, {request.request_id: 1}), {request.request_id: 1})


def test_a_request_may_ask_to_read_no_cache(make: Make) -> None:
    engine = make()
    engine.serve(PROMPT)
    request = engine.arrive(PROMPT)
    request.skip_reading_prefix_cache = True
    assert engine.match(request) == 0


@pytest.mark.parametrize("prompt_only", [True, False])
def test_replies_are_saved_if_vllms_setting_says_so(make: Make, prompt_only: bool) -> None:
    engine = make(offload_prompt_only=prompt_only)
    request = engine.arrive(PROMPT[:10])
    engine.admit(request, engine.match(request) or 0)
    engine.step((request, 10))
    for token in PROMPT[10:24]:
        request.tokens.append(token)
        engine._extend(request, 0, request.num_tokens)
        engine.step((request, 1))
    assert engine.serve(PROMPT) == (8 if prompt_only else 24)


def test_tokens_that_are_only_guessed_are_not_saved(make: Make) -> None:
    engine = make(offload_prompt_only=False)
    request = engine.arrive(PROMPT[:10])
    engine.admit(request, 0)
    engine._extend(request, 0, 16)
    planned = engine.plan({request.request_id: 14})  # 10 tokens and 4 drafts
    assert len(planned.saves[0][0].block_ids) == 2
    engine.end(engine.execute(planned, {request.request_id: 10}), {request.request_id: 10})


def test_a_token_may_change_until_it_is_computed(make: Make) -> None:
    engine = make(offload_prompt_only=False)
    request = engine.arrive(PROMPT[:8])
    engine.admit(request, 0)
    engine.step((request, 7))
    request.tokens[7] = 99  # as in a session of vLLM that takes further input
    engine.step((request, 1))
    engine.finish(request)
    assert engine.serve(PROMPT) == 4
    assert engine.serve([*PROMPT[:7], 99, 100]) == 8


# ---------------------------------------------------------------- chunks and windows


@pytest.mark.parametrize("per_chunk", [1, 2, 4])
@pytest.mark.parametrize(
    "groups",
    [
        (FULL,),
        (WINDOW,),
        (FULL, WINDOW, Group(4, 6)),
        (WINDOW, FULL, Group(4, 20)),
        (Group(8), Group(4, 9)),
    ],
)
@pytest.mark.parametrize("step_tokens", [1000, 10])
def test_a_prefix_ends_with_a_chunk_of_every_group(
    make: Make, groups: Any, per_chunk: int, step_tokens: int
) -> None:
    engine = make(groups, per_chunk=per_chunk)
    longest = max(group.block_tokens for group in groups) * per_chunk
    want = 36 // longest * longest
    assert engine.serve(PROMPT, step_tokens=step_tokens) == 0
    assert engine.serve([*PROMPT, 91, 92, 93], step_tokens=step_tokens) == want
    assert engine.num_compared > 0


def test_a_window_needs_only_its_own_chunks(make: Make) -> None:
    engine = make((FULL, WINDOW))
    engine.serve(PROMPT)
    request = engine.arrive(PROMPT)
    found = engine.match(request) or 0
    engine.admit(request, found)
    planned = engine.plan({request.request_id: 1})
    [(host, device)] = planned.loads
    assert device.group_sizes == [9, 2]  # the next token reads 6 tokens before itself
    assert device.block_indices == [0, 7]
    assert len(host.block_ids) == 11
    engine.end(engine.execute(planned, {request.request_id: 1}), {request.request_id: 1})


def test_a_prefix_ends_where_a_window_is_complete(make: Make) -> None:
    engine = make((FULL, WINDOW))
    engine.serve(PROMPT)
    request = engine.arrive(PROMPT)
    engine.match(request)
    engine.lose(request, 1, range(3))
    assert engine.match(request) == 36  # its window is in blocks 7 and 8
    engine.lose(request, 1, range(5, 8))
    assert engine.match(request) == 20  # in blocks 3 and 4


def test_a_prefix_that_one_window_shortens_suits_the_others(make: Make) -> None:
    engine = make((WINDOW, WINDOW))
    engine.serve(PROMPT)
    request = engine.arrive(PROMPT)
    engine.match(request)
    engine.lose(request, 0, [6])
    engine.lose(request, 1, [7])
    assert engine.match(request) == 24  # not 28: block 6 is in that window
    engine.admit(request, 24)
    engine.step((request, 13))


def test_a_prefix_ends_with_a_block_of_the_group_with_larger_ones(make: Make) -> None:
    engine = make((Group(8), FULL))
    engine.serve(PROMPT)
    request = engine.arrive(PROMPT)
    engine.match(request)
    engine.lose(request, 1, [5])
    assert engine.match(request) == 16
    engine.admit(request, 16)
    engine.step((request, 21))


def test_blocks_that_vllm_expects_before_a_window_are_not_left_unwritten(make: Make) -> None:
    engine = make((WINDOW,))
    engine.serve(PROMPT)
    request = engine.arrive(PROMPT)
    assert engine.match(request) == 36
    held = SimpleNamespace(get_block_ids=lambda: ([5] * 10,))
    with pytest.raises(RuntimeError, match="blocks that lie before the window"):
        engine.scheduler.update_state_after_alloc(request, held, 36)


def test_a_chunk_without_blocks_that_a_reader_needs_is_not_saved(make: Make) -> None:
    engine = make((FULL, WINDOW), per_chunk=2)
    request = engine.arrive(PROMPT)
    engine.admit(request, 0)
    engine.step((request, 10))
    assert request.blocks[1][0] == 0  # half of the first chunk left the window
    engine.scheduler.reset_cache()
    engine.step((request, 27))
    engine.finish(request)
    assert engine.serve(PROMPT[:9]) == 0
    assert engine.serve(PROMPT) == 32


# ---------------------------------------------------------------- a small host memory


def test_rows_are_kept_until_the_step_that_copies_them_has_ended(make: Make) -> None:
    engine = make(num_slots=9)
    engine.serve(PROMPT)
    reader, writer = engine.arrive(PROMPT), engine.arrive(range(50, 90))
    engine.admit(reader, engine.match(reader) or 0)
    engine.admit(writer, engine.match(writer) or 0)
    scheduled = {reader.request_id: 1, writer.request_id: 40}
    planned = engine.plan(scheduled)
    assert len(planned.loads) == 1
    assert planned.saves == []  # no row may leave yet
    engine.end(engine.execute(planned, scheduled), scheduled)
    assert engine.serve(PROMPT) == 36


def test_steps_may_be_planned_before_earlier_ones_have_ended(make: Make) -> None:
    engine = make(num_slots=9)
    first = engine.arrive(PROMPT)
    engine.admit(first, 0)
    scheduled = {first.request_id: len(PROMPT)}
    one = engine.plan(scheduled)
    second = engine.arrive(PROMPT)
    found = engine.match(second)
    assert found == 36  # from rows that the first step writes
    engine.admit(second, found)
    two = engine.plan({second.request_id: 1})
    told = engine.execute(one, scheduled)
    told_two = engine.execute(two, {second.request_id: 1})
    engine.end(told, scheduled)
    assert sum(engine.manager._tier._pins) == 9  # of the second step
    engine.end(told_two, {second.request_id: 1})
    assert engine.num_compared == 9


def test_rows_of_a_request_that_loads_again_are_let_go_step_by_step(make: Make) -> None:
    engine = make()
    engine.serve(PROMPT)
    request = engine.arrive(PROMPT)
    scheduled = {request.request_id: 1}
    engine.admit(request, engine.match(request) or 0)
    first = engine.plan(scheduled)
    told = engine.execute(first, scheduled)
    engine.preempt(request)
    engine.admit(request, engine.match(request, 20) or 0, 20)
    second = engine.plan(scheduled)
    engine.end(told, {})
    assert sum(engine.manager._tier._pins) == 4
    engine.end(engine.execute(second, scheduled), scheduled)


def test_a_step_without_copies_tells_nothing(make: Make) -> None:
    engine = make()
    planned = engine.plan({})
    assert engine.execute(planned, {}) is None
    engine.end(None, {})


def test_the_last_chunk_of_a_prompt_leaves_first(make: Make) -> None:
    engine = make(num_slots=9)
    engine.serve(PROMPT, step_tokens=8)
    engine.serve(range(50, 59))
    assert engine.serve(PROMPT) == 28


# ---------------------------------------------------------------- preemption, aborts, resets


def test_a_preempted_request_finds_its_own_prefix(make: Make) -> None:
    engine = make((FULL, WINDOW))
    request = engine.arrive(PROMPT)
    engine.admit(request, 0)
    engine.step((request, 20))
    engine.preempt(request)
    found = engine.match(request)
    assert found == 20
    engine.admit(request, found)
    engine.step((request, 17))


@pytest.mark.parametrize("stage", ["arrived", "matched", "planned", "ended"])
def test_an_abort_holds_nothing(make: Make, stage: str) -> None:
    store = store_of()
    make(stores=[store]).serve(PROMPT)
    engine = make(stores=[store])
    request = engine.arrive(PROMPT)
    if stage == "matched":
        assert engine.match(request) is None
        engine.step()
    if stage in ("planned", "ended"):
        engine.admit(request, 0)
        scheduled = {request.request_id: 20}
        told = engine.execute(engine.plan(scheduled), scheduled)
        if stage == "planned":
            engine.finish(request)
            scheduled = {}
        engine.end(told, scheduled)
    if stage != "planned":
        engine.finish(request)
    assert engine.serve(PROMPT) == 36  # and `close` checks the rest


def test_a_reset_waits_for_the_step_that_copies(make: Make) -> None:
    engine = make()
    request = engine.arrive(PROMPT)
    engine.admit(request, 0)
    scheduled = {request.request_id: 20}
    planned = engine.plan(scheduled)
    assert engine.scheduler.reset_cache() is False
    engine.end(engine.execute(planned, scheduled), scheduled)
    assert engine.scheduler.reset_cache() is True
    engine.step((request, 17))
    engine.finish(request)
    assert engine.serve(PROMPT) == 36  # all of its chunks were offered again


# ---------------------------------------------------------------- stores


def test_another_engine_loads_what_one_saved(make: Make) -> None:
    store = store_of()
    make((FULL, WINDOW), num_slots=80, stores=[store]).serve(PROMPT)
    other = make((FULL, WINDOW), stores=[store])
    assert other.serve(PROMPT) == 36
    assert other.num_compared == 11


def test_no_step_waits_for_a_store(make: Make) -> None:
    store = store_of()
    make(stores=[store]).serve(PROMPT)
    engine = make(stores=[store])
    store.gate.clear()
    waiting, running = engine.arrive(PROMPT), engine.arrive(range(50, 89))
    assert engine.match(waiting) is None
    engine.admit(running, 0)
    for _ in range(3):
        engine.step((running, 13))
        assert engine.match(waiting) is None
    store.gate.set()
    for _ in range(3):
        engine.settle()
        engine.step()
        engine.match(waiting)
    assert engine.match(waiting) == 36


def test_stores_get_chunks_when_their_bytes_are_there(make: Make) -> None:
    store = store_of()
    engine = make(stores=[store])
    request = engine.arrive(PROMPT)
    engine.match(request)
    engine.step()
    engine.settle()
    engine.admit(request, engine.match(request) or 0)
    scheduled = {request.request_id: len(PROMPT)}
    planned = engine.plan(scheduled)
    engine.settle()
    assert not store.blocks
    engine.end(engine.execute(planned, scheduled), scheduled)
    engine.settle()
    assert len(store.blocks) == 9


def test_a_hit_says_where_it_came_from(make: Make) -> None:
    store = store_of()
    store.name = "disk"
    make(stores=[store]).serve(PROMPT[:21])
    engine = make(stores=[store])
    engine.serve(PROMPT[:9])
    engine.serve(PROMPT[:9])
    request = engine.arrive(PROMPT)
    while (found := engine.match(request, 4)) is None:
        engine.step()
        engine.settle()
    sources = engine.scheduler.get_external_cache_hit_sources(request, found)
    source = interface.CacheHitSource
    assert sources == {source.HOST: 4, source.DISK: 12}


# ---------------------------------------------------------------- everything at once


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic_loads_only_the_right_bytes(make: Make, seed: int) -> None:
    choices = random.Random(seed)
    store = store_of()
    store.capacity = 30
    groups = choices.choice([(FULL,), (FULL, WINDOW), (Group(8), Group(4, 9))])
    engine = make(
        groups,
        num_slots=choices.choice([6, 12, 40]),
        per_chunk=choices.choice([1, 2]),
        stores=[store] if seed % 2 else (),
        offload_prompt_only=False,
    )
    prompts = [[number, *range(1, choices.randrange(4, 40))] for number in (1, 1, 1, 2, 3)]
    running, waiting = list[Any](), list[Any]()
    for _ in range(150):
        if len(running) + len(waiting) < 3:
            waiting.append(engine.arrive(choices.choice(prompts)))
        for request in list(waiting):
            found = engine.match(request)
            if found is not None:
                waiting.remove(request)
                engine.admit(request, found)
                running.append(request)
        pairs = [
            (request, min(choices.randrange(1, 12), left))
            for request in running
            if (left := request.num_tokens - request.num_computed_tokens)
        ]
        engine.step(*pairs)
        for request in list(running):
            if choices.random() < 0.1:
                engine.preempt(request)
                running.remove(request)
                waiting.append(request)
            elif request.num_computed_tokens == request.num_tokens or choices.random() < 0.1:
                engine.finish(request)
                running.remove(request)
        if choices.random() < 0.02:
            engine.settle()
            engine.scheduler.reset_cache()
    assert engine.num_compared > 20
