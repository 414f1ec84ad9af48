"""Pinned blocks: a request that cannot run beside them is refused, and every other one ends."""

from __future__ import annotations

import math
import random

import pytest

from kvpager import BlockManager, Scheduler
from kvpager.blocks.groups.manager import GroupedManager
from kvpager.plans import Reason
from kvpager.scheduling.preemption import PreemptionCosts
from tests.support.scheduling import BLOCK_SIZE, complete, ids, make, request, step

SWAP, RECOMPUTE = PreemptionCosts(seconds_per_block=0.0), PreemptionCosts(seconds_per_block=9.0)


def pin(scheduler: Scheduler, prompt: object, **key: str | None) -> int:
    """Pin the cached blocks of a prompt; return the ticket."""
    manager = scheduler.manager
    assert isinstance(manager, BlockManager)
    found = manager.match_prefix(prompt, blocks=True, **key)  # type: ignore[arg-type]
    return manager.cached.hold(found.whole(BLOCK_SIZE))


def release(scheduler: Scheduler, ticket: int) -> None:
    manager = scheduler.manager
    assert isinstance(manager, BlockManager)
    manager.cached.release(ticket)


def run(scheduler: Scheduler, steps_max: int = 2_000) -> dict[object, Reason]:
    """Run to the end; return the reason of each request.

    A plan may be None after a request was dropped, so that it begins again. The next one is not.
    """
    ended: dict[object, Reason] = {}
    is_idle = False
    for _ in range(steps_max):
        if not scheduler.has_work:
            return ended
        plan = scheduler.plan()
        assert plan is not None or not is_idle, "no request can run"
        is_idle = plan is None
        if plan is not None:
            ended |= dict(plan.ended)
            if len(plan):
                complete(scheduler, plan)
    raise AssertionError(f"after {steps_max} steps there are still {scheduler.request_ids}")


def with_a_pin(num_blocks: int = 16, length: int = 24, **options: object) -> tuple[Scheduler, int]:
    """Return a scheduler of which a prompt of `length` tokens is pinned, and its ticket."""
    scheduler = make(num_blocks, **options)  # type: ignore[arg-type]
    scheduler.submit(request("pinned", prompt=ids(length), new=1))
    run(scheduler)
    return scheduler, pin(scheduler, ids(length))


def test_a_request_that_does_not_fit_beside_pinned_blocks_is_refused() -> None:
    scheduler, ticket = with_a_pin()  # 6 of 16 blocks
    text = r"may need 11 blocks, but the pool has 16, 6 of them retained for other prompts"
    with pytest.raises(ValueError, match=text):
        scheduler.submit(request("a", 41, new=1))
    scheduler.submit(request("b", 40, new=1))
    assert run(scheduler) == {"b": Reason.FINISHED}
    release(scheduler, ticket)
    scheduler.submit(request("a", 41, new=1))
    assert run(scheduler) == {"a": Reason.FINISHED}


def test_a_request_that_shares_the_pinned_blocks_is_accepted() -> None:
    scheduler, _ = with_a_pin()
    with pytest.raises(ValueError, match="may need 17 blocks"):
        scheduler.submit(request("a", prompt=ids(62), new=6))
    scheduler.submit(request("a", prompt=ids(62), new=3))
    assert run(scheduler) == {"a": Reason.FINISHED}


def test_the_last_token_of_a_prompt_shares_no_pinned_block() -> None:
    scheduler, _ = with_a_pin(length=24)
    with pytest.raises(ValueError, match="1 of them retained for other prompts"):
        scheduler.submit(request("a", prompt=ids(24), new=4 * 16 - 24 + 1))
    scheduler.submit(request("a", prompt=ids(24), new=4 * 15 - 24 + 1))
    assert run(scheduler) == {"a": Reason.FINISHED}


@pytest.mark.parametrize("costs", [SWAP, RECOMPUTE], ids=["swap", "recompute"])
def test_a_request_with_copies_of_pinned_blocks_ends(costs: PreemptionCosts) -> None:
    """It computed the prefix itself, so it must begin again to share the pinned one."""
    scheduler = make(24, 24, costs=costs, max_batch_tokens=64, policy="priority")
    prefix = ids(16)
    for name in ("a", "b"):  # neither finds the prefix of the other
        scheduler.submit(request(name, prompt=[*prefix, *ids(4, 100 * ord(name))], new=40))
    step(scheduler)
    ticket = pin(scheduler, prefix)
    scheduler.refuse_starvation()
    scheduler.submit(request("c", 20, new=60, priority=9))  # they make way for it
    assert set(run(scheduler).values()) == {Reason.FINISHED}
    release(scheduler, ticket)
    assert scheduler.manager.stats().num_kept == 0


def test_a_swapped_request_begins_again_to_share_pinned_blocks() -> None:
    scheduler = make(16, 16, costs=SWAP, policy="priority")
    scheduler.submit(request("a", prompt=ids(32), new=28))
    for _ in range(8):
        step(scheduler)
    scheduler.submit(request("first", 20, new=16, priority=-9))
    while scheduler.stats().total_preempted_by_swap == 0:
        step(scheduler)
    scheduler.cancel("first")
    ticket = pin(scheduler, ids(32))  # 8 blocks; its own 10 are in host memory
    scheduler.refuse_starvation()
    assert run(scheduler) == {"first": Reason.CANCELLED, "a": Reason.FINISHED}
    release(scheduler, ticket)


