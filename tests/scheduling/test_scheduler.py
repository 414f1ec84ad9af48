"""The scheduler: the plan of a step, and how sequences continue."""

from __future__ import annotations

import numpy as np
import pytest

from kvpager import (
    Request,
    StepPlan,
)
from kvpager.plans import EndFetch, Reason
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

# -------------------------------------------------------------------- plans


def test_a_step_computes_a_prompt_and_then_one_token() -> None:
    scheduler = make()
    scheduler.submit(Request(request_id="a", prompt=ids(6), max_new_tokens=3))
    first = step(scheduler)
    assert first.request_ids == ["a"]
    assert (first.num_computed.tolist(), first.num_scheduled.tolist(), first.seq_lens.tolist()) == (
        [0],
        [6],
        [6],
    )
    assert first.token_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert first.needs_logits.tolist() == [True]
    second = step(scheduler)
    assert (second.num_computed.tolist(), second.num_scheduled.tolist()) == ([6], [1])
    assert second.token_ids.tolist() == [7]
    assert second.block_tables.shape == (1, 2)
    assert second.seq_ids.tolist() == first.seq_ids.tolist()
    third = step(scheduler)
    assert third.token_ids.tolist() == [7]
    last = scheduler.plan()
    assert last is not None
    assert (len(last), last.ended, last.freed.tolist()) == (0, [("a", Reason.FINISHED)], [0])
    assert not scheduler.has_work
    assert scheduler.plan() is None
    assert scheduler.manager.num_held_blocks == 0


def test_plan_arrays_have_the_documented_dtypes() -> None:
    scheduler = make()
    scheduler.submit(request("a"))
    plan = step(scheduler)
    for name in (
        "copies",
        "seq_ids",
        "num_computed",
        "num_scheduled",
        "token_ids",
        "seq_lens",
        "block_tables",
        "freed",
    ):
        assert getattr(plan, name).dtype == np.int32, name
    assert plan.slot_mapping.dtype == np.int64
    assert plan.needs_logits.dtype == np.bool_
    assert plan.copies.shape == (0, 2)
    ended = scheduler.cancel("a") and scheduler.plan()
    assert isinstance(ended, StepPlan)
    assert ended.block_tables.shape[0] == 0
    assert ended.slot_mapping.dtype == np.int64


