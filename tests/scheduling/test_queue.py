"""Scheduling policies: order, freedom from starvation, and waiting for shared prefixes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpager import Request, Scheduler, StepPlan
from kvpager.plans import Reason
from kvpager.scheduling.queue import Fair, Fifo, Priority, SchedulingPolicy
from kvpager.scheduling.request import RequestState
from tests.support.clock import Clock
from tests.support.scheduling import (
    BLOCK_SIZE,
    complete,
    ids,
    make,
    request,
    rows,
    run,
    step,
)


def begun(scheduler: Scheduler) -> list[object]:
    """Run until all requests have ended; return them in the order of their first step."""
    names: dict[object, None] = {}
    run(scheduler, lambda plan: names.update(dict.fromkeys(plan.request_ids)))
    return list(names)


def one_at_a_time(policy: str | SchedulingPolicy, **options: object) -> Scheduler:
    return make(policy=policy, max_num_seqs=1, **options)


# -------------------------------------------------------------------- the three policies


def test_fifo_serves_by_arrival() -> None:
    scheduler = one_at_a_time("fifo")
    for name in ("b", "a", "c"):
        scheduler.submit(request(name))
    assert begun(scheduler) == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("policy", "ignored", "fix"),
    [
        ("fifo", {"priority": 2}, 'policy="priority"'),
        ("fifo", {"tenant": "x"}, 'policy="fair"'),
        ("priority", {"tenant": "x"}, 'policy="fair"'),
        ("fair", {"priority": -1}, 'policy="priority"'),
    ],
)
def test_what_a_policy_ignores_is_refused(policy: str, ignored: dict[str, Any], fix: str) -> None:
    scheduler = one_at_a_time(policy)
    with pytest.raises(ValueError, match=rf"^{next(iter(ignored))}=.*ignores it\. .*{fix}\.$"):
        scheduler.submit(request("a", **ignored))
    assert not scheduler.has_work
    scheduler.submit(request("a", priority=np.int64(0), tenant=None))


def test_a_policy_of_ones_own_gets_tenants_and_priorities() -> None:
    class Last(SchedulingPolicy):
        def rank(self, state: RequestState) -> tuple[float, int]:
            return float(state.request.tenant == "x") - state.request.priority, state.arrival

    scheduler = one_at_a_time(Last())
    for name, tenant, priority in (("a", "x", 0), ("b", None, 0), ("c", None, 3)):
        scheduler.submit(request(name, tenant=tenant, priority=priority))
    assert begun(scheduler) == ["c", "b", "a"]


def test_fifo_lets_no_request_overtake_a_large_one() -> None:
    scheduler = make(num_blocks=8)
    scheduler.submit(request("a", 12, new=4))
    step(scheduler)
    scheduler.submit(request("large", 24, new=4))
    scheduler.submit(request("small", 1, new=1))
    assert begun(scheduler) == ["a", "large", "small"]


def test_priority_serves_lower_first_and_then_by_arrival() -> None:
    scheduler = one_at_a_time("priority", clock=Clock())
    for name, priority in (("a", 2), ("b", 0), ("c", 2), ("d", -1)):
        scheduler.submit(request(name, priority=priority))
    assert begun(scheduler) == ["d", "b", "a", "c"]


def test_waiting_improves_a_priority() -> None:
    clock = Clock()
    scheduler = one_at_a_time(Priority(ageing=10.0), clock=clock)
    scheduler.submit(request("old", priority=3))
    clock.now = 29.0
    scheduler.submit(request("before", priority=0))
    clock.now = 31.0
    scheduler.submit(request("after", priority=0))
    assert begun(scheduler) == ["before", "old", "after"]


def test_the_lowest_priority_is_preempted_first() -> None:
    scheduler = make(num_blocks=6, policy="priority", clock=Clock())
    scheduler.submit(request("low", 4, new=13, priority=5))
    scheduler.submit(request("high", 4, new=13, priority=0))
    assert list(run(scheduler)) == ["high", "low"]
    assert scheduler.stats().total_preempted_by_recompute == 1


def test_fair_serves_tenants_in_turn() -> None:
    scheduler = one_at_a_time(Fair(ageing=0.0))
    for name in ("a1", "a2", "a3", "b1", "b2"):
        scheduler.submit(request(name, 4, new=3, tenant=name[0]))
    assert begun(scheduler) == ["a1", "b1", "a2", "b2", "a3"]


def test_fair_counts_tokens_rather_than_requests() -> None:
    scheduler = one_at_a_time(Fair(ageing=0.0))
    for number in range(4):
        scheduler.submit(request(f"short{number}", 4, new=2, tenant="a"))
    for number in range(2):
        scheduler.submit(request(f"long{number}", 16, new=3, tenant="b"))
    # A short request costs 4 + 2 * 1 tokens of service, a long one 16 + 2 * 2.
    assert begun(scheduler) == ["short0", "long0", "short1", "short2", "short3", "long1"]


def test_fair_weights_decoded_tokens() -> None:
    policy = Fair(decode_weight=5.0, ageing=0.0)
    scheduler = make(policy=policy)
    scheduler.submit(request("a", 6, new=4, tenant="x"))
    run(scheduler)
    assert policy.service["x"] == 6 + 5.0 * 3


def test_fair_charges_neither_cached_nor_recomputed_tokens() -> None:
    policy = Fair(ageing=0.0)
    scheduler = make(num_blocks=6, policy=policy, prefix_cache=False)
    for name in "ab":
        scheduler.submit(request(name, 4, new=13, tenant=name))
    run(scheduler)
    assert scheduler.stats().total_preempted_by_recompute == 1
    assert policy.service == {"a": 4 + 24.0, "b": 4 + 24.0}
    policy = Fair(ageing=0.0)
    scheduler = make(policy=policy)
    for name in "ab":
        scheduler.submit(Request(request_id=name, prompt=ids(8), max_new_tokens=1, tenant=name))
        run(scheduler)
    assert policy.service["a"] == 8
    assert policy.service["b"] == 8 + 1  # starts with the service of "a", and computes one token


def test_an_idle_tenant_collects_no_credit() -> None:
    policy = Fair(ageing=0.0)
    scheduler = one_at_a_time(policy)
    for number in range(20):
        scheduler.submit(request(f"a{number}", 4, new=3, tenant="a"))
    for _ in range(30):
        step(scheduler)
    for number in range(5):
        scheduler.submit(request(f"b{number}", 4, new=3, tenant="b"))
    assert policy.service["b"] == policy.service["a"] > 50
    late = begun(scheduler)
    places = [late.index(f"b{number}") for number in range(5)]
    assert max(np.diff(places)) <= 2  # tenants alternate
    assert min(np.diff(places)) >= 2


@pytest.mark.parametrize("num_tenants", [2, 5])
def test_busy_tenants_get_equal_service(num_tenants: int) -> None:
    policy = Fair(ageing=0.0)
    scheduler = make(num_blocks=400, policy=policy, max_num_seqs=4, max_batch_tokens=64)
    for tenant in range(num_tenants):
        for number in range(60):
            length, new = 4 + 6 * tenant, 3 + 3 * tenant
            scheduler.submit(request((tenant, number), length, new=new, tenant=str(tenant)))
    while min(Counter(name[0] for name in scheduler.request_ids).values()) > 10:
        step(scheduler)
    service = list(policy.service.values())
    # The bound of VTC: the service of all requests that may run at a time.
    most = 4 * (4 + 6 * num_tenants + 2 * (3 + 3 * num_tenants))
    assert max(service) - min(service) <= most
    assert min(service) > most


def test_idle_tenants_are_forgotten() -> None:
    policy = Fair()
    scheduler = make(policy=policy)
    for number in range(500):
        scheduler.submit(request(number, 2, new=1, tenant=str(number)))
        run(scheduler)
    assert len(policy.service) < 100


def test_a_custom_policy_ranks_requests() -> None:
    class ShortestFirst(Fifo):
        def rank(self, live):  # type: ignore[no-untyped-def]
            return float(len(live.prompt)), live.arrival

    scheduler = one_at_a_time(ShortestFirst())
    for length in (9, 3, 6):
        scheduler.submit(request(length, length))
    assert begun(scheduler) == [3, 6, 9]


def test_a_policy_serves_one_scheduler() -> None:
    policy = Fifo()
    make(policy=policy).submit(request("a"))
    with pytest.raises(ValueError, match="Give each scheduler its own policy"):
        make(policy=policy)
    with pytest.raises(TypeError, match="a name or a SchedulingPolicy"):
        make(policy=3)
    with pytest.raises(ValueError, match="ageing=0"):
        Priority(ageing=0.0)


# -------------------------------------------------------------------- starvation


def ranked(policy: str, tenant: str, priority: int) -> dict[str, Any]:
    """Return the field that the policy ranks by, as an argument of `request`."""
    fields: dict[str, dict[str, Any]] = {
        "fifo": {}, "fair": {"tenant": tenant}, "priority": {"priority": priority},
    }  # fmt: skip
    return fields[policy]


def flood(policy: str) -> Iterator[Request]:
    """Yield requests without end that the policy prefers to all others."""
    number = 0
    while True:
        number += 1
        yield request(f"f{number}", 5, new=6, **ranked(policy, f"new{number}", -5))


@pytest.mark.slow
@settings(max_examples=25)
@given(
    policy=st.sampled_from(["fifo", "priority", "fair"]),
    num_blocks=st.integers(8, 40),
    num_host_blocks=st.sampled_from([0, 10]),
    max_num_seqs=st.integers(1, 6),
    each=st.integers(1, 3),
    chunked=st.booleans(),
    watermark=st.sampled_from([0.0, 0.1]),
)
def test_no_request_starves(
    policy: str,
    num_blocks: int,
    num_host_blocks: int,
    max_num_seqs: int,
    each: int,
    chunked: bool,
    watermark: float,
) -> None:
    clock = Clock()
    scheduler = make(
        num_blocks,
        num_host_blocks,
        policy=policy,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=16,
        chunked=chunked,
        watermark=watermark,
        clock=clock,
    )
    if policy == "fair":  # "me" has much service, and new tenants have none
        scheduler.submit(request("before", 20, new=8, tenant="me"))
    scheduler.submit(request("mine", 17, new=12, **ranked(policy, "me", 5)))
    others = flood(policy)
    for _ in range(1500):
        clock.now += 1.0
        if scheduler.num_waiting < 50:
            for _ in range(each):
                scheduler.submit(next(others))
        plan = scheduler.plan()
        assert plan is not None
        if ("mine", Reason.FINISHED) in plan.ended:
            return
        if len(plan):
            complete(scheduler, plan)
    raise AssertionError(f"still waiting: {scheduler.stats()}")


# -------------------------------------------------------------------- shared prefixes


def computed(scheduler: Scheduler) -> tuple[int, list[StepPlan]]:
    plans: list[StepPlan] = []
    run(scheduler, plans.append)
    return scheduler.stats().total_tokens, plans


def test_a_shared_prefix_is_computed_once() -> None:
    scheduler = make(max_batch_tokens=64)
    for name in range(5):
        prompt = [*range(16), 100 + name]
        scheduler.submit(Request(request_id=name, prompt=prompt, max_new_tokens=1))
    total, plans = computed(scheduler)
    assert total == 17 + 4
    assert [len(plan) for plan in plans[:2]] == [1, 4]


def test_a_started_request_drops_its_reference_to_another() -> None:
    scheduler = make(max_batch_tokens=64)
    for name in "ab":
        scheduler.submit(Request(request_id=name, prompt=ids(17), max_new_tokens=3))
    step(scheduler)
    waits = scheduler._table.live["b"]
    assert waits.waits_for is scheduler._table.live["a"]
    step(scheduler)
    assert waits.waits_for is None  # otherwise requests would keep each other alive in a chain


def test_requests_overtake_one_that_waits_for_a_prefix() -> None:
    scheduler = make(max_batch_tokens=8)
    scheduler.submit(Request(request_id="leader", prompt=ids(16), max_new_tokens=1))
    step(scheduler)
    scheduler.submit(Request(request_id="waits", prompt=[*range(16), 99], max_new_tokens=1))
    scheduler.submit(request("passes", 4))
    scheduler.max_batch_tokens = 16
    assert rows(step(scheduler)) == {"leader": 8, "passes": 4}
    assert rows(step(scheduler)) == {"passes": 1, "waits": 1}


def test_less_than_a_common_block_is_not_waited_for() -> None:
    scheduler = make(max_batch_tokens=64)
    scheduler.submit(Request(request_id="a", prompt=[1, 2, 3, 4, 5, 6, 7, 8], max_new_tokens=1))
    scheduler.submit(Request(request_id="b", prompt=[1, 2, 3, 9, 9, 9, 9, 9], max_new_tokens=1))
    assert rows(step(scheduler)) == {"a": 8, "b": 8}


@pytest.mark.parametrize("other", [{"namespace": "x"}, {"lora": "x"}])
def test_prefixes_of_other_namespaces_are_not_waited_for(other: dict[str, str]) -> None:
    scheduler = make(max_batch_tokens=64)
    scheduler.submit(Request(request_id="a", prompt=ids(8), max_new_tokens=1))
    scheduler.submit(Request(request_id="b", prompt=ids(8), max_new_tokens=1, **other))
    assert rows(step(scheduler)) == {"a": 8, "b": 8}


def test_a_cached_prefix_is_not_waited_for() -> None:
    scheduler = make(max_batch_tokens=64)
    scheduler.submit(Request(request_id="old", prompt=ids(9), max_new_tokens=1))
    run(scheduler)
    for name in "ab":
        tail = [50 + ord(name)] * 5
        scheduler.submit(Request(request_id=name, prompt=[*range(8), *tail], max_new_tokens=1))
    assert rows(step(scheduler)) == {"a": 5, "b": 5}


def test_a_cancelled_request_is_not_waited_for() -> None:
    scheduler = make(max_batch_tokens=8)
    scheduler.submit(Request(request_id="leader", prompt=ids(40), max_new_tokens=1))
    scheduler.submit(Request(request_id="waits", prompt=ids(40), max_new_tokens=1))
    assert rows(step(scheduler)) == {"leader": 8}
    scheduler.cancel("leader")
    plan = step(scheduler)
    assert (rows(plan), plan.num_computed.tolist()) == ({"waits": 8}, [8])


def test_a_request_waits_for_one_prefix_at_most() -> None:
    """Later requests share ever longer prefixes with it and are served before it."""
    scheduler = make(num_blocks=200, max_batch_tokens=12, policy="priority", clock=Clock())
    scheduler.submit(Request(request_id=0, prompt=ids(16), max_new_tokens=3))
    step(scheduler)
    scheduler.submit(Request(request_id="waits", prompt=ids(100), max_new_tokens=1, priority=5))
    seen: list[object] = []
    for number in range(1, 5):
        prompt = [*range(16 * (number + 1)), 9000 + number]
        leader = Request(request_id=number, prompt=prompt, max_new_tokens=3, priority=-number)
        scheduler.submit(leader)
        while number not in seen:
            seen.extend(name for name in step(scheduler).request_ids if name not in seen)
    assert seen.index("waits") < seen.index(2)


def test_a_plan_skips_a_bounded_number_of_requests() -> None:
    """At most 32 requests that wait for a prefix are skipped."""
    scheduler = make(num_blocks=2000, max_batch_tokens=BLOCK_SIZE)
    for name in range(1000):
        scheduler.submit(Request(request_id=name, prompt=ids(40), max_new_tokens=1))
    step(scheduler)
    calls = 0
    must_wait = scheduler._admission._must_wait_for_prefix

    def counted(live):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        return must_wait(live)

    scheduler._admission._must_wait_for_prefix = counted  # type: ignore[method-assign]
    step(scheduler)
    assert calls <= 33


def test_fair_ranks_each_tenant_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = [0]
    rank = Fair.rank

    def counted(self: Fair, live: RequestState) -> tuple[float, int]:
        looked[0] += 1
        return rank(self, live)

    monkeypatch.setattr(Fair, "rank", counted)
    scheduler = make(num_blocks=400, max_num_seqs=64, max_batch_tokens=4096, policy="fair")
    for number in range(200):
        scheduler.submit(request(number, 4, new=2, tenant=f"t{number}"))
    looked[0] = 0
    plan = scheduler.plan()
    assert plan is not None
    assert len(plan) == 64
    assert looked[0] <= 200 + 4 * 64
