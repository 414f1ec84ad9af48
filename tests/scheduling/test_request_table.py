"""The request table: the place of requests, their ends, and its invariants."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvpager import Request, Scheduler, StepPlan
from kvpager.errors import BrokenInvariant, StaleSequence
from kvpager.plans import Reason
from tests.support.clock import Clock
from tests.support.scheduling import (
    complete,
    ids,
    make,
    request,
    rows,
    run,
    step,
)

# -------------------------------------------------------------------- how requests end


STATES = ("waiting", "begun", "decoding", "preempted", "in a step")


def brought_into(state: str, **options: int) -> tuple[Scheduler, StepPlan | None]:
    """Return a scheduler whose request "a" is in `state`, and the plan under way, if any."""
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
        assert scheduler.request_ids == ["a"]  # it ends with its step
        assert complete(scheduler, plan).tolist() == [-1]
    assert "a" not in scheduler.request_ids
    assert run(scheduler)["a"] is Reason.CANCELLED
    assert scheduler.manager.num_held_blocks == 0
    stats = scheduler.manager.stats()
    assert stats.num_host_free == stats.num_host_blocks


@pytest.mark.parametrize("state", STATES)
def test_a_request_can_be_finished_in_any_state(state: str) -> None:
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
    assert "a" not in ended.request_ids


def test_an_old_deadline_does_not_end_a_reused_request_id() -> None:
    clock = Clock()
    scheduler = make(clock=clock)
    scheduler.submit(request("a", new=1, deadline=5.0))
    run(scheduler)
    scheduler.submit(request("a", new=9))
    clock.now = 6.0
    assert run(scheduler) == {"a": Reason.FINISHED}


def test_cancelling_an_unknown_request_does_nothing() -> None:
    scheduler = make()
    assert not scheduler.cancel("a")
    assert not scheduler.finish("a")


def test_an_aborted_step_ends_only_its_own_requests() -> None:
    scheduler = make(max_num_seqs=2)
    for name in "abc":
        scheduler.submit(request(name))
    plan = scheduler.plan()
    assert plan is not None
    assert scheduler.abort(plan) == ["a", "b"]
    scheduler.check()
    assert scheduler.manager.num_held_blocks == 0
    assert run(scheduler) == {"a": Reason.FAILED, "b": Reason.FAILED, "c": Reason.FINISHED}


def test_tokens_of_an_aborted_step_are_not_reused() -> None:
    scheduler = make(max_batch_tokens=8)
    scheduler.submit(Request(request_id="a", prompt=ids(16), max_new_tokens=2))
    step(scheduler)
    plan = scheduler.plan()
    assert plan is not None
    scheduler.abort(plan)
    scheduler.submit(Request(request_id="b", prompt=ids(16), max_new_tokens=2))
    assert step(scheduler).num_computed.tolist() == [8]  # tokens of the completed step are valid


def test_a_request_id_is_reusable_after_its_reported_end() -> None:
    scheduler = make()
    scheduler.submit(request("a"))
    with pytest.raises(ValueError, match="a live request has this id"):
        scheduler.submit(request("a"))
    scheduler.cancel("a")
    with pytest.raises(ValueError, match="a live request has this id"):
        scheduler.submit(request("a"))
    scheduler.plan()
    scheduler.submit(request("a"))
    assert run(scheduler) == {"a": Reason.FINISHED}


# -------------------------------------------------------------------- counts and invariants


def test_counts_tell_where_requests_are() -> None:
    scheduler = make(num_blocks=6, num_host_blocks=6)
    for name in "abc":
        scheduler.submit(request(name, 4, new=13))
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.request_ids) == (
        3,
        0,
        ["a", "b", "c"],
    )
    while not scheduler.num_preempted:
        step(scheduler)
    counts = (scheduler.num_waiting, scheduler.num_running, scheduler.num_preempted)
    stats = scheduler.stats()
    assert counts == (stats.num_waiting, stats.num_running, stats.num_preempted)
    assert sum(counts) == len(scheduler.request_ids) == 3
    assert stats.num_running_seqs == scheduler.num_running


def corrupt_row(scheduler: Scheduler) -> None:
    scheduler._table.sequences.computed[0] += 1


def corrupt_reservation(scheduler: Scheduler) -> None:
    scheduler._table.num_seqs_reserved += 1


def corrupt_place(scheduler: Scheduler) -> None:
    scheduler._table.preempted.append(scheduler._table.running.pop())


def corrupt_names(scheduler: Scheduler) -> None:
    del scheduler._table.live["b"]


def corrupt_numbers(scheduler: Scheduler) -> None:
    scheduler._table.sequences._free.append(0)


def corrupt_queue(scheduler: Scheduler) -> None:
    scheduler._table.policy.num_waiting += 1


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
def test_check_finds_corrupted_state(corrupt: Callable[[Scheduler], None]) -> None:
    scheduler = make(max_num_seqs=1)
    scheduler.submit(request("a"))
    scheduler.submit(request("b"))
    step(scheduler)
    scheduler.check()
    corrupt(scheduler)
    with pytest.raises((BrokenInvariant, StaleSequence)):
        scheduler.check()


def test_deadlines_of_ended_requests_are_forgotten() -> None:
    scheduler = make(clock=Clock())
    for number in range(500):
        scheduler.submit(request(number, deadline=1e9))
        scheduler.cancel(number)
        scheduler.plan()
    assert len(scheduler._table._deadlines) < 100


def test_nothing_is_shared_across_clear_prefix_cache() -> None:
    scheduler = make()
    prompt = ids(40)
    scheduler.submit(request("before", prompt=prompt, new=30))
    step(scheduler)
    scheduler.submit(request("waits", prompt=prompt))
    scheduler.clear_prefix_cache()
    scheduler.submit(request("after", prompt=prompt))
    computed: dict[object, int] = {}
    run(
        scheduler,
        lambda plan: [computed.update({n: computed.get(n, 0) + c}) for n, c in rows(plan).items()],
    )
    # One of the two computes the prompt again, the other shares it.
    assert sorted(computed[name] >= 40 for name in ("waits", "after")) == [False, True]
