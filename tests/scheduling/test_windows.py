"""Schedulers over groups of layers: bounded blocks, chunked prompts, preemption."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import count

import numpy as np
import pytest

from kvpager import Scheduler, StepPlan
from kvpager.blocks.groups.manager import GroupedManager
from tests.support.scheduling import request

SIZE, WINDOW, CHUNK = 16, 1024, 2048


def make(num_blocks: int, windows: tuple[int | None, ...], **options: object) -> Scheduler:
    manager = GroupedManager(windows, num_blocks, SIZE, max_chunk=CHUNK)
    return Scheduler(manager, max_batch_tokens=CHUNK, **{"watermark": 0.0, **options})  # type: ignore[arg-type]


def serve(
    scheduler: Scheduler,
    look: Callable[[StepPlan], None] = lambda plan: None,
    samples: int = 1,
) -> None:
    """Serve all requests to their end, each with `samples` samples."""
    has_begun: set[object] = set()
    for number in count():
        plan = scheduler.plan()
        if plan is None:
            break
        look(plan)
        rows = plan.needs_logits.nonzero()[0]
        begins = [plan.request_ids[row] not in has_begun for row in rows]
        has_begun.update(plan.request_ids[row] for row in rows)
        parents = np.repeat(rows, np.where(begins, samples, 1)) if len(rows) else rows
        if len(plan):
            scheduler.complete(plan, parents, 7 + np.arange(len(parents)) % 50)
        if number % 16 == 0:
            scheduler.check()
    assert not scheduler.has_work
    scheduler.check()


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("windows", [(WINDOW,), (None, WINDOW)])
def test_a_windowed_group_holds_its_window_plus_two_blocks(
    windows: tuple[int | None, ...], prefix_cache: bool
) -> None:
    scheduler = make(2000, windows, prefix_cache=prefix_cache)
    scheduler.submit(request("a", 8192, new=100))
    decoding, prompt = [], []

    def look(plan: StepPlan) -> None:
        for row in range(len(plan)):
            held = int(np.count_nonzero(plan.groups[-1].block_tables[row] >= 0))
            (decoding if plan.num_scheduled[row] == 1 else prompt).append(held)

    serve(scheduler, look)
    assert len(decoding) == 99
    assert max(decoding) <= WINDOW // SIZE + 2
    assert max(prompt) <= (WINDOW + CHUNK) // SIZE + 1
    assert scheduler.manager.num_held_blocks == 0


def test_a_windowed_prompt_may_exceed_the_pool() -> None:
    need = (WINDOW + CHUNK) // SIZE + 1
    scheduler = make(need, (WINDOW,))
    assert 10 * need < 50_000 // SIZE
    scheduler.submit(request("a", 50_000, new=20))
    serve(scheduler)
    with pytest.raises(ValueError, match=rf"may need {need} blocks, but the pool has {need - 1}"):
        make(need - 1, (WINDOW,)).submit(request("a", 50_000, new=20))


def test_submit_counts_the_blocks_of_all_groups() -> None:
    scheduler = make(100, (None, None, WINDOW))
    with pytest.raises(ValueError, match="may need 150 blocks, but the pool has 100"):
        scheduler.submit(request("a", 700, new=101))


def test_a_prefix_longer_than_the_window_is_reused() -> None:
    scheduler = make(2000, (None, WINDOW))
    prompt = np.arange(8192, dtype=np.int32)
    scheduler.submit(request("a", prompt=prompt, new=2))
    serve(scheduler)
    scheduler.submit(request("b", prompt=np.append(prompt, [1, 2, 3]), new=2))
    counts: list[int] = []
    serve(scheduler, lambda plan: counts.extend(plan.num_scheduled.tolist()))
    assert counts == [3, 1]


def test_prompts_that_outgrow_the_pool_are_all_served() -> None:
    size = (WINDOW + CHUNK) // SIZE + 1
    scheduler = make(size + 40, (WINDOW,))
    for name in "abcd":
        scheduler.submit(request(name, 6000, new=30))
    ended: list[object] = []
    serve(scheduler, lambda plan: ended.extend(plan.ended))
    assert sorted(str(name) for name, _ in ended) == list("abcd")  # type: ignore[misc]
    assert scheduler.manager.num_held_blocks == 0


def test_recomputed_samples_have_windows_of_their_own() -> None:
    scheduler = make(140, (None, 64), max_num_seqs=8)
    chosen = Counter[object]()
    for name in "abcd":
        scheduler.submit(request(name, 200, new=300, n=2))

    def look(plan: StepPlan) -> None:
        chosen.update(
            name for name, wants in zip(plan.request_ids, plan.needs_logits, strict=True) if wants
        )

    serve(scheduler, look, samples=2)
    assert scheduler.stats().total_preempted_by_recompute > 0
    # The first token of both samples is chosen from one row.
    assert chosen == dict.fromkeys("abcd", 2 * 300 - 1)
    assert scheduler.manager.num_held_blocks == 0
