"""Preemption: which request leaves, by swap or recompute, and how it resumes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvpager import BlockManager, Request, Scheduler, StepPlan
from kvpager.plans import Reason
from kvpager.scheduling.preemption import PreemptionCosts
from tests.support.scheduling import BLOCK_SIZE, complete, ids, make, request, rows, run, step

SWAP = PreemptionCosts(seconds_per_block=0.0)
RECOMPUTE = PreemptionCosts(seconds_per_block=math.inf)
WAYS = pytest.mark.parametrize("costs", [SWAP, RECOMPUTE], ids=["swap", "recompute"])


def until_preempted(scheduler: Scheduler, steps_max: int = 50) -> None:
    for _ in range(steps_max):
        step(scheduler)
        if scheduler.num_preempted:
            return
    raise AssertionError("no request was preempted")


def two_that_outgrow(costs: PreemptionCosts, num_host_blocks: int = 8) -> Scheduler:
    """Return a scheduler with six blocks, and two requests that grow to four blocks each."""
    scheduler = make(num_blocks=6, num_host_blocks=num_host_blocks, costs=costs)
    scheduler.submit(request("first", 4, new=13))
    scheduler.submit(request("last", 4, new=13))
    return scheduler


# -------------------------------------------------------------------- which request leaves


@WAYS
def test_the_request_that_ranks_last_is_preempted(costs: PreemptionCosts) -> None:
    scheduler = two_that_outgrow(costs)
    until_preempted(scheduler)
    seen = []
    ended = run(scheduler, lambda plan: seen.append(rows(plan)))
    assert list(ended) == ["first", "last"]
    alone = [each for each in seen if each and "last" not in each]
    assert alone
    assert all(each == {"first": 1} for each in alone)


@WAYS
def test_the_first_request_is_in_every_step(costs: PreemptionCosts) -> None:
    scheduler = make(num_blocks=10, num_host_blocks=5, costs=costs)
    for name in range(6):
        scheduler.submit(request(name, 4, new=12))
    plans = []
    while "0" not in [str(name) for plan in plans for name, _ in plan.ended]:
        plans.append(step(scheduler))
    assert len(plans) == 13  # twelve tokens, and the plan that reports the end
    stats = scheduler.stats()
    assert stats.total_preempted_by_swap + stats.total_preempted_by_recompute > 0


def test_swap_and_recompute_compute_the_same_tokens() -> None:
    outputs = {}
    for costs in (SWAP, RECOMPUTE):
        scheduler = two_that_outgrow(costs)
        tokens: dict[object, list[int]] = {}

        def note(plan: StepPlan, tokens: dict[object, list[int]] = tokens) -> None:
            for name, start in zip(plan.request_ids, plan.seq_lens, strict=True):
                tokens.setdefault(name, []).append(int(start))

        run(scheduler, note)
        outputs[costs] = {name: max(lengths) for name, lengths in tokens.items()}
    assert outputs[SWAP] == outputs[RECOMPUTE] == {"first": 16, "last": 16}


# -------------------------------------------------------------------- swap or recompute


def test_a_swap_moves_blocks_out_and_in() -> None:
    scheduler = two_that_outgrow(SWAP)
    moves = []
    run(scheduler, lambda plan: moves.extend(plan.swaps))
    assert [(move.source, move.destination) for move in moves] == [
        ("device", "host"),
        ("host", "device"),
    ]
    assert len(moves[0]) == len(moves[1]) > 0
    stats = scheduler.stats()
    assert (stats.total_preempted_by_swap, stats.total_preempted_by_recompute) == (1, 0)
    assert stats.total_tokens == 2 * 16


def test_recompute_samples_no_token_twice() -> None:
    scheduler = make(num_blocks=6, prefix_cache=False, costs=RECOMPUTE)
    scheduler.submit(request("first", 4, new=13))
    scheduler.submit(request("last", 4, new=13))
    chosen = []
    run(scheduler, lambda plan: chosen.append(int(plan.needs_logits.sum())))
    assert sum(chosen) == 2 * 13
    stats = scheduler.stats()
    assert (stats.total_preempted_by_swap, stats.total_preempted_by_recompute) == (0, 1)
    assert stats.total_tokens > 2 * 16


def test_recompute_reuses_cached_blocks() -> None:
    scheduler = two_that_outgrow(RECOMPUTE)
    run(scheduler)
    assert scheduler.stats().total_reused_tokens > 0


def test_recompute_after_clear_prefix_cache_reuses_nothing() -> None:
    scheduler = two_that_outgrow(RECOMPUTE)
    step(scheduler)
    scheduler.clear_prefix_cache()
    run(scheduler)
    assert scheduler.stats().total_preempted_by_recompute > 0
    assert scheduler.stats().total_reused_tokens == 0


def test_a_full_host_pool_leads_to_recompute() -> None:
    scheduler = two_that_outgrow(SWAP, num_host_blocks=1)
    run(scheduler)
    stats = scheduler.stats()
    assert (stats.total_preempted_by_swap, stats.total_preempted_by_recompute) == (0, 1)


@pytest.mark.parametrize(("per_block", "swaps"), [(9.0, 1), (11.0, 0)])
def test_the_cheaper_way_is_taken(per_block: float, swaps: int) -> None:
    # The preempted request holds three blocks with eleven or twelve tokens.
    costs = PreemptionCosts(
        seconds_per_token=5.0, seconds_per_token_squared=0.0, seconds_per_block=per_block
    )
    scheduler = two_that_outgrow(costs)
    until_preempted(scheduler)
    assert scheduler.stats().total_preempted_by_swap == swaps


def test_the_cost_model_follows_its_formula() -> None:
    costs = PreemptionCosts(
        seconds_per_token=2.0, seconds_per_token_squared=0.5, seconds_per_block=3.0
    )
    assert costs.swap_s(4) == 24.0
    assert costs.recompute_s(10, 10) == 20.0 + 50.0
    assert costs.recompute_s(10, 5) == 20.0 + 25.0  # two sequences of five tokens attend to less
    assert RECOMPUTE.swap_s(0) == 0.0
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="seconds_per_block"):
            PreemptionCosts(seconds_per_block=bad)


# -------------------------------------------------------------------- resuming


@WAYS
def test_preempted_requests_resume_before_waiting_ones_start(costs: PreemptionCosts) -> None:
    scheduler = two_that_outgrow(costs)
    until_preempted(scheduler)
    scheduler.submit(request("new", 1, new=2))
    begun: list[object] = []
    run(scheduler, lambda plan: begun.extend(plan.request_ids))
    assert begun.index("last") < begun.index("new")


@WAYS
def test_a_resumed_request_is_not_preempted_at_once(costs: PreemptionCosts) -> None:
    scheduler = make(num_blocks=40, num_host_blocks=100, costs=costs, watermark=0.05)
    for name in range(12):
        scheduler.submit(request(name, 8, new=40))
    ended = run(scheduler)
    assert len(ended) == 12
    stats = scheduler.stats()
    preempted = stats.total_preempted_by_swap + stats.total_preempted_by_recompute
    # A request that resumed too early would be preempted at every step: hundreds of times.
    assert 0 < preempted <= 24


@WAYS
def test_sequences_of_a_request_resume_together_and_share_blocks(
    costs: PreemptionCosts,
) -> None:
    scheduler = make(num_blocks=12, num_host_blocks=12, costs=costs)
    scheduler.submit(request("first", 4, new=25))
    scheduler.submit(request("rows", 10, new=9, n=3))
    plan = scheduler.plan()
    assert plan is not None
    complete(scheduler, plan, times=3) if len(plan) == 1 else scheduler.complete(
        plan, [0, 1, 1, 1], [7, 1, 2, 3]
    )
    until_preempted(scheduler)
    shared = []

    def note(plan: StepPlan) -> None:
        at = [row for row, name in enumerate(plan.request_ids) if name == "rows"]
        assert len(at) in (0, 1, 2, 3)
        if len(at) == 3:
            shared.append(plan.block_tables[at, :2])

    ended = run(scheduler, note)
    assert set(ended) == {"first", "rows"}
    assert shared
    for tables in shared:
        assert np.array_equal(tables[0], tables[1])
        assert np.array_equal(tables[0], tables[2])


def test_recomputed_sequences_compute_their_common_prefix_once() -> None:
    scheduler = make(num_blocks=12, prefix_cache=False, costs=RECOMPUTE)
    scheduler.submit(request("first", 4, new=25))
    scheduler.submit(request("rows", 10, new=9, n=3))
    plan = scheduler.plan()
    assert plan is not None
    scheduler.complete(plan, [0, 1, 1, 1], [7, 1, 2, 3])
    until_preempted(scheduler)
    again: list[int] = []
    found: list[int] = []

    def note(plan: StepPlan) -> None:
        mine = [row for row, name in enumerate(plan.request_ids) if name == "rows"]
        chunk = [int(plan.num_scheduled[row]) for row in mine if not plan.needs_logits[row]]
        again.extend(chunk)
        found.extend(mine)

    run(scheduler, note)
    length = again[0]  # the first sequence computes all its known tokens
    assert sum(again) == length + 2 * (length - 8)  # the others share two full blocks


def test_a_sequence_waits_for_its_whole_common_prefix() -> None:
    """The third sequence shares more with the second than with the first.

    The first computes the prefix of both.
    """
    scheduler = make(num_blocks=14, prefix_cache=False, costs=RECOMPUTE)
    scheduler.submit(request("first", 4, new=50))
    scheduler.submit(request("rows", 8, new=14, n=3))
    plan = scheduler.plan()
    assert plan is not None
    scheduler.complete(plan, [0, 1, 1], [7, 1, 2])
    plan = scheduler.plan()
    assert plan is not None
    scheduler.complete(plan, [0, 1, 2, 2], [7, 3, 4, 5])
    until_preempted(scheduler)
    starts: list[list[int]] = []

    def note(plan: StepPlan) -> None:
        mine = [row for row, name in enumerate(plan.request_ids) if name == "rows"]
        chunks = [int(plan.num_computed[row]) for row in mine if not plan.needs_logits[row]]
        starts.extend([chunks] if chunks else [])

    assert set(run(scheduler, note)) == {"first", "rows"}
    assert [0] in starts  # no row starts at token 8 while tokens 0 to 7 are computed
    assert all(0 not in chunks or chunks == [0] for chunks in starts)


def test_a_swapped_request_gives_up_shared_device_blocks() -> None:
    scheduler = make(num_blocks=16, num_host_blocks=16, costs=SWAP, watermark=0.25)
    scheduler.submit(request("first", 4, new=61))  # grows until it fills the pool
    scheduler.submit(Request(request_id="other", prompt=ids(32), max_new_tokens=12))
    step(scheduler)
    scheduler.submit(Request(request_id="last", prompt=ids(32), max_new_tokens=30))
    until_preempted(scheduler)
    assert scheduler.stats().total_preempted_by_swap == 1
    # "other" keeps the shared prompt on the device, and after its end "last" does.
    assert list(run(scheduler)) == ["other", "first", "last"]


def test_requests_swapped_by_an_aborted_step_are_recomputed() -> None:
    scheduler = two_that_outgrow(SWAP)
    plan = None
    while plan is None or not plan.swaps:
        plan = scheduler.plan()
        assert plan is not None
        if not plan.swaps:
            complete(scheduler, plan)
    assert scheduler.abort(plan) == ["first"]
    scheduler.check()
    assert scheduler.manager.stats().num_host_free == 8  # the moved blocks cannot be trusted
    assert run(scheduler) == {"first": Reason.FAILED, "last": Reason.FINISHED}


# -------------------------------------------------------------------- admission


def test_the_watermark_holds_back_requests_unless_none_runs() -> None:
    scheduler = make(num_blocks=10, watermark=0.5)
    scheduler.submit(request("a", 6 * BLOCK_SIZE, new=2))
    scheduler.submit(request("b", 1, new=2))
    assert rows(step(scheduler)) == {"a": 24}  # no other request runs
    assert rows(step(scheduler)) == {
        "a": 1
    }  # three blocks are available, but the watermark is five
    assert rows(step(scheduler)) == {"b": 1}


def test_cached_blocks_count_as_available() -> None:
    scheduler = make(num_blocks=10, watermark=0.3)
    scheduler.submit(request("old", 32, new=2))
    run(scheduler)
    assert scheduler.manager.num_free_blocks < 3
    scheduler.submit(request("a", 8, new=2))
    scheduler.submit(request("b", 8, new=2))
    assert rows(step(scheduler)) == {"a": 8, "b": 8}


def test_blocks_of_a_reused_prefix_are_not_available() -> None:
    scheduler = make(num_blocks=8, watermark=0.25)
    scheduler.submit(Request(request_id="old", prompt=ids(16), max_new_tokens=1))
    run(scheduler)
    scheduler.submit(request("a", 8, new=9))
    # Four blocks are cached, one is new.
    scheduler.submit(Request(request_id="b", prompt=ids(20), max_new_tokens=1))
    assert rows(step(scheduler)) == {
        "a": 8
    }  # the watermark is two blocks, so five of six are too many


def test_a_namespace_stays_below_its_quota() -> None:
    scheduler = make(num_blocks=20, num_host_blocks=4)
    scheduler.manager.quotas.set("acme", ceiling=5)
    with pytest.raises(ValueError, match="may need 6 blocks, but the quota of its namespace is 5"):
        scheduler.submit(request("too large", 4, new=18, namespace="acme"))
    for name in range(3):
        scheduler.submit(request(name, 4, new=14, namespace="acme"))
        scheduler.submit(request(f"other{name}", 4, new=14))
    most = []
    ended = run(scheduler, lambda _: most.append(scheduler.manager.quotas.used("acme")))
    assert set(ended.values()) == {Reason.FINISHED}
    assert len(ended) == 6
    assert max(most) == 5


def test_a_full_quota_delays_no_other_namespace() -> None:
    scheduler = make(num_blocks=40, max_num_seqs=8)
    scheduler.manager.quotas.set("acme", ceiling=6)
    for name in range(4):
        scheduler.submit(request(f"acme{name}", 4, new=16, namespace="acme"))
    for name in range(3):
        scheduler.submit(request(f"other{name}", 4, new=16))
    computed: dict[object, int] = {}

    def note(plan: StepPlan) -> None:
        for name, count in rows(plan).items():
            computed[name] = computed.get(name, 0) + count

    ended = run(scheduler, note)
    assert list(ended)[:4] == ["acme0", "other0", "other1", "other2"]
    assert set(ended.values()) == {Reason.FINISHED}
    assert [computed[f"other{name}"] for name in range(3)] == [19] * 3  # nothing is recomputed
    assert scheduler.stats().total_preempted_by_recompute > 0  # requests of acme only


def test_swapped_requests_of_a_full_quota_resume() -> None:
    scheduler = make(num_blocks=40, num_host_blocks=40, costs=SWAP)
    scheduler.manager.quotas.set("acme", ceiling=6)
    prompt = ids(8)
    for name in range(3):
        scheduler.submit(
            Request(request_id=name, prompt=prompt, max_new_tokens=14, n=1, namespace="acme")
        )
    scheduler.submit(request("other", 4, new=60))
    ended = run(scheduler)
    assert set(ended.values()) == {Reason.FINISHED}
    assert scheduler.stats().total_preempted_by_swap > 0


def test_a_scheduler_waits_for_blocks_held_elsewhere() -> None:
    manager = BlockManager(6, BLOCK_SIZE)
    scheduler = Scheduler(manager, watermark=0.0)
    scheduler.submit(request("a", 8, new=9))
    step(scheduler)
    foreign = manager.allocate(4 * BLOCK_SIZE)
    assert scheduler.plan() is None
    assert (scheduler.num_running, scheduler.num_preempted) == (0, 1)
    manager.free(foreign)
    assert run(scheduler) == {"a": Reason.FINISHED}