def test_the_slot_mapping_follows_the_block_tables() -> None:
    scheduler = make()
    scheduler.submit(request("a", 9))
    scheduler.submit(request("b", 2))
    for _ in range(3):
        plan = step(scheduler)
        expected = [
            int(plan.block_tables[row, at // BLOCK_SIZE]) * BLOCK_SIZE + at % BLOCK_SIZE
            for row in range(len(plan))
            for at in range(plan.num_computed[row], plan.seq_lens[row])
        ]
        assert plan.slot_mapping.tolist() == expected


def test_decoding_rows_come_before_prompts() -> None:
    scheduler = make(max_batch_tokens=6)
    scheduler.submit(request("a", 2, new=9))
    step(scheduler)
    scheduler.submit(request("b", 4))
    scheduler.submit(request("c", 4))
    assert list(rows(step(scheduler)).items()) == [("a", 1), ("b", 4)]


def test_a_long_prompt_is_chunked_to_the_remaining_budget() -> None:
    scheduler = make(max_batch_tokens=10)
    scheduler.submit(request("a", 2, new=9))
    step(scheduler)
    scheduler.submit(request("b", 20))
    plans = [step(scheduler) for _ in range(4)]
    assert [rows(plan).get("b") for plan in plans] == [9, 9, 2, 1]
    assert [bool(plan.needs_logits[-1]) for plan in plans] == [False, False, True, True]
    assert plans[1].num_computed.tolist() == [3, 9]


def test_no_chunk_is_smaller_than_a_block() -> None:
    scheduler = make(max_batch_tokens=6)
    scheduler.submit(request("a", 1, new=3))
    scheduler.submit(request("b", 1, new=3))
    scheduler.submit(request("c", 1, new=3))
    step(scheduler)
    scheduler.submit(request("d", 20))  # the budget has room for three tokens
    assert "d" not in rows(step(scheduler))


def test_without_chunks_only_whole_prompts_are_computed() -> None:
    scheduler = make(max_batch_tokens=10, chunked=False)
    for name in "ab":
        scheduler.submit(request(name, 6, new=2))
    assert rows(step(scheduler)) == {"a": 6}
    assert rows(step(scheduler)) == {"a": 1, "b": 6}


def test_without_chunks_an_oversized_prompt_is_alone_in_its_step() -> None:
    scheduler = make(max_batch_tokens=10, chunked=False)
    scheduler.submit(request("a", 3, new=3))
    scheduler.submit(request("b", 25, new=2))
    scheduler.submit(request("c", 3, new=2))
    found = []
    run(scheduler, lambda plan: found.append(rows(plan)))
    assert {"b": 25} in found
    assert all(sum(each.values()) <= 10 for each in found if each != {"b": 25})


def test_at_most_max_num_seqs_sequences_run() -> None:
    scheduler = make(max_num_seqs=3)
    for name in range(7):
        scheduler.submit(request(name, new=3))
    most = []
    run(scheduler, lambda plan: most.append(len(plan)))
    assert max(most) == 3


def test_a_request_counts_with_its_n_sequences() -> None:
    scheduler = make(max_num_seqs=4)
    for name in "ab":
        scheduler.submit(request(name, new=2, n=3))
    assert rows(step(scheduler)) == {"a": 3}
    assert set(rows(step(scheduler))) == {"a"}


def test_a_cached_prefix_is_reused() -> None:
    scheduler = make()
    scheduler.submit(Request(request_id="a", prompt=ids(12), max_new_tokens=2))
    run(scheduler)
    scheduler.submit(Request(request_id="b", prompt=ids(15), max_new_tokens=2))
    plan = step(scheduler)
    assert (plan.num_computed.tolist(), plan.token_ids.tolist()) == ([12], [12, 13, 14])
    assert scheduler.stats().total_reused_tokens == 12


def test_generated_tokens_are_reused() -> None:
    scheduler = make()
    scheduler.submit(Request(request_id="a", prompt=ids(4), max_new_tokens=6))
    run(scheduler)
    scheduler.submit(
        Request(request_id="b", prompt=[0, 1, 2, 3, 7, 7, 7, 7, 7, 7], max_new_tokens=2)
    )
    plan = step(scheduler)
    assert plan.num_computed.tolist() == [8]


@pytest.mark.parametrize("other", [{"namespace": "x"}, {"lora": "x"}])
def test_prefixes_of_other_namespaces_and_loras_are_not_reused(other: dict[str, str]) -> None:
    scheduler = make()
    scheduler.submit(Request(request_id="a", prompt=ids(12), max_new_tokens=2))
    run(scheduler)
    scheduler.submit(Request(request_id="b", prompt=ids(12), max_new_tokens=2, **other))
    assert step(scheduler).num_computed.tolist() == [0]


def test_without_the_prefix_cache_nothing_is_reused() -> None:
    scheduler = make(prefix_cache=False)
    for name in "ab":
        scheduler.submit(Request(request_id=name, prompt=ids(12), max_new_tokens=3))
        run(scheduler)
    assert scheduler.stats().total_reused_tokens == 0
    assert scheduler.manager.num_free_blocks == 64


def test_a_partly_matching_block_is_copied() -> None:
    scheduler = make()
    scheduler.submit(Request(request_id="a", prompt=ids(8), max_new_tokens=2))
    run(scheduler)
    scheduler.submit(Request(request_id="b", prompt=[0, 1, 2, 3, 4, 5, 99], max_new_tokens=2))
    plan = step(scheduler)
    assert plan.num_computed.tolist() == [6]
    assert plan.copies[:, 1].tolist() == [int(plan.block_tables[0, 1])]


# -------------------------------------------------------------------- continuations


def test_a_row_listed_several_times_is_forked() -> None:
    scheduler = make()
    scheduler.submit(request("a", 5, new=4, n=3))
    plan = scheduler.plan()
    assert plan is not None
    found = scheduler.complete(plan, [0, 0, 0], [1, 2, 3])
    assert found[0] == plan.seq_ids[0]
    assert len(set(found.tolist())) == 3
    plan = scheduler.plan()
    assert plan is not None
    assert plan.seq_ids.tolist() == found.tolist()
    assert plan.token_ids.tolist() == [1, 2, 3]
    full, partial = plan.block_tables.T
    assert full.tolist() == [int(full[0])] * 3  # shared
    assert len(set(partial.tolist())) == 3  # copied
    assert len(plan.copies) == 2


def test_beams_are_forked_dropped_and_ended() -> None:
    scheduler = make()
    scheduler.submit(request("a", 4, new=9, n=3))
    plan = scheduler.plan()
    assert plan is not None
    beams = scheduler.complete(plan, [0, 0, 0], [1, 2, 3])
    plan = scheduler.plan()
    assert plan is not None
    after = scheduler.complete(plan, [1, 2, 2], [4, 5, 6])  # drops the first beam
    assert after[:2].tolist() == beams[1:].tolist()
    plan = scheduler.plan()
    assert plan is not None
    assert plan.seq_ids.tolist() == after.tolist()
    assert plan.freed.tolist() == [int(beams[0])]
    assert after[2] not in beams  # an id is not reused before its end is reported
    assert plan.token_ids.tolist() == [4, 5, 6]
    scheduler.complete(plan, [], [])
    assert run(scheduler) == {"a": Reason.FINISHED}


def test_a_row_that_is_not_listed_ends() -> None:
    scheduler = make()
    scheduler.submit(request("a", new=9))
    scheduler.submit(request("b", new=9))
    plan = scheduler.plan()
    assert plan is not None
    assert scheduler.complete(plan, [1], [5]).tolist() == [1]
    plan = step(scheduler)
    assert (plan.request_ids, plan.ended) == (["b"], [("a", Reason.FINISHED)])


def test_the_last_token_is_not_computed() -> None:
    scheduler = make()
    scheduler.submit(request("a", 3, new=1, n=2))
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
        ([1], [5], "rows of the plan, 0 to 0"),
        ([-1], [5], "rows of the plan, 0 to 0"),
        ([0], [5, 6], "got 2 for 1 parents"),
        ([0, 0, 0], [1, 2, 3], "n is 2"),
    ],
)
def test_a_bad_continuation_changes_nothing(
    parents: list[int], tokens: list[int], error: str
) -> None:
    scheduler = make()
    scheduler.submit(request("a", n=2))
    plan = scheduler.plan()
    assert plan is not None
    with pytest.raises(ValueError, match=error):
        scheduler.complete(plan, parents, tokens)
    scheduler.check()
    assert scheduler.complete(plan, [0, 0], [1, 2]).tolist() == [0, 1]