def test_pins_that_would_starve_a_live_request_are_noticed() -> None:
    scheduler, ticket = with_a_pin()
    release(scheduler, ticket)
    scheduler.submit(request("big", 50, new=4))
    ticket = pin(scheduler, ids(24))
    with pytest.raises(ValueError, match=r"'big'.* may need 14 blocks, .* 6 of them retained"):
        scheduler.refuse_starvation()
    release(scheduler, ticket)
    scheduler.refuse_starvation()
    assert run(scheduler) == {"big": Reason.FINISHED}


def test_pinned_blocks_count_in_the_quota_of_their_namespace() -> None:
    scheduler = make(64)
    scheduler.manager.quotas.set("acme", ceiling=10)
    scheduler.submit(request("pinned", prompt=ids(24), new=1, namespace="acme"))
    run(scheduler)
    ticket = pin(scheduler, ids(24), namespace="acme")
    text = "the quota of its namespace is 10, 6 of them retained for other prompts"
    with pytest.raises(ValueError, match=text):
        scheduler.submit(request("a", 17, new=1, namespace="acme"))
    scheduler.submit(request("a", 16, new=1, namespace="acme"))
    scheduler.submit(request("b", prompt=ids(37), new=4, namespace="acme"))
    scheduler.submit(request("c", 17, new=1, namespace="other"))
    assert set(run(scheduler).values()) == {Reason.FINISHED}
    release(scheduler, ticket)


def test_blocks_that_floors_reserve_are_no_room_for_others() -> None:
    scheduler = make(16)
    manager = scheduler.manager
    assert isinstance(manager, BlockManager)
    manager.quotas.set("acme", floor=6)
    with pytest.raises(ValueError, match="16, 6 of them reserved for other namespaces"):
        scheduler.submit(request("a", 41, new=1))
    scheduler.submit(request("a", 40, new=1))
    scheduler.submit(request("b", 61, new=1, namespace="acme"))
    assert set(run(scheduler).values()) == {Reason.FINISHED}


def random_scheduler(source: random.Random, kind: str) -> Scheduler:
    num_blocks, num_host_blocks = source.choice([16, 24]), source.choice([0, 6, 40])
    manager: BlockManager | GroupedManager
    if kind == "groups":
        manager = GroupedManager((None, 8), 2 * num_blocks, BLOCK_SIZE, num_host_blocks)
    else:
        manager = BlockManager(num_blocks, BLOCK_SIZE, num_host_blocks)
    return Scheduler(
        manager,
        costs=PreemptionCosts(seconds_per_block=source.choice([0.0, math.inf])),
        policy=source.choice(["fifo", "priority"]),
        max_batch_tokens=source.choice([8, 64]),
        watermark=source.choice([0.0, 0.1]),
    )


@pytest.mark.mostly_slow(quick=6)
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kind", ["blocks", "groups"])
def test_random_requests_beside_random_pins_all_end(kind: str, seed: int) -> None:
    source = random.Random(seed)
    scheduler = random_scheduler(source, kind)
    if source.random() < 0.5:
        scheduler.manager.quotas.set("a", ceiling=source.randint(8, 14))
    tickets, accepted, ended = list[int](), set[int](), dict[object, Reason]()
    num_idle = 0

    def some_prompt() -> list[int]:
        prefix = ids(source.choice([8, 12, 20, 28]))
        return [*prefix[: source.randint(0, len(prefix))], *ids(source.randint(1, 9), 50)]

    for number in range(300):
        key = {"namespace": source.choice(["a", None])}
        if len(accepted) < 40 and source.random() < 0.3:
            asked = request(
                number, prompt=some_prompt(), new=source.randint(1, 24),
                n=source.choice([1, 1, 2, 3]), priority=0, **key,
            )  # fmt: skip
            try:
                scheduler.submit(asked)
                accepted.add(number)
            except ValueError as error:
                assert "may need" in str(error)  # noqa: PT017
        if source.random() < 0.2:
            ticket = pin(scheduler, some_prompt(), **key)
            try:
                scheduler.refuse_starvation()
                tickets.append(ticket)
            except ValueError:
                release(scheduler, ticket)
        if tickets and source.random() < 0.05:
            release(scheduler, tickets.pop(source.randrange(len(tickets))))
        if scheduler.has_work:
            plan = scheduler.plan()
            num_idle = num_idle + 1 if plan is None else 0
            assert num_idle < 2, "no request can run"
            if plan is None:
                continue
            ended |= dict(plan.ended)
            if len(plan):
                rows = plan.needs_logits.nonzero()[0]
                scheduler.complete(plan, rows, [source.randint(0, 3) for _ in rows])
                scheduler.check()
    ended |= run(scheduler, steps_max=5_000)
    assert set(ended) == accepted
    assert set(ended.values()) <= {Reason.FINISHED}
    for ticket in tickets:
        release(scheduler, ticket)
    assert scheduler.manager.stats().num_kept == 0
