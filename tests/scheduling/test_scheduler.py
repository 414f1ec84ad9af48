"""Requests through a scheduler: what a step has, how it goes on, how requests end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvpager import (
    BlockManager,
    BrokenInvariant,
    QueueFull,
    Request,
    Scheduler,
    StaleSequence,
    StepPlan,
)
from kvpager.plans import Reason
from tests.support.scheduling import (
    BLOCK_SIZE,
    Clock,
    complete,
    ids,
    make,
    request,
    rows,
    run,
    step,
)

# -------------------------------------------------------------------- what a step says


def test_a_prompt_and_then_a_token_a_step() -> None:
    scheduler = make()
    scheduler.submit(Request(name="a", prompt=ids(6), max_new_tokens=3))
    first = step(scheduler)
    assert first.names == ["a"]
    assert (first.starts.tolist(), first.counts.tolist(), first.kv_lens.tolist()) == ([0], [6], [6])
    assert first.ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert first.wants_logits.tolist() == [True]
    second = step(scheduler)
    assert (second.starts.tolist(), second.counts.tolist()) == ([6], [1])
    assert second.ids.tolist() == [7]
    assert second.tables.shape == (1, 2)
    assert second.samples.tolist() == first.samples.tolist()
    third = step(scheduler)
    assert third.ids.tolist() == [7]
    last = scheduler.plan()
    assert last is not None
    assert (len(last), last.ended, last.freed.tolist()) == (0, [("a", Reason.FINISHED)], [0])
    assert not scheduler.has_work
    assert scheduler.plan() is None
    assert scheduler.manager.num_held_blocks == 0


def test_arrays_have_the_types_that_are_promised() -> None:
    scheduler = make()
    scheduler.submit(request("a"))
    plan = step(scheduler)
    for name in ("copies", "samples", "starts", "counts", "ids", "kv_lens", "tables", "freed"):
        assert getattr(plan, name).dtype == np.int32, name
    assert plan.slots.dtype == np.int64
    assert plan.wants_logits.dtype == np.bool_
    assert plan.copies.shape == (0, 2)
    ended = scheduler.cancel("a") and scheduler.plan()
    assert isinstance(ended, StepPlan)
    assert ended.tables.shape[0] == 0
    assert ended.slots.dtype == np.int64


def test_slots_are_those_of_the_tables() -> None:
    scheduler = make()
    scheduler.submit(request("a", 9))
    scheduler.submit(request("b", 2))
    for _ in range(3):
        plan = step(scheduler)
        expected = [
            int(plan.tables[row, at // BLOCK_SIZE]) * BLOCK_SIZE + at % BLOCK_SIZE
            for row in range(len(plan))
            for at in range(plan.starts[row], plan.kv_lens[row])
        ]
        assert plan.slots.tolist() == expected


def test_rows_that_decode_come_before_prompts() -> None:
    scheduler = make(max_batch_tokens=6)
    scheduler.submit(request("a", 2, new=9))
    step(scheduler)
    scheduler.submit(request("b", 4))
    scheduler.submit(request("c", 4))
    assert list(rows(step(scheduler)).items()) == [("a", 1), ("b", 4)]


def test_a_long_prompt_is_computed_in_chunks_of_what_the_budget_leaves() -> None:
    scheduler = make(max_batch_tokens=10)
    scheduler.submit(request("a", 2, new=9))
    step(scheduler)
    scheduler.submit(request("b", 20))
    plans = [step(scheduler) for _ in range(4)]
    assert [rows(plan).get("b") for plan in plans] == [9, 9, 2, 1]
    assert [bool(plan.wants_logits[-1]) for plan in plans] == [False, False, True, True]
    assert plans[1].starts.tolist() == [3, 9]


def test_no_chunk_is_smaller_than_a_block() -> None:
    scheduler = make(max_batch_tokens=6)
    scheduler.submit(request("a", 1, new=3))
    scheduler.submit(request("b", 1, new=3))
    scheduler.submit(request("c", 1, new=3))
    step(scheduler)
    scheduler.submit(request("d", 20))  # three tokens of budget are left
    assert "d" not in rows(step(scheduler))


def test_without_chunks_only_whole_prompts_are_computed() -> None:
    scheduler = make(max_batch_tokens=10, chunked=False)
    for name in "ab":
        scheduler.submit(request(name, 6, new=2))
    assert rows(step(scheduler)) == {"a": 6}
    assert rows(step(scheduler)) == {"a": 1, "b": 6}


def test_without_chunks_a_prompt_beyond_the_budget_is_alone_in_its_step() -> None:
    scheduler = make(max_batch_tokens=10, chunked=False)
    scheduler.submit(request("a", 3, new=3))
    scheduler.submit(request("b", 25, new=2))
    scheduler.submit(request("c", 3, new=2))
    found = []
    run(scheduler, lambda plan: found.append(rows(plan)))
    assert {"b": 25} in found
    assert all(sum(each.values()) <= 10 for each in found if each != {"b": 25})


def test_no_more_rows_run_than_may() -> None:
    scheduler = make(max_running=3)
    for name in range(7):
        scheduler.submit(request(name, new=3))
    most = []
    run(scheduler, lambda plan: most.append(len(plan)))
    assert max(most) == 3


def test_a_request_counts_with_all_the_rows_it_may_have() -> None:
    scheduler = make(max_running=4)
    for name in "ab":
        scheduler.submit(request(name, new=2, num_samples=3))
    assert rows(step(scheduler)) == {"a": 3}
    assert set(rows(step(scheduler))) == {"a"}


def test_a_known_prefix_is_not_computed_again() -> None:
    scheduler = make()
    scheduler.submit(Request(name="a", prompt=ids(12), max_new_tokens=2))
    run(scheduler)
    scheduler.submit(Request(name="b", prompt=ids(15), max_new_tokens=2))
    plan = step(scheduler)
    assert (plan.starts.tolist(), plan.ids.tolist()) == ([12], [12, 13, 14])
    assert scheduler.stats().total_reused_tokens == 12


def test_what_was_generated_is_found_again() -> None:
    scheduler = make()
    scheduler.submit(Request(name="a", prompt=ids(4), max_new_tokens=6))
    run(scheduler)
    scheduler.submit(Request(name="b", prompt=[0, 1, 2, 3, 7, 7, 7, 7, 7, 7], max_new_tokens=2))
    plan = step(scheduler)
    assert plan.starts.tolist() == [8]


@pytest.mark.parametrize("other", [{"namespace": "x"}, {"adapter": "x"}])
def test_a_prefix_of_somebody_else_is_computed_again(other: dict[str, str]) -> None:
    scheduler = make()
    scheduler.submit(Request(name="a", prompt=ids(12), max_new_tokens=2))
    run(scheduler)
    scheduler.submit(Request(name="b", prompt=ids(12), max_new_tokens=2, **other))
    assert step(scheduler).starts.tolist() == [0]


def test_without_the_prefix_cache_nothing_is_kept() -> None:
    scheduler = make(prefix_cache=False)
    for name in "ab":
        scheduler.submit(Request(name=name, prompt=ids(12), max_new_tokens=3))
        run(scheduler)
    assert scheduler.stats().total_reused_tokens == 0
    assert scheduler.manager.num_free_blocks == 64


def test_part_of_a_block_is_copied_and_kept() -> None:
    scheduler = make()
    scheduler.submit(Request(name="a", prompt=ids(8), max_new_tokens=2))
    run(scheduler)
    scheduler.submit(Request(name="b", prompt=[0, 1, 2, 3, 4, 5, 99], max_new_tokens=2))
    plan = step(scheduler)
    assert plan.starts.tolist() == [6]
    assert plan.copies[:, 1].tolist() == [int(plan.tables[0, 1])]


# -------------------------------------------------------------------- going on


def test_a_row_that_is_named_twice_is_forked() -> None:
    scheduler = make()
    scheduler.submit(request("a", 5, new=4, num_samples=3))
    plan = scheduler.plan()
    assert plan is not None
    found = scheduler.complete(plan, [0, 0, 0], [1, 2, 3])
    assert found[0] == plan.samples[0]
    assert len(set(found.tolist())) == 3
    plan = scheduler.plan()
    assert plan is not None
    assert plan.samples.tolist() == found.tolist()
    assert plan.ids.tolist() == [1, 2, 3]
    assert plan.tables[:, 0].tolist() == [int(plan.tables[0, 0])] * 3  # the full block is shared
    assert len(set(plan.tables[:, 1].tolist())) == 3  # and the open one was copied
    assert len(plan.copies) == 2


def test_beams_change_places_and_end() -> None:
    scheduler = make()
    scheduler.submit(request("a", 4, new=9, num_samples=3, together=True))
    plan = scheduler.plan()
    assert plan is not None
    beams = scheduler.complete(plan, [0, 0, 0], [1, 2, 3])
    plan = scheduler.plan()
    assert plan is not None
    after = scheduler.complete(plan, [1, 2, 2], [4, 5, 6])  # the first beam is given up
    assert after[:2].tolist() == beams[1:].tolist()
    plan = scheduler.plan()
    assert plan is not None
    assert plan.samples.tolist() == after.tolist()
    assert plan.freed.tolist() == [int(beams[0])]
    assert after[2] not in beams  # a number is not given again before its end was told
    assert plan.ids.tolist() == [4, 5, 6]
    scheduler.complete(plan, [], [])
    assert run(scheduler) == {"a": Reason.FINISHED}


def test_a_row_nobody_names_has_ended() -> None:
    scheduler = make()
    scheduler.submit(request("a", new=9))
    scheduler.submit(request("b", new=9))
    plan = scheduler.plan()
    assert plan is not None
    assert scheduler.complete(plan, [1], [5]).tolist() == [1]
    plan = step(scheduler)
    assert (plan.names, plan.ended) == (["b"], [("a", Reason.FINISHED)])


def test_the_last_token_ends_a_row_without_being_computed() -> None:
    scheduler = make()
    scheduler.submit(request("a", 3, new=1, num_samples=2))
    plan = scheduler.plan()
    assert plan is not None
    assert scheduler.complete(plan, [0, 0], [1, 2]).tolist() == [-1, -1]
    assert run(scheduler) == {"a": Reason.FINISHED}
    assert scheduler.stats().total_tokens == 3


def test_a_request_may_fill_the_pool_to_the_last_block() -> None:
    scheduler = make(num_blocks=4)
    scheduler.submit(request("a", 8, new=9))
    assert run(scheduler) == {"a": Reason.FINISHED}


@pytest.mark.parametrize(
    ("parents", "tokens", "error"),
    [
        ([1], [5], "rows below 1"),
        ([-1], [5], "rows below 1"),
        ([0], [5, 6], "1 parents, but 2 tokens"),
        ([0, 0, 0], [1, 2, 3], "num_samples is 2"),
    ],
)
def test_a_bad_continuation_changes_nothing(
    parents: list[int], tokens: list[int], error: str
) -> None:
    scheduler = make()
    scheduler.submit(request("a", num_samples=2))
    plan = scheduler.plan()
    assert plan is not None
    with pytest.raises(ValueError, match=error):
        scheduler.complete(plan, parents, tokens)
    scheduler.check()
    assert scheduler.complete(plan, [0, 0], [1, 2]).tolist() == [0, 1]


def test_a_row_in_the_middle_of_its_prompt_cannot_go_on() -> None:
    scheduler = make(max_batch_tokens=4)
    scheduler.submit(request("a", 9))
    plan = scheduler.plan()
    assert plan is not None
    with pytest.raises(ValueError, match="not computed to its end"):
        scheduler.complete(plan, [0], [1])
    with pytest.raises(TypeError, match="parents"):
        scheduler.complete(plan, [0.5], [1])


def test_parents_out_of_order_are_refused() -> None:
    scheduler = make()
    scheduler.submit(request("a"))
    scheduler.submit(request("b"))
    plan = scheduler.plan()
    assert plan is not None
    with pytest.raises(ValueError, match="ascending"):
        scheduler.complete(plan, [1, 0], [1, 2])


def test_one_step_at_a_time() -> None:
    scheduler = make()
    scheduler.submit(request("a"))
    plan = scheduler.plan()
    assert plan is not None
    with pytest.raises(ValueError, match="under way"):
        scheduler.plan()
    complete(scheduler, plan)
    with pytest.raises(ValueError, match="not under way"):
        scheduler.complete(plan, [0], [1])
    with pytest.raises(ValueError, match="not under way"):
        scheduler.abort(plan)


# -------------------------------------------------------------------- how requests end


STATES = ("waiting", "begun", "decoding", "preempted", "in a step")


def brought_into(state: str, **options: int) -> tuple[Scheduler, StepPlan | None]:
    """A scheduler whose request "a" is in a state, and the plan of a step that is under way."""
    scheduler = make(num_blocks=6, max_batch_tokens=8, clock=Clock(), **options)
    if state == "preempted":
        scheduler.submit(request("first", 4, new=14))
    scheduler.submit(request("a", 12 if state == "begun" else 8, new=6, deadline=100.0))
    if state != "waiting":
        step(scheduler)
    while state == "preempted" and not scheduler.num_preempted:
        step(scheduler)
    if state in ("decoding", "in a step"):
        step(scheduler)
    return scheduler, scheduler.plan() if state == "in a step" else None


@pytest.mark.parametrize("num_host_blocks", [0, 6])
@pytest.mark.parametrize("state", STATES)
def test_a_request_can_be_cancelled_in_any_state(state: str, num_host_blocks: int) -> None:
    scheduler, plan = brought_into(state, num_host_blocks=num_host_blocks)
    assert scheduler.cancel("a")
    assert not scheduler.cancel("a")
    if plan is not None:
        assert scheduler.names == ["a"]  # its step is still computed
        assert complete(scheduler, plan).tolist() == [-1]
    assert "a" not in scheduler.names
    assert run(scheduler)["a"] is Reason.CANCELLED
    assert scheduler.manager.num_held_blocks == 0
    stats = scheduler.manager.stats()
    assert stats.num_host_free == stats.num_host_blocks


@pytest.mark.parametrize("state", STATES)
def test_a_request_can_be_finished_from_outside(state: str) -> None:
    scheduler, plan = brought_into(state)
    assert scheduler.finish("a")
    if plan is not None:
        complete(scheduler, plan)
    assert run(scheduler)["a"] is Reason.FINISHED


@pytest.mark.parametrize("state", STATES)
def test_a_deadline_ends_a_request_in_any_state(state: str) -> None:
    scheduler, plan = brought_into(state)
    clock = scheduler.clock
    assert isinstance(clock, Clock)
    clock.now = 99.9
    if plan is not None:
        complete(scheduler, plan)
    clock.now = 100.0
    ended = scheduler.plan()
    assert ended is not None
    assert ended.ended == [("a", Reason.EXPIRED)]
    assert "a" not in ended.names


def test_a_deadline_of_a_name_that_came_again_does_not_end_it() -> None:
    clock = Clock()
    scheduler = make(clock=clock)
    scheduler.submit(request("a", new=1, deadline=5.0))
    run(scheduler)
    scheduler.submit(request("a", new=9))
    clock.now = 6.0
    assert run(scheduler) == {"a": Reason.FINISHED}


def test_nobody_to_cancel() -> None:
    scheduler = make()
    assert not scheduler.cancel("a")
    assert not scheduler.finish("a")


def test_an_aborted_step_ends_its_requests_and_no_others() -> None:
    scheduler = make(max_running=2)
    for name in "abc":
        scheduler.submit(request(name))
    plan = scheduler.plan()
    assert plan is not None
    assert scheduler.abort(plan) == ["a", "b"]
    scheduler.check()
    assert scheduler.manager.num_held_blocks == 0
    assert run(scheduler) == {"a": Reason.FAILED, "b": Reason.FAILED, "c": Reason.FINISHED}


def test_nothing_of_an_aborted_step_is_reused() -> None:
    scheduler = make(max_batch_tokens=8)
    scheduler.submit(Request(name="a", prompt=ids(16), max_new_tokens=2))
    step(scheduler)
    plan = scheduler.plan()
    assert plan is not None
    scheduler.abort(plan)
    scheduler.submit(Request(name="b", prompt=ids(16), max_new_tokens=2))
    assert step(scheduler).starts.tolist() == [8]  # what the step before it computed is good


def test_a_name_can_be_used_again_once_its_end_was_told() -> None:
    scheduler = make()
    scheduler.submit(request("a"))
    with pytest.raises(ValueError, match="in use"):
        scheduler.submit(request("a"))
    scheduler.cancel("a")
    with pytest.raises(ValueError, match="in use"):
        scheduler.submit(request("a"))
    scheduler.plan()
    scheduler.submit(request("a"))
    assert run(scheduler) == {"a": Reason.FINISHED}


# -------------------------------------------------------------------- what is refused


def test_a_full_queue_refuses_and_says_so() -> None:
    scheduler = make(max_waiting=2)
    scheduler.submit(request("a"))
    scheduler.submit(request("b"))
    with pytest.raises(QueueFull, match="2 requests wait, at most 2 may") as error:
        scheduler.submit(request("c"))
    assert (error.value.num_waiting, error.value.max_waiting) == (2, 2)
    step(scheduler)
    scheduler.submit(request("c"))
    assert set(run(scheduler)) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"length": 60, "new": 6}, "may need 17 blocks, the pool has 16"),
        ({"length": 8, "new": 30, "num_samples": 2}, "may need 18 blocks"),
        ({"length": 40, "new": 21}, "more than max_length 60"),
        ({"num_samples": 9}, "9 samples, but at most 8 rows"),
        ({"length": 0}, "prompt is empty"),
        ({"new": 0}, "max_new_tokens 0"),
        ({"num_samples": 0}, "num_samples 0"),
        ({"deadline": float("nan")}, "deadline nan"),
    ],
)
def test_what_can_never_be_served_is_refused(bad: dict[str, float], error: str) -> None:
    options = {"max_length": 60} if "max_length" in error else {}
    scheduler = make(num_blocks=16, max_running=8, **options)
    with pytest.raises(ValueError, match=error):
        scheduler.submit(request("a", **bad))
    assert not scheduler.has_work
    scheduler.submit(request("a"))


@pytest.mark.parametrize(
    "bad", [{"namespace": 1}, {"tenant": 1}, {"priority": 0.5}, {"name": []}, {"prompt": [0.5]}]
)
def test_arguments_of_the_wrong_type_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        make().submit(Request(**{"name": "a", "prompt": ids(3), "max_new_tokens": 1, **bad}))


def test_exactly_what_fits_is_accepted() -> None:
    scheduler = make(num_blocks=16)
    scheduler.submit(request("a", 8, new=25, num_samples=2))  # 2 + 2 * 6 blocks, less the last
    scheduler.submit(request("b", 60, new=5))
    assert set(run(scheduler)) == {"a", "b"}


def test_the_null_block_cannot_be_had() -> None:
    scheduler = Scheduler(BlockManager(4, BLOCK_SIZE, null_block=True))
    with pytest.raises(ValueError, match="the pool has 3"):
        scheduler.submit(request("a", 12, new=2))
    scheduler.submit(request("a", 12, new=1))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"order": "random"}, "expected one of fifo, priority, fair"),
        ({"watermark": 1.0}, "watermark"),
        ({"max_batch_tokens": 0}, "max_batch_tokens"),
        ({"max_running": 0}, "max_running"),
    ],
)
def test_a_scheduler_that_cannot_be_is_refused(options: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make(**options)


def test_a_manager_with_fences_is_refused() -> None:
    with pytest.raises(ValueError, match="without fences"):
        Scheduler(BlockManager(4, fences=True))


def test_the_prompt_is_copied() -> None:
    scheduler, prompt = make(), ids(5)
    scheduler.submit(Request(name="a", prompt=prompt, max_new_tokens=2))
    prompt[:] = 9
    assert step(scheduler).ids.tolist() == [0, 1, 2, 3, 4]


# -------------------------------------------------------------------- its own books


def test_it_says_who_is_where() -> None:
    scheduler = make(num_blocks=6, num_host_blocks=6)
    for name in "abc":
        scheduler.submit(request(name, 4, new=13))
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.names) == (
        3,
        0,
        ["a", "b", "c"],
    )
    while not scheduler.num_preempted:
        step(scheduler)
    counts = (scheduler.num_waiting, scheduler.num_running, scheduler.num_preempted)
    stats = scheduler.stats()
    assert counts == (stats.num_waiting, stats.num_running, stats.num_preempted)
    assert sum(counts) == len(scheduler.names) == 3
    assert stats.num_running_rows == scheduler.num_running


def corrupt_row(scheduler: Scheduler) -> None:
    scheduler._table.sequences.computed[0] += 1


def corrupt_reservation(scheduler: Scheduler) -> None:
    scheduler._table.num_rows_reserved += 1


def corrupt_place(scheduler: Scheduler) -> None:
    scheduler._table.preempted.append(scheduler._table.running.pop())


def corrupt_names(scheduler: Scheduler) -> None:
    del scheduler._table._live["b"]


def corrupt_numbers(scheduler: Scheduler) -> None:
    scheduler._table.sequences._free.append(0)


def corrupt_queue(scheduler: Scheduler) -> None:
    scheduler._table.order._num_waiting += 1


def corrupt_blocks(scheduler: Scheduler) -> None:
    scheduler.manager.free(scheduler._table.sequences.handle(0))


@pytest.mark.parametrize(
    "corrupt",
    [
        corrupt_row,
        corrupt_reservation,
        corrupt_place,
        corrupt_names,
        corrupt_numbers,
        corrupt_queue,
        corrupt_blocks,
    ],
)
def test_wrong_books_are_noticed(corrupt: Callable[[Scheduler], None]) -> None:
    scheduler = make(max_running=1)
    scheduler.submit(request("a"))
    scheduler.submit(request("b"))
    step(scheduler)
    scheduler.check()
    corrupt(scheduler)
    with pytest.raises((BrokenInvariant, StaleSequence)):
        scheduler.check()


def test_deadlines_of_requests_that_ended_are_forgotten() -> None:
    scheduler = make(clock=Clock())
    for number in range(500):
        scheduler.submit(request(number, deadline=1e9))
        scheduler.cancel(number)
        scheduler.plan()
    assert len(scheduler._table._deadlines) < 100


def test_what_was_computed_before_prefixes_were_forgotten_is_not_shared_afterwards() -> None:
    scheduler = make()
    prompt = ids(40)
    scheduler.submit(request("before", prompt=prompt, new=30))
    step(scheduler)
    scheduler.submit(request("waits", prompt=prompt))
    scheduler.forget_prefixes()
    scheduler.submit(request("after", prompt=prompt))
    computed: dict[object, int] = {}
    run(
        scheduler,
        lambda plan: [computed.update({n: computed.get(n, 0) + c}) for n, c in rows(plan).items()],
    )
    # The first of the two computes the prompt again, the other shares that.
    assert sorted(computed[name] >= 40 for name in ("waits", "after")) == [False, True]