def test_a_row_in_prefill_cannot_continue() -> None:
    scheduler = make(max_batch_tokens=4)
    scheduler.submit(request("a", 9))
    plan = scheduler.plan()
    assert plan is not None
    with pytest.raises(ValueError, match="row 0 does not need logits"):
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


def test_transfers_make_a_plan_without_rows() -> None:
    scheduler, transfers = make(), (EndFetch(1),)
    assert scheduler.plan() is None
    plan = scheduler.plan(transfers)
    assert plan is not None
    assert (len(plan), plan.transfers) == (0, transfers)
    scheduler.submit(request("a"))
    plan = scheduler.plan(transfers)  # the plan before needed no `complete`
    assert plan is not None
    assert (len(plan), plan.transfers) == (1, transfers)
    complete(scheduler, plan)
    scheduler.check()


def test_a_plan_is_completed_or_aborted_once() -> None:
    scheduler = make()
    scheduler.submit(request("a"))
    plan = scheduler.plan()
    assert plan is not None
    with pytest.raises(ValueError, match="a step is under way"):
        scheduler.plan()
    complete(scheduler, plan)
    with pytest.raises(ValueError, match="not the plan under way"):
        scheduler.complete(plan, [0], [1])
    with pytest.raises(ValueError, match="not the plan under way"):
        scheduler.abort(plan)
